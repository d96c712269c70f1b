"""A tiny FLUX in 8 and 4 bits: what is done for few bits is in its graphs, and plans know it."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch")
ir = pytest.importorskip("onnx_ir")

from edgesd.export.cost.cpu_lowering import EDGESD_FORMS, lower_workload  # noqa: E402
from edgesd.export.cost.workload import split_joined  # noqa: E402
from edgesd.export.pipeline import export_spec  # noqa: E402
from edgesd.export.quantize.assign import planned  # noqa: E402
from edgesd.export.source import resolve_source  # noqa: E402
from edgesd.recipes import BuildOptions, LocalFolders, QuantOptions, build  # noqa: E402
from edgesd.recipes.footprints import Networks, schemes_of  # noqa: E402
from edgesd.runtime import kernels  # noqa: E402
from edgesd.runtime.bundle import Bundle  # noqa: E402
from edgesd.spec.scheme import parse_scheme  # noqa: E402
from tests.quantizing import fused_in  # noqa: E402
from tests.tiny_pipelines import write_tiny  # noqa: E402

pytestmark = pytest.mark.slow

PROMPTS = ("a red apple", "the blue cat")
NETWORK = "transformer"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny("flux-schnell", tmp_path_factory.mktemp("tiny") / "flux-schnell")


def built(model: Path, folder: Path, precision: str) -> Bundle:
    how = QuantOptions(calibration_prompts=PROMPTS, quality_prompts=PROMPTS, steps=2)
    options = BuildOptions("x86-64-cpu", precision, size=(64, 64), quantization=how)
    return build(str(model), options, folder / precision, LocalFolders(folder / "work")).bundle


def test_few_bits(model: Path, tmp_path: Path) -> None:
    bundle = built(model, tmp_path, "w8a8")
    recipe, quality = bundle.manifest.recipe, bundle.manifest.quality
    assert recipe is not None and quality is not None and quality.psnr_min > 35
    layers = {la.name: la for la in recipe.layers if la.component == NETWORK}
    shapes = [layers[f"single_transformer_blocks.1.proj_out.{n}"].shape for n in (0, 1)]
    assert shapes == [(32, 32), (32, 128)] and layers["context_embedder"].scheme == "fp16"

    networks = Networks(export_spec(resolve_source(model), (64, 64)))
    stage = next(s for s in networks.flow.stages if s.component == NETWORK)
    workload = split_joined(networks.trace_own(stage))
    traced = {(la.name, la.kind, la.shape) for la in workload.layers}
    assert traced == {(la.name, la.kind, la.shape) for la in layers.values()}
    schemes = schemes_of(bundle.manifest, NETWORK, workload.layers)
    assert schemes == planned(workload.layers, parse_scheme("w8a8"))

    graph = ir.load(bundle.path / NETWORK / "model.onnx").graph
    inputs = [node.inputs[0].producer() for node in graph if "proj_out." in (node.name or "")]
    assert inputs and "Concat" not in {node.op_type for node in inputs if node is not None}
    if kernels.usable(["w8a8"]):
        own = ir.load(bundle.path / NETWORK / "kernels.onnx").graph
        made = lower_workload(workload, schemes, True, True)
        fused = {op.layer.name: set(op.fused) for op in made.operations if op.layer is not None
                 and op.form in EDGESD_FORMS and op.layer.part}  # fmt: skip
        found = {name: what for name, what in fused_in(own).items() if name in fused}
        # Which of two parts adds the other's values is the same to memory and time.
        assert sorted(map(sorted, found.values())) == sorted(map(sorted, fused.values()))


def test_four_bits(model: Path, tmp_path: Path) -> None:
    bundle = built(model, tmp_path, "w4a4-g32-lr8")
    recipe, quality = bundle.manifest.recipe, bundle.manifest.quality
    assert recipe is not None and quality is not None and quality.psnr_min > 25
    schemes: dict[str, set[str]] = {}
    for layer in recipe.layers:
        schemes.setdefault(layer.component, set()).add(layer.scheme)
    assert "w4a4-g32-lr8" in schemes.pop(NETWORK)
    assert not any("a4" in name for names in schemes.values() for name in names)
    assert "w4a8-g32-lr8" in schemes["text_encoder_2"]
    graph = ir.load(bundle.path / NETWORK / "model.onnx").graph
    shifts = [name for name in graph.initializers if name.endswith(":shift")]
    assert len(shifts) == 2 + 2 * 2  # single blocks, and texts and images of double ones
