"""Where tasks begin: in which order noise is drawn, and what becomes of each draw.

The order is that of diffusers' pipelines; images made by it are compared with theirs in
tests/e2e/test_images_in.py.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import pytest
from PIL import Image

from edgesd.errors import UsageError
from edgesd.runtime.arrays import Float
from edgesd.runtime.denoise import Start
from edgesd.runtime.requests import (
    CompleteRequest,
    Completion,
    Request,
    painted_whole,
    scheduler_of,
)
from edgesd.runtime.tasks import TASKS
from edgesd.runtime.tasks.beginning import Beginning
from edgesd.spec.pipeline import PipelineSpec, Task
from tests.support import CHANNELS, SCALE, for_images, pipeline_spec

SIZE = 12, 16
"""Height and width."""

STEPS = 5


class Draws:
    """Noise whose k-th draw is k everywhere; with what each of the batch asks for."""

    seeds = (1, 2)

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, shape: tuple[int, ...]) -> Float:
        self.shapes.append(shape)
        return np.full(shape, len(self.shapes), np.float32)


class Encoder:
    """Latents of mean 10 times an image's mean, and deviation 100; seen: what was encoded."""

    def __init__(self, moments: bool = True) -> None:
        self.moments, self.seen = moments, list[float]()

    def __call__(self, image: Float) -> Sequence[Float]:
        assert image.shape == (1, 3, *SIZE)
        self.seen.append(round(float(image.mean()), 3))
        latents = np.full((1, CHANNELS, SIZE[0] // SCALE, SIZE[1] // SCALE), 1.0, np.float32)
        mean = latents * np.float32(10 * image.mean())
        return (mean, latents * 100) if self.moments else (mean,)


def spec(concat: bool = False) -> PipelineSpec:
    """The miniature pipeline with an encoder; concat: with a denoiser made for inpainting."""
    found = for_images(pipeline_spec())
    if not concat:
        return found
    denoiser = msgspec.structs.replace(found.wiring.denoiser, concat=("mask", "masked"))
    wiring = msgspec.structs.replace(found.wiring, tasks=("inpaint",), denoiser=denoiser)
    return msgspec.structs.replace(found, wiring=wiring)


def half_mask() -> Image.Image:
    """The right half of an image is painted."""
    mask = Image.new("L", SIZE[::-1], 0)
    mask.paste(255, (SIZE[1] // 2, 0, SIZE[1], SIZE[0]))
    return mask


def begun(
    pipeline: PipelineSpec, task: Task, count: int = 2, moments: bool = True, **asked: Any
) -> tuple[Start, Draws, Encoder, Beginning]:
    """What the task makes of requests for a white image."""
    given: dict[str, Any] = {}
    if task != "text":
        given["image"] = Image.new("RGB", SIZE[::-1], "white")
    if task == "inpaint":
        given["mask"] = half_mask()
    template = Request("a cat", 0, num_inference_steps=STEPS, height=SIZE[0], width=SIZE[1])
    request = Completion(pipeline).complete(replace(template, **(given | asked)))
    draws, encoder = Draws(), Encoder(moments)
    beginning = Beginning(
        pipeline, [request] * count, scheduler_of(pipeline, request), draws, None, encoder
    )
    return TASKS[request.task or "text"].prepare(beginning), draws, encoder, beginning


def draws_of(found: Draws, count: int) -> int:
    """How many there were, each of a whole batch of latents."""
    shape = count, CHANNELS, SIZE[0] // SCALE, SIZE[1] // SCALE
    assert found.shapes == [shape] * len(found.shapes)
    return len(found.shapes)


@pytest.mark.parametrize("count", [1, 2])
def test_text_draws_noise_once(count: int) -> None:
    start, draws, encoder, _ = begun(spec(), "text", count)
    assert (draws_of(draws, count), encoder.seen, start.first_step) == (1, [], 0)
    np.testing.assert_array_equal(start.latents, np.float32(1))


@pytest.mark.parametrize("count", [1, 2])
def test_an_image_is_drawn_before_its_noise(count: int) -> None:
    start, draws, encoder, beginning = begun(spec(), "image", count, strength=0.6)
    assert (draws_of(draws, count), encoder.seen, start.first_step) == (2, [1.0] * count, 2)
    signal, spread = beginning.scheduler.noise_level(2)
    np.testing.assert_allclose(start.latents, signal * (10 + 100 * 1) + spread * 2, rtol=1e-5)
    assert start.after_step is None and not start.given


def test_an_encoder_without_a_deviation_draws_nothing() -> None:
    start, draws, _, beginning = begun(spec(), "image", moments=False, strength=1.0)
    assert draws_of(draws, 2) == 1
    signal, spread = beginning.scheduler.noise_level(0)
    np.testing.assert_allclose(start.latents, signal * 10 + spread * 1, rtol=1e-5)


@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_an_inpainted_image_is_drawn_first_and_what_is_masked_last(strength: float) -> None:
    start, draws, encoder, beginning = begun(spec(), "inpaint", strength=strength)
    assert draws_of(draws, 2) == 3
    assert encoder.seen == [1.0, 1.0, 0.5, 0.5]  # what is painted is grey
    scheduler, first = beginning.scheduler, start.first_step
    latents = 10 + 100 * 1
    signal, spread = scheduler.noise_level(first) if strength < 1 else (0, 1)
    np.testing.assert_allclose(start.latents, signal * latents + spread * 2, rtol=1e-5)
    assert start.after_step is not None
    sample = np.full_like(start.latents, -5)
    for at in range(first, STEPS):
        kept = start.after_step(at, sample)
        half = kept.shape[3] // 2
        np.testing.assert_array_equal(kept[..., half:], np.float32(-5))
        signal, spread = scheduler.noise_level(at + 1) if at + 1 < STEPS else (1, 0)
        np.testing.assert_allclose(kept[..., :half], signal * latents + spread * 2, rtol=1e-5)


@pytest.mark.parametrize(("strength", "drawn"), [(1.0, 2), (0.9999, 3), (0.6, 3)])
def test_a_model_for_inpainting_is_given_the_mask_and_the_rest(strength: float, drawn: int) -> None:
    """An image whose latents nothing needs isn't drawn."""
    start, draws, encoder, beginning = begun(spec(concat=True), "inpaint", strength=strength)
    assert draws_of(draws, 2) == drawn
    assert encoder.seen == ([] if strength == 1 else [1.0, 1.0]) + [0.5, 0.5]
    np.testing.assert_allclose(start.given["masked"], 5 + 100 * drawn, rtol=1e-5)
    mask = start.given["mask"]
    half = mask.shape[3] // 2
    assert mask.shape == (2, 1, *start.latents.shape[2:])
    assert not mask[..., :half].any() and (mask[..., half:] == 1).all()
    signal, spread = beginning.scheduler.noise_level(start.first_step) if drawn == 3 else (0, 1)
    wanted = signal * (10 + 100 * 1) + spread * (drawn - 1)
    np.testing.assert_allclose(start.latents, wanted, rtol=1e-5)
    assert start.after_step is None


IMAGE = Image.new("RGB", (21, 13), "white")
ONLY_TEXT, ALL, INPAINTING = pipeline_spec(), spec(), spec(concat=True)


@pytest.mark.parametrize(
    ("pipeline", "asked", "words"),
    [
        (ONLY_TEXT, {"image": IMAGE}, "doesn't begin with an image: build it with --task image"),
        (
            msgspec.structs.replace(
                ALL, wiring=msgspec.structs.replace(ALL.wiring, tasks=("image",))
            ),
            {"image": IMAGE, "mask": IMAGE},
            "doesn't inpaint: build it with --task inpaint",
        ),
        (INPAINTING, {"image": IMAGE}, "is for inpainting alone: give --mask"),
        (ALL, {"mask": IMAGE}, "a mask goes with an image: give --image"),
        (ALL, {"strength": 0.5}, "strength goes with an image"),
        (ALL, {"mask_blur": 4}, "mask_blur goes with an image"),
        (ALL, {"mask_padding": 4}, "mask_padding goes with an image"),
        (ALL, {"image": IMAGE, "mask_blur": 4}, "go with a mask: give --mask"),
        (ALL, {"image": IMAGE, "strength": 0.0}, "strength must be above 0, up to 1, not 0"),
        (ALL, {"image": IMAGE, "strength": 1.5}, "strength must be above 0, up to 1, not 1.5"),
        (ALL, {"image": IMAGE, "strength": float("nan")}, "up to 1, not nan"),
        (ALL, {"image": IMAGE, "strength": 0.1}, "strength 0.1 leaves no step of 4"),
        (
            ALL,
            {"image": IMAGE, "mask": IMAGE, "denoising_end": 0.8},
            "leave --refiner or --mask out",
        ),
        (ALL, {"image": IMAGE, "mask": IMAGE, "mask_blur": -1}, "mask blur must be 0 to"),
        (ALL, {"image": IMAGE, "mask": IMAGE, "mask_padding": 1 << 20}, "mask padding must be"),
    ],
)
def test_what_does_not_go_together_is_refused(
    pipeline: PipelineSpec, asked: dict[str, Any], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        Completion(pipeline).complete(Request("a cat", 1, **asked))


def completed(**asked: Any) -> CompleteRequest:
    return Completion(ALL).complete(Request("a cat", 1, **asked))


def test_an_image_gives_its_size_and_the_task_its_strength() -> None:
    found = completed(image=IMAGE)
    assert (found.width, found.height, found.strength, found.task) == (20, 12, 0.8, "image")
    assert (found.mask_blur, found.pasted) == (None, False)
    found = completed(image=IMAGE, mask=Image.new("L", IMAGE.size, 255), mask_padding=0)
    assert (found.strength, found.task, found.pasted) == (1.0, "inpaint", True)
    assert completed(image=IMAGE, width=8, height=8).width == 8
    assert completed(image=IMAGE, width=8).height == 16  # the bundle's own
    text = completed()
    assert (text.task, text.strength, text.width) == (None, None, 16)


def test_a_pipeline_for_inpainting_is_measured_on_images_that_are_painted_whole() -> None:
    found = Completion(INPAINTING).complete(painted_whole(INPAINTING, Request("a cat", 1)))
    assert (found.task, found.strength, found.width) == ("inpaint", 1.0, 16)
    painted = found.painting()
    assert painted is not None and painted.arrays()[1].all()
    own = Request("a cat", 1)
    assert painted_whole(ALL, own) is own


def test_pictures_that_were_checked_are_not_kept() -> None:
    completion = Completion(ALL)
    mask = Image.new("L", IMAGE.size, 255)
    found = completion.complete(Request("a cat", 1, image=IMAGE, mask=mask))
    kept = [weakref.ref(picture) for picture in (found.image, found.mask) if picture]
    del found
    gc.collect()
    assert [one() for one in kept] == [None, None]
