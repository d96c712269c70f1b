"""Plans for TensorRT: the lint, the spec, the environment, and the process that builds them."""

from __future__ import annotations

import os
import signal
import stat
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest

from edgesd.engines.tensorrt import (
    BuildSpec,
    PlanReport,
    Profile,
    build_plan,
)
from edgesd.errors import EdgesdError, MissingDependencyError, ResourceError, TargetError
from edgesd.export.backends.tensorrt import check_engine
from edgesd.progress import Lines
from edgesd.runtime.cuda import find_gpu
from edgesd.spec.bundle import Engine, Parity

onnx = pytest.importorskip("onnx")

from benchmarks.tensorrt_refusals import faults, graph  # noqa: E402
from edgesd.export.backends.tensorrt_lint import RULES, check_graph, lint  # noqa: E402

pytestmark = pytest.mark.integration

EXPECTED = {
    "zero point of 3": {"zero-point"},
    "unsigned activations": {"codes"},
    "int4 activations": {"codes"},
    "fp8 activations": {"codes"},
    "unsigned weights": {"codes"},
    "blocks of a convolution": {"blocks"},
    "fp32 scales, fp16 activations": {"types"},
    "a scale of 0": {"scale"},
    "a negative scale": {"scale"},
    "codes transposed": {"constant-codes"},
    "two types added": {"types"},
    "ranges at run time": {"integer", "codes", "zero-point"},
    "fused attention": {"standard"},
    "attention of opset 23": {"attention"},
    "any number of rows, no profile": {"shapes"},
    "NaN among the weights": {"finite"},
}


def product(dims: list[int | str]) -> onnx.ModelProto:
    """y = x @ w in fp16."""
    node = onnx.helper.make_node("MatMul", ["x", "w"], ["y"], name="layer/MatMul")
    weight = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float16)
    return graph([node], {"w": weight}, (onnx.TensorProto.FLOAT16, dims))


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    onnx.save(product([1, 64]), path)
    return path


# The lint.


@pytest.mark.parametrize("name", EXPECTED)
def test_each_fault_is_found_by_its_rule(name: str, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(faults()[name], path)
    found = lint(path)
    assert {finding.rule for finding in found} == EXPECTED[name]
    assert all(finding.node and finding.message for finding in found)


def test_every_rule_has_a_fault_that_shows_it() -> None:
    assert faults().keys() == EXPECTED.keys()
    assert set.union(*EXPECTED.values()) == {*RULES, "shapes"}


def test_a_graph_without_faults_passes(plain: Path) -> None:
    assert lint(plain) == []
    check_graph(plain, "unet")


def test_what_is_refused_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(faults()["a negative scale"], path)
    with pytest.raises(EdgesdError, match=r"^unet: .* layer/DQ: scales must be positive"):
        check_graph(path, "unet")


def test_a_profile_opens_a_shape(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(product(["rows", 64]), path)
    assert [finding.rule for finding in lint(path)] == ["shapes"]
    assert lint(path, ["x"]) == []


def test_a_file_that_is_no_graph(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"not a graph")
    with pytest.raises(EdgesdError, match="can't be read"):
        lint(path)


# Specs.


def test_the_equivalent_command_line() -> None:
    profiles = (Profile("x", (1, 4), (2, 4), (3, 4)),)
    spec = BuildSpec("unet", profiles=profiles, workspace_bytes=512 << 20)
    assert spec.trtexec("a b.onnx", "unet.plan") == (
        "trtexec '--onnx=a b.onnx' --saveEngine=unet.plan --stronglyTyped "
        "--memPoolSize=workspace:512M --builderOptimizationLevel=3 --skipInference "
        "--minShapes=x:1x4 --optShapes=x:2x4 --maxShapes=x:3x4"
    )


def test_a_spec_survives_its_json() -> None:
    profiles = (Profile("x", (1, 4), (2, 4), (3, 4)),)
    spec = BuildSpec("unet", "tensorrt_rtx", "sm_86", profiles, 1 << 29, 2)
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


def test_shapes_that_are_open_take_a_profile(tmp_path: Path, rtx: BuildSpec) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(product(["rows", 64]), path)
    with pytest.raises(EdgesdError, match="x has no fixed shape, and no profile was given"):
        build_plan(path, rtx, tmp_path / "x.plan")
    profiles = (Profile("x", (1, 64), (2, 64), (8, 64)),)
    spec = msgspec.structs.replace(rtx, profiles=profiles)
    assert build_plan(path, spec, tmp_path / "x.plan").plan_bytes > 0


@pytest.mark.parametrize("name", ["a negative scale", "two types added", "codes transposed"])
def test_what_the_lint_refuses_tensorrt_refuses(name: str, tmp_path: Path, rtx: BuildSpec) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(faults()[name], path)
    with pytest.raises(EdgesdError, match="tensorrt_rtx refuses the graph"):
        build_plan(path, rtx, tmp_path / "x.plan")
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]


def test_a_gpu_it_does_not_build_for(plain: Path, rtx: BuildSpec) -> None:
    spec = msgspec.structs.replace(rtx, sm="sm_87")
    with pytest.raises(TargetError, match=r"it builds for .*SM86.*, not for sm_87"):
        build_plan(plain, spec, plain.parent / "x.plan")


@pytest.mark.skipif(not isinstance(find_gpu(), str), reason="this machine has an NVIDIA GPU")
def test_without_a_gpu_its_own_plan_cannot_be_built(plain: Path, rtx: BuildSpec) -> None:
    spec = msgspec.structs.replace(rtx, sm=None)
    with pytest.raises(TargetError, match=r"can't build here: .*driver"):
        build_plan(plain, spec, plain.parent / "x.plan")


@pytest.mark.parametrize(
    ("sm", "near", "kept"),
    [
        ("sm_86", "sm_86", True),
        ("sm_89", "sm_89", True),
        ("sm_87", "sm_86", False),
        ("sm_110", "sm_120", False),
    ],
)
def test_only_a_plan_for_the_targets_own_gpu_is_kept(
    sm: str, near: str, kept: bool, tmp_path: Path, rtx: BuildSpec
) -> None:
    root = tmp_path / "bundle"
    (root / "unet").mkdir(parents=True)
    onnx.save(product([1, 64]), root / "unet/model.onnx")
    engine = Engine("unet", "unet/model.onnx", "tensorrt", "fp16", Parity(0, 0, 0))
    found = check_engine(root, engine, sm)
    assert found.words.startswith(f"built for {near} by tensorrt_rtx ")
    assert (root / "plans/unet.plan").exists() == kept
    if kept:
        assert found.built_for and found.built_for.sm == sm
    else:
        assert found.built_for is None
    assert sorted(path.name for path in (root / "unet").iterdir()) == ["model.onnx"]
