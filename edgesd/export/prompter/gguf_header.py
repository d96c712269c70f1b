"""The header of a GGUF file (ggml's docs/gguf.md), checked before libraries read it: they trust its
counts, and would go on for ever."""

from __future__ import annotations

import math
import mmap
import struct
from pathlib import Path
from typing import ClassVar

from edgesd.errors import InputError
from edgesd.text import first_sentence

_MOST_ITEMS = 1 << 22
"""Parts of a GGUF file's header, at most: a vocabulary has some 300,000."""

_MOST_ELEMENTS = 1 << 40
"""Of a tensor, at most."""


def check_header(path: Path) -> None:
    """Raise InputError where a file is no GGUF file, counts and lengths in its header lead out of
    it, or its header has millions of parts."""
    try:
        _check(path)
    except (OSError, ValueError, struct.error) as exc:
        raise InputError(f"{path} can't be read as a GGUF file: {first_sentence(exc)}") from exc


def _check(path: Path) -> None:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        magic, version, tensors, pairs = struct.unpack_from("<4sIQQ", data)
        if magic != b"GGUF" or not 2 <= version <= 3:
            raise ValueError(f"it begins with {magic!r} and version {version}")
        walk = _Walk(data)
        walk.take(24)
        for _ in walk.items(pairs):
            walk.string()
            walk.value(walk.number("I"))
        for _ in walk.items(tensors):
            walk.string()
            dims = [walk.number("Q") for _ in range(min(walk.number("I"), 9))]
            if len(dims) > 8 or math.prod(dims) > _MOST_ELEMENTS:
                raise ValueError(f"a tensor has the shape {dims}")
            walk.take(4)
            if walk.number("Q") > len(data):
                raise ValueError("a tensor lies after the end of the file")


class _Walk:
    """Goes through the header of a GGUF file, which is mapped as `data`."""

    _BYTES: ClassVar = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
    _STRING, _ARRAY = 8, 9

    def __init__(self, data: mmap.mmap) -> None:
        self._data, self._at, self._left = data, 0, _MOST_ITEMS

    def take(self, count: int) -> int:
        """Go on by `count` bytes; where they begin."""
        start = self._at
        self._at += count
        if self._at > len(self._data):
            raise ValueError("a length in its header leads out of the file")
        return start

    def number(self, kind: str) -> int:
        """An unsigned number: I has 4 bytes, Q has 8."""
        start = self.take(struct.calcsize(kind))
        return int(struct.unpack_from(f"<{kind}", self._data, start)[0])

    def string(self) -> None:
        """Continue after a string."""
        self.take(self.number("Q"))

    def items(self, count: int) -> range:
        """`count` parts to go through."""
        self._left -= count
        if self._left < 0:
            raise ValueError(f"its header counts {count} parts")
        return range(count)

    def value(self, kind: int, within: bool = False) -> None:
        """Continue after a value of a type."""
        if kind == self._STRING:
            self.string()
        elif kind == self._ARRAY and not within:
            kind, count = self.number("I"), self.number("Q")
            if kind in self._BYTES and count <= _MOST_ITEMS:
                self.take(self._BYTES[kind] * count)
            else:
                for _ in self.items(count):
                    self.value(kind, within=True)
        elif kind in self._BYTES:
            self.take(self._BYTES[kind])
        else:
            raise ValueError(f"its header has a value of type {kind}")
