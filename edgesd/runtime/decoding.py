"""Latents to an image: as a whole, or in parts and tiles where memory is short."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from edgesd.errors import BundleError
from edgesd.runtime.arrays import Float
from edgesd.runtime.backends.base import Runner, run_once
from edgesd.runtime.loaded import Loaded
from edgesd.runtime.tiles import TILE, Tile, decode_tail, decode_tiles, margin_of
from edgesd.spec.bundle import DecoderPart, SplitDecoder
from edgesd.spec.pipeline import PipelineSpec


@dataclass(frozen=True)
class Decoding:
    """How a pipeline's decoder is run.

    split: the parts that it is run in (runtime/tiles.py), opened by open_part; None as a whole.
    tiled: whether the whole one is run in tiles, if it can be. window: side in latents of the
    tiles of a part.
    """

    spec: PipelineSpec
    loaded: Loaded
    open_part: Callable[[DecoderPart], Runner]
    split: SplitDecoder | None
    tiled: bool
    window: int

    def values(self, latents: Float) -> Float:
        """Latents [C, h, w] -> values [3, H, W] from -1 to 1."""
        if self.split is not None:
            return self._in_parts(self.split, latents)
        latent = self.spec.latent
        if self.tiled and latent.halo is not None and self.spec.shape.dynamic:

            def decode(seen: Float, rows: Tile, columns: Tile) -> Float:
                return self._whole(seen)

            margin = margin_of(latent.halo)
            return decode_tiles(decode, latents, latent.scale_factor, TILE, margin)
        return self._whole(latents[None])

    def _whole(self, latents: Float) -> Float:
        """Latents [1, C, h, w] through the whole decoder: values [3, H, W]."""
        decoder = self.spec.wiring.decoder
        outputs = self.loaded.run(decoder.component, {decoder.input: latents})
        image: Float = np.array(outputs[decoder.output], np.float32)[0]
        scale = self.spec.latent.scale_factor
        expected = (3, *(scale * size for size in latents.shape[2:]))
        if image.shape != expected:
            raise BundleError(
                f"{decoder.component} makes an image of the shape {list(image.shape)}, not "
                f"{list(expected)}: build the bundle again"
            )
        return image

    def _in_parts(self, split: SplitDecoder, latents: Float) -> Float:
        """Only one part is in memory at a time."""
        component, scale = self.spec.wiring.decoder.component, self.spec.latent.scale_factor
        with self.loaded.part(component, lambda: self.open_part(split.head)) as head:
            (output,) = run_once(head, {split.head.spec.inputs[0].name: latents[None]}).values()
            features: Float = np.array(output, np.float32)[0]
        with self.loaded.part(component, lambda: self.open_part(split.tail)) as tail:
            try:
                return decode_tail(tail, features, scale, self.window)
            except ValueError as exc:  # its tiles have other sizes than those of the features
                raise BundleError(
                    f"head and tail of {component} don't fit each other ({exc}): build the bundle "
                    "again"
                ) from exc
