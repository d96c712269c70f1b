"""Images to latents, or to the moments that latents are drawn by."""

from __future__ import annotations

import numpy as np

from edgesd.errors import BundleError
from edgesd.runtime.arrays import Float
from edgesd.runtime.loaded import Loaded


def encoded(loaded: Loaded, image: Float) -> tuple[Float, ...]:
    """Image [1, 3, H, W] of -1 to 1 -> mean and deviation of its latents, or the latents alone,
    each [1, C, h, w]. Raises BundleError for an encoder that makes something else."""
    spec = loaded.bundle.manifest.pipeline
    encoder, latent = spec.wiring.encoder, spec.latent
    assert encoder is not None  # networks.check_networks
    outputs = loaded.run(encoder.component, {encoder.input: image})
    found = tuple(np.array(outputs[name], np.float32) for name in encoder.outputs)
    height, width = (side // latent.scale_factor for side in image.shape[2:])
    wanted = 1, latent.channels, height, width
    for name, values in zip(encoder.outputs, found, strict=True):
        if values.shape != wanted:
            raise BundleError(
                f"{encoder.component} makes {name} of the shape {list(values.shape)}, and "
                f"{list(wanted)} was expected: build the bundle again"
            )
    return found
