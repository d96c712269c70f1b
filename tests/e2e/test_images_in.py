"""Image to image and inpainting make diffusers' images, and draw noise in its order.

The networks are the torch modules that would be exported, as in test_same_images.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFilter

pytest.importorskip("torch")

import diffusers

from edgesd.errors import ParityError, UsageError
from edgesd.export.families import ExportSpec
from edgesd.export.own_pipeline import check_own_pipeline
from edgesd.export.pipeline import export_spec
from edgesd.export.source import resolve_source
from edgesd.runtime.pipeline import Pipeline
from edgesd.runtime.requests import Request
from edgesd.runtime.schedulers import preset, sampler_class
from edgesd.runtime.tasks import inpaint
from edgesd.runtime.tokenizer import PromptTokenizer, tokenizer_of
from edgesd.spec.pipeline import ImageTask
from tests.support import run_cli
from tests.tiny_pipelines import diffusers_images, on_torch, tiny, write_tiny

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

STEPS = 6
PROMPTS, SEEDS = ("a red apple", "the blue cat"), (5, 6)
SQUARE, OBLONG = (32, 32), (40, 24)
"""Width and height."""

CLASSES: dict[tuple[str, ImageTask], Any] = {
    ("sd", "image"): diffusers.StableDiffusionImg2ImgPipeline,
    ("sd", "inpaint"): diffusers.StableDiffusionInpaintPipeline,
    ("sdxl", "image"): diffusers.StableDiffusionXLImg2ImgPipeline,
    ("sdxl", "inpaint"): diffusers.StableDiffusionXLInpaintPipeline,
}


def picture(index: int, size: tuple[int, int]) -> Image.Image:
    """An image of colours that run smoothly, another for each index."""
    width, height = size
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / (5 + index) + phase) * np.cos(y / 7 - phase) for phase in (0, 1, 2)]
    return Image.fromarray((127.5 * (1 + np.stack(waves, 2))).astype(np.uint8))


def mask(index: int, size: tuple[int, int]) -> Image.Image:
    """A box within an image, with a grey edge."""
    width, height = size
    values = np.zeros((height, width), np.uint8)
    values[4 + index : height // 2 + 5, width // 3 :] = 255
    values[4 + index, :] = 100
    return Image.fromarray(values)


@dataclass
class Both:
    """A tiny pipeline of diffusers, and edgesd's of it."""

    theirs: Any
    ours: Pipeline
    export: ExportSpec
    tokenizers: Mapping[str, PromptTokenizer]

    def wanted(self, task: ImageTask, count: int, size: tuple[int, int], **asked: Any) -> list[Any]:
        """diffusers' images, of its pipeline for the task. asked: of its call."""
        cls = CLASSES[self.ours.spec.family, task]
        sampler = asked.get("scheduler", self.ours.spec.scheduler.name)
        distilled = isinstance(self.theirs, diffusers.LatentConsistencyModelPipeline)
        if distilled and (task, sampler) == ("image", "lcm"):
            cls = diffusers.LatentConsistencyModelImg2ImgPipeline
        config = self.theirs.config
        options: dict[str, Any] = {"requires_safety_checker": False}
        if self.ours.spec.family == "sdxl":
            forced = config.force_zeros_for_empty_prompt
            options = {"force_zeros_for_empty_prompt": forced, "add_watermarker": False}
            options["requires_aesthetics_score"] = config.get("requires_aesthetics_score", False)
        pipeline = cls(**self.theirs.components, **options)
        pipeline.set_progress_bar_config(disable=True)
        own = getattr(diffusers, sampler_class(sampler))
        # As saved and read again: a file gives all options.
        known = dict(pipeline.scheduler.config) | {"_use_default_values": []}
        pipeline.scheduler = own.from_config(known, **preset(sampler))
        given: dict[str, Any] = {"image": [picture(k, size) for k in range(count)]}
        if task == "inpaint":
            masks = [mask(k, size) for k in range(count)]
            given |= {"mask_image": masks, "width": size[0], "height": size[1]}
        if "strength" in asked:
            given["strength"] = asked["strength"]
        return diffusers_images(
            pipeline, PROMPTS[:count], SEEDS[:count], num_inference_steps=STEPS,
            guidance_scale=asked.get("guidance_scale", self.ours.spec.guidance_scale), **given,
        )  # fmt: skip

    def requests(
        self, task: ImageTask, count: int, size: tuple[int, int], **asked: Any
    ) -> list[Request]:
        return [
            Request(
                PROMPTS[k], SEEDS[k], num_inference_steps=STEPS, image=picture(k, size),
                mask=mask(k, size) if task == "inpaint" else None, **asked,
            )
            for k in range(count)
        ]  # fmt: skip

    def difference(
        self, task: ImageTask, count: int = 1, size: tuple[int, int] = OBLONG, **asked: Any
    ) -> int:
        """The largest difference of `count` images in one batch from diffusers', 0 to 255."""
        wanted = self.wanted(task, count, size, **asked)
        found = self.ours.generate(self.requests(task, count, size, **asked))
        pairs = zip(found, wanted, strict=True)
        return max(int(np.abs(np.int32(one) - np.int32(other)).max()) for one, other in pairs)


Open = Callable[[str], Both]


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Open]:
    """Opens tiny pipelines by their names, each once; holds them to diffusers' own pipelines."""
    kept: dict[str, Both] = {}

    def open_one(name: str) -> Both:
        if name not in kept:
            folder = tmp_path_factory.mktemp(name)
            source = resolve_source(write_tiny(name, folder / "model"))
            export = export_spec(source, tasks=("inpaint",))
            ours = on_torch(source, export, folder / "bundle")
            folders = ours.spec.wiring.tokenizers
            tokenizers = {each: tokenizer_of(ours.bundle, each) for each in folders}
            check_own_pipeline(export, tokenizers)
            kept[name] = Both(tiny(name), ours, export, tokenizers)
        return kept[name]

    yield open_one
    for both in kept.values():
        both.ours.close()


def slow(*names: str) -> list[Any]:
    return [pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("task", ["image", "inpaint"])
@pytest.mark.parametrize(
    "name",
    [
        *("sd", "sdxl"),
        *slow("sd2-v", "sd-turbo", "lcm", "sdxl-turbo", "sdxl-refiner", "sdxl-encoded-negative"),
        *slow("sdxl-lcm", "sdxl-lcm-lora", "sdxl-pruned"),
    ],
)
def test_images_are_those_of_diffusers(name: str, task: ImageTask, opened: Open) -> None:
    """By the model's own sampler and strength, and by others."""
    both = opened(name)
    assert both.difference(task, 2, OBLONG) <= 1
    assert both.difference(task, 1, SQUARE, strength=0.5) <= 1
    assert both.difference(task, 1, OBLONG, strength=1.0) <= 1


@pytest.mark.slow
def test_latents_of_a_mean_and_deviation_of_each_channel(opened: Open) -> None:
    """Where diffusers' pipeline for inpainting leaves these out."""
    assert opened("sdxl-per-channel").difference("image", 2) <= 1


@pytest.mark.parametrize("name", ["sd-inpaint", "sdxl-inpaint"])
def test_a_model_for_inpainting_makes_images_of_diffusers(name: str, opened: Open) -> None:
    both = opened(name)
    assert both.difference("inpaint", 2) <= 1
    assert both.difference("inpaint", 1, SQUARE, strength=0.3) <= 1
    assert both.difference("inpaint", 2, OBLONG, strength=0.8) <= 1
    assert both.difference("inpaint", 1, OBLONG, strength=1.0) <= 1


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
    both = opened(name)
    for strength in 0.3, 0.8, 1.0:
        assert both.difference(task, 2, scheduler=sampler, strength=strength) <= 1


def test_a_mask_that_is_turned_around_is_noticed(
    opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = opened("sd-inpaint")
    right = inpaint.latent_mask
    monkeypatch.setattr(inpaint, "latent_mask", lambda mask, *size: 1 - right(mask, *size))
    assert both.difference("inpaint") > 1
    with pytest.raises(ParityError, match="the sample of step 1"):
        check_own_pipeline(both.export, both.tokenizers)


@pytest.mark.parametrize("count", [1, 2])
def test_what_a_mask_does_not_cover_keeps_its_bits(count: int, opened: Open) -> None:
    """With a blurred mask, or what lies around it drawn alone; without either it is decoded."""
    both = opened("sd")
    requests = both.requests("inpaint", count, SQUARE)
    cases: list[dict[str, Any]] = [{"mask_blur": 0}, {"mask_blur": 2}, {"mask_padding": 4}, {}]
    for asked in cases:
        found = both.ours.generate([replace(request, **asked) for request in requests])
        for k, image in enumerate(found):
            given, blurred = np.asarray(picture(k, SQUARE)), mask(k, SQUARE)
            if asked.get("mask_blur"):
                blurred = blurred.filter(ImageFilter.GaussianBlur(asked["mask_blur"]))
            kept = np.asarray(blurred) == 0
            same = (np.asarray(image) == given).all(axis=2)
            assert kept.any() and same[kept].all() == bool(asked)
            assert not same[~kept].all()


def test_images_of_one_batch_all_begin_with_one_or_none(opened: Open) -> None:
    both = opened("sd")
    (image,) = both.requests("image", 1, SQUARE)
    (masked,) = both.requests("inpaint", 1, SQUARE, strength=0.8)
    with pytest.raises(UsageError, match="must all begin with an image, or none"):
        both.ours.generate([image, masked])


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
    source = resolve_source(model)
    export = export_spec(source, tasks=("inpaint",))
    with on_torch(source, export, tmp_path / "torch") as ours:
        both = Both(tiny(name), ours, export, {})
        (wanted,) = both.wanted("inpaint", 1, OBLONG)
    with Image.open(out) as found:
        off = np.abs(np.int32(found) - np.int32(wanted))
    assert off.max() <= 1 if precision == "fp32" else off.mean() < 4
