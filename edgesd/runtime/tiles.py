"""Latents -> image, and image -> latents, in tiles, for autoencoders whose activations are larger
than the memory.

AutoencoderTiny's decoder and encoder see only so far: tiles with margins are computed like images.

A full autoencoder's have attention over all latents, and group normalization over the whole image.
Each is run in parts (spec.bundle.SplitComponent): one with attention, where tensors are as large as
the latents, and in tiles what lies between that and the image: a decoder's tail, an encoder's head
and middle. Each normalization of a part in tiles takes its input's mean and mean square from
outside. Of a decoder they are found like this:

1. The part runs on a mosaic of its input, small enough for one tile. A normalization takes the
   mosaic's own figures plus a correction, none at first.
2. The output is made in tiles with the figures that were taken; the tiles' own, together, are
   what they should have been.
3. If those differ by more than TOLERANCE, what is between them and the mosaic's own is the next
   correction. A normalization depends on those before it, and in the mosaic in nearly the same
   way: twice is enough (docs/cpu.md).

An encoder's parts, one for each resolution, have four normalizations each, mostly. Here the output
is made again with what was found, each time with one exact normalization more: after the last one
it is the whole's, but for rounding. Margins lose nothing either.

Sizes, windows and margins are in latents; those of an encoder's parts in pixels of what they make.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from edgesd.runtime.arrays import Float
from edgesd.runtime.backends.base import Runner, run_once
from edgesd.spec.pipeline import TensorSpec

Figures = npt.NDArray[np.float64]
"""Mean and mean square of the input of each group normalization [norms, 2, groups]."""

TILE = 32
"""Side of AutoencoderTiny's tiles, without margins."""

WINDOWS = (28, 22)
"""Sides of the tiles of a full autoencoder's decoder with their margins, the smaller where memory
is short. `encoder_window` has an encoder's."""

Margins = tuple[int, int]
"""Of a tile: above (and to the left), and below (and to the right)."""

DECODER_MARGINS: Margins = 3, 3
"""Of a full autoencoder's decoder: about half of what its tail sees, 7."""

TOLERANCE = 0.01
"""Allowed distance of the figures from the image's, in standard deviations: RMS over all groups."""
MAX_PASSES, _USUAL_PASSES = 4, 2
"""How often an image is made, or read: at most, and usually."""

_PATCHES = 3
"""A mosaic has as many rows and columns of patches. Of 2 they miss too much of the image, and of
4 they consist of borders."""

_EPSILON = 1e-6

_EXACT = 1e-6
"""The same distance of figures that make no difference."""

_ENCODER_WINDOW = 5.6
"""Side of the tiles of an encoder's head, by that of a decoder's in latents: as much memory, as its
largest tensors have half the channels."""
_LEAST_WINDOW = 48
"""Twice the largest margins (spec.bundle.MOST_MARGIN), and half as much of the image."""


def margins_of(halo: int) -> Margins:
    """Margins of AutoencoderTiny's tiles, which sees up to `halo`.

    What lies beyond half of that changes a value by less than 1/255: margins of all would double
    the work and the memory.
    """
    return -(-halo // 2), -(-halo // 2)


class Tile(NamedTuple):
    """A tile in one direction: its begin and end, and the same with its margins."""

    begin: int
    end: int
    first: int
    last: int


def tiles_of(size: int, most: int, margins: Margins) -> list[Tile]:
    """`size` latents in tiles of about the same size, at most `most` without their margins."""
    count = max(1, -(-size // most))
    edges = [size * index // count for index in range(count + 1)]
    above, below = margins
    return [Tile(a, b, max(0, a - above), min(size, b + below)) for a, b in pairwise(edges)]


def in_tiles(
    compute: Callable[[Float, Tile, Tile], Float],
    source: Float,
    out: Float,
    size: tuple[int, int],
    most: int,
    margins: Margins,
) -> None:
    """Write to `out` [K, h * b, w * b] what becomes of `source` [C, h * a, w * a]; size: h, w.

    compute: makes what a tile with its margins [1, C, ...] becomes [K, ...], margins included; it
    gets their rows and columns, too.
    """
    into, made = (array.shape[1] // size[0] for array in (source, out))
    rows_of, columns_of = (tiles_of(n, most, margins) for n in size)
    for rows in rows_of:
        for columns in columns_of:
            seen = source[
                None,
                :,
                rows.first * into : rows.last * into,
                columns.first * into : columns.last * into,
            ]
            part = compute(seen, rows, columns)
            top, left = (rows.begin - rows.first) * made, (columns.begin - columns.first) * made
            tall, wide = ((tile.end - tile.begin) * made for tile in (rows, columns))
            out[
                :,
                rows.begin * made : rows.end * made,
                columns.begin * made : columns.end * made,
            ] = part[:, top : top + tall, left : left + wide]


def encoder_window(window: int, index: int) -> int:
    """Side of the tiles of an encoder's part, the head being 0, that takes as much memory as those
    of a decoder's tail with the side `window`: each part has twice as many channels as the one
    before."""
    return max(_LEAST_WINDOW, int(_ENCODER_WINDOW * window / 2 ** (index / 2)))


def in_tiled_part(
    part: Runner,
    source: Float,
    scales: tuple[int, int],
    window: int,
    margins: Margins | None = None,
) -> Float:
    """What a part makes of `source` [C, h * a, w * a], in tiles of which none is larger than window
    x window: [K, h * b, w * b]. scales: a, b. margins: of an encoder's part; None for a decoder's.
    See the module."""
    _, height, width = source.shape
    size = height // scales[0], width // scales[0]
    if max(size) <= window:
        values, _ = _run(part, source[None], None, 1, *_one_tile(size))
        return np.array(values, np.float32)
    used = margins or DECODER_MARGINS
    channels = int(_made(part).shape[1])
    out = np.empty((channels, size[0] * scales[1], size[1] * scales[1]), np.float32)
    tiles = _Tiles(part, source, size, out, window - sum(used), used)
    if margins is None:
        _by_mosaic(tiles, *_mosaic(source, size, window))
    else:
        _exactly(tiles)
    return out


class _Tiles(NamedTuple):
    """A part in tiles: `out` is made of `source`. size: h, w. most, margins: see tiles_of."""

    part: Runner
    source: Float
    size: tuple[int, int]
    out: Float
    most: int
    margins: Margins

    def make(self, taken: Figures | None) -> Figures:
        """Make all with the figures `taken`, each tile's own if there are none; what they should
        have been."""
        found: list[Figures] = []

        def compute(seen: Float, rows: Tile, columns: Tile) -> Float:
            values, moments = _run(self.part, seen, taken, int(taken is None), rows, columns)
            area = (rows.end - rows.begin) * (columns.end - columns.begin)
            found.append(moments * (area / (self.size[0] * self.size[1])))
            return values

        in_tiles(compute, self.source, self.out, self.size, self.most, self.margins)
        total: Figures = np.sum(found, axis=0)
        return total


def _by_mosaic(tiles: _Tiles, mosaic: Float, size: tuple[int, int]) -> None:
    """See the module."""
    correction: Figures | None = None
    for _ in range(MAX_PASSES):
        _, own = _run(tiles.part, mosaic, correction, 1, *_one_tile(size))
        taken = own if correction is None else own + correction
        found = tiles.make(taken)
        if difference(taken, found) <= TOLERANCE:
            break
        correction = found - own


def _exactly(tiles: _Tiles) -> None:
    """See the module."""
    taken = tiles.make(None)
    for _ in range(len(taken)):
        found = tiles.make(taken)
        if difference(taken, found) <= _EXACT:
            break
        taken = found


def part_shapes(
    size: tuple[int, int], window: int, margins: Margins | None, norms: int
) -> tuple[list[tuple[int, int]], int]:
    """Heights and widths that `in_tiled_part` runs a part at in one pass over an output of `size`,
    and how many passes there are as a rule. norms: of the part."""
    if max(size) <= window:
        return [size], 1
    used = margins or DECODER_MARGINS
    rows, columns = (
        [tile.last - tile.first for tile in tiles_of(n, window - sum(used), used)] for n in size
    )
    tiles = [(h, w) for h in rows for w in columns]
    if margins is not None:
        return tiles, norms + 1
    return [(len(_places(size[0], window)), len(_places(size[1], window))), *tiles], _USUAL_PASSES


def difference(taken: Figures, found: Figures) -> float:
    """RMS over all groups of how far means and deviations are apart, in deviations of `found`."""
    deviation = _deviation(found)
    means = (taken[:, 0] - found[:, 0]) / deviation
    widths = _deviation(taken) / deviation - 1
    return float(np.sqrt(np.mean(means**2 + widths**2)))


def _deviation(figures: Figures) -> Figures:
    variance: Figures = np.maximum(figures[:, 1] - figures[:, 0] ** 2, 0) + _EPSILON
    return np.sqrt(variance)


def _one_tile(size: tuple[int, int]) -> tuple[Tile, Tile]:
    rows, columns = (Tile(0, n, 0, n) for n in size)
    return rows, columns


def _run(
    part: Runner, source: Float, given: Figures | None, own: int, rows: Tile, columns: Tile
) -> tuple[Float, Figures]:
    """What is made of a tile [1, C, ...], and its moments without the margins of rows and columns.

    given: figures, to which `own` times the tile's own are added; None for none.
    """
    spec = part.spec
    statistics = next(tensor for tensor in spec.inputs if tensor.name == "statistics")
    shape = [int(dim) for dim in statistics.shape]
    core = (
        rows.begin - rows.first,
        columns.begin - columns.first,
        rows.end - rows.first,
        columns.end - columns.first,
    )
    fed = {
        "statistics": np.zeros(shape, np.float32) if given is None else given,
        "own": np.array([own], np.float32),
        "core": np.array(core, np.int64),
    }
    (source_name,) = (tensor.name for tensor in spec.inputs if tensor.name not in fed)
    out = run_once(part, {source_name: source, **fed})
    made: Float = out[_made(part).name][0]
    return made, out["moments"].astype(np.float64)


def _made(part: Runner) -> TensorSpec:
    """What a part makes besides moments."""
    (made,) = (tensor for tensor in part.spec.outputs if tensor.name != "moments")
    return made


def _mosaic(source: Float, size: tuple[int, int], window: int) -> tuple[Float, tuple[int, int]]:
    """Patches from all over the source [C, h * a, w * a], side by side [1, C, ...]; their size."""
    unit = source.shape[1] // size[0]
    rows, columns = (_places(n, window) for n in size)
    tall, wide = (
        (places[:, None] * unit + np.arange(unit)).reshape(-1) for places in (rows, columns)
    )
    return source[None, :, tall[:, None], wide], (len(rows), len(columns))


def _places(size: int, window: int) -> npt.NDArray[np.int64]:
    """Which of `size` rows are in the mosaic: all, or patches at equal distances."""
    if size <= window:
        return np.arange(size)
    patch = window // _PATCHES
    begins = np.linspace(0, size - patch, _PATCHES).round().astype(np.int64)
    places: npt.NDArray[np.int64] = (begins[:, None] + np.arange(patch)).reshape(-1)
    return places
