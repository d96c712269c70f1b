"""The output of a command on a board, separated from what the login shell prints around it.

A command's output stands between two unpredictable marks, each with a number: the
shell's process id before it, the exit status after it. Banners, .bashrc and .bash_logout print
outside of them.
"""

from __future__ import annotations

import asyncio
import re
import secrets
import shlex
from collections.abc import Callable, Sequence

from edgesd.errors import BoardError
from edgesd.remote.board import OnLine, excerpt

_READ_BYTES = 1 << 16
_NOISE_BYTES = 1 << 20
"""Of what a login shell may print before a command."""
_LINE_BYTES = 1 << 16
"""A longer line is handed out in pieces."""

# The mark comes in two parts: a shell that prints the command which it runs doesn't print the
# mark. Without `exec` before "$@": somebody must be left to print the second one.
_SCRIPT = """set -- %s
one=$1; two=$2; shift 2
mark() { printf '%%s-%%s %%s\\n' "$one" "$two" "$1"; }
mark $$; mark $$ >&2
"$@"
status=$?
mark $status >&2; mark $status
"""


class Mark:
    """A mark, and the command line that prints it around a command."""

    def __init__(self, command: Sequence[str]) -> None:
        halves = secrets.token_hex(8), secrets.token_hex(8)
        self.text = "-".join(halves).encode()
        script = _SCRIPT % shlex.join([*halves, *command])
        # Login shells differ in what quotes and line ends mean to them: they get to see none.
        safe = re.sub(rb"[^\w./:,=@+-]", lambda found: b"\\0%03o" % found[0][0], script.encode())
        self.command_line = f"""exec sh -c 'eval "$(printf %b "$0")"' '{safe.decode()}'"""


class Answer:
    """One stream of a command: `sink` is given what stands between the two marks."""

    def __init__(self, board: str, mark: Mark, sink: Callable[[bytes], None]) -> None:
        self._board, self._sink = board, sink
        self._start = mark.text + b" "
        self._mark = re.compile(re.escape(self._start) + rb"(\d{1,10})\n")
        self._held = b""
        self._noise = 0
        self.begun = asyncio.Event()
        self.pid: int | None = None
        self.status: int | None = None

    @property
    def noise(self) -> str:
        """The last line of what came before the command, or where none began."""
        return "" if self.begun.is_set() else excerpt(self._held.decode(errors="replace"))

    async def read(self, stream: asyncio.StreamReader) -> None:
        """All until the second mark. Raises BoardError for a shell that prints without end before
        the command."""
        while block := await stream.read(_READ_BYTES):
            if self.pid is None:
                block = self._before(block)
            if self.pid is not None and self.status is None:
                self._within(block)
            if self.status is not None:
                return
        if self.pid is not None and self.status is None:
            self._sink(self._held)

    def _before(self, block: bytes) -> bytes:
        """Look for the first mark; what follows it."""
        text = self._held + block
        if found := self._mark.search(text):
            self.pid, self._held = int(found[1]), b""
            self.begun.set()
            return text[found.end() :]
        self._noise += len(block)
        self._held = text[-_LINE_BYTES:]
        if self._noise > _NOISE_BYTES:
            raise BoardError(
                f"{self._board}: its login shell prints without end and runs no command: "
                f"{self.noise!r}"
            )
        return b""

    def _within(self, block: bytes) -> None:
        text = self._held + block
        if found := self._mark.search(text):
            self.status = int(found[1])
            self._sink(text[: found.start()])
            return
        # What may be the beginning of a mark waits for the rest.
        at = text.find(self._start[:1], max(0, len(text) - len(self._start) - 11))
        while at >= 0 and not self._begins(text[at:]):
            at = text.find(self._start[:1], at + 1)
        at = len(text) if at < 0 else at
        self._held = text[at:]
        self._sink(text[:at])

    def _begins(self, text: bytes) -> bool:
        rest = text[len(self._start) :]
        return text.startswith(self._start[: len(text)]) and (not rest or rest.isdigit())


class Output:
    """Keeps the end of a stream and passes its lines to `listener`.

    keep_bytes: of its end. limit_bytes: after so many it is cut off by a BoardError; None for a
    stream that may go on for ever.
    """

    def __init__(
        self, board: str, listener: OnLine | None, keep_bytes: int, limit_bytes: int | None
    ) -> None:
        self._board, self._listener = board, listener
        self._keep, self._limit = keep_bytes, limit_bytes
        self._kept, self._line = bytearray(), b""
        self._count = 0

    def __call__(self, block: bytes) -> None:
        """Take what was printed."""
        self._count += len(block)
        if self._limit is not None and self._count > self._limit:
            raise BoardError(
                f"{self._board}: a command there prints more than {self._limit >> 20} MB: "
                "it was ended"
            )
        if self._keep:
            self._kept += block
            del self._kept[: -self._keep]
        if self._listener:
            *lines, self._line = (self._line + block).split(b"\n")
            while len(self._line) >= _LINE_BYTES:
                lines.append(self._line[:_LINE_BYTES])
                self._line = self._line[_LINE_BYTES:]
            for line in lines:
                self._listener(line.decode(errors="replace").rstrip("\r"))

    def text(self) -> str:
        """What was kept, once there is no more: a last line without an end is passed on, too."""
        if self._line and self._listener:
            self._listener(self._line.decode(errors="replace"))
            self._line = b""
        return self._kept.decode(errors="replace")
