"""Work that continues after its caller is gone: python -m edgesd.device.detached KEY -- ARGV...

`follow` starts a command under a key, or finds it running, or finished, and passes its output on.
So the same call, made again after a lost link, goes on with the same work. Lines are kept in memory
and handed out over a socket in Linux's abstract namespace, which is no file: nothing is written
before the end. What a finished command printed lies in the cache until somebody has fetched it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec

from edgesd.errors import BoardError, InputError
from edgesd.files import atomic_write, check_file_place, user_cache
from edgesd.processes import module_command
from edgesd.spec.base import Spec, decode_json

_KEY = re.compile(r"[0-9a-zA-Z_-]{1,64}")
_POLL_SECONDS = 0.05
_START_SECONDS = 120.0
"""A small board needs some of them to start Python."""
_LINE_CHARACTERS = 1 << 16
"""A longer line is passed on in pieces."""


class Ended(Spec, frozen=True):
    """The result of a command."""

    status: int
    out: str
    err: str


def follow(key: str, command: Sequence[str], on_line: Callable[[str], None]) -> Ended:
    """Run `command` under `key`, detached, or join it; its result. Its result is kept no more.

    on_line: called with each line of its standard error, from the first on. Raises InputError for a
    malformed key, BoardError when it ended without a result (a reboot, or it was killed).
    """
    if not _KEY.fullmatch(key):
        raise InputError(f"{key!r} isn't a key: letters, digits, - and _, at most 64")
    result = _result(key)
    link = _connect(key)
    if link is None and not result.exists():
        check_file_place(result)
        started = _start(key, command)
        end = time.monotonic() + _START_SECONDS
        while (link := _connect(key)) is None and not result.exists():
            if started.poll() is not None and _connect(key) is None and not result.exists():
                break  # it is gone, and no other process began the same
            if time.monotonic() > end:
                started.terminate()
                raise BoardError(f"the work doesn't begin within {_START_SECONDS:.0f} s")
            time.sleep(_POLL_SECONDS)
    if link is not None:
        for line in _lines(link):
            on_line(line.rstrip("\n"))
    try:
        return decode_json(result.read_bytes(), Ended)
    except FileNotFoundError as exc:
        raise BoardError(
            "the work ended without a result (killed, or out of memory?): run the command again"
        ) from exc
    except InputError as exc:
        forget(key)  # else the same command would never begin anew
        raise BoardError(
            f"the result of the work is damaged ({exc}): run the command again"
        ) from exc


def _lines(link: socket.socket) -> Iterator[str]:
    """The lines of `link`, until its other end is gone: closed, or killed before it was read."""
    with link, link.makefile("r", encoding="utf-8", errors="replace") as lines:
        try:
            while line := lines.readline(_LINE_CHARACTERS):
                yield line
        except ConnectionError:
            return


def forget(key: str) -> None:
    """Remove the result of `key`: it has been fetched."""
    _result(key).unlink(missing_ok=True)


def _result(key: str) -> Path:
    return user_cache() / "runs" / f"{key}.json"


def _name(key: str) -> str:
    """Name of the socket: one for each user and cache."""
    who = hashlib.sha256(f"{os.getuid()} {user_cache()} {key}".encode()).hexdigest()[:32]
    return f"\0edgesd-{who}"


def _connect(key: str) -> socket.socket | None:
    link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        link.connect(_name(key))
    except OSError:
        link.close()
        return None
    if (user := _user_of(link)) != os.getuid():
        link.close()
        raise BoardError(
            f"the user with id {user} holds the name under which this work is followed: ask them "
            "to end that process"
        )
    return link


def _user_of(link: socket.socket) -> int:
    """The user id of the process at the other end."""
    credentials = link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return int(struct.unpack("3i", credentials)[1])


def _start(key: str, command: Sequence[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        module_command("edgesd.device.detached", key, "--", *command),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # so that the end of a login doesn't reach it
    )


class _Lines:
    """Lines that any number of readers follow from the first on."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._ended = False
        self._changed = threading.Condition()

    def add(self, line: str) -> None:
        with self._changed:
            self._lines.append(line)
            self._changed.notify_all()

    def end(self) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def __iter__(self) -> Iterator[str]:
        at = 0
        while True:
            with self._changed:
                while len(self._lines) == at and not self._ended:
                    self._changed.wait()
                fresh = self._lines[at:]
                if not fresh:
                    return
            at += len(fresh)
            yield from fresh

    def text(self) -> str:
        return "".join(self._lines)


def main() -> int:
    """Run a command and serve its lines; the exit status."""
    key, _, *command = sys.argv[1:]
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        server.bind(_name(key))
    except OSError:
        return 0  # somebody began the same at the same moment
    server.listen()
    said = _Lines()
    threading.Thread(target=_serve, args=(server, said), daemon=True).start()
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    ) as process:
        stdout, stderr = process.stdout, process.stderr
        assert stdout and stderr
        out: list[str] = []
        reader = threading.Thread(target=lambda: out.append(stdout.read()))
        reader.start()
        for line in stderr:
            said.add(line)
        reader.join()
    ended = Ended(process.returncode, "".join(out), said.text())
    with atomic_write(_result(key)) as file:
        file.write(msgspec.json.encode(ended))
    server.close()
    said.end()
    time.sleep(0.2)  # the last lines go out
    return 0


def _serve(server: socket.socket, said: _Lines) -> None:
    while True:
        try:
            link, _ = server.accept()
        except OSError:
            return
        if _user_of(link) != os.getuid():
            link.close()
            continue
        threading.Thread(target=_tell, args=(link, said), daemon=True).start()


def _tell(link: socket.socket, said: _Lines) -> None:
    with link, contextlib.suppress(OSError):
        for line in said:
            link.sendall(line.encode())


if __name__ == "__main__":
    sys.exit(main())
