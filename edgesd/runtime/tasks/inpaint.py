"""Inpainting: what a mask covers is made anew, as in diffusers' pipelines.

A denoiser that was made for it is given the mask and the rest of the image at each step (Rombach
et al. 2022, arXiv 2112.10752, sec. 4.5). With any other one, the rest is put back after each step,
as noisy as the latents are then (Lugmayr et al. 2022, arXiv 2201.09865, without its resampling).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from edgesd.runtime.arrays import Float
from edgesd.runtime.cut import first_of_picture
from edgesd.runtime.denoise import Start
from edgesd.runtime.pictures import latent_mask, masked_image
from edgesd.runtime.schedulers import Scheduler
from edgesd.runtime.tasks.beginning import Beginning


def prepare(begin: Beginning) -> Start:
    """Noise, or with less than full strength the images' latents with noise.

    Draws the images' latents, where the denoiser wasn't made for inpainting, takes the mask in
    pixels (FLUX.1's), or they are begun with; noise; and the latents of what masks leave of the
    images, also where these aren't used.
    """
    scheduler, strength = begin.scheduler, begin.strength
    first = first_of_picture(scheduler, strength)
    denoiser = begin.spec.wiring.denoiser
    made_for_it = bool(denoiser.concat)
    always = denoiser.input_of("pixel_mask") is not None
    paintings = begin.paintings()
    images = [image for image, _ in paintings]
    latents = None if made_for_it and strength == 1 and not always else begin.encoded(images)
    noise = begin.drawn()
    masked = begin.encoded([masked_image(image, mask) for image, mask in paintings])
    mask = np.concatenate([latent_mask(mask, *begin.size) for _, mask in paintings])
    start = noise * np.float32(scheduler.init_noise_sigma)
    if latents is not None and strength < 1:
        start = scheduler.add_noise(latents, noise, first)
    if made_for_it or latents is None:
        whole = np.concatenate([mask for _, mask in paintings])
        return Start(start, first, {"mask": mask, "masked": masked, "pixel_mask": whole})
    return Start(start, first, after_step=_kept(scheduler, latents, noise, mask))


def _kept(
    scheduler: Scheduler, latents: Float, noise: Float, mask: Float
) -> Callable[[int, Float], Float]:
    """Puts what `mask` doesn't cover of an image's latents back after a step."""

    def after_step(at: int, sample: Float) -> Float:
        return (1 - mask) * scheduler.add_noise(latents, noise, at + 1) + mask * sample

    return after_step
