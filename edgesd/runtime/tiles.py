"""Latents -> image in tiles, for decoders whose activations are larger than the memory.

AutoencoderTiny's decoder sees only so far: tiles with a margin are decoded like images.

A full autoencoder's has attention over all latents, and group normalization over the whole image.
It is run in two parts (spec.bundle.SplitDecoder): the head, all before the first upsampling, on all
latents; the tail on tiles of the features that the head makes. Each normalization of the tail takes
the image's mean and mean square from outside. They are found like this:

1. The tail runs on a mosaic of the features, small enough for one tile. A normalization takes the
   mosaic's own figures plus a correction, none at first.
2. The image is generated in tiles with the figures that were taken; the tiles' own, together, are
   what they should have been.
3. If those differ by more than TOLERANCE, what is between them and the mosaic's own is the next
   correction. A normalization depends on those before it, and in the mosaic in nearly the same
   way: twice is enough (docs/cpu.md).
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from edgesd.runtime.arrays import Float
from edgesd.runtime.backends.base import Runner, run_once

Figures = npt.NDArray[np.float64]
"""Mean and mean square of the input of each group normalization [norms, 2, groups]."""

TILE = 32
"""Side in latents of AutoencoderTiny's tiles, without margins."""

WINDOWS, MARGIN = (28, 22), 3
"""Sides in latents of a full autoencoder's tiles with their margins, the smaller where memory is
short; and the margins: about half of what the tail sees, 7."""

TOLERANCE = 0.01
"""Allowed distance of the figures from the image's, in standard deviations: RMS over all groups."""
MAX_PASSES, _USUAL_PASSES = 4, 2
"""Number of decodings of an image: at most, and usually."""

_PATCHES = 3
"""A mosaic has as many rows and columns of patches. Of 2 they miss too much of the image, and of
4 they consist of borders."""

_EPSILON = 1e-6


def margin_of(halo: int) -> int:
    """Margin in latents of AutoencoderTiny's tiles, whose decoder sees up to `halo`.

    What lies beyond half of that changes a value by less than 1/255: a margin of all would double
    the work and the memory.
    """
    return -(-halo // 2)


class Tile(NamedTuple):
    """A tile in one direction: its begin and end, and the same with its margins."""

    begin: int
    end: int
    first: int
    last: int


def tiles_of(size: int, most: int, margin: int) -> list[Tile]:
    """`size` latents in tiles of about the same size, at most `most` without their margins."""
    count = max(1, -(-size // most))
    edges = [size * index // count for index in range(count + 1)]
    return [Tile(a, b, max(0, a - margin), min(size, b + margin)) for a, b in pairwise(edges)]


def decode_tiles(
    decode: Callable[[Float, Tile, Tile], Float],
    latents: Float,
    scale: int,
    most: int,
    margin: int,
    image: Float | None = None,
) -> Float:
    """Latents (or features) [C, h, w] -> [3, h * scale, w * scale].

    decode: makes what a tile with its margins [1, C, ...] becomes [3, ...], margins included; it
    gets their rows and columns, too. image: overwritten, if given.
    """
    _, height, width = latents.shape
    if image is None:
        image = np.empty((3, height * scale, width * scale), np.float32)
    for rows in tiles_of(height, most, margin):
        for columns in tiles_of(width, most, margin):
            seen = latents[None, :, rows.first : rows.last, columns.first : columns.last]
            part = decode(seen, rows, columns)
            top, left = (rows.begin - rows.first) * scale, (columns.begin - columns.first) * scale
            tall, wide = (tile.end - tile.begin for tile in (rows, columns))
            image[
                :,
                rows.begin * scale : rows.end * scale,
                columns.begin * scale : columns.end * scale,
            ] = part[:, top : top + tall * scale, left : left + wide * scale]
    return image


def decode_tail(tail: Runner, features: Float, scale: int, window: int = WINDOWS[0]) -> Float:
    """Features [C, h, w] of a decoder's head -> values [3, H, W], by its tail, of which no tile is
    larger than window x window. See the module."""
    _, height, width = features.shape
    if height <= window and width <= window:
        values, _ = _tail(tail, features[None], None, 1)
        return np.array(values, np.float32)
    mosaic = _mosaic(features, window)
    image = np.empty((3, height * scale, width * scale), np.float32)
    correction: Figures | None = None
    for _ in range(MAX_PASSES):
        _, own = _tail(tail, mosaic, correction, 1)
        taken = own if correction is None else own + correction
        found = _decode_pass(tail, features, taken, image, window)
        if difference(taken, found) <= TOLERANCE:
            break
        correction = found - own
    return image


def tail_shapes(
    height: int, width: int, window: int = WINDOWS[0]
) -> tuple[list[tuple[int, int]], int]:
    """Heights and widths that `decode_tail` runs the tail at in one decoding, and how many
    decodings there are as a rule."""
    if height <= window and width <= window:
        return [(height, width)], 1
    rows, columns = (
        [tile.last - tile.first for tile in tiles_of(size, window - 2 * MARGIN, MARGIN)]
        for size in (height, width)
    )
    mosaic = (len(_places(height, window)), len(_places(width, window)))
    return [mosaic, *((h, w) for h in rows for w in columns)], _USUAL_PASSES


def difference(taken: Figures, found: Figures) -> float:
    """RMS over all groups of how far means and deviations are apart, in deviations of `found`."""
    deviation = _deviation(found)
    means = (taken[:, 0] - found[:, 0]) / deviation
    widths = _deviation(taken) / deviation - 1
    return float(np.sqrt(np.mean(means**2 + widths**2)))


def _deviation(figures: Figures) -> Figures:
    variance: Figures = np.maximum(figures[:, 1] - figures[:, 0] ** 2, 0) + _EPSILON
    return np.sqrt(variance)


def _decode_pass(
    tail: Runner, features: Float, taken: Figures, image: Float, window: int
) -> Figures:
    """Decode `image` with the figures `taken`; what they should have been."""
    _, height, width = features.shape
    scale = image.shape[1] // height
    found = np.zeros_like(taken)

    def decode(seen: Float, rows: Tile, columns: Tile) -> Float:
        values, moments = _tail(tail, seen, taken, 0, rows, columns)
        part = (rows.end - rows.begin) * (columns.end - columns.begin) / (height * width)
        found[:] += part * moments
        return values

    decode_tiles(decode, features, scale, window - 2 * MARGIN, MARGIN, image)
    return found


def _tail(
    tail: Runner,
    features: Float,
    given: Figures | None,
    own: int,
    rows: Tile | None = None,
    columns: Tile | None = None,
) -> tuple[Float, Figures]:
    """Image [3, ...] and moments of features [1, C, h, w] without the margins of rows and columns.

    given: figures, to which `own` times the features' own are added; None for none.
    """
    _, _, height, width = features.shape
    rows = rows or Tile(0, height, 0, height)
    columns = columns or Tile(0, width, 0, width)
    shape = [int(dim) for dim in tail.spec.inputs[1].shape]
    core = (
        rows.begin - rows.first,
        columns.begin - columns.first,
        rows.end - rows.first,
        columns.end - columns.first,
    )
    out = run_once(
        tail,
        {
            "features": features,
            "statistics": np.zeros(shape, np.float32) if given is None else given,
            "own": np.array([own], np.float32),
            "core": np.array(core, np.int64),
        },
    )
    image: Float = out["image"][0]
    return image, out["moments"].astype(np.float64)


def _mosaic(features: Float, window: int) -> Float:
    """Patches from all over the features [C, h, w], side by side [1, C, h', w']."""
    _, height, width = features.shape
    rows, columns = (_places(size, window) for size in (height, width))
    return features[None, :, rows[:, None], columns]


def _places(size: int, window: int) -> npt.NDArray[np.int64]:
    """Which of `size` rows are in the mosaic: all, or patches at equal distances."""
    if size <= window:
        return np.arange(size)
    patch = window // _PATCHES
    begins = np.linspace(0, size - patch, _PATCHES).round().astype(np.int64)
    places: npt.NDArray[np.int64] = (begins[:, None] + np.arange(patch)).reshape(-1)
    return places
