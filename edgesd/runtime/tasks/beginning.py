"""What a task begins with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from edgesd.errors import BundleError
from edgesd.runtime.arrays import Float
from edgesd.runtime.pictures import image_array
from edgesd.runtime.requests import CompleteRequest, of_pictures
from edgesd.runtime.schedulers import Scheduler
from edgesd.runtime.schedulers.base import Noise
from edgesd.spec.pipeline import PipelineSpec

Encode = Callable[[Float], Sequence[Float]]
"""Image [1, 3, H, W] of -1 to 1 -> mean and deviation of its latents, or the latents alone, each
[1, C, h, w]."""


def _no_encoder(image: Float) -> Sequence[Float]:
    raise BundleError("nothing encodes the image that this begins with: build with --task image")


@dataclass(frozen=True)
class Beginning:
    """Requests that are generated in one batch, and what they are generated with.

    scheduler: laid out for the requests. begun: latents [B, C, h, w] that another pipeline began.
    encode: for tasks that begin with an image.
    """

    spec: PipelineSpec
    requests: Sequence[CompleteRequest]
    scheduler: Scheduler
    noise: Noise
    begun: Float | None = None
    encode: Encode = _no_encoder

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in latents."""
        first, unit = self.requests[0], self.spec.latent.scale_factor
        return first.height // unit, first.width // unit

    @property
    def strength(self) -> float:
        """The part of the steps that is taken; all of them where nobody says."""
        found = self.requests[0].strength
        return 1.0 if found is None else found

    def images(self) -> list[Float]:
        """The images that the requests begin with, [1, 3, H, W] of -1 to 1 each."""

        def read(request: CompleteRequest) -> Float | None:
            if request.image is None:
                return None
            return image_array(request.image.decoded(), request.width, request.height)

        return [one for one in of_pictures(self.requests, read) if one is not None]

    def paintings(self) -> list[tuple[Float, Float]]:
        """The same with their masks, [1, 1, H, W] of 0 (kept) and 1 (painted)."""

        def read(request: CompleteRequest) -> tuple[Float, Float] | None:
            painted = request.painting()
            return None if painted is None else painted.arrays()

        return [one for one in of_pictures(self.requests, read) if one is not None]

    def drawn(self) -> Float:
        """Standard normal noise of the latents' shape [B, C, h, w]."""
        return self.noise((len(self.requests), self.spec.latent.channels, *self.size))

    def encoded(self, images: Sequence[Float]) -> Float:
        """Latents [B, C, h, w] of images [1, 3, H, W]: drawn by their mean and deviation, where the
        encoder gives these."""
        found = [self.encode(image) for image in images]
        mean, *spread = (np.concatenate(parts) for parts in zip(*found, strict=True))
        return mean + spread[0] * self.drawn() if spread else mean
