"""What models/ has beside pipelines of prompts: a model for inpainting, a ControlNet, LoRAs."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from edgesd.errors import InputError
from edgesd.export.pipeline import export_spec
from edgesd.export.source import resolve_source
from edgesd.recipes import demo_model
from edgesd.recipes.demo import TASK_DEMOS, Demo
from edgesd.recipes.sources import open_model
from edgesd.runtime.pictures import read_picture
from edgesd.runtime.requests import Control, Request
from tests.support import run_cli
from tests.tiny_pipelines import diffusers_images, on_torch

MODELS = demo_model().parent
SKETCH = MODELS / "emoji-sketch"
ADAPTER = "pytorch_lora_weights.safetensors"
LORAS = ("emoji-line-art", "emoji-duotone", "emoji-lcm-lora")
WEIGHTS = {"emoji-sketch": "diffusion_pytorch_model.safetensors", **dict.fromkeys(LORAS, ADAPTER)}
PROMPTS, SEEDS = ("a peach", "a red balloon"), (3, 4)
MOST_BYTES = 8e6


@pytest.fixture(scope="module")
def pipe() -> Any:
    """diffusers' pipeline of the embedded model."""
    diffusers = pytest.importorskip("diffusers")
    made = diffusers.DiffusionPipeline.from_pretrained(demo_model())
    made.set_progress_bar_config(disable=True)
    return made


@pytest.mark.parametrize("name", WEIGHTS)
def test_it_is_small_and_its_card_is_of_these_weights(name: str) -> None:
    folder = MODELS / name
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= MOST_BYTES
    for licence in ("Apache-2.0.txt", "MIT-fluent-emoji.txt", "Unicode-3.0.txt"):
        assert (folder / "LICENSES" / licence).is_file()
        assert f"LICENSES/{licence}" in (folder / "NOTICE").read_text()
    content = (folder / WEIGHTS[name]).read_bytes()
    assert hashlib.sha256(content).hexdigest() in (folder / "README.md").read_text()


def differences(ours: list[Any], theirs: list[Any]) -> list[int]:
    """Largest difference of each image's pixels."""
    pairs = zip(ours, theirs, strict=True)
    return [int(np.abs(np.int32(one) - np.int32(other)).max()) for one, other in pairs]


@pytest.mark.parametrize("name", LORAS)
def test_images_with_a_lora_are_those_of_diffusers(name: str, tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DiffusionPipeline.from_pretrained(demo_model())
    theirs.set_progress_bar_config(disable=True)
    file = MODELS / name / ADAPTER
    options = {"num_inference_steps": 4, "guidance_scale": 3.0}
    plain = diffusers_images(theirs, PROMPTS, SEEDS, **options)
    theirs.load_lora_weights(file.parent)
    theirs.fuse_lora(components=["unet"])
    wanted = diffusers_images(theirs, PROMPTS, SEEDS, **options)
    assert min(differences(plain, wanted)) > 50
    source = open_model("demo", variant="base", loras=[str(file)])
    with on_torch(source, export_spec(source), tmp_path / "bundle") as ours:
        requests = [
            Request(prompt, seed, num_inference_steps=4, guidance_scale=3.0)
            for prompt, seed in zip(PROMPTS, SEEDS, strict=True)
        ]
        assert max(differences([*ours.generate(requests)], wanted)) <= 1


def test_the_lora_of_few_steps_says_so() -> None:
    file = MODELS / "emoji-lcm-lora" / ADAPTER
    spec = export_spec(open_model("demo", loras=[str(file)])).pipeline
    assert spec.scheduler.name == "lcm"
    assert (spec.num_inference_steps, spec.guidance_scale) == (4, 1.0)


def test_the_model_for_inpainting_is_the_embedded_one_with_more_inputs() -> None:
    folder = demo_model("emoji-inpaint")
    source = resolve_source(str(folder))
    assert source.sha256() in (folder / "README.md").read_text()
    assert [*export_spec(source).pipeline.wiring.tasks] == ["inpaint"]
    for name in ("text_encoder/model", "vae/diffusion_pytorch_model"):
        file = f"{name}.safetensors"
        assert (folder / file).read_bytes() == (demo_model() / file).read_bytes()
    assert (folder / "unet" / WEIGHTS["emoji-sketch"]).stat().st_size < 8.6e6


@pytest.mark.parametrize("model", ["emoji", "emoji-inpaint"])
def test_what_the_mask_leaves_keeps_its_bits(model: str, tmp_path: Path) -> None:
    demo = replace(TASK_DEMOS["inpaint"], mask_blur=None)
    asked = replace(demo.request(3), prompt=demo.prompts[0], num_inference_steps=4)
    source = open_model(str(demo_model(model)))
    spec = export_spec(source, tasks=("inpaint",) if model == "emoji" else ())
    with on_torch(source, spec, tmp_path / "bundle") as ours:
        blurred = ours.complete(replace(asked, mask_blur=4.0))
        whole, pasted = (
            np.asarray(next(iter(ours.generate([one]))), np.int32) for one in (asked, blurred)
        )
    painting = blurred.painting()
    assert painting
    kept = np.asarray(painting.mask) == 0
    assert 0.3 < kept.mean() < 0.7
    with Image.open(demo.files["image"]) as opened:
        given = np.asarray(opened, np.int32)
    assert (pasted == given)[kept].all()
    assert np.abs(pasted - given)[~kept].max() > 100
    error = np.square(whole - given)[kept].mean()
    assert 0 < error < 255**2 / 100  # 20 dB: as the autoencoder gives it back


def test_sketched_images_are_those_of_diffusers(pipe: Any, tmp_path: Path) -> None:
    from diffusers import ControlNetModel, StableDiffusionControlNetPipeline

    sketch = SKETCH / "example" / "sketch.png"
    theirs = StableDiffusionControlNetPipeline(
        **pipe.components,
        controlnet=ControlNetModel.from_pretrained(SKETCH, torch_dtype=torch.float32),
        requires_safety_checker=False,
    )
    theirs.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 4, "guidance_scale": 3.0, "height": 128, "width": 128}
    with Image.open(sketch) as opened:
        hint = opened.convert("RGB")
    wanted = diffusers_images(theirs, PROMPTS, SEEDS, image=[hint] * 2, **options)

    source = open_model("demo", sides=[("controlnet", str(SKETCH))])
    ours = on_torch(source, export_spec(source), tmp_path / "bundle")
    controls = (Control(read_picture(sketch)),)
    requests = [
        Request(prompt, seed, num_inference_steps=4, controls=controls)
        for prompt, seed in zip(PROMPTS, SEEDS, strict=True)
    ]
    assert max(differences([*ours.generate(requests)], wanted)) <= 1
    plain = diffusers_images(pipe, PROMPTS, SEEDS, **options)
    assert min(differences(plain, wanted)) > 100


@pytest.mark.parametrize("task", TASK_DEMOS)
def test_a_task_of_the_demo_says_which_model(task: str) -> None:
    outcome = run_cli("demo", "--task", task, "--model", "emoji-xl")
    assert outcome.code == 2
    assert f"--task {task} says which model: leave --model out" in outcome.err


def test_bundles_of_the_demo_are_told_apart_by_all_that_they_are_built_of() -> None:
    sketch = TASK_DEMOS["sketch"]
    assert sketch.sha256() != replace(sketch, controlnet=None).sha256()


def test_examples_of_the_demo_are_part_of_the_checkout() -> None:
    told = "none of the embedded models is part of the source checkout"
    with pytest.raises(InputError, match=told):
        Demo("emoji", (), pictures={"image": "none"}).request(0)
    with pytest.raises(InputError, match=told):
        Demo("emoji", (), controlnet="none").sha256()


@pytest.mark.slow
@pytest.mark.usefixtures("kept_exports")
@pytest.mark.parametrize("task", TASK_DEMOS)
def test_demo_builds_for_a_task_and_generates(task: str, tmp_path: Path) -> None:
    outcome = run_cli("demo", "--task", task, "-o", tmp_path / "out")
    assert outcome.code == 0, outcome.err
    demo = TASK_DEMOS[task]
    images = sorted((tmp_path / "out" / "images").iterdir())
    assert len(images) == len(demo.prompts)
    assert len(images) + len(demo.pictures) == 8  # all on one sheet
    drawn = [np.asarray(Image.open(path)).astype(np.int32) for path in images]
    assert all(each.std() > 20 for each in drawn)  # not one flat colour
    if task == "inpaint":
        given = np.asarray(Image.open(demo.files["image"])).astype(np.int32)
        assert all((each[100:] == given[100:]).all() for each in drawn)  # below the mask
        assert all(np.abs(each - given).max() > 100 for each in drawn)
    again = run_cli("demo", "--task", task, "-o", tmp_path / "out")
    assert again.code == 0, again.err
    assert "using the bundle" in again.err
