"""Text files that people write, on any system and by any editor."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from edgesd.errors import InputError, UsageError
from edgesd.runtime.images import expand_requests, read_prompts
from edgesd.runtime.requests import Request
from edgesd.runtime.tokenizer import check_prompt
from edgesd.textfiles import MOST_LINE_BYTES, lines_of, read_json, read_lines, read_text

_NO_ENDS = "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg\rh"


@pytest.mark.parametrize(
    ("raw", "lines"),
    [
        (b"a\nb\n", ["a", "b"]),
        (b"a\r\nb", ["a", "b"]),
        (b"\xef\xbb\xbfa\n", ["a"]),
        (f"{_NO_ENDS}\n".encode(), [_NO_ENDS]),
        (b"", []),
        (b"\n", [""]),
        (b"a\n\nb", ["a", "", "b"]),
    ],
)  # fmt: skip
def test_lines_end_at_line_feeds_alone(raw: bytes, lines: list[str], tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(raw)
    assert read_lines(path) == read_lines(io.BytesIO(raw)) == lines
    assert lines_of(read_text(path)) == lines


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32"])
def test_other_encodings_are_named(encoding: str, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    mark = "\ufeff" if encoding.endswith("be") else ""
    path.write_bytes((mark + "a cat").encode(encoding))
    with pytest.raises(InputError, match=rf"a\.txt is {encoding[:6].upper()} text: save it as"):
        read_text(path)


def test_what_is_no_text_is_refused_with_its_place(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"abc\xff")
    with pytest.raises(InputError, match=r"isn't UTF-8 text \(byte 3\)"):
        read_text(path)
    with pytest.raises(InputError, match="can't be read: No such file"):
        read_text(tmp_path / "none")
    with pytest.raises(InputError, match="can't be read: Is a directory"):
        read_text(tmp_path)


def test_what_is_too_large_is_refused_and_not_read() -> None:
    with Path("/dev/zero").open("rb") as endless, pytest.raises(InputError, match="larger than"):
        read_prompts(endless)
    file = io.BytesIO(b"a cat\n" + b"x" * (MOST_LINE_BYTES + 1))
    file.name = "p.txt"
    with pytest.raises(InputError, match=r"p\.txt, line 2 has 64001 bytes, and 64000 are"):
        read_prompts(file)
    with pytest.raises(InputError, match="100001 prompts, and 100000 are the most"):
        read_prompts(io.BytesIO(b"a\n" * 100_001))
    with pytest.raises(InputError, match="64001 characters"):
        check_prompt("x" * (MOST_LINE_BYTES + 1))
    with pytest.raises(UsageError, match="several runs"):
        expand_requests(Request("", 0), ["a"] * 20, 100_000)


def test_json_with_a_mark_is_read_and_depth_is_no_fault(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(path) == {"a": 1}
    for raw in (b"[" * 100_000, b"{"):
        path.write_bytes(raw)
        with pytest.raises(InputError, match="isn't valid JSON"):
            read_json(path)


def test_a_read_that_fails_names_the_file() -> None:
    with (
        Path("/proc/self/mem").open("rb") as unreadable,
        pytest.raises(InputError, match="/proc/self/mem can't be read: "),
    ):
        read_text(unreadable)
