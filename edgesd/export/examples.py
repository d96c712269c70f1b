"""What a pipeline's tasks are calibrated and judged with: pictures are its own, of prompts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from edgesd.runtime.arrays import Float
from edgesd.runtime.requests import Request
from edgesd.spec.pipeline import IMAGE_TASKS, ImageTask, PipelineSpec

if TYPE_CHECKING:
    from PIL import Image

_PAINTED = ((0, 0, 1, 1), (0, 1 / 2, 1, 1), (1 / 4, 1 / 4, 3 / 4, 3 / 4), (1 / 2, 0, 1, 1))
"""Top, left, bottom and right of what is painted, as shares of the sides: all of it first."""

PER_TASK = 4
"""Images of each task that begins with one, at most; and at most half as many as of prompts."""


def example_mask(index: int, height: int, width: int) -> Float:
    """The mask [1, 1, height, width] of an example: 1 where it is painted, else 0."""
    top, left, bottom, right = _PAINTED[index % len(_PAINTED)]
    mask = np.zeros((1, 1, height, width), np.float32)
    mask[..., int(top * height) : int(bottom * height), int(left * width) : int(right * width)] = 1
    return mask


def further_tasks(spec: PipelineSpec, count: int) -> list[tuple[ImageTask, int]]:
    """What is to be judged beside `count` requests of prompts: tasks that begin with an image, and
    the place of the request that it is of."""
    places = range(min(PER_TASK, (count + 1) // 2))
    return [(task, place) for task in IMAGE_TASKS if task in spec.wiring.tasks for place in places]


def with_images(
    spec: PipelineSpec,
    requests: Sequence[Request],
    images: Sequence[Image.Image],
    tasks: Sequence[tuple[ImageTask, int]],
) -> list[Request]:
    """Requests of `tasks`: an image of those that `requests` gave, with the prompt of the next one,
    at the task's usual strength, or the least that leaves a step. None of the masks is whole."""
    found = []
    for number, (task, place) in enumerate(tasks):
        image, following = images[place], requests[(place + 1) % len(requests)]
        steps = following.num_inference_steps or spec.num_inference_steps
        found.append(
            replace(
                following,
                seed=len(requests) + number,
                image=image,
                mask=_mask(1 + place % 3, image.size) if task == "inpaint" else None,
                strength=max(spec.wiring.strengths.get(task, 1.0), math.ceil(1000 / steps) / 1000),
            )
        )
    return found


def _mask(index: int, size: tuple[int, int]) -> Image.Image:
    from PIL import Image

    width, height = size
    return Image.fromarray(
        np.uint8(255) * example_mask(index, height, width)[0, 0].astype(np.uint8)
    )
