"""The real transport, against a real SSH server on loopback."""

from __future__ import annotations

import asyncio
import io
import os
import random
import signal
import socket
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import TypeVar

import asyncssh
import pytest

from edgesd.errors import BoardError
from edgesd.remote import ssh
from edgesd.remote.board import Address, Finished, send
from edgesd.remote.ssh import SshBoard, connect
from tests.boards import Server, sshd
from tests.unit.remote.test_board import FILES, items, on

pytestmark = pytest.mark.integration

T = TypeVar("T")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    home = tmp_path / "board"
    home.mkdir()
    with sshd(tmp_path / "user", home) as found:
        yield found


def with_board(server: Server, work: Callable[[SshBoard], Awaitable[T]]) -> T:
    async def run() -> T:
        async with connect(Address("127.0.0.1", "jetson", server.port)) as board:
            return await work(board)

    return asyncio.run(run())


def test_a_command_and_what_it_says(server: Server) -> None:
    lines: list[str] = []
    words = "echo out; echo one >&2; echo two >&2; exit 3"
    done = with_board(server, lambda board: board.run(["sh", "-c", words], lines.append))
    assert done == Finished(3, "out\n", "one\ntwo\n")
    assert lines == ["one", "two"]


def test_arguments_are_not_read_by_a_shell(server: Server) -> None:
    hostile = ["a b", "$HOME", "`id`", "'", '"', ";", "*", "\\", "", "é"]
    done = with_board(server, lambda board: board.run(["printf", "%s\\n", *hostile]))
    assert done.out.splitlines() == hostile


def test_what_a_login_shell_leaves_running_holds_up_nothing(server: Server) -> None:
    server.before = "sleep 300 & echo $! >> left; "

    async def work(board: SshBoard) -> Finished:
        await board.put("file", [b"what is sent"])
        return await board.run(["cat", "file"])

    try:
        assert with_board(server, work) == Finished(0, "what is sent", "")
    finally:
        left = [int(pid) for pid in (server.home / "left").read_text().split()]
        for pid in left:
            os.kill(pid, signal.SIGKILL)  # they run still
    assert len(left) == 2


def test_a_login_shell_that_reads_gets_nothing_of_a_file(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.before = "read line; "
    monkeypatch.setattr(ssh, "_BEGIN_SECONDS", 1)
    with pytest.raises(BoardError, match="does its login shell wait for something"):
        with_board(server, lambda board: board.put("file", [b"one\ntwo\n"]))
    sent = server.home / "file"
    assert not sent.exists() or sent.read_bytes() == b""


def test_a_login_shell_that_joins_the_streams_is_named(server: Server) -> None:
    server.before = "exec 2>&1; "
    with pytest.raises(BoardError, match="joins standard error and standard output"):
        with_board(server, lambda board: board.run(["true"]))


def test_files_go_there_and_come_back(server: Server) -> None:
    async def work(board: SshBoard) -> bytes:
        assert await send(board, "in/b", items(FILES)) == sum(map(len, FILES.values()))
        assert await send(board, "in/b", items(FILES)) == 0
        out = io.BytesIO()
        counts: list[int] = []
        size = len(FILES["unet/weights.bin"])
        await board.get("in/b/unet/weights.bin", size, out, counts.append)
        assert sum(counts) == size
        short = io.BytesIO()
        with pytest.raises(BoardError, match="has more than 7 bytes"):
            await board.get("in/b/unet/weights.bin", 7, short, counts.append)
        assert len(short.getvalue()) <= 7
        with pytest.raises(BoardError, match=f"has {size} bytes, not {size + 1}"):
            await board.get("in/b/unet/weights.bin", size + 1, io.BytesIO(), counts.append)
        with pytest.raises(BoardError, match=r"can't be read there .*No such file"):
            await board.get("in/b/none", 7, io.BytesIO(), counts.append)
        return out.getvalue()

    assert with_board(server, work) == FILES["unet/weights.bin"]
    assert on(server.home) == FILES


def test_a_link_that_is_cut_again_and_again(server: Server) -> None:
    """Each time the next attempt goes on, and in the end every byte is there."""
    chance = random.Random(0)
    losses = 0
    for _ in range(100):
        server.cut_after = server.written + chance.randrange(1, 400_000)
        try:
            with_board(server, lambda board: send(board, "in/b", items(FILES)))
            break
        except BoardError as exc:
            losses += 1
            assert "lost" in str(exc) and "goes on" in str(exc)
    assert losses >= 2
    assert on(server.home) == FILES


def refused(address: Address) -> str:
    async def run() -> None:
        async with connect(address):
            pass

    with pytest.raises(BoardError) as caught:
        asyncio.run(run())
    return str(caught.value)


def test_another_host_key(server: Server, tmp_path: Path) -> None:
    known = tmp_path / "user/.ssh/known_hosts"
    other = asyncssh.generate_private_key("ssh-ed25519").export_public_key().decode().split()[:2]
    known.write_text(f"[127.0.0.1]:{server.port} {' '.join(other)}\n")
    said = refused(Address("127.0.0.1", "jetson", server.port))
    assert "its host key isn't the known one" in said
    assert f"ssh-keygen -f {known} -R '[127.0.0.1]:{server.port}'" in said
    known.unlink()
    assert "its host key isn't known here yet" in refused(
        Address("127.0.0.1", "jetson", server.port)
    )


def test_a_user_without_a_key_there(server: Server) -> None:
    assert "ssh-copy-id" in refused(Address("127.0.0.1", "nobody", server.port))


def test_nobody_listens() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert "does sshd run there" in refused(Address("127.0.0.1", "jetson", port))


def test_a_name_that_is_not_known() -> None:
    assert "the name no-such-board.invalid has no address" in refused(
        Address("no-such-board.invalid")
    )


def test_something_that_is_no_ssh_server(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]

        async def run() -> None:
            loop = asyncio.get_running_loop()
            other.setblocking(False)
            accepted = asyncio.ensure_future(loop.sock_accept(other))
            trying = asyncio.ensure_future(anext_board())
            talker, _ = await accepted
            talker.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n" * 100)
            talker.close()
            await trying

        async def anext_board() -> None:
            async with connect(Address("127.0.0.1", "jetson", port)):
                pass

        with pytest.raises(BoardError, match="can't be reached by SSH"):
            asyncio.run(run())


def test_the_users_ssh_config_is_read(server: Server, tmp_path: Path) -> None:
    config = f"Host shelf\n  HostName 127.0.0.1\n  User jetson\n  Port {server.port}\n"
    (tmp_path / "user/.ssh/config").write_text(config)

    async def run() -> str:
        async with connect(Address("shelf")) as board:
            return (await board.run(["echo", "here"])).out

    assert asyncio.run(run()) == "here\n"
