"""Text to image: denoising starts from noise alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edgesd.errors import UsageError
from edgesd.runtime.arrays import Float
from edgesd.runtime.denoise import Start
from edgesd.runtime.requests import CompleteRequest
from edgesd.runtime.schedulers import Scheduler
from edgesd.runtime.schedulers.base import Noise
from edgesd.runtime.tasks.cut import steps_of_base
from edgesd.spec.pipeline import PipelineSpec


def prepare(
    spec: PipelineSpec,
    requests: Sequence[CompleteRequest],
    scheduler: Scheduler,
    noise: Noise,
    begun: Float | None = None,
) -> Start:
    """Noise [B, C, h, w] of the first timestep, in one draw; up to where a refiner goes on."""
    if begun is not None:
        raise UsageError("this pipeline is no refiner: it doesn't go on with another's latents")
    first, latent = requests[0], spec.latent
    height, width = (side // latent.scale_factor for side in (first.height, first.width))
    latents = noise((len(requests), latent.channels, height, width))
    return Start(
        (latents * np.float32(scheduler.init_noise_sigma)).astype(np.float32),
        last_step=None
        if first.denoising_end is None
        else steps_of_base(spec, scheduler, first.denoising_end),
    )
