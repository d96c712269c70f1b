"""The protocol of a board: over SSH (remote/ssh.py), and a fake that is a folder.

Paths on a board are relative to its user's home folder, POSIX.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import shlex
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple, Protocol, TypeVar

from edgesd import __version__
from edgesd.errors import BoardError, InputError, LinkError, ResourceError, UsageError
from edgesd.runtime.bundle import Bundle
from edgesd.spec.base import decode_json

_T = TypeVar("_T")

OnLine = Callable[[str], None]
"""Called with each line that a command prints, while it runs."""

_ADDRESS = re.compile(
    r"(?:(?P<user>[^@\s:/]+)@)?(?:\[(?P<v6>[0-9a-fA-F:.]+)\]|(?P<host>[\w.-]+))(?::(?P<port>\d+))?"
)


class Address(NamedTuple):
    """Where a board is. user, port: None for what ~/.ssh/config says, or SSH's own defaults."""

    host: str
    user: str | None = None
    port: int | None = None

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        user = f"{self.user}@" if self.user else ""
        return f"{user}{host}" + (f":{self.port}" if self.port else "")


def parse_address(text: str) -> Address:
    """`[user@]host[:port]`; an IPv6 address stands in brackets. Raises UsageError."""
    match = _ADDRESS.fullmatch(text)
    port = int(match["port"]) if match and match["port"] else None
    if not match or (match["host"] or "").startswith("-") or port == 0 or (port or 0) > 65535:
        raise UsageError(
            f"{text!r} isn't a board's address: write user@host or user@host:port, as ssh takes it "
            "(a password has no place there: keys and the agent are used)"
        )
    return Address(match["host"] or match["v6"], match["user"], port)


class Finished(NamedTuple):
    """The result of a command: its exit status and its output."""

    status: int
    out: str
    err: str


class Board(Protocol):
    """One board. Every method raises BoardError when it can't be reached any more."""

    name: str

    async def run(
        self,
        command: Sequence[str],
        on_line: OnLine | None = None,
        on_output: OnLine | None = None,
    ) -> Finished:
        """Run `command` (an argument vector; no shell sees it) in the home folder. A program that
        isn't there is exit status 127. on_line: gets its standard error; on_output: its standard
        output, which is then not kept."""

    async def put(self, path: str, chunks: Iterable[bytes], start: int = 0) -> None:
        """Write `chunks` into the file `path` from its byte `start` on, making it if need be; it
        ends after them. Its folder exists."""

    async def get(
        self, path: str, size: int, out: BinaryIO, on_bytes: Callable[[int], None]
    ) -> None:
        """Copy the file `path` to `out`. Raises BoardError when it hasn't `size` bytes."""


class Item(NamedTuple):
    """A file to send: its size and hash, and its bytes from an offset on."""

    size: int
    sha256: str
    chunks: Callable[[], Iterator[bytes]]


def bundle_items(bundle: Bundle) -> dict[str, Item]:
    """Every file of a bundle, by its name; its manifest is last: without it the rest is none."""
    items = {
        name: Item(entry.bytes, entry.sha256, partial(bundle.verified_chunks, name))
        for name, entry in bundle.manifest.files.items()
    }
    for name in bundle.frame:
        raw = b"".join(bundle.chunks(name))
        items[name] = Item(len(raw), hashlib.sha256(raw).hexdigest(), partial(iter, [raw]))
    return items


ANSWER_SECONDS = 120.0
"""For a question that a board answers at once, unless its disk is stuck."""


async def in_time(
    board: Board, work: Awaitable[_T], what: str, limit_seconds: float | None = ANSWER_SECONDS
) -> _T:
    """The result of `work`. Raises BoardError when it takes longer than the limit."""
    try:
        return await asyncio.wait_for(work, limit_seconds)
    except asyncio.TimeoutError as exc:
        raise BoardError(
            f"{board.name}: {what} isn't done within {limit_seconds:.0f} s: is its disk stuck?"
        ) from exc


async def ask(
    board: Board,
    command: Sequence[str],
    on_line: OnLine | None = None,
    limit_seconds: float | None = ANSWER_SECONDS,
) -> str:
    """The output of `command`. Raises BoardError with its last words when it fails, or when it
    isn't done in time; None for work that may take as long as it wants."""
    done = await in_time(board, board.run(command, on_line), command[0], limit_seconds)
    if done.status == 0:
        return done.out
    failed = f"{shlex.join(command)} ended with status {done.status}"
    raise BoardError(f"{board.name}: {excerpt(done.err) or failed}")


def excerpt(text: str) -> str:
    """The last line of `text` with words in it, or "": as much as fits into a message."""
    line = next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")
    return line if len(line) <= _EXCERPT else f"{line[:_EXCERPT]} ..."


_EXCERPT = 300
"""Characters that are shown of what a board says."""


EDGESD_PATHS = ("edgesd/bin", ".local/bin", "/opt/edgesd/bin")
"""Folders where a board may have edgesd, before those of its PATH: a command over SSH gets a short
one. The first is where `edgesd deploy` puts it."""


async def edgesd(
    board: Board,
    *arguments: str,
    on_line: OnLine | None = None,
    on_output: OnLine | None = None,
    limit_seconds: float | None = None,
) -> str:
    """The output of `edgesd ARGUMENTS` on the board. Raises BoardError with its last words, which
    `on_line` isn't given, or when it isn't done in time."""
    listener = None if on_line is None else _without_error(on_line)
    places = ":".join(p if p.startswith("/") else f"$HOME/{p}" for p in EDGESD_PATHS)
    # Bundles are sent to ~/edgesd, whatever EDGESD_HOME is there.
    script = f'PATH="{places}:$PATH" EDGESD_HOME="$HOME/edgesd" exec edgesd "$@"'
    running = board.run(["sh", "-c", script, "edgesd", *arguments], listener, on_output)
    done = await in_time(board, running, f"edgesd {arguments[0]}", limit_seconds)
    if done.status == 127:
        raise BoardError(
            f"{board.name} has no edgesd: edgesd deploy BUNDLE {board.name} installs it"
        )
    if done.status:
        words = excerpt(done.err).removeprefix("edgesd: ") or f"it ended with {done.status}"
        raise BoardError(f"{board.name}: edgesd {arguments[0]}: {words}")
    return done.out


def _without_error(on_line: OnLine) -> OnLine:
    def listener(line: str) -> None:
        if not line.startswith("edgesd: ") or line.startswith("edgesd: warning: "):
            on_line(line)

    return listener


def decode(board: Board, answer: str, kind: type[_T]) -> _T:
    """Decode the --json output of edgesd on the board. Raises BoardError when it isn't a `kind`."""
    try:
        return decode_json(answer, kind)
    except InputError as exc:
        raise BoardError(
            f"{board.name} answers as edgesd {__version__} doesn't expect ({excerpt(str(exc))}): "
            "install the same version there, as edgesd deploy does"
        ) from exc


def strange(board: Board, command: str, answer: str) -> BoardError:
    """The error for an answer that a command there can't have given."""
    return BoardError(
        f"{board.name}: {command} there answers {excerpt(answer)!r}, which isn't its answer: is it "
        "the usual Linux tool?"
    )


async def send(
    board: Board,
    folder: str,
    items: Mapping[str, Item],
    on_bytes: Callable[[int], None] | None = None,
    spare_bytes: int = 0,
    others: bool = False,
) -> int:
    """Make `folder` on the board hold exactly `items` (by relative path); the bytes sent.

    What is there already isn't sent: whole files, by their hash, and the beginning of a file whose
    sending was cut. Every file is hashed on the board before it takes its name. spare_bytes: of
    disk that must be left. others: leave what else is in the folder. Raises
    BoardError, ResourceError when the board's disk is too small.
    """
    await ask(board, ["mkdir", "-p", "--", folder])
    there = await _sizes(board, folder)
    same = [name for name, item in items.items() if there.get(name) == item.size]
    kept = {
        name
        for name, sha256 in (await _hashes(board, folder, same)).items()
        if sha256 == items[name].sha256
    }
    missing = {name: item for name, item in items.items() if name not in kept}
    begun = {name: there.get(f"{name}{_PART}", 0) for name in missing}
    stale = there.keys() - kept - {f"{name}{_PART}" for name in missing}
    for some in _batches(sorted(stale) if not others else ()):
        await ask(board, ["rm", "-f", "--", *(f"{folder}/{name}" for name in some)])
    folders = {str(PurePosixPath(f"{folder}/{name}").parent) for name in missing}
    for some in _batches(sorted(folders)):
        await ask(board, ["mkdir", "-p", "--", *some])
    needed = sum(item.size - min(begun[name], item.size) for name, item in missing.items())
    await _check_space(board, folder, needed, spare_bytes if missing else 0)
    for name in items.keys() - missing.keys():
        if on_bytes:
            on_bytes(items[name].size)
    return sum(
        [await _send_one(board, folder, n, item, begun[n], on_bytes) for n, item in missing.items()]
    )


_PART = ".part"


async def _send_one(
    board: Board,
    folder: str,
    name: str,
    item: Item,
    begun: int,
    on_bytes: Callable[[int], None] | None,
) -> int:
    part = f"{name}{_PART}"
    sent = 0
    for start in dict.fromkeys((begun if begun <= item.size else 0, 0)):

        def rest(start: int = start) -> Iterator[bytes]:
            nonlocal sent
            at = 0
            for chunk in item.chunks():
                left = chunk[max(0, start - at) :]
                at += len(chunk)
                if on_bytes:
                    on_bytes(len(chunk))
                sent += len(left)
                if left:
                    yield left

        await board.put(f"{folder}/{part}", rest(), start)
        if (await _hashes(board, folder, [part]))[part] == item.sha256:
            await ask(board, ["mv", "-f", "--", f"{folder}/{part}", f"{folder}/{name}"])
            return sent
    await ask(board, ["rm", "-f", "--", f"{folder}/{part}"])
    raise BoardError(
        f"{board.name}: {name} arrived damaged: check the board's disk (its card may be worn out)"
    )


async def _sizes(board: Board, folder: str) -> dict[str, int]:
    """Relative path -> bytes of every file below `folder`."""
    answer = await ask(board, ["find", folder, "-type", "f", "-printf", "%s %P\\0"])
    found = {}
    for entry in answer.split("\0")[:-1]:
        match = _SIZE.fullmatch(entry)
        if not match or {"", ".", ".."} & set(match[2].split("/")):
            raise strange(board, "find", entry)
        found[match[2]] = int(match[1])
    if (answer and not answer.endswith("\0")) or len(found) > _MOST_FILES:
        raise strange(board, "find", answer[-_EXCERPT:])
    return found


_SIZE = re.compile(r"([0-9]{1,18}) (.+)", re.DOTALL)
_MOST_FILES = 100_000


async def _hashes(board: Board, folder: str, names: Sequence[str]) -> dict[str, str]:
    """Name -> SHA-256, in hex, of each of those files below `folder`."""
    found = {}
    for some in _batches(names):
        paths = {f"{folder}/{name}": name for name in some}
        answer = await ask(
            board, ["sha256sum", "--zero", "--", *paths], limit_seconds=_HASH_SECONDS
        )
        for entry in answer.split("\0")[:-1]:
            match = _HASH.fullmatch(entry)
            if not match or match[2] not in paths:
                raise strange(board, "sha256sum", entry)
            found[paths[match[2]]] = match[1]
        if found.keys() < set(some):
            raise strange(board, "sha256sum", answer[-_EXCERPT:])
    return found


_HASH = re.compile(r"([0-9a-f]{64}) [ *](.+)", re.DOTALL)
_HASH_SECONDS = 3600.0
"""For a batch of files: an old card reads 10 MB a second."""


def _batches(names: Iterable[str]) -> Iterator[list[str]]:
    """As many names at once as surely fit into one command line."""
    rest = list(names)
    while rest:
        yield rest[:_BATCH]
        del rest[:_BATCH]


_BATCH = 50


async def _check_space(board: Board, folder: str, needed: int, spare: int) -> None:
    answer = await ask(board, ["df", "-Pk", "--", folder])
    match = _FREE.search(excerpt(answer))
    if not match:
        raise strange(board, "df", answer)
    free = int(match[1]) << 10
    if needed + spare > free:
        also = f" and {spare / 1e6:.0f} MB to be left" if spare else ""
        raise ResourceError(
            f"{board.name} has {free / 1e6:.0f} MB of disk free, and {needed / 1e6:.0f} MB are to "
            f"be sent{also}: free some space there"
        )


_FREE = re.compile(r"\s[0-9]{1,18}\s+[0-9]{1,18}\s+(-?[0-9]{1,18})\s+(?:[0-9]{1,3}%|-)\s+/")


class FolderBoard:
    """A fake: the board's home is a folder, commands run on this machine, in it.

    fail_after: bytes of transfer until the link drops, if ever.
    """

    def __init__(self, home: Path, fail_after: int | None = None, name: str = "board") -> None:
        self.home = home
        self.name = name
        self.left = fail_after
        self.received = 0

    async def run(
        self,
        command: Sequence[str],
        on_line: OnLine | None = None,
        on_output: OnLine | None = None,
    ) -> Finished:
        self._spend(0)
        try:
            process = await asyncio.create_subprocess_exec(
                *command,
                cwd=self.home,
                env={**os.environ, "HOME": str(self.home)},
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
            )
        except FileNotFoundError:
            return Finished(127, "", f"{command[0]}: not found")
        out, err = await process.communicate()
        texts = tuple(stream.decode(errors="replace") for stream in (out, err))
        for text, listener in zip(texts, (on_output, on_line), strict=True):
            for line in text.splitlines() if listener else ():
                assert listener
                listener(line)
        return Finished(process.returncode or 0, "" if on_output else texts[0], texts[1])

    async def put(self, path: str, chunks: Iterable[bytes], start: int = 0) -> None:
        file = self.home / path
        with file.open("r+b" if file.exists() else "w+b") as out:
            out.seek(start)
            for chunk in chunks:
                now = chunk if self.left is None else chunk[: self.left]
                out.write(now)
                self.received += len(now)
                self._spend(len(chunk))
            out.truncate()

    async def get(
        self, path: str, size: int, out: BinaryIO, on_bytes: Callable[[int], None]
    ) -> None:
        data = (self.home / path).read_bytes()
        self._spend(len(data))
        out.write(data[:size])
        on_bytes(len(data[:size]))
        if len(data) != size:
            raise BoardError(f"{self.name}: {path} has {len(data)} bytes, not {size}")

    def _spend(self, count: int) -> None:
        if self.left is not None:
            self.left -= count
            if self.left <= 0:
                self.left = 0
                raise LinkError(f"the link to {self.name} was lost: run the command again")
