"""The tasks of a pipeline, a file for each: they say where denoising starts.

A task is the only place beside the samplers that draws noise: the order of its draws is a part of
the image.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from edgesd.runtime.denoise import Start
from edgesd.runtime.tasks import control, image, inpaint, refine, text
from edgesd.runtime.tasks.beginning import Beginning
from edgesd.spec.pipeline import Fill


class Task(NamedTuple):
    """prepare: where the denoising of requests starts. gives: what inputs of the networks the
    start fills, of those that tasks give (spec.pipeline.GIVEN_BY_TASKS)."""

    prepare: Callable[[Beginning], Start]
    gives: frozenset[Fill]


TASKS: dict[str, Task] = {
    "text": Task(text.prepare, frozenset()),
    "refine": Task(refine.prepare, frozenset()),
    "control": Task(control.prepare, frozenset(("control_latents",))),
    "image": Task(image.prepare, frozenset()),
    "inpaint": Task(inpaint.prepare, frozenset(("mask", "masked", "pixel_mask"))),
}
