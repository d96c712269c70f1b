"""Headers of GGUF files: a wrong one is one line at once, however large its numbers are."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import pytest

from edgesd.errors import InputError
from edgesd.export.prompter.gguf_header import check_header

U32, F32, BOOL, STRING, ARRAY, U64 = 4, 6, 7, 8, 9, 10


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def pair(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def tensor(name: str, shape: tuple[int, ...], offset: int = 0) -> bytes:
    dims = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return text(name) + dims + struct.pack("<IQ", 0, offset)


def header(pairs: int, tensors: int, *parts: bytes, version: int = 3) -> bytes:
    return struct.pack("<4sIQQ", b"GGUF", version, tensors, pairs) + b"".join(parts)


NAMES = struct.pack("<IQ", STRING, 2) + text("a") + text("b")
GOOD = header(
    4,
    1,
    pair("general.architecture", STRING, text("llama")),
    pair("llama.block_count", U32, struct.pack("<I", 1)),
    pair("scores", ARRAY, struct.pack("<IQ2f", F32, 2, 0.0, 1.0)),
    pair("tokens", ARRAY, NAMES),
    tensor("blk.0.attn_q.weight", (2, 2)),
    bytes(64),
)


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def test_a_header_that_fits_its_file_passes(tmp_path: Path) -> None:
    check_header(write(tmp_path / "m.gguf", GOOD))
    check_header(write(tmp_path / "m.gguf", header(0, 0)))


HUGE = 2**60


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "empty"),
        (b"GGUF", "GGUF"),
        (b"<html>" + bytes(64), "begins with"),
        (header(0, 0, version=9), "version 9"),
        (header(HUGE, 0), "counts"),
        (header(0, HUGE), "counts"),
        (header(10**6, 0, bytes(100)), "leads out of the file"),
        (header(1, 0, struct.pack("<Q", HUGE)), "leads out of the file"),
        (header(1, 0, pair("x", STRING, struct.pack("<Q", 2**64 - 1))), "leads out of the file"),
        (header(1, 0, pair("x", ARRAY, struct.pack("<IQ", U64, HUGE))), "counts"),
        (header(1, 0, pair("x", ARRAY, struct.pack("<IQ", BOOL, 10**6))), "leads out of the file"),
        (header(1, 0, pair("x", ARRAY, struct.pack("<IQ", STRING, HUGE))), "counts"),
        (header(1, 0, pair("x", ARRAY, struct.pack("<IQ", ARRAY, 1))), "value of type 9"),
        (header(1, 0, pair("x", 99, b"")), "value of type 99"),
        (header(0, 1, tensor("t", (2**40, 2**40))), "has the shape"),
        (header(0, 1, text("t") + struct.pack("<I", 2**31) + bytes(200)), "has the shape"),
        (header(0, 1, tensor("t", (2, 2), HUGE)), "after the end"),
    ],
)
def test_a_header_that_leads_out_of_its_file_is_refused(
    data: bytes, words: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=words):
        check_header(write(tmp_path / "m.gguf", data))


def test_mutated_headers_pass_or_are_refused_in_one_line(tmp_path: Path) -> None:
    rng = random.Random(0)
    for _ in range(300):
        data = bytearray(GOOD)
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(len(data))] = rng.choice((0, 1, 127, 255, rng.randrange(256)))
        cut = rng.randrange(len(data)) if rng.random() < 0.2 else len(data)
        try:
            check_header(write(tmp_path / "m.gguf", bytes(data[:cut])))
        except InputError as exc:
            assert "\n" not in str(exc)
