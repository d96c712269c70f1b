"""Image to image: denoising starts in the middle, from an image with noise (Meng et al. 2022, arXiv
2108.01073), as in diffusers' pipelines."""

from __future__ import annotations

from edgesd.runtime.cut import first_of_picture
from edgesd.runtime.denoise import Start
from edgesd.runtime.tasks.beginning import Beginning


def prepare(begin: Beginning) -> Start:
    """The images' latents, as noisy as their strength says. Draws those, then noise."""
    first = first_of_picture(begin.scheduler, begin.strength)
    latents = begin.encoded(begin.images())
    return Start(begin.scheduler.add_noise(latents, begin.drawn(), first), first)
