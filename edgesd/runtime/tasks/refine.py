"""A refiner: denoising goes on where a base model's stopped, and draws no noise of its own."""

from __future__ import annotations

from dataclasses import replace

from edgesd.runtime.cut import first_of_refiner
from edgesd.runtime.denoise import Start
from edgesd.runtime.tasks import text
from edgesd.runtime.tasks.beginning import Beginning


def prepare(begin: Beginning) -> Start:
    """Latents [B, C, h, w] that a base model's pipeline began, as they are.

    Without any it starts from noise, which is for checks and measurements of a refiner's bundle.
    """
    at = begin.requests[0].denoising_end
    if begin.begun is None or at is None:
        return replace(text.prepare(replace(begin, begun=None)), last_step=None)
    return Start(begin.begun, first_of_refiner(begin.spec, begin.scheduler, at))
