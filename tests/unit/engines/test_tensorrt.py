"""Plans for TensorRT: the spec, the driver, and the process that builds them."""

from __future__ import annotations

import os
import signal
import stat
import sys
from pathlib import Path

import msgspec
import pytest

from edgesd.engines.tensorrt import (
    BuildSpec,
    PlanReport,
    build_plan,
)
from edgesd.errors import EdgesdError, MissingDependencyError, ResourceError, TargetError
from edgesd.progress import Lines
from edgesd.runtime.cuda import find_gpu

onnx = pytest.importorskip("onnx")

from tests.tensorrt_graphs import product  # noqa: E402

pytestmark = pytest.mark.integration


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    onnx.save(product([1, 64]), path)
    return path


# Specs.


def test_a_spec_survives_its_json() -> None:
    spec = BuildSpec("unet", "tensorrt_rtx", "sm_86", 1 << 29, 2)
    assert msgspec.json.decode(msgspec.json.encode(spec), type=BuildSpec) == spec


# The driver.


def test_no_driver_is_said_and_nothing_crashes() -> None:
    assert find_gpu("libno-such-driver.so") == (
        "no NVIDIA driver: libno-such-driver.so can't be loaded"
    )


# The process.


def pretend(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> BuildSpec:
    """A spec whose worker is `script` instead, in the place of the interpreter."""
    path = folder / "python"
    path.write_text(f"#!{sys.executable}\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(sys, "executable", str(path))
    return BuildSpec("unet", "math")  # a module that is there


@pytest.mark.parametrize(
    ("script", "kind", "words"),
    [
        (
            "import os, signal, sys; sys.stdin.read(); os.kill(os.getpid(), signal.SIGKILL)",
            ResourceError,
            "killed while it built the plan, most likely for lack of memory",
        ),
        (
            "import os, sys; sys.stdin.read(); os.kill(os.getpid(), 11)",
            EdgesdError,
            r"crashed \(SIGSEGV\) while it built the plan: it said nothing",
        ),
        (
            "import sys; sys.stdin.read(); print('boom' * 90000, file=sys.stderr); sys.exit(3)",
            EdgesdError,
            "ended with 3 while it built the plan: .*boom$",
        ),
        (
            'import sys; sys.stdin.read(); print(\'{"type":"failure","kind":"memory",'
            '"message":"full"}\'); sys.exit(1)',
            ResourceError,
            "ran out of memory: full",
        ),
        (
            'import sys; sys.stdin.read(); print(\'{"type":"failure","kind":"graph",'
            '"message":"unet/Conv (Conv): no"}\'); sys.exit(1)',
            EdgesdError,
            r"refuses the graph: unet/Conv \(Conv\): no",
        ),
    ],
)
def test_what_a_worker_dies_of_is_one_line(
    script: str,
    kind: type[EdgesdError],
    words: str,
    plain: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spec = pretend(plain.parent, script, monkeypatch)
    with pytest.raises(kind, match=words) as caught:
        build_plan(plain, spec, plain.parent / "unet.plan")
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)


def test_an_interrupted_build_leaves_no_process(
    plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = (
        "import os, sys, time; sys.stdin.read();"
        'print(\'{"type":"step","phase":"a","done":%d,"total":2}\' % os.getpid(), flush=True);'
        "time.sleep(600)"
    )
    spec = pretend(plain.parent, script, monkeypatch)
    pids = []

    class Interrupting(Lines):
        def update(self, task: str, done: int, *others: object, **more: object) -> None:
            pids.append(done)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_plan(plain, spec, plain.parent / "unet.plan", Interrupting(print))
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0], signal.SIGCONT)


def test_a_module_that_is_not_there(plain: Path) -> None:
    with pytest.raises(MissingDependencyError, match="needs no_such_module, which isn't"):
        build_plan(plain, BuildSpec("unet", "no_such_module"), plain.parent / "unet.plan")


# TensorRT-RTX itself, which builds without a GPU.


@pytest.fixture
def rtx() -> BuildSpec:
    pytest.importorskip("tensorrt_rtx")
    return BuildSpec("unet", "tensorrt_rtx", "sm_86")


def test_a_plan_is_built_and_described(plain: Path, rtx: BuildSpec) -> None:
    plan = plain.parent / "unet.plan"
    report = build_plan(plain, rtx, plan)
    assert isinstance(report, PlanReport)
    assert plan.stat().st_size == report.plan_bytes > 64 * 64 * 2
    assert report.environment.module == "tensorrt_rtx" and report.environment.sm == "sm_86"
    assert 0 < report.seconds < 60
    assert 50 << 20 < report.import_bytes <= report.peak_bytes < 2 << 30
    first = plan.read_bytes()
    build_plan(plain, rtx, plan)
    assert plan.read_bytes() == first


def test_an_open_shape_is_refused(tmp_path: Path, rtx: BuildSpec) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(product(["rows", 64]), path)
    with pytest.raises(EdgesdError, match="refuses the graph: x has no fixed shape"):
        build_plan(path, rtx, tmp_path / "x.plan")


def test_a_gpu_it_does_not_build_for(plain: Path, rtx: BuildSpec) -> None:
    spec = msgspec.structs.replace(rtx, sm="sm_87")
    with pytest.raises(TargetError, match=r"it builds for .*SM86.*, not for sm_87"):
        build_plan(plain, spec, plain.parent / "x.plan")


@pytest.mark.skipif(not isinstance(find_gpu(), str), reason="this machine has an NVIDIA GPU")
def test_without_a_gpu_its_own_plan_cannot_be_built(plain: Path, rtx: BuildSpec) -> None:
    spec = msgspec.structs.replace(rtx, sm=None)
    with pytest.raises(TargetError, match=r"can't build here: .*driver"):
        build_plan(plain, spec, plain.parent / "x.plan")
