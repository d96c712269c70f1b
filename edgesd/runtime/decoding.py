"""Latents to an image: by the whole decoder, or in parts and tiles where memory is short."""

from __future__ import annotations

import numpy as np

from edgesd.errors import BundleError
from edgesd.runtime.arrays import Float
from edgesd.runtime.backends.base import run_once
from edgesd.runtime.loaded import Loaded
from edgesd.runtime.tiles import TILE, Tile, decode_tail, decode_tiles, margin_of
from edgesd.spec.bundle import SplitDecoder


def decoded(loaded: Loaded, latents: Float) -> Float:
    """Latents [C, h, w] -> values [3, H, W] from -1 to 1; in tiles where weights are streamed, if
    the bundle's decoder can be run so (runtime/tiles.py)."""
    spec, streamed = loaded.bundle.manifest.pipeline, loaded.memory == "stream"
    component, latent = spec.wiring.decoder.component, spec.latent
    split = loaded.bundle.manifest.engines[component].split
    if streamed and split is not None and component not in loaded.replaced:
        return _in_parts(loaded, split, latents)
    if streamed and latent.halo is not None and spec.shape.dynamic:

        def decode(seen: Float, rows: Tile, columns: Tile) -> Float:
            return _whole(loaded, seen)

        return decode_tiles(decode, latents, latent.scale_factor, TILE, margin_of(latent.halo))
    return _whole(loaded, latents[None])


def _whole(loaded: Loaded, latents: Float) -> Float:
    """Latents [1, C, h, w] through the whole decoder: values [3, H, W]."""
    spec = loaded.bundle.manifest.pipeline
    decoder, scale = spec.wiring.decoder, spec.latent.scale_factor
    outputs = loaded.run(decoder.component, {decoder.input: latents})
    image: Float = np.array(outputs[decoder.output], np.float32)[0]
    _check_shape(f"{decoder.component} makes an image", image, 3, latents[0], scale)
    return image


def _in_parts(loaded: Loaded, split: SplitDecoder, latents: Float) -> Float:
    """Only one part is in memory at a time."""
    spec = loaded.bundle.manifest.pipeline
    decoder, scale = spec.wiring.decoder, spec.latent.scale_factor
    with loaded.part(decoder.component, split.head) as head:
        (output,) = run_once(head, {decoder.input: latents[None]}).values()
        features: Float = np.array(output, np.float32)[0]
    what = f"the head of {decoder.component} makes features"
    _check_shape(what, features, len(features), latents, 1)
    with loaded.part(decoder.component, split.tail) as tail:
        try:
            image = decode_tail(tail, features, scale, loaded.window)
        except ValueError as exc:  # its tiles have other sizes than those of the features
            raise BundleError(
                f"head and tail of {decoder.component} don't fit each other ({exc}): build the "
                "bundle again"
            ) from exc
    _check_shape(f"the tail of {decoder.component} makes an image", image, 3, latents, scale)
    return image


def _check_shape(what: str, found: Float, channels: int, latents: Float, scale: int) -> None:
    """Raise BundleError unless what was made of latents [C, h, w] is [channels, scale h, scale w].
    what: for the message."""
    expected = (channels, *(scale * size for size in latents.shape[1:]))
    if found.shape != expected:
        raise BundleError(
            f"{what} of the shape {list(found.shape)}, not {list(expected)}: build the bundle again"
        )
