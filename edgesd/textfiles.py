"""Reads text files that people write: prompts, captions, templates, keys, grammars, JSON.

All are UTF-8, with or without a byte order mark. LF and CR LF end lines, and nothing else does: a
line separator or a form feed within a prompt is part of it. What is read is bounded, so that a
wrong file is an error and not a machine without memory.
"""

from __future__ import annotations

import codecs
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any, BinaryIO

from edgesd.errors import InputError

MOST_BYTES = 16 << 20
"""Of a file, where the reader gives no other limit."""

MOST_LINE_BYTES = 64_000
"""Of a line. Text encoders take some hundred bytes of a prompt."""

_OTHER_MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)


def read_text(source: Path | BinaryIO, most_bytes: int = MOST_BYTES) -> str:
    """The text of a file or an open one, without a byte order mark; line ends are as they are.

    Raises InputError when it can't be read, is larger than `most_bytes`, or isn't UTF-8.
    """
    name = _name_of(source)
    try:
        with source.open("rb") if isinstance(source, Path) else nullcontext(source) as file:
            raw = file.read(most_bytes + 1)
    except OSError as exc:
        raise InputError(f"{name} can't be read: {exc.strerror or exc}") from exc
    if len(raw) > most_bytes:
        raise InputError(f"{name} is larger than {most_bytes / 1e6:.0f} MB: is it the right file?")
    return decode_text(raw, name)


def _name_of(source: Path | BinaryIO) -> str:
    return str(source if isinstance(source, Path) else getattr(source, "name", "the file"))


def decode_text(raw: bytes, name: str) -> str:
    """As `read_text`, of bytes that were read. name: for the error."""
    for mark, encoding in _OTHER_MARKS:
        if raw.startswith(mark):
            raise InputError(f"{name} is {encoding} text: save it as UTF-8")
    try:
        return raw.removeprefix(codecs.BOM_UTF8).decode()
    except UnicodeDecodeError as exc:
        raise InputError(f"{name} isn't UTF-8 text (byte {exc.start}): save it as UTF-8") from exc


def lines_of(text: str) -> list[str]:
    """Its lines, without their ends."""
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    return lines if lines[-1] else lines[:-1]


def read_lines(
    source: Path | BinaryIO, most_bytes: int = MOST_BYTES, most_line_bytes: int = MOST_LINE_BYTES
) -> list[str]:
    """The lines of a text file. Raises InputError as `read_text`, and for a line that is longer
    than `most_line_bytes`."""
    lines = lines_of(read_text(source, most_bytes))
    for number, line in enumerate(lines, 1):
        if len(line) * 4 > most_line_bytes and len(line.encode()) > most_line_bytes:
            raise InputError(
                f"{_name_of(source)}, line {number} has {len(line.encode())} bytes, and "
                f"{most_line_bytes} are the most: is it the right file?"
            )
    return lines


def read_json(path: Path, most_bytes: int = MOST_BYTES) -> Any:
    """The value in a JSON file. Raises InputError as `read_text`, and when it isn't JSON."""
    text = read_text(path, most_bytes)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise InputError(f"{path} isn't valid JSON ({exc})") from exc
