"""How far a bundle's images are from its source's."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from edgesd.spec.base import Count, Number, RelativePath, Spec, Text, Word


class PictureQuality(Spec, frozen=True, omit_defaults=True):
    """One prompt, drawn by the source's graphs and by the bundle's, from the same seed.

    psnr in dB (None: equal pictures); ssim up to 1; distance by the metric Quality names.
    source, ours: the two pictures as files of the bundle, where they were kept.
    """

    prompt: Annotated[str, Meta(max_length=64_000)]
    seed: Annotated[int, Meta(ge=0)]
    psnr: Number | None
    ssim: Number
    distance: Number
    source: RelativePath | None = None
    ours: RelativePath | None = None


class Quality(Spec, frozen=True):
    """How far the bundle's pictures are from its source's, measured at build.

    psnr: mean and minimum over all pictures, in dB, equal pictures counting as 100. metric: name of
    the perceptual distance ("LPIPS (AlexNet, v0.1)", or what stands in for it). min_psnr: the floor
    asked for. measured_on: the arithmetic that drew the pictures.
    """

    pictures: tuple[PictureQuality, ...]
    num_inference_steps: Count
    guidance_scale: Number
    scheduler: Word
    psnr_mean: Number
    psnr_min: Number
    ssim_mean: Number
    distance_mean: Number
    metric: Text
    measured_on: Text
    min_psnr: Number | None = None
