"""Image to image: denoising starts in the middle, from an image with noise (Meng et al. 2022, arXiv
2108.01073), as in diffusers' pipelines."""

from __future__ import annotations

from edgesd.runtime.cut import first_of_picture, taken_by_base
from edgesd.runtime.denoise import Start
from edgesd.runtime.tasks.beginning import Beginning


def prepare(begin: Beginning) -> Start:
    """The images' latents, as noisy as their strength says; up to where a refiner goes on. Draws
    those, then noise."""
    scheduler, end = begin.scheduler, begin.requests[0].denoising_end
    first, last = first_of_picture(scheduler, begin.strength), None
    if end is not None:
        last = taken_by_base(begin.spec, scheduler, end, begin.strength).stop
    latents = begin.encoded(begin.images())
    return Start(scheduler.add_noise(latents, begin.drawn(), first), first, last_step=last)
