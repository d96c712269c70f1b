"""Text to image beside a control image, whose latents the denoiser is given at each step: FLUX.1's
Control models, as in diffusers' FluxControlPipeline."""

from __future__ import annotations

import numpy as np

from edgesd.errors import UsageError
from edgesd.runtime.denoise import Start
from edgesd.runtime.tasks.beginning import Beginning


def prepare(begin: Beginning) -> Start:
    """Noise [B, C, h, w] of the first timestep. Draws the control image's latents for each image,
    then noise. Raises UsageError without a control image."""
    first = begin.requests[0]
    if not first.controls:
        raise UsageError(NO_CONTROL)
    hint = first.controls[0].hint(first.width, first.height)
    shown = np.float32(2) * hint - np.float32(1)
    latents = begin.encoded([shown] * len(begin.requests))
    start = begin.drawn() * np.float32(begin.scheduler.init_noise_sigma)
    return Start(start, given={"control_latents": latents})


NO_CONTROL = (
    "this model draws by a control image, such as edges or depths: give --control FILE, and to "
    "have one made of a photo, --control-from photo"
)
