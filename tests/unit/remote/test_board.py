"""Sending files to a board: what is there already isn't sent, and what breaks can be repeated."""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgesd.errors import BoardError, ResourceError, UsageError
from edgesd.remote import board as boards
from edgesd.remote.board import Address, FolderBoard, Item, parse_address, send

FILES = {
    "a": random.Random(1).randbytes(300_000),
    "unet/weights.bin": random.Random(2).randbytes(700_001),
    "unet/model.onnx": b"",
    "it's a name; rm -rf $HOME": b"text",
}


def items(files: dict[str, bytes]) -> dict[str, Item]:
    def pieces(raw: bytes) -> Iterator[bytes]:
        for at in range(0, len(raw), 65_536):
            yield raw[at : at + 65_536]

    return {
        name: Item(len(raw), hashlib.sha256(raw).hexdigest(), lambda raw=raw: pieces(raw))
        for name, raw in files.items()
    }


def on(home: Path) -> dict[str, bytes]:
    folder = home / "in" / "b"
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def push(board: boards.Board, files: dict[str, bytes]) -> int:
    return asyncio.run(send(board, "in/b", items(files)))


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("orin", Address("orin")),
        ("me@orin.local", Address("orin.local", "me")),
        ("me@10.0.0.7:2222", Address("10.0.0.7", "me", 2222)),
        ("me@[fe80::1]:22", Address("fe80::1", "me", 22)),
        ("[::1]", Address("::1")),
    ],
)
def test_addresses(text: str, address: Address) -> None:
    assert parse_address(text) == address
    assert str(address) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "@orin",
        "me@",
        "me:secret@orin",
        "-oProxyCommand=x",
        "orin:0",
        "orin:70000",
        "a b",
        "::1",
    ],
)
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(UsageError, match="user@host:port"):
        parse_address(text)


def test_files_arrive_and_are_not_sent_again(tmp_path: Path) -> None:
    board = FolderBoard(tmp_path)
    assert push(board, FILES) == sum(map(len, FILES.values()))
    assert on(tmp_path) == FILES
    assert push(board, FILES) == 0
    changed = {**FILES, "a": b"new"}
    assert push(board, changed) == 3
    assert on(tmp_path) == changed


def test_what_does_not_belong_there_is_removed(tmp_path: Path) -> None:
    board = FolderBoard(tmp_path)
    push(board, FILES)
    (tmp_path / "in/b/old.part").write_bytes(b"x")
    assert push(board, {"a": FILES["a"]}) == 0
    assert on(tmp_path) == {"a": FILES["a"]}


def test_a_file_that_the_board_damaged_is_sent_again(tmp_path: Path) -> None:
    board = FolderBoard(tmp_path)
    push(board, FILES)
    file = tmp_path / "in/b/a"
    file.write_bytes(b"\0" + FILES["a"][1:])
    assert push(board, FILES) == len(FILES["a"])
    assert on(tmp_path) == FILES


def test_a_lost_link_costs_what_was_not_written_yet(tmp_path: Path) -> None:
    total = sum(map(len, FILES.values()))
    received = 0
    for _ in range(40):  # every call gets 50 kB further, or loses none
        board = FolderBoard(tmp_path, fail_after=50_000)
        try:
            push(board, FILES)
        except BoardError as exc:
            assert "link to board was lost" in str(exc)
            received += board.received
            continue
        received += board.received
        break
    else:
        pytest.fail("never finished")
    assert on(tmp_path) == FILES
    assert received == total


@pytest.mark.parametrize("begun", [b"\0" * 1000, b"\0" * 400_000])
def test_a_beginning_of_something_else(begun: bytes, tmp_path: Path) -> None:
    folder = tmp_path / "in/b"
    folder.mkdir(parents=True)
    (folder / "a.part").write_bytes(begun)
    push(FolderBoard(tmp_path), {"a": FILES["a"]})
    assert on(tmp_path) == {"a": FILES["a"]}


def test_a_disk_that_writes_something_else(tmp_path: Path) -> None:
    class Worn(FolderBoard):
        async def put(self, path, chunks, start=0):  # type: ignore[no-untyped-def]
            await super().put(path, (b"\0" * len(chunk) for chunk in chunks), start)

    with pytest.raises(BoardError, match="a arrived damaged"):
        push(Worn(tmp_path), {"a": FILES["a"]})
    assert on(tmp_path) == {}


def test_a_disk_that_is_too_small(tmp_path: Path) -> None:
    class Full(FolderBoard):
        async def run(self, command, *listeners):  # type: ignore[no-untyped-def]
            if command[0] == "df":
                return boards.Finished(0, "F 1K U A C M\n/dev/x 9 9 100 9% /\n", "")
            return await super().run(command, *listeners)

    with pytest.raises(ResourceError, match="0 MB of disk free"):
        push(Full(tmp_path), FILES)
    assert on(tmp_path) == {}


def test_a_board_without_edgesd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    with pytest.raises(BoardError, match="board has no edgesd: edgesd deploy"):
        asyncio.run(boards.edgesd(FolderBoard(tmp_path), "--version"))


def test_edgesd_is_found_in_the_users_own_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    program = tmp_path / ".local/bin/edgesd"
    program.parent.mkdir(parents=True)
    program.write_text('#!/bin/sh\necho "$# $2"\necho "edgesd: no such thing" >&2\nexit $1\n')
    program.chmod(0o755)
    board = FolderBoard(tmp_path)
    assert asyncio.run(boards.edgesd(board, "0", "a b; c")) == "2 a b; c\n"
    with pytest.raises(BoardError, match="board: edgesd 3: no such thing"):
        asyncio.run(boards.edgesd(board, "3"))
