"""Control images, made on the board of what a person has: a photo or a sketch.

Lines are white on black, as ControlNets and adapters were trained with them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from edgesd.errors import InputError, UsageError
from edgesd.runtime.arrays import Array

if TYPE_CHECKING:
    from PIL import Image

Hint = Literal["ready", "canny", "scribble"]
HINTS: tuple[Hint, ...] = ("ready", "canny", "scribble")
"""What a control image is made by: ready is one already."""

Lines = Literal["dark", "light"]

Bits = npt.NDArray[np.bool_]

MOST_THRESHOLD = 2040
"""Of an edge: a Sobel operator's largest |dx| + |dy| for 8 bits."""

MOST_LINE_WIDTH = 64

_LEAST_CONTRAST = 24
"""Between lines and what is around them, of 255: paper has less."""

_LEAST_CONTRAST_PART = 0.35
"""Between a line and its ground, of the strongest lines' contrast."""

_LEAST_SKETCH = 512
"""Pixels of the shorter side in which lines are looked for: in fewer, thin ones fade."""

_FINEST = 8
"""Times the size that is drawn, at most."""

_WORKING_BYTES = 112
"""Of a pixel, while lines are looked for (measured: 75 for edges, 107 for a sketch)."""

_TILES = 32
"""Along the shorter side, in which the brightness of a sketch's ground is measured."""

_FILLED_TILES = 9
"""Filled shapes up to so many tiles wide are no ground."""

_LINE_PARTS = 128
"""Lines are this part of the shorter side wide: 4 pixels of 512, as people draw scribbles."""


@dataclass(frozen=True)
class HintOptions:
    """How a control image is made.

    low, high: Canny's thresholds. lines: of a sketch are darker or lighter than their ground; None:
    whichever are less. line_width: of a scribble, in pixels; None: as is usual for its size.
    Raises UsageError for values out of range.
    """

    low: float = 100
    high: float = 200
    lines: Lines | None = None
    line_width: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.high <= MOST_THRESHOLD:
            raise UsageError(
                f"thresholds of edges must be 0 to {MOST_THRESHOLD}, the low one first, not "
                f"{self.low} and {self.high}: 100 and 200 are usual"
            )
        if self.line_width is not None and not 1 <= self.line_width <= MOST_LINE_WIDTH:
            raise UsageError(
                f"lines must be 1 to {MOST_LINE_WIDTH} pixels wide, not {self.line_width}"
            )


USUAL = HintOptions()


def control_image(
    image: Image.Image, kind: Hint, width: int, height: int, options: HintOptions = USUAL
) -> Image.Image:
    """The control image that `image` (RGB) gives at a size: RGB, white lines on black.

    A ready one stays as it is, in its own size. Raises InputError when a sketch has no lines.
    """
    from PIL import Image

    if kind == "ready":
        return image
    finer = _finer(kind, width, height)
    image = image.resize((width * finer, height * finer), Image.Resampling.LANCZOS)
    if kind == "canny":
        found = canny(np.asarray(image), options.low, options.high)
    else:
        usual = max(1, round(min(width, height) / _LINE_PARTS))
        grey = np.asarray(image.convert("L"))
        found = scribble(grey, options.line_width or usual, options.lines, finer)
    return Image.fromarray(found.astype(np.uint8) * np.uint8(255)).convert("RGB")


def making_bytes(kind: Hint, width: int, height: int) -> int:
    """Memory at most while a control image of this size is made of a picture's pixels."""
    if kind == "ready":
        return 0
    return _WORKING_BYTES * width * height * _finer(kind, width, height) ** 2


def _finer(kind: Hint, width: int, height: int) -> int:
    """How many times the size that is drawn a picture is looked at in."""
    return 1 if kind == "canny" else min(-(-_LEAST_SKETCH // min(width, height)), _FINEST)


# --- edges ----------------------------------------------------------------------------------------


def canny(image: Array, low: float, high: float) -> Bits:
    """Edges of an 8-bit image [H, W, channels] -> [H, W] (Canny 1986).

    In OpenCV's variant, with its defaults: Sobel's 3x3 operator on the image as it is, at each
    pixel in the channel where it is steepest, |dx| + |dy|, and four directions.
    """
    across, down = _sobel(image)
    steepness = np.abs(across) + np.abs(down)
    if image.shape[2] == 1:
        across, down, steepness = across[..., 0], down[..., 0], steepness[..., 0]
    else:
        channel = steepness.argmax(axis=2)[..., None]
        across, down, steepness = (
            np.take_along_axis(values, channel, 2)[..., 0] for values in (across, down, steepness)
        )
    ridge = _ridges(across, down, steepness) & (steepness > low)
    return _connected_to(ridge, ridge & (steepness > high))


def _sobel(image: Array) -> tuple[Array, Array]:
    """Derivatives across and down of [H, W, C], each [H, W, C] in int32; edges are repeated."""
    padded = np.pad(image.astype(np.int32), ((1, 1), (1, 1), (0, 0)), mode="edge")
    tall = padded[:-2] + 2 * padded[1:-1] + padded[2:]
    wide = padded[:, :-2] + 2 * padded[:, 1:-1] + padded[:, 2:]
    return tall[:, 2:] - tall[:, :-2], wide[2:] - wide[:-2]


_TAN_22 = 13573
"""The tangent of 22.5 degrees, times 2**15, as OpenCV rounds it."""


def _ridges(across: Array, down: Array, steepness: Array) -> Bits:
    """Where the steepness [H, W] is largest along its direction. Of two equal pixels it is the one
    further right, or further down; in a diagonal neither."""
    padded = np.pad(steepness, 1)
    height, width = steepness.shape

    def at(y: int, x: int) -> Array:
        return padded[1 + y : 1 + y + height, 1 + x : 1 + x + width]

    flat = np.abs(across).astype(np.int64) * _TAN_22
    tall = np.abs(down).astype(np.int64) << 15
    sideways = tall < flat
    upright = tall > flat + (np.abs(across).astype(np.int64) << 16)
    falling = (across ^ down) < 0
    horizontal = (steepness > at(0, -1)) & (steepness >= at(0, 1))
    vertical = (steepness > at(-1, 0)) & (steepness >= at(1, 0))
    main = (steepness > at(-1, -1)) & (steepness > at(1, 1))
    other = (steepness > at(-1, 1)) & (steepness > at(1, -1))
    diagonal = np.where(falling, other, main)
    found: Bits = np.where(sideways, horizontal, np.where(upright, vertical, diagonal))
    return found


def _connected_to(area: Bits, seeds: Bits) -> Bits:
    """The parts of `area` that have one of `seeds`, which lie in it."""
    labels = _labels(area)
    chosen = np.zeros(labels.size, bool)
    chosen[labels[seeds[area]]] = True
    return _where(area, chosen[labels])


def _labels(area: Bits) -> Array:
    """For each pixel of `area` [H, W], in order, the number of one of the pixels that it is
    connected with, the same for all of them; diagonally, too."""
    count = int(area.sum())
    numbers = np.full((area.shape[0] + 1, area.shape[1] + 2), -1, np.int32)
    numbers[:-1, 1:-1][area] = np.arange(count, dtype=np.int32)
    here = numbers[:-1, 1:-1]
    pairs = []
    for there in numbers[:-1, 2:], numbers[1:, :-2], numbers[1:, 1:-1], numbers[1:, 2:]:
        both = area & (there >= 0)
        pairs.append((here[both], there[both]))
    first, second = (np.concatenate(each) for each in zip(*pairs, strict=True))
    labels = np.arange(count, dtype=np.int32)
    while True:
        one, other = labels[first], labels[second]
        differ = one != other
        if not differ.any():
            return labels
        first, second, one, other = (each[differ] for each in (first, second, one, other))
        labels[np.maximum(one, other)] = np.minimum(one, other)
        while True:  # what a label points to points further
            further = labels[labels]
            if np.array_equal(further, labels):
                break
            labels = further


# --- scribbles ------------------------------------------------------------------------------------


def scribble(grey: Array, line_width: int, lines: Lines | None = None, finer: int = 1) -> Bits:
    """The lines of a sketch, 8-bit [H, W] -> [H // finer, W // finer], drawn anew `line_width`
    pixels wide.

    Each is thinned to its middle; of a filled shape that is what remains. What has fewer pixels
    than a line is wide is a speck and left out.
    Raises InputError when there are no lines.
    """
    least, middle, most = np.percentile(grey, (0.1, 50, 99.9))
    dark = most - middle < middle - least if lines is None else lines == "dark"
    if not dark:
        grey = 255 - grey
    ink = _ground(grey).astype(np.int16) - grey
    strongest = float(np.percentile(ink, 99.9))
    area = ink > max(strongest * _LEAST_CONTRAST_PART, _LEAST_CONTRAST)
    found = _thinned(_without_specks(area, line_width * finer))
    if not found.any():
        raise InputError("the sketch has no lines that stand out from their ground")
    if finer > 1:
        height, width = (side // finer for side in grey.shape)
        pieces = found[: height * finer, : width * finer].reshape(height, finer, width, finer)
        found = np.asarray(pieces.any(axis=(1, 3)))
    return _thickened(found, line_width)


def _ground(grey: Array) -> Array:
    """How bright the ground of a sketch with dark lines is at each pixel: a photographed sheet is
    lit from one side. 8-bit [H, W], as its argument."""
    from PIL import Image, ImageFilter

    height, width = grey.shape
    side = max(1, min(height, width) // _TILES)
    padded = np.pad(grey, ((0, -height % side), (0, -width % side)), mode="edge")
    rows, columns = (length // side for length in padded.shape)
    tiles = np.percentile(padded.reshape(rows, side, columns, side), 75, axis=(1, 3))
    coarse = Image.fromarray(tiles.astype(np.uint8))
    coarse = coarse.filter(ImageFilter.MaxFilter(_FILLED_TILES))
    coarse = coarse.filter(ImageFilter.MinFilter(_FILLED_TILES))
    smooth = coarse.resize((columns * side, rows * side), Image.Resampling.BICUBIC)
    ground: Array = np.asarray(smooth)[:height, :width]
    return ground


def _without_specks(area: Bits, least: int) -> Bits:
    labels = _labels(area)
    large = np.bincount(labels, minlength=labels.size) >= least
    return _where(area, large[labels])


def _where(area: Bits, chosen: Bits) -> Bits:
    """The pixels of `area` that are `chosen`, a value for each of them in order."""
    found: Bits = area.copy()
    found[area] = chosen
    return found


def _neighbours(area: Bits) -> list[Bits]:
    """The eight neighbours of each pixel, clockwise from the one above."""
    padded = np.pad(area, 1)
    height, width = area.shape
    places = ((0, 1), (0, 2), (1, 2), (2, 2), (2, 1), (2, 0), (1, 0), (0, 0))
    return [padded[y : y + height, x : x + width] for y, x in places]


def _thinned(area: Bits) -> Bits:
    """Lines one pixel wide in the middle of those of `area` (Zhang and Suen 1984).

    A pixel with two neighbours stays, as in Lu and Wang's variant (1986): diagonal lines two
    pixels wide would vanish.
    """
    while True:
        before = area
        for first, second in (((0, 2, 4), (2, 4, 6)), ((0, 2, 6), (0, 4, 6))):
            around = _neighbours(area)
            count = np.zeros(area.shape, np.uint8)
            changes = np.zeros(area.shape, np.uint8)
            for index, one in enumerate(around):
                count += one
                changes += ~one & around[(index + 1) % 8]
            inner = np.logical_and.reduce([around[index] for index in first])
            inner |= np.logical_and.reduce([around[index] for index in second])
            area = area & ~((count >= 3) & (count <= 6) & (changes == 1) & ~inner)
        if np.array_equal(area, before):
            return area


def _thickened(area: Bits, width: int) -> Bits:
    """`area` with a disc of `width` pixels around each of its pixels."""
    height, wide = area.shape
    before = (width - 1) // 2
    padded = np.pad(area, width)
    found = np.zeros_like(area)
    for y, x in _disc(width):
        top, left = width + before - y, width + before - x
        found |= padded[top : top + height, left : left + wide]
    return found


def _disc(width: int) -> Iterator[tuple[int, int]]:
    """The pixels of a disc within width x width."""
    middle = (width - 1) / 2
    for y in range(width):
        for x in range(width):
            if (y - middle) ** 2 + (x - middle) ** 2 <= (width / 2) ** 2:
                yield y, x
