"""Boards over SSH, by OpenSSH's own client: its configuration, known hosts, keys and agent count.

One `ssh` logs in and keeps the connection (the master). Every command and every file is a session
of that connection, through the master's control socket: nothing but ssh reads ssh_config, and the
board needs no sftp.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import pwd
import re
import subprocess
import tempfile
import time
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal

from edgesd.errors import BoardError, LinkError, MissingDependencyError
from edgesd.processes import find_program
from edgesd.remote.answer import Answer, Mark, Output
from edgesd.remote.board import Address, Finished, OnLine, excerpt
from edgesd.remote.ssh_reasons import why_refused

_CONNECT_SECONDS = 15
"""For the connection, where the user's ConnectTimeout says no other."""
_LOGIN_SECONDS = 45
"""For the login after it: proxies, key exchange, agents that ask their user."""
_BEGIN_SECONDS = 60
"""From a session's start until the board begins to run its command."""
_CLOSE_SECONDS = 5.0
_LEAVE_SECONDS = 1.0
"""For the login shell to end after a command."""
_SIGNALS = 20
"""To end an ssh, in that time."""
_ALIVE_SECONDS, _ALIVE_COUNT = 10, 3
"""A silent board is asked this often; after so many questions in vain the link is lost."""
_POLL_SECONDS = 0.02
_READ_BYTES = 1 << 16
_SAID_BYTES = 1 << 20
"""Of what ssh itself says."""
_ANSWER_BYTES = 64 << 20
"""Of what a command may print."""
_ERROR_BYTES = 1 << 16
"""Of standard error, that are kept: its end."""

# As scp has them, and verbose output, which names the keys that were tried.
_OPTIONS = (
    *("BatchMode=yes", "ClearAllForwardings=yes", "ForwardAgent=no", "ForwardX11=no"),
    *("PermitLocalCommand=no", "RemoteCommand=none", "RequestTTY=no", "ControlPersist=no"),
    *("LogLevel=DEBUG1", f"ServerAliveInterval={_ALIVE_SECONDS}"),
    f"ServerAliveCountMax={_ALIVE_COUNT}",
)

_STOP = """kill -s TERM -- "-$1" || { pkill -TERM -P "$1"; kill -s TERM "$1"; }"""
_PUT = """
if [ "$2" = 0 ]; then exec cat > "$1"; fi
dd if=/dev/null of="$1" bs=1 seek="$2" 2> /dev/null && exec cat >> "$1"
"""


@asynccontextmanager
async def connect(address: Address) -> AsyncIterator[SshBoard]:
    """A board, for as long as the context lasts.

    Raises MissingDependencyError without OpenSSH's client; BoardError with ssh's own reason when
    the board can't be reached, its host key isn't the known one, or it takes none of the user's
    keys; LinkError where trying again may help.
    """
    program = find_program("ssh")
    if program is None:
        raise MissingDependencyError(
            "boards are reached by OpenSSH's ssh, which isn't installed here (Debian: apt-get "
            "install openssh-client)"
        )
    with tempfile.TemporaryDirectory(prefix="edgesd-", dir=_short_folder()) as folder:
        master = await _log_in(address, program, Path(folder, "c"))
        try:
            yield SshBoard(str(address), master)
        finally:
            await master.close()


def _short_folder() -> str:
    """Where a socket's path stays short enough: 104 bytes on macOS."""
    usual = tempfile.gettempdir()
    return usual if len(os.fsencode(usual)) < 60 else "/tmp"


class _Master:
    """The `ssh` that holds a connection."""

    def __init__(self, program: str, control: Path, process: Process) -> None:
        self._process = process
        self._said = bytearray()
        self._reader = asyncio.ensure_future(self._read())
        # A session without its master would log in by itself: let it fail instead.
        self.session = [program, "-F", "none", "-o", "ProxyCommand=exit 1", "-T", "-S"]
        self.session += [str(control), "--", "board"]

    @property
    def ended(self) -> bool:
        return self._process.returncode is not None

    async def said(self) -> list[str]:
        """All lines of an ssh that has ended, those for people and the others."""
        with contextlib.suppress(asyncio.TimeoutError):  # a proxy may hold the pipe
            await asyncio.wait_for(asyncio.shield(self._reader), 1)
        return self._said.decode(errors="replace").splitlines()

    async def is_lost(self) -> bool:
        """Whether the connection broke. It takes ssh a moment to notice."""
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._process.wait(), 3)
        return self.ended

    async def close(self) -> None:
        await _end(self._process)
        await self.said()
        self._reader.cancel()

    async def _read(self) -> None:
        assert self._process.stderr
        while block := await self._process.stderr.read(_READ_BYTES):
            self._said += block
            del self._said[_SAID_BYTES:]


async def _end(process: Process) -> None:
    """End a process of ours, which removes what it made.

    ssh may miss a signal that comes just before it waits for the network: it is sent again.
    """
    for end in (*[process.terminate] * _SIGNALS, process.kill):
        with contextlib.suppress(ProcessLookupError):
            end()
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(process.wait(), _CLOSE_SECONDS / _SIGNALS)
            return


def _spawn(command: Sequence[str], stdin: int, stdout: int) -> Awaitable[Process]:
    """Begin `command` in a session of its own: Ctrl-C is ours, and it has no terminal to ask at."""
    return asyncio.create_subprocess_exec(
        *command,
        stdin=stdin,
        stdout=stdout,
        stderr=subprocess.PIPE,
        start_new_session=True,
        env={**os.environ, "LC_ALL": "C", "SSH_ASKPASS_REQUIRE": "never"},
    )


async def _log_in(address: Address, program: str, control: Path) -> _Master:
    where = ["-l", address.user] if address.user else []
    where += ["-p", str(address.port)] if address.port else []
    where += ["--", address.host]
    asked, files = await _configuration(address, program, where)
    options = [*_OPTIONS]
    given = asked.get("connecttimeout", ["none"])[0]
    seconds = int(given) if re.fullmatch("[1-9][0-9]{0,3}", given) else _CONNECT_SECONDS
    options.append(f"ConnectTimeout={seconds}")
    if "forkafterauthentication" in asked:  # not known to every ssh
        options.append("ForkAfterAuthentication=no")
    command = [program, *files, *(f"-o{option}" for option in options), "-MN", "-S", str(control)]
    master = _Master(
        program, control, await _spawn([*command, *where], subprocess.DEVNULL, subprocess.DEVNULL)
    )
    try:
        end = time.monotonic() + seconds + _LOGIN_SECONDS
        while not control.exists():  # it is made once ssh has logged in
            if master.ended:
                raise why_refused(address, await master.said(), seconds)
            if time.monotonic() > end:
                raise LinkError(
                    f"{address} accepts the connection, but no login was done within "
                    f"{seconds + _LOGIN_SECONDS} s: try ssh -v {address}"
                )
            await asyncio.sleep(_POLL_SECONDS)
    except BaseException:
        await master.close()
        raise
    return master


async def _configuration(
    address: Address, program: str, where: Sequence[str]
) -> tuple[dict[str, list[str]], list[str]]:
    """What ssh_config says of a board, by option in small letters; and arguments of ssh.

    ssh takes the user's home from the system's list of users. Where HOME is another one, with a
    folder .ssh in it, that folder counts.
    """
    home = os.environ.get("HOME", "")
    try:
        own = pwd.getpwuid(os.getuid()).pw_dir
    except KeyError:
        own = ""
    ssh = Path(home, ".ssh")
    if not home or home == own or not ssh.is_dir():
        return await _effective(address, program, where), []
    config = ssh / "config"
    files = ["-F", str(config) if config.is_file() else "none"]
    asked = await _effective(address, program, [*files, *where])
    usual = await _effective(address, program, ["-F", "none", *where])
    if asked["identityfile"] == usual["identityfile"]:
        names = (Path(path).name for path in usual["identityfile"])
        files += [
            f"-oIdentityFile={_quoted(ssh / name)}" for name in names if (ssh / name).exists()
        ]
    if asked["userknownhostsfile"] == usual["userknownhostsfile"]:
        files.append(f"-oUserKnownHostsFile={_quoted(ssh / 'known_hosts')}")
    return asked, files


def _quoted(path: Path) -> str:
    return '"{}"'.format(str(path).replace("%", "%%"))


async def _effective(
    address: Address, program: str, arguments: Sequence[str]
) -> dict[str, list[str]]:
    """Option -> its values, as `ssh -G` prints them. Raises BoardError for what ssh refuses."""
    process = await _spawn([program, "-G", *arguments], subprocess.DEVNULL, subprocess.PIPE)
    try:
        out, said = await asyncio.wait_for(process.communicate(), _LOGIN_SECONDS)
    except asyncio.TimeoutError as exc:
        raise BoardError(
            f"{address}: reading ssh_config takes more than {_LOGIN_SECONDS} s: try ssh -G "
            f"{address.host}"
        ) from exc
    finally:
        await _end(process)
    if process.returncode:
        raise why_refused(address, said.decode(errors="replace").splitlines(), _CONNECT_SECONDS)
    found: dict[str, list[str]] = {}
    for line in out.decode(errors="replace").splitlines():
        name, _, value = line.partition(" ")
        found.setdefault(name, []).append(value)
    return found


class SshBoard:
    """See Board. Made by `connect`."""

    def __init__(self, name: str, master: _Master) -> None:
        self.name = name
        self._master = master

    async def run(
        self,
        command: Sequence[str],
        on_line: OnLine | None = None,
        on_output: OnLine | None = None,
    ) -> Finished:
        """See Board. Of standard error the end is kept."""
        kept, limit = (0, None) if on_output else (_ANSWER_BYTES, _ANSWER_BYTES)
        out = Output(self.name, on_output, kept, limit)
        said = Output(self.name, on_line, _ERROR_BYTES, _ANSWER_BYTES)
        status = await self._session(command, out, said)
        return Finished(status, out.text(), said.text())

    async def put(self, path: str, chunks: Iterable[bytes], start: int = 0) -> None:
        said = Output(self.name, None, _ERROR_BYTES, _ANSWER_BYTES)
        nothing = Output(self.name, None, 0, _ANSWER_BYTES)
        command = ["sh", "-c", _PUT, "put", f"./{path}", str(start)]
        if await self._session(command, nothing, said, chunks):
            words = said.text()
            if "No space left" in words:
                raise BoardError(f"{self.name}: its disk is full: free some space there")
            raise BoardError(
                f"{self.name}: {path} can't be written there ({excerpt(words)}): is its disk full "
                "or read-only?"
            )

    async def get(
        self, path: str, size: int, out: BinaryIO, on_bytes: Callable[[int], None]
    ) -> None:
        at = 0

        def take(block: bytes) -> None:
            nonlocal at
            at += len(block)
            if at > size:
                raise BoardError(f"{self.name}: {path} has more than {size} bytes")
            out.write(block)
            on_bytes(len(block))

        said = Output(self.name, None, _ERROR_BYTES, _ANSWER_BYTES)
        if await self._session(["cat", "--", path], take, said):
            raise BoardError(f"{self.name}: {path} can't be read there ({excerpt(said.text())})")
        if at != size:
            raise BoardError(f"{self.name}: {path} has {at} bytes, not {size}")

    async def _session(
        self,
        command: Sequence[str],
        out: Callable[[bytes], None],
        said: Callable[[bytes], None],
        fed: Iterable[bytes] | None = None,
    ) -> int:
        """Run `command` with `fed` as its standard input; its exit status.

        Whatever goes wrong, Ctrl-C included, the command is ended on the board: it would work on
        for nobody.
        """
        mark = Mark(command)
        first, other = Answer(self.name, mark, out), Answer(self.name, mark, said)
        stdin = subprocess.DEVNULL if fed is None else subprocess.PIPE
        process = await _spawn([*self._master.session, mark.command_line], stdin, subprocess.PIPE)
        assert process.stdout and process.stderr
        begun = asyncio.ensure_future(first.begun.wait())
        answers = [
            asyncio.ensure_future(first.read(process.stdout)),
            asyncio.ensure_future(other.read(process.stderr)),
        ]
        answered = asyncio.gather(*answers)
        feeding = asyncio.ensure_future(_feed(process, fed or (), begun, answered))
        try:
            either: set[asyncio.Future[Any]] = {begun, *answers}
            done: set[asyncio.Future[Any]] = set()
            done, _ = await asyncio.wait(
                either, timeout=_BEGIN_SECONDS, return_when=asyncio.FIRST_COMPLETED
            )
            if not done:
                raise BoardError(
                    f"{self.name} lets you in, but runs no command within {_BEGIN_SECONDS} s: does "
                    "its login shell wait for something?"
                )
            either = {answered, feeding}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if feeding.done():
                feeding.result()
            await answered
            # What the login shell left running may hold the session: its answer is there.
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(process.wait(), _LEAVE_SECONDS)
            await _end(process)
        except BaseException:
            await _end(process)
            if first.pid is not None and first.status is None:
                with contextlib.suppress(Exception):
                    await self._stop(first.pid)
            raise
        finally:
            tasks: list[asyncio.Future[Any]] = [begun, feeding, answered, *answers]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            if process.stdin and process.stdin.transport.get_write_buffer_size():
                process.stdin.transport.abort()  # what waits there is never taken
            # The master holds the pipes until the session is closed.
            with contextlib.suppress(asyncio.TimeoutError):
                rest = asyncio.gather(_drain(process.stdout), _drain(process.stderr))
                await asyncio.wait_for(rest, _CLOSE_SECONDS)
        if first.status is not None:
            if other.pid is None and first.status == first.pid:  # the mark of the other stream
                raise BoardError(
                    f"{self.name}: its login shell joins standard error and standard output: take "
                    "exec 2>&1 out of what it reads at a login (.bashrc)"
                )
            return first.status
        if await self._master.is_lost():
            raise LinkError(_lost(self.name))
        if first.pid is not None:
            raise BoardError(f"{self.name}: {command[0]} was killed there: is it out of memory?")
        raise BoardError(
            f"{self.name} lets you in, but its login shell runs no command"
            + (f": it says {first.noise or other.noise!r}" if first.noise or other.noise else "")
        )

    async def _stop(self, pid: int) -> None:
        """End the command whose shell has that process id."""
        line = Mark(["sh", "-c", _STOP, "stop", str(pid)]).command_line
        process = await _spawn(
            [*self._master.session, line], subprocess.DEVNULL, subprocess.DEVNULL
        )
        try:
            await asyncio.wait_for(process.communicate(), _CLOSE_SECONDS)
        finally:
            await _end(process)


async def _feed(
    process: Process,
    chunks: Iterable[bytes],
    begun: asyncio.Future[Literal[True]],
    answered: asyncio.Future[Any],
) -> None:
    """Write `chunks` to the process once its command has `begun` (a login shell that reads gets
    nothing of them), as long as it takes them: its answer says why it doesn't."""
    if process.stdin is None:
        return
    try:
        await asyncio.wait({begun, answered}, return_when=asyncio.FIRST_COMPLETED)
        if not begun.done():
            return
        with contextlib.suppress(ConnectionError):
            for chunk in chunks:
                process.stdin.write(chunk)
                await process.stdin.drain()
    finally:
        process.stdin.close()


async def _drain(stream: asyncio.StreamReader) -> None:
    while await stream.read(_READ_BYTES):
        pass


def _lost(name: str) -> str:
    return f"the link to {name} was lost: run the command again, it goes on from what is done"
