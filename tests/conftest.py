"""Fixtures shared by all tests."""

from __future__ import annotations

import contextlib
import math
import os
import platform
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from filelock import FileLock
from hypothesis import HealthCheck, settings

from edgesd.cli import common as cli
from edgesd.cores import library_settings
from edgesd.engines import plans
from edgesd.runtime import device_memory
from edgesd.runtime.bundle import Bundle
from edgesd.runtime.cuda import Gpu
from edgesd.runtime.device_memory import NumpyMemory
from edgesd.runtime.memory import available_bytes
from tests import fake_tensorrt
from tests.boards import Builder
from tests.exports import Export, KeptExports
from tests.support import write_bundle

WORKER_BYTES = 3 << 30
"""Memory that a process of tests takes at most, roughly."""

SLOW_SECONDS = 3600
"""Time limit of a test that is marked slow."""

FOREIGN = (
    *("EDGESD_", "HF_", "HUGGINGFACE_", "TRANSFORMERS_", "DIFFUSERS_", "TORCH_HOME", "XDG_"),
    *("SSH_", "GIT_", "PYTHONWARNINGS", "SOURCE_DATE_EPOCH"),
    *("NO_COLOR", "FORCE_COLOR", "CLICOLOR", "TTY_", "COLUMNS", "LINES"),
    *("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"),
)
"""Beginnings of the names of variables by which a user's shell would change what is tested."""


def pytest_configure(config: pytest.Config) -> None:
    """Start from the same state wherever this runs: in a terminal, under nohup, in a CI's job.

    What is ignored or blocked by the process that started the tests (SIGINT in a shell's background
    job, SIGHUP under nohup, SIGCHLD by some servers) is inherited by every process of a test.
    """
    for number in (signal.SIGHUP, signal.SIGQUIT, signal.SIGTERM, signal.SIGCHLD, signal.SIGALRM):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    # Examples are the same each time, however slow the machine, and none is left from another run.
    settings.register_profile(
        "tests",
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.too_slow],
    )
    settings.load_profile("tests")
    os.umask(0o022)
    os.environ.update(library_settings(os.environ))
    if "PYTEST_XDIST_WORKER" in os.environ:
        _take_one_core(int(os.environ["PYTEST_XDIST_WORKER"].lstrip("gw")))


def _take_one_core(worker: int) -> None:
    """Threads of two processes that wait for each other's cores cost more than they save."""
    cores = sorted(os.sched_getaffinity(0))
    with contextlib.suppress(PermissionError):  # in some containers
        os.sched_setaffinity(0, {cores[worker % len(cores)]})


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """`-n auto`: a process for each core, up to four, as far as memory reaches."""
    memory = available_bytes() or WORKER_BYTES
    return max(1, min(4, len(os.sched_getaffinity(0)), memory // WORKER_BYTES))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked slow get a time limit of their own."""
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(SLOW_SECONDS))


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of this run that all its processes share, where tests run in several."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session", autouse=True)
def sealed(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests look for no weights on the network, and neither see nor change the user's files, nor
    the folder that they were started in.

    Nor does what they print depend on time: lines of progress never come. Nor do they wait for the
    disk, as no test cuts the power.
    """
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(FOREIGN)]:
            patch.delenv(name)
        home = run_folder / "home"
        home.mkdir(exist_ok=True)
        patch.setenv("HOME", str(home))
        patch.setenv("EDGESD_OFFLINE", "1")
        patch.setenv("EDGESD_CACHE", str(run_folder / "cache"))
        patch.setattr(cli, "LINE_SECONDS", math.inf)
        patch.setattr(os, "fsync", lambda fd: None)
        patch.chdir(tmp_path_factory.mktemp("here"))
        yield


@pytest.fixture(scope="session")
def own_kernels(run_folder: Path) -> Path | None:
    """The library of edgesd's own kernels for this machine, compiled once; None where it can't
    be."""
    from edgesd.engines.kernels import ensure_library

    with FileLock(run_folder / "kernels.lock", timeout=900):
        return ensure_library()


@pytest.fixture(scope="session")
def miniature(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle of the miniature pipeline for this machine's architecture. Read-only."""
    arm = platform.machine() in ("aarch64", "arm64")
    target, arch = ("raspberry-pi-4", "aarch64") if arm else ("x86-64-cpu", "x86_64")
    return write_bundle(tmp_path_factory.mktemp("bundles") / "miniature", target, arch)


@pytest.fixture(scope="session")
def miniature_file(miniature: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same bundle in its one-file form. Read-only."""
    from edgesd.engines.bundle import pack_bundle

    path = tmp_path_factory.mktemp("files") / "miniature.edgesd"
    pack_bundle(miniature, path)
    return path


@pytest.fixture(scope="session")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where builds of the embedded model keep what they have in common."""
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="module")
def kept_exports(run_folder: Path) -> Iterator[Export]:
    """`export_pipeline`; builds, too, take the graphs that another test has exported already."""
    exporting = pytest.importorskip("edgesd.export.pipeline")
    kept = KeptExports(exporting.export_pipeline, run_folder / "exports")
    kept.folder.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporting, "export_pipeline", kept)
        yield kept


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """On matrices as small as a unit test's, threads wait for each other more than they work."""
    torch = pytest.importorskip("torch")
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(count)


@pytest.fixture
def board(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Builder:
    """A machine with a GPU and TensorRT, and an empty folder of plans."""
    builder = Builder()
    monkeypatch.setenv("EDGESD_PLANS", str(tmp_path / "plans"))
    gpu = Gpu("Orin", "sm_87", 8 << 30)
    monkeypatch.setattr(plans, "find_gpu", lambda: gpu)
    monkeypatch.setattr(plans, "build_plan", builder)
    monkeypatch.setattr(device_memory, "open_device_memory", NumpyMemory)
    monkeypatch.setattr(fake_tensorrt, "__version__", "10.3.0", raising=False)
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt)
    return builder
