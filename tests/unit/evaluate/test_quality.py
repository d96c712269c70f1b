"""How many images are generated at a time when quality is measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from PIL import Image

from edgesd.evaluate.quality import generate, requests_for
from edgesd.runtime.pipeline import Pipeline
from edgesd.runtime.requests import Request
from edgesd.spec.pipeline import ShapeSpec


class Counting(Pipeline):
    """Generates an image of the seed's colour, and notes how many at a time."""

    def __init__(self, rows: int | None, guided: bool) -> None:
        shape = ShapeSpec(64, 64, batch=rows or 63, dynamic=rows is None, multiple_of=8)
        self.spec: Any = type("Spec", (), {"shape": shape})
        self.flow: Any = type("Flow", (), {"guided": lambda self, scale: guided})()
        self.groups = list[int]()

    def complete(self, request: Request) -> Request:
        return request

    def generate(self, requests: Sequence[Request], on_step: object = None) -> list[Image.Image]:
        self.groups.append(len(requests))
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
