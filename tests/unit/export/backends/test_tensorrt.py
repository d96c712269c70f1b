"""Graphs for TensorRT: the lint, the check by TensorRT-RTX, NVIDIA's command line."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from edgesd.device.targets import get_target
from edgesd.engines.tensorrt import BuildSpec, build_plan
from edgesd.errors import EdgesdError
from edgesd.spec.bundle import Engine, Parity

onnx = pytest.importorskip("onnx")

from benchmarks.tensorrt_refusals import faults  # noqa: E402
from edgesd.export.backends.tensorrt import LOWERING, trtexec  # noqa: E402
from edgesd.export.backends.tensorrt_lint import RULES, check_graph, lint  # noqa: E402
from tests.tensorrt_graphs import product  # noqa: E402

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
    "RMS norm of ONNX Runtime": {"newer"},
    "rotary embedding of opset 23": {"newer"},
    "any number of rows, no profile": {"shapes"},
    "NaN among the weights": {"finite"},
}


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    onnx.save(product([1, 64]), path)
    return path


@pytest.fixture
def rtx() -> BuildSpec:
    pytest.importorskip("tensorrt_rtx")
    return BuildSpec("unet", "tensorrt_rtx", "sm_86")


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


def test_a_file_that_is_no_graph(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"not a graph")
    with pytest.raises(EdgesdError, match="can't be read"):
        lint(path)


def test_the_equivalent_command_line() -> None:
    spec = BuildSpec("unet", workspace_bytes=512 << 20)
    assert trtexec(spec, "a b.onnx", "unet.plan") == (
        "trtexec '--onnx=a b.onnx' --saveEngine=unet.plan --stronglyTyped "
        "--memPoolSize=workspace:512M --builderOptimizationLevel=3 --skipInference"
    )


@pytest.mark.parametrize("name", ["a negative scale", "two types added", "codes transposed"])
def test_what_the_lint_refuses_tensorrt_refuses(name: str, tmp_path: Path, rtx: BuildSpec) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(faults()[name], path)
    with pytest.raises(EdgesdError, match="tensorrt_rtx refuses the graph"):
        build_plan(path, rtx, tmp_path / "x.plan")
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]


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
    target = msgspec.structs.replace(get_target("jetson-orin"), capabilities=(sm,))
    found = LOWERING.check_engine(root, engine, target)
    assert found.checked and found.checked.startswith(f"built for {near} by tensorrt_rtx ")
    assert (root / "plans/unet.plan").exists() == kept
    if kept:
        assert found.built_for and found.built_for.sm == sm and found.plan == "plans/unet.plan"
    else:
        assert found.built_for is None and found.plan is None
    assert sorted(path.name for path in (root / "unet").iterdir()) == ["model.onnx"]
