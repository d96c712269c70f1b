"""What a bundle is compared with: images of prompts, and of pictures where it has such tasks."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
from PIL import Image

pytest.importorskip("torch")

from edgesd.evaluate.quality import requests_for, task_of
from edgesd.progress import SILENT
from edgesd.recipes.comparison import Comparison, Measured, worst_places
from edgesd.recipes.gates import WORST, Judging
from edgesd.runtime.requests import Request
from edgesd.spec.pipeline import DenoiserSpec, EncoderSpec, PipelineSpec, ShapeSpec, Task
from edgesd.spec.quality import Gate, ImageQuality, Quality
from tests.support import pipeline_spec

PROMPTS = ("a cat", "a dog", "a tree", "a car")


def able(*tasks: Task, **strengths: float) -> PipelineSpec:
    spec = pipeline_spec()
    wiring = msgspec.structs.replace(
        spec.wiring,
        tasks=tasks,
        encoder=EncoderSpec("vae_encoder", "image", ("latents",)),
        strengths=strengths,
    )
    shape = ShapeSpec(16, 24, batch=4, dynamic=True, multiple_of=8)
    return msgspec.structs.replace(spec, wiring=wiring, shape=shape)


class Painting:
    """Generates an image of the seed's colour, and notes of how many requests of which task."""

    def __init__(self, spec: PipelineSpec) -> None:
        self.spec, self.groups = spec, list[tuple[str, int]]()

    def generate(self, requests: Sequence[Request]) -> list[Image.Image]:
        self.groups.append((task_of(requests[0]), len(requests)))
        assert len({task_of(request) for request in requests}) == 1
        size = self.spec.shape.width, self.spec.shape.height
        return [Image.new("RGB", size, (40 * request.seed % 256, 9, 9)) for request in requests]


def comparing(
    spec: PipelineSpec, work: Path, prompts: Sequence[str] = PROMPTS, **settings: object
) -> tuple[Comparison, Painting]:
    reference: Any = SimpleNamespace(manifest=SimpleNamespace(tools={}, pipeline=spec))
    no: Any = None
    judging = Judging((Gate("psnr"),), no)
    made = Comparison([], reference, requests_for(prompts, **settings), judging, work, SILENT)
    painting = Painting(spec)

    @contextmanager
    def source() -> Any:
        yield painting

    made.source_pipeline = source  # type: ignore[assignment, method-assign]
    return made, painting


def test_a_bundle_of_prompts_alone_is_compared_by_these(tmp_path: Path) -> None:
    made, painting = comparing(able("text"), tmp_path)
    assert (made.count, made.probes) == (4, (0, 1, 2, 3))
    assert not made.encodes(range(4))
    assert [task_of(request) for request in made.requests] == ["text"] * 4
    assert painting.groups == []
    assert len(made.source_images) == 4
    assert [path.name for path in tmp_path.iterdir()] == [made.folder.name]


def test_each_task_begins_with_the_source_s_own_images(tmp_path: Path) -> None:
    made, painting = comparing(able("text", "image", "inpaint", image=0.8, inpaint=1.0), tmp_path)
    assert made.count == 8
    assert made.probes == (0, 1, 2, 3, 4, 6) and len(made.probes) == WORST
    assert made.encodes((0, 4)) and not made.encodes((0, 3))
    assert painting.groups == []
    requests, images = made.requests, made.source_images
    assert [task_of(each) for each in requests] == ["text"] * 4 + ["image"] * 2 + ["inpaint"] * 2
    assert [each.prompt for each in requests[4:]] == ["a dog", "a tree"] * 2
    assert len({each.seed for each in requests}) == 8
    for each, place in zip(requests[4:], (0, 1, 0, 1), strict=True):
        assert np.array_equal(each.image, images[place])
        assert each.strength == (0.8 if each.mask is None else 1.0)
    masks = [np.asarray(each.mask) for each in requests[6:]]
    for mask, share in zip(masks, (1 / 2, 1 / 4), strict=True):
        assert mask.shape == (16, 24) and (mask == 255).mean() == share
        assert ((mask == 0) | (mask == 255)).all()
    assert [task for task, _ in painting.groups] == ["text", "image", "inpaint"]


def test_source_images_are_found_again(tmp_path: Path) -> None:
    spec = able("text", "image", image=0.8)
    first, _ = comparing(spec, tmp_path)
    images = first.source_images
    again, painting = comparing(spec, tmp_path)
    for one, other in zip(images, again.source_images, strict=True):
        assert np.array_equal(one, other)
    assert painting.groups == [] and again.folder == first.folder
    other, painting = comparing(able("text", "image", image=0.5), tmp_path)
    assert other.folder != first.folder
    assert len(other.source_images) == 6 and painting.groups == [("image", 2)]


def test_a_pipeline_for_inpainting_alone_paints_whole_images_first(tmp_path: Path) -> None:
    spec = able("inpaint", inpaint=1.0)
    denoiser: DenoiserSpec = spec.wiring.denoiser
    wiring = msgspec.structs.replace(
        spec.wiring, denoiser=msgspec.structs.replace(denoiser, concat=("mask", "masked"))
    )
    made, painting = comparing(msgspec.structs.replace(spec, wiring=wiring), tmp_path)
    assert made.encodes((0,)) and made.probes == (0, 1, 2, 3, 4)
    whole, further = made.requests[:4], made.requests[4:]
    for each in whole:
        assert (np.asarray(each.mask) == 255).all()
        assert each.image is not None and each.image.size == (24, 16)
    assert len(further) == 2 and np.array_equal(further[0].image, made.source_images[0])
    assert {task for task, _ in painting.groups} == {"inpaint"}


@pytest.mark.parametrize(("steps", "strength"), [(1, 1.0), (2, 0.5), (3, 0.334), (20, 0.3)])
def test_few_steps_leave_one_to_every_task(tmp_path: Path, steps: int, strength: float) -> None:
    spec = able("text", "image", image=0.3)
    made, _ = comparing(spec, tmp_path, num_inference_steps=steps)
    assert {each.strength for each in made.requests[4:]} == {strength}
    assert int(steps * strength) >= 1


def test_the_worst_images_of_every_gate_are_looked_at() -> None:
    images = tuple(
        ImageQuality("", seed, 40.0 - seed, 0.9, 0.1 - 0.01 * seed) for seed in range(10)
    )
    quality = Quality(images, 4, 1.0, "euler", 35.0, 31.0, 0.9, 0.05, "LPIPS", "here")
    measured = Measured((), quality)
    assert worst_places(measured, [Gate("psnr")]) == (9, 8, 7, 6, 5, 4)
    assert worst_places(measured, [Gate("lpips"), Gate("psnr", 30.0, "option")]) == (
        *range(6),
        *(9, 8, 7, 6),
    )
