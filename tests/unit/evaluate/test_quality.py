"""How many images are generated at a time when quality is measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from edgesd.evaluate.quality import generate, requests_for, task_of
from edgesd.runtime.pipeline import Pipeline
from edgesd.runtime.requests import Request
from edgesd.spec.pipeline import ShapeSpec, stable_diffusion


class Counting(Pipeline):
    """Generates an image of the seed's colour, and notes how many at a time."""

    def __init__(self, rows: int | None, guided: bool) -> None:
        shape = ShapeSpec(64, 64, batch=rows or 63, dynamic=rows is None, multiple_of=8)
        self.spec: Any = SimpleNamespace(shape=shape, wiring=stable_diffusion())
        self.flow: Any = type("Flow", (), {"guided": lambda self, scale, true_scale: guided})()
        self.groups = list[int]()

    def complete(self, request: Request) -> Request:
        return request

    def generate(self, requests: Sequence[Request], on_step: object = None) -> list[Image.Image]:
        self.groups.append(len(requests))
        assert len({(task_of(request), request.strength) for request in requests}) == 1
        return [Image.new("RGB", (8, 8), (request.seed, 0, 0)) for request in requests]


@pytest.mark.parametrize(
    ("rows", "guided", "groups"),
    [
        (None, True, [1] * 5),
        (1, True, [1] * 5),  # one half of guidance after the other
        (2, True, [1] * 5),  # both together
        (4, True, [2, 2, 2]),  # the last one filled up
        (3, True, [3, 3]),
        (2, False, [2, 2, 2]),
    ],
)
def test_a_fixed_number_of_rows_is_filled(
    rows: int | None, guided: bool, groups: list[int]
) -> None:
    pipeline = Counting(rows, guided)
    images = generate(pipeline, requests_for([f"prompt {n}" for n in range(5)]))
    assert [image.getpixel((0, 0)) for image in images] == [(n, 0, 0) for n in range(5)]
    assert pipeline.groups == groups


def test_small_images_are_generated_together_where_figures_allow() -> None:
    pipeline = Counting(None, True)
    assert len(generate(pipeline, requests_for(["a"] * 9), together=True)) == 9
    assert pipeline.groups == [8, 1]


def test_tasks_are_no_batch_together() -> None:
    pipeline, image = Counting(3, False), Image.new("RGB", (8, 8))
    prompts = requests_for(["a", "b", "c", "d"])
    begun = [replace(each, image=image, strength=0.5) for each in prompts[:2]]
    painted = [
        replace(each, mask=image, strength=strength) for each in begun for strength in (1, 1)
    ]
    weak = [replace(each, strength=0.3) for each in painted[:1]]
    found = generate(pipeline, [*prompts, *begun, *painted, *weak, *prompts[:1]])
    assert pipeline.groups == [3] * 7
    seeds = [pixel[0] for pixel in (each.getpixel((0, 0)) for each in found)]
    assert seeds == [0, 1, 2, 3, 0, 1, 0, 0, 1, 1, 0, 0]
