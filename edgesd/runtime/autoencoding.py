"""Latents to an image, and an image to latents: by the whole network, or in parts and tiles where
memory is short."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from edgesd.errors import BundleError
from edgesd.runtime.arrays import Float
from edgesd.runtime.backends.base import run_once
from edgesd.runtime.loaded import Loaded
from edgesd.runtime.tiles import (
    TILE,
    Tile,
    encoder_window,
    in_tiled_part,
    in_tiles,
    margins_of,
)
from edgesd.spec.bundle import ComponentPart, SplitComponent
from edgesd.spec.pipeline import EncoderSpec

_Known = dict[tuple[tuple[int, ...], bytes], tuple[Float, ...]]
"""Shape and hash of an image -> what it was encoded to."""


def decoded(loaded: Loaded, latents: Float) -> Float:
    """Latents [C, h, w] -> values [3, H, W] from -1 to 1; in tiles where that is fitted
    (runtime/tiles.py)."""
    spec = loaded.bundle.manifest.pipeline
    component, latent = spec.wiring.decoder.component, spec.latent
    split = _split(loaded, component)
    if split is not None:
        return _decoded_in_parts(loaded, split, latents)
    if component in loaded.tiled and latent.halo is not None:

        def decode(seen: Float, rows: Tile, columns: Tile) -> Float:
            return _decoded_whole(loaded, seen)

        _, height, width = latents.shape
        scale = latent.scale_factor
        image = np.empty((3, height * scale, width * scale), np.float32)
        in_tiles(decode, latents, image, (height, width), TILE, margins_of(latent.halo))
        return image
    return _decoded_whole(loaded, latents[None])


def encoded(loaded: Loaded, image: Float) -> tuple[Float, ...]:
    """An image [1, 3, H, W] of -1 to 1 -> what the encoder makes of it, mean and deviation of its
    latents or the latents alone, each [1, C, h, w]; in tiles as in `decoded`."""
    spec = loaded.bundle.manifest.pipeline
    encoder, latent = spec.wiring.image_encoder, spec.latent
    split = _split(loaded, encoder.component)
    if split is not None:
        return _encoded_in_parts(loaded, encoder, split, image[0])
    if encoder.component in loaded.tiled and latent.encoder_halo is not None:

        def encode(seen: Float, rows: Tile, columns: Tile) -> Float:
            found: Float = _encoded_whole(loaded, encoder, seen)[0][0]
            return found

        height, width = (side // latent.scale_factor for side in image.shape[2:])
        latents = np.empty((latent.channels, height, width), np.float32)
        margins = margins_of(latent.encoder_halo)
        in_tiles(encode, image[0], latents, (height, width), TILE, margins)
        return (latents[None],)
    return _encoded_whole(loaded, encoder, image)


class Encoded:
    """Encodes images, each once: what the batch before began with is known, until `forget`. What
    they were encoded to is small beside what encoding takes."""

    def __init__(self, loaded: Loaded) -> None:
        self._loaded = loaded
        self._before: _Known = {}
        self._known: _Known = {}

    def next_batch(self) -> None:
        """Keep what was asked for since the last time, and forget all else."""
        self._before, self._known = self._known, {}

    def forget(self) -> None:
        """Encode every image anew from now on."""
        self._before, self._known = {}, {}

    def __call__(self, image: Float) -> tuple[Float, ...]:
        """As `encoded`."""
        key = image.shape, hashlib.sha256(image.data).digest()
        if key not in self._known:
            self._known[key] = self._before.get(key) or encoded(self._loaded, image)
        return self._known[key]


def _split(loaded: Loaded, component: str) -> SplitComponent | None:
    """The parts that a component is run in, if any."""
    if component not in loaded.tiled or component in loaded.replaced:
        return None
    return loaded.bundle.manifest.engines[component].split


def _decoded_whole(loaded: Loaded, latents: Float) -> Float:
    """Latents [1, C, h, w] through the whole decoder: values [3, H, W]."""
    spec = loaded.bundle.manifest.pipeline
    decoder, scale = spec.wiring.decoder, spec.latent.scale_factor
    outputs = loaded.run(decoder.component, {decoder.input: latents})
    image: Float = np.array(outputs[decoder.output], np.float32)[0]
    what = f"{decoder.component} makes an image"
    _check_shape(what, image, 3, [scale * side for side in latents.shape[2:]])
    return image


def _encoded_whole(loaded: Loaded, encoder: EncoderSpec, image: Float) -> tuple[Float, ...]:
    outputs = loaded.run(encoder.component, {encoder.input: image})
    return _checked_latents(loaded, encoder, [outputs[name] for name in encoder.outputs], image[0])


def _decoded_in_parts(loaded: Loaded, split: SplitComponent, latents: Float) -> Float:
    """Only one part is in memory at a time."""
    spec = loaded.bundle.manifest.pipeline
    decoder, scale = spec.wiring.decoder, spec.latent.scale_factor
    with loaded.part(decoder.component, split.head) as head:
        (output,) = run_once(head, {decoder.input: latents[None]}).values()
        features: Float = np.array(output, np.float32)[0]
    what = f"the head of {decoder.component} makes features"
    _check_shape(what, features, len(features), latents.shape[1:])
    image = _tiled(loaded, decoder.component, split.tail, features, (1, scale), loaded.window)
    what = f"the tail of {decoder.component} makes an image"
    _check_shape(what, image, 3, [scale * side for side in latents.shape[1:]])
    return image


def _encoded_in_parts(
    loaded: Loaded, encoder: EncoderSpec, split: SplitComponent, image: Float
) -> tuple[Float, ...]:
    """The same for an image [3, H, W]."""
    component, features = encoder.component, image
    for index, part in enumerate(split.parts[:-1]):
        window = encoder_window(loaded.window, index)
        expected = [side // 2 for side in features.shape[1:]]
        features = _tiled(loaded, component, part, features, (2, 1), window)
        what = f"part {index + 1} of {component} makes features"
        _check_shape(what, features, len(features), expected)
    with loaded.part(component, split.tail) as tail:
        (name,) = (tensor.name for tensor in split.tail.spec.inputs)
        outputs = run_once(tail, {name: features[None]})
        return _checked_latents(loaded, encoder, [outputs[name] for name in encoder.outputs], image)


def _tiled(
    loaded: Loaded,
    component: str,
    part: ComponentPart,
    source: Float,
    scales: tuple[int, int],
    window: int,
) -> Float:
    """As runtime.tiles.in_tiled_part. Raises BundleError where the parts don't fit each other."""
    with loaded.part(component, part) as runner:
        try:
            return in_tiled_part(runner, source, scales, window, part.margins)
        except ValueError as exc:  # tiles of other sizes than those that they should be put into
            raise BundleError(
                f"the parts of {component} don't fit each other ({exc}): build the bundle again"
            ) from exc


def _checked_latents(
    loaded: Loaded, encoder: EncoderSpec, outputs: Sequence[Float], image: Float
) -> tuple[Float, ...]:
    """Copies of what the encoder made of an image [3, H, W]. Raises BundleError."""
    latent = loaded.bundle.manifest.pipeline.latent
    copies = tuple(np.array(output, np.float32) for output in outputs)
    for copy in copies:
        what = f"{encoder.component} makes latents"
        sides = [side // latent.scale_factor for side in image.shape[1:]]
        _check_shape(what, copy[0], latent.channels, sides)
    return copies


def _check_shape(what: str, found: Float, channels: int, sides: Sequence[int]) -> None:
    """Raise BundleError unless what was made is [channels, height, width]. what: for the
    message."""
    expected = (channels, *sides)
    if found.shape != expected:
        raise BundleError(
            f"{what} of the shape {list(found.shape)}, not {list(expected)}: build the bundle again"
        )
