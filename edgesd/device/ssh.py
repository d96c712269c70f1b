"""Boards over SSH, by asyncssh: ~/.ssh/config, known_hosts, keys and the agent as ssh has them."""

from __future__ import annotations

import asyncio
import shlex
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any, BinaryIO

from edgesd.device.board import Address, Finished, OnLine
from edgesd.errors import BoardError, LinkError, MissingDependencyError

_CONNECT_SECONDS = 15
_ALIVE_SECONDS, _ALIVE_COUNT = 10, 3
"""A silent board is asked this often; after so many questions in vain the link is lost."""
_BLOCK_BYTES = 1 << 20
_READ_BYTES = 1 << 16


@asynccontextmanager
async def connect(address: Address) -> AsyncIterator[SshBoard]:
    """A board, for as long as the context lasts.

    Raises MissingDependencyError without asyncssh, BoardError when nobody answers, the board's host
    key isn't the known one, or the board takes none of the user's keys.
    """
    try:
        import asyncssh
    except ImportError as exc:
        raise MissingDependencyError(
            "boards are reached by asyncssh, which isn't installed: pip install 'edgesd[deploy]'"
        ) from exc
    options: dict[str, Any] = {
        "connect_timeout": _CONNECT_SECONDS,
        "keepalive_interval": _ALIVE_SECONDS,
        "keepalive_count_max": _ALIVE_COUNT,
        "encoding": None,
    }
    if address.user:
        options["username"] = address.user
    if address.port:
        options["port"] = address.port
    host = address.host
    try:
        connection = await asyncssh.connect(host, **options)
    except asyncssh.HostKeyNotVerifiable as exc:
        raise BoardError(
            f"{address}: its host key isn't the one in known_hosts, or isn't there: log in once by "
            f"ssh and compare it; if the board was set up anew, first run ssh-keygen -R {host}"
        ) from exc
    except asyncssh.PermissionDenied as exc:
        raise BoardError(
            f"{address} takes none of your keys: copy one there with ssh-copy-id, or add the right "
            "one to the agent with ssh-add"
        ) from exc
    except (TimeoutError, asyncio.TimeoutError) as exc:
        raise LinkError(
            f"{address} doesn't answer within {_CONNECT_SECONDS} s: is it on, and on this network?"
        ) from exc
    except (asyncssh.Error, OSError, ValueError) as exc:
        raise LinkError(
            f"{address} can't be reached by SSH ({exc}): is it on, and does sshd run there?"
        ) from exc
    board = SshBoard(str(address), connection)
    try:
        yield board
    finally:
        board.close()
        await connection.wait_closed()


class SshBoard:
    """See Board. Made by `connect`."""

    def __init__(self, name: str, connection: Any) -> None:
        self.name = name
        self._connection = connection
        self._sftp: Any = None

    async def run(
        self,
        command: Sequence[str],
        on_line: OnLine | None = None,
        on_output: OnLine | None = None,
    ) -> Finished:
        """See Board."""
        with self._link():
            process = await self._connection.create_process(
                shlex.join(command), stdin=asyncio.subprocess.DEVNULL
            )

            async def listen(stream: Any, listener: OnLine | None, keep: bool) -> str:
                whole, line = bytearray(), b""
                while block := await stream.read(_READ_BYTES):
                    whole += block if keep else b""
                    *lines, line = (line + block).split(b"\n")
                    for raw in lines if listener else ():
                        assert listener
                        listener(raw.decode(errors="replace").rstrip("\r"))
                if line and listener:
                    listener(line.decode(errors="replace"))
                return whole.decode(errors="replace")

            try:
                out, said = await asyncio.gather(
                    listen(process.stdout, on_output, on_output is None),
                    listen(process.stderr, on_line, True),
                )
                await process.wait_closed()
            except asyncio.CancelledError:
                process.terminate()  # else it would work on for nobody
                raise
            if process.returncode is None:  # no exit status came: the connection broke
                raise LinkError(_lost(self.name))
        return Finished(process.returncode, out, said)

    async def put(self, path: str, chunks: Iterable[bytes], start: int = 0) -> None:
        """See Board."""
        with self._link():
            sftp = await self._files()
            made = "r+b" if await sftp.exists(path) else "w+b"
            async with sftp.open(path, made) as file:
                at = start
                for chunk in chunks:
                    await file.write(chunk, at)
                    at += len(chunk)
                await file.truncate(at)

    async def get(
        self, path: str, size: int, out: BinaryIO, on_bytes: Callable[[int], None]
    ) -> None:
        """See Board."""
        with self._link():
            sftp = await self._files()
            at = 0
            async with sftp.open(path, "rb") as file:
                while block := await file.read(_BLOCK_BYTES, at):
                    out.write(block)
                    at += len(block)
                    on_bytes(len(block))
        if at != size:
            raise BoardError(f"{self.name}: {path} has {at} bytes, not {size}")

    def close(self) -> None:
        """Leave the board."""
        self._connection.close()

    async def _files(self) -> Any:
        if self._sftp is None:
            self._sftp = await self._connection.start_sftp_client()
        return self._sftp

    @contextmanager
    def _link(self) -> Iterator[None]:
        """Turn asyncssh's errors into ours."""
        import asyncssh

        lost = (asyncssh.SFTPConnectionLost, asyncssh.SFTPNoConnection, asyncssh.ConnectionLost)
        try:
            yield
        except asyncssh.SFTPNoSpaceOnFilesystem as exc:
            raise BoardError(f"{self.name}: its disk is full: free some space there") from exc
        except (*lost, asyncssh.DisconnectError, asyncssh.ChannelOpenError, ConnectionError) as exc:
            raise LinkError(_lost(self.name)) from exc
        except asyncssh.SFTPError as exc:
            raise BoardError(
                f"{self.name}: a file can't be moved ({exc}): is its disk full or read-only?"
            ) from exc


def _lost(name: str) -> str:
    return f"the link to {name} was lost: run the command again, it goes on from what is done"
