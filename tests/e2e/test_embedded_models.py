"""The pipelines in models/: what they hold, and that edgesd makes diffusers' images with them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from edgesd.export.pipeline import export_spec
from edgesd.export.source import ModelSource, resolve_source
from edgesd.recipes import demo_model
from edgesd.runtime.pipeline import Pipeline
from edgesd.runtime.requests import Micro, Request
from edgesd.spec.build import EMBEDDED
from tests.support import run_cli
from tests.tiny_pipelines import diffusers_images, on_torch

PROMPTS = ("a red apple", "butterfly", "blue octopus", "house with garden")
MAX_BYTES = 20e6


def opened(name: str) -> ModelSource:
    return resolve_source(demo_model(name))


@pytest.fixture(scope="module", params=EMBEDDED)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def ours(name: str, tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    """edgesd's pipeline of an embedded model, on torch."""
    source = opened(name)
    return on_torch(source, export_spec(source), tmp_path_factory.mktemp(name) / "bundle")


def test_it_is_small_and_brings_its_notices_and_prompts(name: str) -> None:
    folder = demo_model(name)
    sizes = {path: path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    assert sum(sizes.values()) <= MAX_BYTES
    for licence in ("Apache-2.0.txt", "MIT-fluent-emoji.txt", "Unicode-3.0.txt"):
        assert folder / "LICENSES" / licence in sizes
        assert f"LICENSES/{licence}" in (folder / "NOTICE").read_text()
    source = opened(name)
    assert len(source.prompts("calibration") or ()) == 16
    assert len(source.prompts("quality") or ()) == 64


def test_the_card_is_of_these_weights(name: str) -> None:
    card = (demo_model(name) / "README.md").read_text(encoding="utf-8")
    assert opened(name).sha256() in card
    hints = json.loads((demo_model(name) / "edgesd.json").read_text())
    assert f"num_inference_steps={hints['num_inference_steps']}" in card
    assert f"guidance_scale={hints['guidance_scale']}" in card


def test_its_images_are_those_of_diffusers(name: str, ours: Pipeline) -> None:
    diffusers = pytest.importorskip("diffusers")
    hints = json.loads((demo_model(name) / "edgesd.json").read_text())
    theirs = diffusers.DiffusionPipeline.from_pretrained(demo_model(name))
    theirs.set_progress_bar_config(disable=True)
    options = {**hints, "num_inference_steps": 4}
    if ours.spec.family == "flux":  # diffusers pads to 512 tokens unless it is told
        options["max_sequence_length"] = ours.spec.wiring.tokenizers["tokenizer_2"].max_tokens
    wanted = diffusers_images(theirs, PROMPTS[:2], [3, 4], **options)
    requests = [
        Request(prompt, seed, num_inference_steps=4)
        for prompt, seed in zip(PROMPTS, (3, 4), strict=False)
    ]
    for made, right in zip(ours.generate(requests), wanted, strict=True):
        difference = np.int32(made) - np.int32(right)
        assert np.abs(difference).max() <= 1


def sharpness(pixels: npt.NDArray[np.uint8]) -> float:
    """Mean difference of neighbours that are two pixels apart along both axes, 0 to 255."""
    grey = pixels.astype(np.float32).mean(axis=2)
    return float(np.abs(np.diff(grey, 2, axis=0)).mean() + np.abs(np.diff(grey, 2, axis=1)).mean())


@pytest.fixture(scope="module")
def xl(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    source = opened("emoji-xl")
    return on_torch(source, export_spec(source), tmp_path_factory.mktemp("xl") / "bundle")


def drawn(pipeline: Pipeline, micro: Micro) -> list[npt.NDArray[np.uint8]]:
    requests = [
        Request(prompt, seed, num_inference_steps=8, micro=micro)
        for seed, prompt in enumerate(PROMPTS)
    ]
    return [np.asarray(image) for image in pipeline.generate(requests)]


def test_a_small_original_size_gives_soft_images(xl: Pipeline) -> None:
    plain, soft = (
        np.array([sharpness(pixels) for pixels in drawn(xl, Micro(original_size=(side, side)))])
        for side in (128, 20)
    )
    kept = soft / plain
    # 0.81; of pictures that are soft themselves the decoder gives back 0.82.
    assert kept.mean() < 0.88
    assert kept.max() < 0.99


def test_a_crop_moves_the_image_up_and_left(xl: Pipeline) -> None:
    def centre(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
        """Of what isn't white: column and row, in pixels."""
        ink = 255.0 - pixels.mean(axis=2)
        places = np.indices(ink.shape)[::-1]
        return (places * ink).sum(axis=(1, 2)) / ink.sum()

    plain, cropped = (
        [centre(pixels) for pixels in drawn(xl, Micro(crop=crop))] for crop in ((0, 0), (14, 14))
    )
    moved = np.subtract(cropped, plain).mean(axis=0)
    assert (moved < -6).all()


@pytest.mark.slow
@pytest.mark.usefixtures("kept_exports")
@pytest.mark.parametrize("model", EMBEDDED[1:])
def test_demo_builds_it_and_generates(model: str, tmp_path: Path) -> None:
    outcome = run_cli("demo", "--model", model, "-o", tmp_path / "out")
    assert outcome.code == 0, outcome.err
    assert f"the embedded pipeline {model}" in outcome.err
    images = sorted((tmp_path / "out" / "images").iterdir())
    assert len(images) == 8
    for path in images:
        assert np.asarray(Image.open(path)).std() > 20  # not one flat colour
