"""Text to image: denoising starts from noise alone."""

from __future__ import annotations

import numpy as np

from edgesd.errors import UsageError
from edgesd.runtime.cut import steps_of_base
from edgesd.runtime.denoise import Start
from edgesd.runtime.tasks.beginning import Beginning


def prepare(begin: Beginning) -> Start:
    """Noise [B, C, h, w] of the first timestep, in one draw; up to where a refiner goes on."""
    if begin.begun is not None:
        raise UsageError("this pipeline is no refiner: it doesn't go on with another's latents")
    scheduler, end = begin.scheduler, begin.requests[0].denoising_end
    return Start(
        (begin.drawn() * np.float32(scheduler.init_noise_sigma)).astype(np.float32),
        last_step=None if end is None else steps_of_base(begin.spec, scheduler, end),
    )
