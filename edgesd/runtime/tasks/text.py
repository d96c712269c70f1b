"""Text to image: denoising starts from noise alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edgesd.runtime.denoise import Start
from edgesd.runtime.requests import CompleteRequest
from edgesd.runtime.schedulers import Scheduler
from edgesd.runtime.schedulers.base import Noise
from edgesd.spec.pipeline import PipelineSpec


def prepare(
    spec: PipelineSpec, requests: Sequence[CompleteRequest], scheduler: Scheduler, noise: Noise
) -> Start:
    """Noise [B, C, h, w] of the first timestep, in one draw."""
    first, latent = requests[0], spec.latent
    height, width = (side // latent.scale_factor for side in (first.height, first.width))
    latents = noise((len(requests), latent.channels, height, width))
    return Start((latents * np.float32(scheduler.init_noise_sigma)).astype(np.float32))
