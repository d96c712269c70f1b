"""Image to image and inpainting make diffusers' images, and draw noise in its order.

The networks are the torch modules that would be exported, as in test_same_images.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFilter

pytest.importorskip("torch")

import onnx
import torch

from edgesd.errors import ParityError, UsageError
from edgesd.export.source import resolve_source
from edgesd.recipes import LocalFolders, build
from edgesd.recipes.fp16_ranges import LIMIT
from edgesd.recipes.notes import KeptInFp32
from edgesd.runtime.tasks import inpaint
from edgesd.spec.build import BuildOptions
from edgesd.spec.pipeline import ImageTask
from tests.image_tasks import OBLONG, PROMPTS, SEEDS, SQUARE, STEPS, Both, both, mask, picture
from tests.support import run_cli
from tests.tiny_pipelines import tiny, write_tiny

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

Open = Callable[[str], Both]


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Open]:
    """Opens tiny pipelines by their names, each once; holds them to diffusers' own pipelines."""
    kept: dict[str, Both] = {}

    def open_one(name: str) -> Both:
        if name not in kept:
            folder = tmp_path_factory.mktemp(name)
            source = resolve_source(write_tiny(name, folder / "model"))
            kept[name] = both(source, tiny(name), folder / "bundle")
            kept[name].check_own_pipeline()
        return kept[name]

    yield open_one
    for each in kept.values():
        each.ours.close()


def slow(*names: str) -> list[Any]:
    return [pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("task", ["image", "inpaint"])
@pytest.mark.parametrize(
    "name",
    [
        *("sd", "sdxl", "flux-dev"),
        *slow("flux-schnell"),
        *slow("sd2-v", "sd-turbo", "lcm", "sdxl-turbo", "sdxl-refiner", "sdxl-encoded-negative"),
        *slow("sdxl-lcm", "sdxl-lcm-lora", "sdxl-pruned"),
    ],
)
def test_images_are_those_of_diffusers(name: str, task: ImageTask, opened: Open) -> None:
    """By the model's own sampler and strength, and by others."""
    pair = opened(name)
    assert pair.difference(task, 2, OBLONG) <= 1
    assert pair.difference(task, 1, SQUARE, strength=0.5) <= 1
    assert pair.difference(task, 1, OBLONG, strength=1.0) <= 1


@pytest.mark.slow
def test_latents_of_a_mean_and_deviation_of_each_channel(opened: Open) -> None:
    """Where diffusers' pipeline for inpainting leaves these out."""
    assert opened("sdxl-per-channel").difference("image", 2) <= 1


@pytest.mark.parametrize("name", ["sd-inpaint", "sdxl-inpaint"])
def test_a_model_for_inpainting_makes_images_of_diffusers(name: str, opened: Open) -> None:
    pair = opened(name)
    assert pair.difference("inpaint", 2) <= 1
    assert pair.difference("inpaint", 1, SQUARE, strength=0.3) <= 1
    assert pair.difference("inpaint", 2, OBLONG, strength=0.8) <= 1
    assert pair.difference("inpaint", 1, OBLONG, strength=1.0) <= 1


@pytest.mark.parametrize(
    "sampler", ["ddim", "euler", "euler-a", "dpmpp-2m", "lcm", *slow("pndm", "heun", "unipc")]
)
@pytest.mark.parametrize(
    ("name", "task"),
    [("sd", "inpaint"), pytest.param("sdxl", "image", marks=pytest.mark.slow)],
)
def test_samplers_begin_in_the_middle(
    name: str, task: ImageTask, sampler: str, opened: Open
) -> None:
    pair = opened(name)
    for strength in 0.3, 0.8, 1.0:
        assert pair.difference(task, 2, scheduler=sampler, strength=strength) <= 1


def test_a_mask_that_is_turned_around_is_noticed(
    opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = opened("sd-inpaint")
    right = inpaint.latent_mask
    monkeypatch.setattr(inpaint, "latent_mask", lambda mask, *size: 1 - right(mask, *size))
    assert pair.difference("inpaint") > 1
    with pytest.raises(ParityError, match="the sample of step 1"):
        pair.check_own_pipeline()


@pytest.mark.parametrize("count", [1, 2])
def test_what_a_mask_does_not_cover_keeps_its_bits(count: int, opened: Open) -> None:
    """With a blurred mask, or what lies around it drawn alone; without either it is decoded."""
    pair = opened("sd")
    requests = pair.requests("inpaint", count, SQUARE)
    cases: list[dict[str, Any]] = [{"mask_blur": 0}, {"mask_blur": 2}, {"mask_padding": 4}, {}]
    for asked in cases:
        found = pair.ours.generate([replace(request, **asked) for request in requests])
        for k, image in enumerate(found):
            given, blurred = np.asarray(picture(k, SQUARE)), mask(k, SQUARE)
            if asked.get("mask_blur"):
                blurred = blurred.filter(ImageFilter.GaussianBlur(asked["mask_blur"]))
            kept = np.asarray(blurred) == 0
            same = (np.asarray(image) == given).all(axis=2)
            assert kept.any() and same[kept].all() == bool(asked)
            assert not same[~kept].all()


def test_images_of_one_batch_all_begin_with_one_or_none(opened: Open) -> None:
    pair = opened("sd")
    (image,) = pair.requests("image", 1, SQUARE)
    (masked,) = pair.requests("inpaint", 1, SQUARE, strength=0.8)
    with pytest.raises(UsageError, match="must all begin with an image, or none"):
        pair.ours.generate([image, masked])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "precision"), [("sd", "fp32"), ("sd-inpaint", "w8a8")])
def test_a_build_for_inpainting_paints_from_the_command_line(
    name: str, precision: str, tmp_path: Path
) -> None:
    model, bundle, out = write_tiny(name, tmp_path / name), tmp_path / "bundle", tmp_path / "a.png"
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    asked = ["--target", "x86-64-cpu", "--task", "inpaint", "--work", tmp_path / "work"]
    if precision != "fp32":
        asked += ["--precision", precision, "--no-quality", "--calibration-prompts", prompts]
    built = run_cli("build", model, *asked, "-o", bundle)
    assert built.code == 0, built.err
    picture(0, OBLONG).save(tmp_path / "image.png")
    mask(0, OBLONG).save(tmp_path / "mask.png")
    made = run_cli(
        "generate", bundle, "-p", PROMPTS[0], "--seed", SEEDS[0], "--steps", STEPS,
        "--image", tmp_path / "image.png", "--mask", tmp_path / "mask.png", "-o", out,
    )  # fmt: skip
    assert made.code == 0, made.err
    pair = both(resolve_source(model), tiny(name), tmp_path / "torch")
    with pair.ours:
        (wanted,) = pair.wanted("inpaint", 1, OBLONG)
    with Image.open(out) as found:
        off = np.abs(np.int32(found) - np.int32(wanted))
    assert off.max() <= 1 if precision == "fp32" else off.mean() < 4


@pytest.mark.slow
def test_values_of_an_encoder_that_fp16_cannot_hold_stay_in_fp32(tmp_path: Path) -> None:
    """They are found with an image that the build begins another one with."""
    pipeline = tiny("sd")
    with torch.no_grad():
        pipeline.vae.encoder.conv_in.bias[0] += 5e4
    pipeline.save_pretrained(tmp_path / "model")
    options = BuildOptions("jetson-orin-nano", "fp16", tasks=("image",))
    made = build(
        str(tmp_path / "model"), options, tmp_path / "bundle", LocalFolders(tmp_path / "work")
    )
    kept = {note.component: note for note in made.notes if isinstance(note, KeptInFp32)}
    assert kept.keys() == {"vae_encoder"} and kept["vae_encoder"].largest > LIMIT
    graph = onnx.load(tmp_path / "bundle" / "vae_encoder" / "model.onnx", load_external_data=False)
    types = {each.name: each.data_type for each in graph.graph.initializer}
    found = Counter(
        types[name]
        for node in graph.graph.node
        if node.op_type == "Conv"
        for name in node.input[1:2]
    )
    assert found[onnx.TensorProto.FLOAT] and found[onnx.TensorProto.FLOAT16]
