"""Boards that answer anything: each strange answer is one error, on that board alone."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from edgesd.device import detached
from edgesd.errors import BoardError, EdgesdError, InputError
from edgesd.progress import SILENT
from edgesd.remote import bench_hosts, deploy, hosts, on_board
from edgesd.remote import board as boards
from edgesd.remote.answer import Answer, Mark, Output
from edgesd.remote.board import Address, Finished, Item
from edgesd.runtime.bundle import Bundle

GOOD = [[3, 11], "x86_64", 64, "glibc", "2.36", False]
STRANGE = {
    "nothing": "",
    "a banner before it": f"Welcome!\n{json.dumps(GOOD)}",
    "words behind it": f"{json.dumps(GOOD)}\nbye",
    "half of it": "[",
    "deep": "[" * 100_000,
    "null": "null",
    "short": "[[3,11]]",
    "no version of glibc": json.dumps([*GOOD[:4], "", False]),
    "half a version": json.dumps([[3], *GOOD[1:]]),
    "texts for numbers": json.dumps([["3", "11"], *GOOD[1:]]),
    "null for a text": json.dumps([GOOD[0], None, *GOOD[2:]]),
    "a version that is none": json.dumps([*GOOD[:4], "2.x", False]),
    "other digits": json.dumps([*GOOD[:4], "2.1\u00b2", False]),
    "binary": "\0\ufffd\0",
    "a huge number": "9" * 5000,
    "an object": "{}",
    "a list": "[]",
    "an old slot": '[{"slot":"a","active":true}]',
    "a negative size": "-1 name\0",
    "a path out of the folder": "1 ../../x\0",
    "an absolute path": "1 /etc/passwd\0",
    "a name with a line's end": "1 a\nb\0x",
    "a size too large": f"{10**30} a\0",
    "a hash of somebody else's file": f"{'0' * 64}  /etc/passwd\0",
    "a hash that is none": "../../x  x/a\0",
    "much": "x" * 1_000_000,
    "terminal codes": "\x1b]52;c;cm0=\x07",
}


class Strange:
    name = "pi@board"

    def __init__(self, text: str) -> None:
        self.text = text

    async def run(self, command: Any, on_line: Any = None, on_output: Any = None) -> Finished:
        quiet = on_output is not None or command[0] in ("mkdir", "rm", "mv")
        return Finished(0, "" if quiet else self.text, "")

    async def put(self, path: str, chunks: Any, start: int = 0) -> None:
        for _ in chunks:
            pass

    async def get(self, *_: Any) -> None:
        pass


Question = Callable[[boards.Board, Bundle], Awaitable[object]]
QUESTIONS: dict[str, Question] = {
    "look": deploy._look,
    "slots": lambda board, bundle: deploy.active_slot(board),
    "rollback": lambda board, bundle: deploy.rollback(board),
    "sizes": lambda board, bundle: boards._sizes(board, "x"),
    "hashes": lambda board, bundle: boards._hashes(board, "x", ["a"]),
    "space": lambda board, bundle: boards._check_space(board, "x", 1, 1),
    "bench": lambda board, bundle: bench_hosts.bench_on(board, bundle, [], print),
    "finalize": lambda board, bundle: on_board._look(board, "jetson-orin-nano"),
    "plans": lambda board, bundle: on_board._build(board, bundle, bundle.path, SILENT),
    "send": lambda board, bundle: boards.send(
        board, "x", {"a": Item(1, "0" * 64, lambda: iter([b"x"]))}
    ),
}
# Some are answers: an empty folder, no slot.
MAY_PASS = {("sizes", "nothing"), ("slots", "a list"), ("slots", "an old slot")}


@pytest.mark.parametrize("question", QUESTIONS)
def test_a_strange_answer_is_one_error(question: str, miniature: Bundle) -> None:
    for kind, text in STRANGE.items():
        try:
            asyncio.run(QUESTIONS[question](Strange(text), miniature))  # type: ignore[arg-type]
        except EdgesdError as exc:
            assert "\n" not in str(exc) and len(str(exc)) < 1500, kind
        else:
            assert (question, kind) in MAY_PASS, kind


def test_a_fault_on_one_board_leaves_the_others_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    @asynccontextmanager
    async def connect(address: Address) -> AsyncIterator[Address]:
        yield address

    ended = []

    async def work(board: Any) -> str:
        if board.host == "strange":
            raise ValueError("Welcome")
        if board.host == "unread":
            Path("/nonexistent/wheel").read_bytes()
        await asyncio.sleep(0.05)
        ended.append(board.host)
        return "done"

    monkeypatch.setattr(hosts, "connect", connect)
    found = hosts.on_each(["one", "strange", "unread", "other"], work)
    assert found["one"] == found["other"] == "done"
    assert isinstance(found["strange"], BoardError) and "Welcome" in str(found["strange"])
    unread = found["unread"]
    assert isinstance(unread, InputError), "it is no fault of edgesd's or the board's"
    assert str(unread) == "/nonexistent/wheel: No such file or directory"
    assert ended == ["one", "other"]


def test_a_board_that_stays_silent_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    class Silent(Strange):
        async def run(self, command: Any, *_: Any) -> Finished:
            await asyncio.sleep(60)
            raise AssertionError

    with pytest.raises(BoardError, match=r"pi@board: df isn't done within 0 s"):
        asyncio.run(boards.ask(Silent(""), ["df"], limit_seconds=0.05))


def answered(*blocks: bytes) -> tuple[Answer, bytes]:
    """The answer that comes in these blocks, where M stands for the mark."""
    mark, found = Mark(["x"]), bytearray()
    answer = Answer("pi", mark, found.extend)

    async def read() -> None:
        stream = asyncio.StreamReader()
        reading = asyncio.ensure_future(answer.read(stream))
        for block in blocks:
            stream.feed_data(block.replace(b"M", mark.text))
            await asyncio.sleep(0)
        stream.feed_eof()
        await reading

    asyncio.run(read())
    return answer, bytes(found)


@pytest.mark.parametrize(
    "noise", [b"", b"Welcome!\n", b"no line's end", b"\0\xff\n", b"M x\n", b"12 3\n"]
)
def test_what_a_login_shell_prints_is_no_answer(noise: bytes) -> None:
    text = noise + b"M 77\nthe answer\nM 3\nlogout"
    for size in (1, 7, 1000):
        blocks = [text[at : at + size] for at in range(0, len(text), size)]
        answer, found = answered(*blocks)
        assert (found, answer.pid, answer.status) == (b"the answer\n", 77, 3)


def test_a_line_is_told_before_the_next_one_comes() -> None:
    lines: list[str] = []
    mark = Mark(["x"])
    answer = Answer("pi", mark, Output("pi", lines.append, 0, None))

    async def read() -> None:
        stream = asyncio.StreamReader()
        reading = asyncio.ensure_future(answer.read(stream))
        stream.feed_data(mark.text + b" 1\none line\n")
        for _ in range(5):
            await asyncio.sleep(0)
        assert lines == ["one line"]
        stream.feed_eof()
        await reading

    asyncio.run(read())


def test_a_shell_that_prints_without_end_is_cut_off() -> None:
    with pytest.raises(BoardError, match="its login shell prints without end"):
        answered(*[b"y\n" * 50_000] * 20)


def test_a_command_that_prints_without_end_is_cut_off() -> None:
    output = Output("pi", None, 1 << 20, 1 << 20)
    output(b"y\n" * 100)
    with pytest.raises(BoardError, match="pi: a command there prints more than 1 MB"):
        output(b"y\n" * (1 << 20))


def test_long_lines_are_told_in_pieces() -> None:
    lines: list[str] = []
    output = Output("pi", lines.append, 10, None)
    for _ in range(40):
        output(b"x" * 10_000)
    assert output.text() == "x" * 10
    assert max(map(len, lines)) <= 1 << 16 and sum(map(len, lines)) == 400_000


def test_another_user_s_lines_are_not_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever binds the name of the socket first isn't taken for the work."""
    name = detached._name("k")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as theirs:
        theirs.bind(name)
        theirs.listen()
        monkeypatch.setattr(detached, "_user_of", lambda link: os.getuid() + 1)
        with pytest.raises(BoardError, match="holds the name under which this work is followed"):
            detached.follow("k", ["true"], lambda line: pytest.fail(line))


def test_a_result_that_cannot_be_kept_is_told_before_the_work(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(detached, "user_cache", lambda: tmp_path / "file")
    monkeypatch.setattr(detached, "_start", lambda *_: pytest.fail("the work was begun"))
    with pytest.raises(EdgesdError, match=r"cannot write|can't"):
        detached.follow("k", ["true"], lambda line: None)
