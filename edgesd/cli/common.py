"""What the commands share: parameter types, the reporter of progress, and the one error line."""

from __future__ import annotations

import errno
import io
import logging
import math
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, ClassVar, TextIO, TypeVar

import click
import msgspec

from edgesd.errors import BoardError, EdgesdError, InputError, missing_package
from edgesd.spec.base import MAX_PIXELS
from edgesd.text import shown, shown_json, shown_lines

if TYPE_CHECKING:
    from rich.progress import Progress

    from edgesd.engines.plans import Plans
    from edgesd.runtime.bundle import Bundle

_T = TypeVar("_T")
_LONGEST_MESSAGE = 4000  # characters


class Size(click.ParamType):  # type: ignore[type-arg]  # generic in new releases only
    """WIDTHxHEIGHT in pixels, or one number for a square -> (width, height)."""

    name = "WxH"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, int]:
        """Parse `value`; fails with a usage message."""
        if isinstance(value, tuple):
            return value
        parts = str(value).lower().split("x")
        if len(parts) in (1, 2) and all(part.isascii() and part.isdigit() for part in parts):
            width, height = int(parts[0]), int(parts[-1])
            if 0 < width <= MAX_PIXELS and 0 < height <= MAX_PIXELS:
                return width, height
        raise click.BadParameter(
            f"{value!r} isn't a size: write WIDTHxHEIGHT in pixels, such as 512x512", ctx, param
        )


class Offset(click.ParamType):  # type: ignore[type-arg]  # as above
    """LEFT,TOP in pixels -> (left, top)."""

    name = "LEFT,TOP"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, int]:
        """Parse `value`; fails with a usage message."""
        if isinstance(value, tuple):
            return value
        match = re.fullmatch(r"([0-9]{1,5}),([0-9]{1,5})", str(value))
        if match is None:
            raise click.BadParameter(
                f"{value!r} isn't an offset: write LEFT,TOP in pixels, such as 0,128", ctx, param
            )
        return int(match[1]), int(match[2])


class Bytes(click.ParamType):  # type: ignore[type-arg]  # generic in new releases only
    """A size in memory: 400MB, 1.5GB, 512MiB, or bytes -> bytes. 1 MB is the least: a number
    without a unit was meant otherwise."""

    name = "SIZE"
    _UNITS: ClassVar = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
    _BINARY: ClassVar = {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30}

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Parse `value`; fails with a usage message."""
        match = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,6})?) ?([KMG]i?B)?", str(value), re.I)
        units = {**self._UNITS, **self._BINARY}
        size = float(match[1]) * units[(match[2] or "").upper()] if match else 0.0
        if size >= self._UNITS["MB"]:
            return int(size)
        reason = "less than 1 MB" if match else "no size in memory"
        raise click.BadParameter(f"{value!r} is {reason}: write 400MB or 1.5GB", ctx, param)


STDOUT = Path("-")
"""What OutputPath makes of "-"; a file of that name is given as ./-."""

_FILE_SUFFIXES = (".png", ".edgesd", ".html", ".json")


class OutputPath(click.Path):
    """A file or folder to write. "-" is standard output, which most commands can't write to."""

    def __init__(self, stdout: bool = False, dir_okay: bool = True, file_okay: bool = True) -> None:
        super().__init__(path_type=Path, dir_okay=dir_okay, file_okay=file_okay, readable=False)
        self._stdout = stdout

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """Parse `value`; fails with a usage message."""
        if str(value) == "-" and isinstance(value, str):
            if self._stdout:
                return STDOUT
            raise click.BadParameter(
                "standard output can't be written to: give a name (./- for a file called -)",
                ctx,
                param,
            )
        if str(value) == "":
            raise click.BadParameter("an empty name: give a file or folder", ctx, param)
        path = Path(os.fsdecode(super().convert(value, param, ctx)))
        if str(value).endswith("/") and path.suffix in _FILE_SUFFIXES and not path.is_dir():
            raise click.BadParameter(
                f"{value} is a folder's name, by the slash at its end: leave the slash out for a "
                f"{path.suffix} file",
                ctx,
                param,
            )
        if path.is_absolute():
            return path
        try:
            here = Path.cwd()
        except FileNotFoundError as exc:
            raise InputError(
                f"the current folder was removed, and {path} was to be in it: go to another one"
            ) from exc
        return here / path if path == STDOUT else path


@contextmanager
def binary_stdout() -> Iterator[BinaryIO]:
    """Standard output for an image; what is printed meanwhile goes to standard error.

    Raises InputError when it is closed, UsageError when it is a terminal.
    """
    if "stdout" in closed_streams:
        raise InputError("standard output is closed: give -o a name")
    if sys.stdout.isatty():
        raise click.UsageError("-o - writes a PNG, which is no text: send it to a file or a pipe")
    sys.stdout.flush()
    fd = sys.stdout.fileno()
    with os.fdopen(os.dup(fd), "wb", buffering=0) as out:
        try:
            os.dup2(2, fd)
        except OSError:  # standard error is closed
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, fd)
            os.close(null)
        try:
            yield out
        finally:
            os.dup2(out.fileno(), fd)


class Finite(click.FloatRange):
    """A FloatRange without NaN."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Parse `value`; fails with a usage message."""
        found = float(super().convert(value, param, ctx))
        if not math.isfinite(found):
            raise click.BadParameter(f"{value!r} isn't a finite number", ctx, param)
        return found


_MOST_NUMBERS = 1001


class Numbers(click.ParamType):  # type: ignore[type-arg]  # as above
    """Numbers with commas between them, as a tuple. words: names that may stand in their place.
    whole: without fractions."""

    def __init__(self, name: str, whole: bool = False, words: Sequence[str] = ()) -> None:
        self.name, self._whole, self._words = name, whole, words

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> str | tuple[float, ...]:
        """Parse `value`; fails with a usage message."""
        if isinstance(value, tuple) or value in self._words:
            found: str | tuple[float, ...] = value
            return found
        parts = str(value).split(",")
        try:
            if len(parts) > _MOST_NUMBERS:
                raise ValueError
            numbers = tuple(int(part) if self._whole else float(part) for part in parts)
            if not all(map(math.isfinite, numbers)):
                raise ValueError
        except (ValueError, OverflowError):
            expected = "whole numbers" if self._whole else "numbers"
            names = f"{', '.join(self._words)}, or " if self._words else ""
            self.fail(f"{value!r}: expected {names}{expected} with commas between", param, ctx)
        return numbers


def printable(path: Path) -> str:
    """`path` as valid Unicode text, whatever bytes it has."""
    return os.fsencode(path).decode(errors="replace")


def say(text: object = "", err: bool = False) -> None:
    """Print one line, on standard error where `err`: safe for a terminal, whatever is in it.

    Every command prints by this, `say_lines` or `print_json`. Failures to write to standard error
    are ignored, as the work itself goes on; standard output raises OSError.
    """
    _print(shown(text), err)


def say_lines(text: object, err: bool = False) -> None:
    """Print the lines of `text`, as `say` does one."""
    _print(shown_lines(text), err)


def print_json(value: object, indent: int = 2) -> None:
    """Print any spec, or a dict of them, as JSON: indented, or with indent=-1 as one line."""
    text = msgspec.json.format(msgspec.json.encode(value), indent=indent).decode()
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    _print(shown_json(text, encoding), err=False)


def say_error(message: str) -> None:
    """Print `message` as one line on standard error, after the program's name.

    Of more than 4,000 characters the middle is left out: an argument or a library's words can have
    megabytes.
    """
    line = " ".join(message.split())
    if len(line) > _LONGEST_MESSAGE:
        half = _LONGEST_MESSAGE // 2
        line = f"{line[:half]} [{len(line) - 2 * half} characters left out] {line[-half:]}"
    say(f"edgesd: {line}", err=True)


def _print(text: str, err: bool) -> None:
    stream = sys.stderr if err else sys.stdout
    try:
        click.echo(text, stream)
    except OSError as exc:
        _to_nowhere(stream)  # else Python fails once more when it ends
        if err:
            return
        if exc.errno == errno.EPIPE:  # a pager that was left: Click ends quietly
            raise
        raise InputError(f"standard output can't be written: {exc.strerror or exc}") from exc


def _to_nowhere(stream: TextIO) -> None:
    """Drop what `stream` still holds, and all that is written to it from here on."""
    try:
        number = stream.fileno()
    except OSError:  # none of the system's
        return
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, number)
    os.close(nowhere)


def flush_streams() -> None:
    """Write what the standard streams still hold, or drop it where that can't be."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            _to_nowhere(stream)


closed_streams: set[str] = set()
"""Those of stdin, stdout and stderr that this process was started without."""


def open_streams() -> None:
    """Give closed standard streams (`>&-`) the null device: a file that is opened would take their
    number, and be written to by whatever prints. Characters that a stream's encoding doesn't have
    are printed as escapes."""
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        if getattr(sys, name) is None:
            closed_streams.add(name)
            try:
                os.fstat(number)
            except OSError:
                nowhere = os.open(os.devnull, os.O_RDWR)  # takes the least number that is free
                if nowhere != number:
                    os.dup2(nowhere, number)
                    os.close(nowhere)
            setattr(sys, name, Path(os.devnull).open(mode))  # noqa: SIM115  for the process
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


LINE_SECONDS = 1.0
"""Between plain lines of progress."""

_BYTE_UNITS = ((10**6, "MB"), (10**3, "kB"), (1, "bytes"))


class Messages(logging.Handler):
    """Shows what edgesd logs, and errors of its libraries, as a line on standard error, safe for a
    terminal. Warnings of libraries are for programmers, and not shown."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno < logging.ERROR and record.name.partition(".")[0] != "edgesd":
            return
        try:
            text = record.getMessage()
        except Exception:  # noqa: BLE001  its arguments don't fit its text: a library's slip
            text = str(record.msg)
        say_error(f"{record.levelname.lower()}: {text}")


def show_messages() -> None:
    """From here on, what edgesd and its libraries log or warn of is shown as lines, as an error is.

    Libraries that set up a handler of their own keep it.
    """
    logging.lastResort = Messages(logging.WARNING)
    warnings.showwarning = lambda message, *_, **__: say_error(f"warning: {message}")


class Reporter:
    """Shows progress on standard error: a rich bar on a terminal, plain lines when piped."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self.fancy = not quiet and sys.stderr.isatty()
        self._bar: Progress | None = None
        self._shown_at = time.monotonic()

    def line(self, text: str) -> None:
        """Print one line, above the bar where there is one."""
        if self._bar:
            self._above_bar(text)
        elif not self.quiet:
            say(text, err=True)

    def warn(self, text: str) -> None:
        """Print a warning, even with --json."""
        if self._bar:
            self._above_bar(f"edgesd: warning: {text}")
        else:
            say_error(f"warning: {text}")

    def _above_bar(self, text: str) -> None:
        assert self._bar
        self._bar.console.print(shown(text), highlight=False, markup=False, emoji=False)

    def bar(self) -> AbstractContextManager[object]:
        """A context in which `update` draws a bar, where there is a terminal."""
        if not self.fancy:
            return nullcontext()
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            console=Console(stderr=True),
        )
        return self._bar

    def update(
        self, task: str, done: int, total: int, note: str = "", *, in_bytes: bool = False
    ) -> None:
        """Show that `done` of `total` parts of `task` are finished; nothing where there are none.

        Bytes are shown in the largest unit of which `total` has ten or more. Plain lines come at
        most once in LINE_SECONDS.
        """
        if total <= 0:
            return
        if in_bytes:
            size, unit = next((one for one in _BYTE_UNITS if total >= 10 * one[0]), (1, "bytes"))
            done, total, note = done // size, total // size, f"{unit} {note}".rstrip()
        task, note = shown(task), shown(note)
        if self._bar:
            if not self._bar.task_ids:
                self._bar.add_task(task, total=total, note=note)
            bar = self._bar.tasks[0]
            if bar.description != task:
                self._bar.reset(bar.id, description=task)
            self._bar.update(bar.id, completed=done, total=total, note=note)
        elif not self.quiet and time.monotonic() - self._shown_at >= LINE_SECONDS:
            self._shown_at = time.monotonic()
            say(f"{task}: {done}/{total} {note}".rstrip(), err=True)


def each_host(hosts: Sequence[str], arguments: Sequence[str]) -> None:
    """Run `edgesd ARGUMENTS` on every host, and print what each prints."""
    from edgesd.remote import board as boards
    from edgesd.remote.hosts import on_each

    def show(host: str, told: str) -> None:
        for line in told.splitlines():
            say(f"{host}: {line}" if len(hosts) > 1 else line)

    show_each(on_each(hosts, lambda board: boards.edgesd(board, *arguments)), show)


def show_each(results: Mapping[str, _T | EdgesdError], show: Callable[[str, _T], None]) -> None:
    """Show the result of every board. Every failure is a line, and together they are an error.

    Raises the error itself where one board alone was asked, else BoardError.
    """
    failed = []
    for host, found in results.items():
        if isinstance(found, EdgesdError):
            failed.append(found)
        else:
            show(host, found)
    if failed and len(results) == 1:
        raise failed[0]
    for error in failed:
        say_error(str(error))
    if failed:
        raise BoardError(f"{len(failed)} of {len(results)} boards failed: see the lines above")


def plans_of(bundle: Bundle, reporter: Reporter) -> Plans:
    """The plans that `bundle` needs, where its backend has some; built when first needed."""
    from edgesd.engines.plans import Plans, plans_folder

    return Plans(bundle, plans_folder(), reporter)


def fail(error: BaseException, debug: bool) -> int:
    """Print what went wrong as one line (the traceback first, with --debug); the exit status."""
    if debug:
        import traceback

        say_lines("".join(traceback.format_exception(error)).rstrip(), err=True)
    if isinstance(error, ModuleNotFoundError):
        error = missing_package(error) or error
    if _caused_by_interrupt(error):
        error = KeyboardInterrupt()
    if isinstance(error, EdgesdError):
        message, code = str(error), error.exit_code
    elif isinstance(error, MemoryError):
        message, code = "out of memory: use --memory stream, a smaller --size or --batch 1", 6
    elif isinstance(error, KeyboardInterrupt):
        message, code = "interrupted; no unfinished file was left", 130
    elif isinstance(error, OSError):
        message, code = f"{error.filename or ''}: {error.strerror or error}".lstrip(": "), 3
    else:
        message = f"internal fault: {type(error).__name__}: {error} (--debug shows where)"
        code = 1
    say_error(message)
    return code


def _caused_by_interrupt(error: BaseException) -> bool:
    """Whether Ctrl-C caused it: in the import of a compiled module it becomes an ImportError."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, KeyboardInterrupt):
        cause = cause.__cause__
    return cause is not None
