"""Builds of a tiny FLUX: graphs, the plan, quantization, the graphs for TensorRT."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from PIL import Image

pytest.importorskip("torch")

from edgesd.export import parity
from edgesd.export.backends import get_lowering
from edgesd.export.external_data import write_model
from edgesd.export.pipeline import export_spec
from edgesd.export.source import resolve_source
from edgesd.export.to_onnx import graph_from_module
from edgesd.recipes import BuildOptions, LocalFolders, QuantOptions, build
from edgesd.runtime.bundle import open_bundle
from tests.support import assert_refused, run_cli
from tests.tiny_pipelines import diffusers_images, tiny, write_tiny

PROMPTS = ("a red apple", "the blue cat")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny("flux-dev", tmp_path_factory.mktemp("tiny") / "flux-dev")


def test_the_graphs_of_the_transformer(model: Path, tmp_path: Path) -> None:
    """Of any size and batch: attention, norms and rotations are one operator each, the timestep's
    are the only sine and cosine, and nothing is cast. In standard operators they are the same."""
    export = export_spec(resolve_source(model))
    components = {component.name: component for component in export.components}
    found = {}
    for name in ("modulation", "transformer"):
        component = components[name]
        module = component.load()
        cases = parity.reference_cases(module, component)
        written = graph_from_module(module, component, "ort-mha")
        write_model(written, tmp_path / name)
        graph = tmp_path / name / "model.onnx"
        parity.check_parity(graph, component, cases, "fp32")
        found[name] = [node.op_type for node in written.graph]
        for precision in ("fp32", "fp16"):
            standard = ir.load(graph)
            get_lowering("tensorrt").lower(standard, precision)
            path = graph.with_name(f"{precision}.onnx")  # beside its weights
            ir.save(standard, path)
            onnx.checker.check_model(path, full_check=True)
            inputs, (wanted,) = cases[1]
            session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
            (made,) = session.run(None, inputs)
            assert parity.relative_rms(made, wanted) < parity.TOLERANCE[precision]
    operators = found["transformer"]
    names = ("MultiHeadAttention", "RotaryEmbedding", "SimplifiedLayerNormalization")
    # Two blocks of both kinds; in the first, text and image have norms of their own.
    assert [operators.count(name) for name in names] == [4, 8, 12]
    assert not {"Sin", "Cos", "Gemm", "Cast"} & {*operators}
    waves = [found["modulation"].count(name) for name in ("Sin", "Cos", "Gemm", "Cast")]
    assert waves == [2, 2, 6 + 2 * 2 + 2 + 1, 0]


def test_the_plan_has_all_networks(model: Path) -> None:
    outcome = run_cli("plan", model, "--target", "raspberry-pi-5", "--precision", "w4a8-g64")
    assert outcome.code == 0, outcome.err
    lines = [line.split()[0] for line in outcome.out.splitlines() if line]
    wanted = {"text_encoder", "text_encoder_2", "modulation", "transformer", "vae_decoder"}
    assert wanted <= {*lines}
    wrong = run_cli("plan", model, "--target", "raspberry-pi-5", "--size", "62x64")
    assert_refused(wrong, "width 62 isn't a multiple of 4")


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16", "w8a8"])
def test_a_bundle_makes_nearly_the_same_images(precision: str, model: Path, tmp_path: Path) -> None:
    quantization = QuantOptions(calibration_prompts=PROMPTS, quality_prompts=PROMPTS, steps=2)
    options = BuildOptions("x86-64-cpu", precision, quantization=quantization)
    built = build(str(model), options, tmp_path / "bundle", LocalFolders(tmp_path / "work")).bundle
    assert all(engine.footprint is not None for engine in built.manifest.engines.values())
    theirs = diffusers_images(
        tiny("flux-dev"), PROMPTS[:1], [3], num_inference_steps=2, width=40, height=24
    )
    for memory in ("fast", "balanced", "stream"):
        out = tmp_path / f"{memory}.png"
        outcome = run_cli(
            "generate", built.path, "-p", PROMPTS[0], "--seed", 3, "--steps", 2,
            "--size", "40x24", "--memory", memory, "-o", out,
        )  # fmt: skip
        assert outcome.code == 0, outcome.err
        with Image.open(out) as image:
            off = np.abs(np.int32(image) - np.int32(theirs[0]))
        assert off.max() <= 1 if precision == "fp32" else off.mean() < 4


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "w8a8"])
def test_graphs_for_tensorrt_pass_their_checks(precision: str, model: Path, tmp_path: Path) -> None:
    """The build lints each graph. Rows of the modulation are as many as any loop asks for."""
    quantization = QuantOptions(calibration_prompts=PROMPTS, quality_prompts=(), steps=2)
    options = BuildOptions("jetson-orin-nano", precision, size=(64, 48), quantization=quantization)
    made = build(str(model), options, tmp_path / "bundle", LocalFolders(tmp_path / "work"))
    components = open_bundle(made.bundle.path).manifest.pipeline.components
    assert components["transformer"].inputs[0].shape == (1, 4, 24, 32)
    assert components["modulation"].inputs[0].shape == (32,)
