"""Boards for tests: a Jetson's TensorRT that is a fake, and an SSH server in front of a folder."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import asyncssh
import msgspec
import onnx

from edgesd.device.slots import Slots
from edgesd.engines.tensorrt import BuildSpec, PlanReport
from edgesd.progress import SILENT, Progress
from edgesd.spec.bundle import Environment
from edgesd.spec.target import Machine
from tests.support import PATIENCE_SECONDS

JETSON = Environment("tensorrt", "10.3.0", "sm_87", None)
MACHINE = Machine(
    arch="aarch64",
    model="NVIDIA Jetson Orin Nano Developer Kit",
    target="jetson-orin-nano-8gb",
    memory_bytes=7 << 30,
    cpu_count=6,
    capabilities=("dotprod", "fp16_arithmetic", "sm_87"),
)


class Builder:
    """Stands in for `build_plan`: the plan is the graph with its weights inside."""

    def __init__(self) -> None:
        self.built: list[str] = []
        self.error: Exception | None = None

    def __call__(
        self,
        graph: Path,
        spec: BuildSpec,
        plan: Path,
        progress: Progress = SILENT,
        weights: Path | None = None,
        opened: Sequence[int] = (),
    ) -> PlanReport:
        if self.error:
            raise self.error
        progress.update("Building engine", 1, 2)
        model = onnx.load(graph, load_external_data=False)
        for tensor in model.graph.initializer:
            if tensor.external_data:
                entries = {entry.key: entry.value for entry in tensor.external_data}
                place = Path(weights or graph.parent, entries["location"])
                assert weights is None or int(place.name) in opened
                data = place.read_bytes()[int(entries["offset"]) :][: int(entries["length"])]
                tensor.raw_data, tensor.data_location = data, onnx.TensorProto.DEFAULT
                del tensor.external_data[:]
        plan.write_bytes(model.SerializeToString())
        self.built.append(spec.component)
        return PlanReport(JETSON, plan.stat().st_size, 1.5, 300 << 20, 200 << 20, ())


class Jetson:
    """A board's home folder: `edgesd` there is this one, on a GPU and TensorRT that are fakes.

    Commands run in processes of their own (tests/fake_jetson.py), which read `change`s.
    """

    def __init__(self, home: Path) -> None:
        self.home = home
        program = home / ".local/bin/edgesd"
        program.parent.mkdir(parents=True)
        root = Path(__file__).resolve().parent.parent
        program.write_text(
            f'#!/bin/sh\nPYTHONPATH={root} exec {sys.executable} -m tests.fake_jetson "$@"\n'
        )
        program.chmod(0o755)
        self.change()

    def change(self, error: str | None = None, gpu: bool = True, **machine: Any) -> None:
        """What builds fail with, whether there is a GPU, and fields of the machine."""
        found = msgspec.structs.replace(MACHINE, **machine)
        state = {"error": error, "gpu": gpu, "machine": found}
        (self.home / "jetson.json").write_bytes(msgspec.json.encode(state))

    @property
    def built(self) -> list[str]:
        """Components whose plans were built, in order."""
        log = self.home / "built"
        return log.read_text().split() if log.exists() else []


class Server:
    """A real SSH server, whose home is a folder. cut_after: bytes written until it hangs up."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.cut_after: int | None = None
        self.written = 0
        self.port = 0
        self.connections: list[Any] = []
        self.before = ""
        """What the login shell does first, as .bashrc has it."""
        self.on_event: Callable[[], None] = lambda: None
        """Called, in the server's thread, when a command has begun and when bytes arrive."""

    def hang_up(self) -> None:
        """Cut all connections, as where the link is lost."""
        for connection in self.connections:
            connection.abort()

    async def command(self, process: asyncssh.SSHServerProcess[bytes]) -> None:
        child = await asyncio.create_subprocess_shell(
            self.before + (process.command or ""),
            cwd=self.home,
            env={"HOME": str(self.home), "PATH": "/usr/bin:/bin"},
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
        )
        self.on_event()

        async def take() -> None:
            assert child.stdin
            with contextlib.suppress(OSError, asyncssh.Error):
                while block := await process.stdin.read(1 << 16):
                    left = None if self.cut_after is None else self.cut_after - self.written
                    block = block[:left] if left is None or left >= 0 else b""
                    child.stdin.write(block)
                    await child.stdin.drain()
                    self.written += len(block)
                    self.on_event()
                    if left is not None and len(block) >= left:
                        self.hang_up()
            child.stdin.close()

        async def tell(stream: asyncio.StreamReader, out: asyncssh.SSHWriter[bytes]) -> None:
            with contextlib.suppress(OSError, asyncssh.Error):
                while block := await stream.read(1 << 16):
                    out.write(block)
                    await out.drain()
            while await stream.read(1 << 16):  # nobody is there any more to be told
                pass

        assert child.stdin and child.stdout and child.stderr
        taking = asyncio.ensure_future(take())
        try:
            told = tell(child.stdout, process.stdout), tell(child.stderr, process.stderr)
            await asyncio.gather(*told)
            status = await child.wait()
        except asyncio.CancelledError:  # the end of the test
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            await asyncio.gather(child.stdout.read(), child.stderr.read())  # until they are closed
            await child.wait()
            raise
        finally:
            taking.cancel()
            child.stdin.close()
            if child.stdin.transport.get_write_buffer_size():
                child.stdin.transport.abort()
        with contextlib.suppress(OSError, asyncssh.Error):
            process.exit(status)


@contextlib.contextmanager
def sshd(user_home: Path, board_home: Path) -> Iterator[Server]:
    """Serve `board_home` on loopback; `user_home` gets the key and the known host of its user."""
    server = Server(board_home)
    host_key, user_key = (asyncssh.generate_private_key("ssh-ed25519") for _ in range(2))
    ssh = user_home / ".ssh"
    ssh.mkdir(parents=True)
    user_key.write_private_key(ssh / "id_ed25519")
    (ssh / "id_ed25519").chmod(0o600)

    class Login(asyncssh.SSHServer):
        def connection_made(self, conn: asyncssh.SSHServerConnection) -> None:
            server.connections.append(conn)

        def public_key_auth_supported(self) -> bool:
            return True

        def validate_public_key(self, username: str, key: asyncssh.SSHKey) -> bool:
            return username == "jetson" and key == user_key.convert_to_public()

    ready, loop = threading.Event(), asyncio.new_event_loop()

    async def serve() -> None:
        listener = await asyncssh.create_server(
            Login,
            "127.0.0.1",
            0,
            server_host_keys=[host_key],
            process_factory=server.command,
            encoding=None,
        )
        server.port = listener.get_port()
        ready.set()

    def run() -> None:
        asyncio.set_event_loop(loop)
        loop.create_task(serve())
        loop.run_forever()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert ready.wait(PATIENCE_SECONDS), "the SSH server did not start"
    public = host_key.export_public_key().decode().split()[:2]
    (ssh / "known_hosts").write_text(f"[127.0.0.1]:{server.port} {' '.join(public)}\n")
    try:
        with mock.patch.dict(os.environ, {"HOME": str(user_home), "SSH_AUTH_SOCK": ""}):
            yield server
    finally:

        async def stop() -> None:
            server.hang_up()
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(stop(), loop).result(PATIENCE_SECONDS)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(PATIENCE_SECONDS)
        assert not thread.is_alive(), "the SSH server did not end"
        loop.close()


class Pi:
    """A board's home folder where `edgesd` is this one, on this machine."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.program = home / "edgesd/bin/edgesd"
        self.program.parent.mkdir(parents=True)
        root = Path(__file__).resolve().parent.parent
        run = f'PYTHONPATH={root} exec {sys.executable} -m edgesd "$@"'
        self.program.write_text(f"#!/bin/sh\n{run}\n")
        self.program.chmod(0o755)

    @property
    def slots(self) -> Slots:
        """What was deployed there."""
        return Slots(self.home / "edgesd")

    def processes(self) -> list[int]:
        """Those that run on the board: the ones whose home it is."""
        mark = f"HOME={self.home}\0".encode()
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if mark in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
        return found
