"""A refiner: denoising goes on where a base model's stopped, and draws no noise of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from edgesd.runtime.arrays import Float
from edgesd.runtime.denoise import Start
from edgesd.runtime.requests import CompleteRequest
from edgesd.runtime.schedulers import Scheduler
from edgesd.runtime.schedulers.base import Noise
from edgesd.runtime.tasks import text
from edgesd.runtime.tasks.cut import first_of_refiner
from edgesd.spec.pipeline import PipelineSpec


def prepare(
    spec: PipelineSpec,
    requests: Sequence[CompleteRequest],
    scheduler: Scheduler,
    noise: Noise,
    begun: Float | None = None,
) -> Start:
    """Latents [B, C, h, w] that a base model's pipeline began, as they are.

    Without any it starts from noise, which is for checks and measurements of a refiner's bundle.
    """
    at = requests[0].denoising_end
    if begun is None or at is None:
        return replace(text.prepare(spec, requests, scheduler, noise), last_step=None)
    return Start(begun, first_of_refiner(spec, scheduler, at))
