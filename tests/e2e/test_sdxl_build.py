"""Builds of a tiny Stable Diffusion XL: graphs, quantization, the graphs for TensorRT, the plan."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("torch")

from edgesd.export import parity
from edgesd.export.external_data import write_model
from edgesd.export.pipeline import export_spec
from edgesd.export.source import resolve_source
from edgesd.export.to_onnx import graph_from_module
from edgesd.recipes import BuildOptions, LocalFolders, QuantOptions, build
from edgesd.runtime.bundle import open_bundle
from tests.support import run_cli
from tests.tiny_pipelines import diffusers_images, tiny, write_tiny

PROMPTS = ("a red apple", "the blue cat")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny("sdxl", tmp_path_factory.mktemp("tiny") / "sdxl")


def test_graphs_of_both_encoders(model: Path, tmp_path: Path) -> None:
    """The first has no layer that nothing reads; the second's gives the text's embedding, too."""
    export = export_spec(resolve_source(model))
    for component, outputs, attentions in zip(export.components, (1, 2), (2, 3), strict=False):
        module = component.load()
        cases = parity.reference_cases(module, component)
        written = graph_from_module(module, component, "ort-mha")
        ops = [node.op_type for node in written.graph]
        assert (len(written.graph.outputs), ops.count("MultiHeadAttention")) == (
            outputs,
            attentions,
        )
        assert "Cast" not in ops
        write_model(written, tmp_path / component.name)
        graph = tmp_path / component.name / "model.onnx"
        assert parity.check_parity(graph, component, cases, "fp32").rel_rms < 1e-5


def test_the_plan_has_both_encoders(model: Path) -> None:
    outcome = run_cli("plan", model, "--target", "raspberry-pi-5", "--precision", "w8a8")
    assert outcome.code == 0, outcome.err
    lines = [line.split()[0] for line in outcome.out.splitlines() if line]
    assert {"text_encoder", "text_encoder_2", "unet", "vae_decoder"} <= {*lines}


@pytest.mark.slow
def test_a_quantized_bundle_makes_nearly_the_same_images(model: Path, tmp_path: Path) -> None:
    quantization = QuantOptions(calibration_prompts=PROMPTS, quality_prompts=PROMPTS, steps=2)
    options = BuildOptions("x86-64-cpu", "w8a8", quantization=quantization)
    built = build(str(model), options, tmp_path / "bundle", LocalFolders(tmp_path / "work")).bundle
    manifest = built.manifest
    assert manifest.quality is not None and manifest.quality.psnr_min > 35
    assert manifest.recipe is not None
    quantized = {layer.component for layer in manifest.recipe.layers}
    assert quantized == {"text_encoder", "text_encoder_2", "unet", "vae_decoder"}
    assert all(engine.footprint is not None for engine in manifest.engines.values())
    theirs = diffusers_images(
        tiny("sdxl"), PROMPTS[:1], [3], num_inference_steps=2, width=40, height=24
    )
    for memory in ("fast", "balanced", "stream"):
        out = tmp_path / f"{memory}.png"
        outcome = run_cli(
            "generate", built.path, "-p", PROMPTS[0], "--seed", 3, "--steps", 2,
            "--size", "40x24", "--memory", memory, "-o", out,
        )  # fmt: skip
        assert outcome.code == 0, outcome.err
        with Image.open(out) as image:
            assert np.abs(np.int32(image) - np.int32(theirs[0])).mean() < 4


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "w8a8"])
def test_graphs_for_tensorrt_pass_their_checks(precision: str, model: Path, tmp_path: Path) -> None:
    """The build lints each graph; the decoder stays in fp32, as the model asks for."""
    quantization = QuantOptions(calibration_prompts=PROMPTS, quality_prompts=(), steps=2)
    options = BuildOptions("jetson-orin-nano", precision, quantization=quantization)
    made = build(str(model), options, tmp_path / "bundle", LocalFolders(tmp_path / "work"))
    spec = open_bundle(made.bundle.path).manifest.pipeline
    assert not spec.shape.dynamic
    assert spec.components["unet"].inputs[0].shape[0] == 2  # both halves of guidance
    assert any("force_upcast" in str(note) for note in made.notes)
