"""Fixtures shared by all tests."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgesd.engines import plans
from edgesd.runtime import device_memory
from edgesd.runtime.bundle import Bundle
from edgesd.runtime.cuda import Gpu
from edgesd.runtime.device_memory import NumpyMemory
from tests import fake_tensorrt
from tests.boards import Builder
from tests.support import write_bundle


@pytest.fixture(scope="session", autouse=True)
def sealed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests look for no weights on the network, and leave the user's cache alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGESD_OFFLINE", "1")
        patch.setenv("EDGESD_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


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
