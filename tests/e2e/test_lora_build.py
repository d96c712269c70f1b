"""`edgesd build --lora`: what a bundle of a merged LoRA holds, says, and draws."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytest.importorskip("peft")

from edgesd.runtime.bundle import Bundle, open_bundle  # noqa: E402
from edgesd.runtime.pipeline import Pipeline  # noqa: E402
from edgesd.runtime.requests import Request  # noqa: E402
from tests.loras import kohya_lora, peft_lora, save  # noqa: E402
from tests.models import EMOJI  # noqa: E402
from tests.support import assert_refused, run_cli  # noqa: E402
from tests.tiny_pipelines import diffusers_images, tiny, write_tiny  # noqa: E402

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("kept_exports", "one_thread")]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("lora")
    save(root / "style.safetensors", kohya_lora(write_and_open(root / "tiny")))
    return root


def write_and_open(folder: Path) -> Any:
    write_tiny("sd", folder)
    return tiny("sd")


@pytest.fixture(scope="module")
def bundle(root: Path, kept_exports: object) -> Bundle:
    arguments = ("--target", "x86-64-cpu", "--size", "32x32", "-o", root / "out")
    made = run_cli("build", root / "tiny", "--lora", root / "style.safetensors:0.5", *arguments)
    assert made.code == 0, made.err
    assert "style.safetensors: merged into " in made.err
    return open_bundle(root / "out")


def test_the_bundle_draws_what_diffusers_draws(bundle: Bundle) -> None:
    theirs = tiny("sd")
    theirs.load_lora_weights(kohya_lora(tiny("sd")))
    theirs.fuse_lora(lora_scale=0.5, components=["unet"])
    options = {"num_inference_steps": 3, "guidance_scale": 3.0}
    wanted = diffusers_images(theirs, ["a cat"], [4], width=32, height=32, **options)[0]
    with Pipeline(bundle) as pipeline:
        found = pipeline.generate([Request("a cat", 4, None, 3, 3.0)])[0]
    assert np.abs(np.int32(found) - np.int32(wanted)).max() <= 1


def test_the_bundle_says_what_was_merged(bundle: Bundle, root: Path, tmp_path: Path) -> None:
    record = bundle.manifest.build
    assert record is not None
    (lora,) = record.loras
    assert (lora.name, lora.scale) == ("style.safetensors", 0.5)
    assert bundle.manifest.licence.name == "unknown; style.safetensors: unknown"
    assert str(root) not in (root / "out" / "bundle.json").read_text()
    told = run_cli("inspect", root / "out")
    assert "style.safetensors:0.5" in told.out
    again = ("build", root / "tiny", "--like", root / "out", "-o", tmp_path / "again", "--json")
    assert_refused(run_cli(*again), "style.safetensors:0.5", "--lora FILE:SCALE")
    made = run_cli(*again, "--lora", root / "style.safetensors:0.5")
    assert made.code == 0, made.err
    assert json.loads(made.out)["differing"] == []


@pytest.mark.slow
def test_the_embedded_model_with_a_lora(tmp_path: Path) -> None:
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(EMOJI, safety_checker=None)
    theirs.set_progress_bar_config(disable=True)
    tensors = peft_lora(theirs, text=True)
    file = save(tmp_path / "style.safetensors", tensors)
    arguments = ("--target", "x86-64-cpu", "-o", tmp_path / "out")
    made = run_cli("build", "demo", "--lora", f"{file}:0.1", *arguments)
    assert made.code == 0, made.err
    request = Request("a red apple", 3, None, 20, 3.0)
    with Pipeline(open_bundle(tmp_path / "out")) as pipeline:
        found = np.asarray(pipeline.generate([request])[0], int)

    def drawn() -> Any:
        options = {"num_inference_steps": 20, "guidance_scale": 3.0}
        return np.asarray(diffusers_images(theirs, ["a red apple"], [3], **options)[0], int)

    plain = drawn()
    theirs.load_lora_weights(tensors)
    theirs.fuse_lora(lora_scale=0.1)
    wanted = drawn()
    assert np.abs(found - wanted).max() <= 1
    assert np.abs(wanted - plain).max() > 20
