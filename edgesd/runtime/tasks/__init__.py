"""The tasks of a pipeline, a file for each: they say where denoising starts.

A task is the only place beside the samplers that draws noise: the order of its draws is a part of
the image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from edgesd.runtime.arrays import Float
from edgesd.runtime.denoise import Start
from edgesd.runtime.requests import CompleteRequest
from edgesd.runtime.schedulers import Scheduler
from edgesd.runtime.schedulers.base import Noise
from edgesd.runtime.tasks import refine, text
from edgesd.spec.pipeline import Fill, PipelineSpec

Prepare = Callable[[PipelineSpec, Sequence[CompleteRequest], Scheduler, Noise, Float | None], Start]
"""Takes requests that are generated in one batch, with a sampler that is laid out for them, and
latents that another pipeline began, if there are any."""


class Task(NamedTuple):
    """prepare: where the denoising of requests starts. gives: what inputs of the networks the
    start fills, of those that tasks give (spec.pipeline.GIVEN_BY_TASKS)."""

    prepare: Prepare
    gives: frozenset[Fill]


TASKS: dict[str, Task] = {
    "text": Task(text.prepare, frozenset()),
    "refine": Task(refine.prepare, frozenset()),
}
