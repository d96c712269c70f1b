"""How far two images are apart, pixel by pixel."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from PIL import Image

from edgesd.errors import InputError

Pixels = npt.NDArray[np.uint8]
ImageLike = Image.Image | Pixels
"""An RGB image, or its pixels [H, W, 3] in 0 to 255."""

_PEAK = 255.0


def psnr(first: ImageLike, second: ImageLike) -> float:
    """Peak signal-to-noise ratio in dB of two images [H, W, 3] of 8 bits.

    10 log10(255^2 / MSE), where MSE is the mean over all pixels and channels of the squared
    difference; infinite for equal images. It doesn't matter which comes first.
    Raises InputError for anything but two 8-bit RGB images of one size.
    """
    mean_squared = mean_squared_error(first, second)
    return math.inf if mean_squared == 0 else 10 * math.log10(_PEAK**2 / mean_squared)


def mean_squared_error(first: ImageLike, second: ImageLike) -> float:
    """Mean over all pixels and channels of the squared difference. Raises InputError as `psnr`."""
    return float(np.mean(_difference(first, second).astype(np.float64) ** 2))


def max_abs_difference(first: ImageLike, second: ImageLike) -> int:
    """The largest difference of any channel of any pixel, 0 to 255. Raises InputError as `psnr`."""
    return int(np.abs(_difference(first, second)).max())


def _difference(first: ImageLike, second: ImageLike) -> npt.NDArray[np.int16]:
    """first - second [H, W, 3]."""
    a, b = pixel_pair(first, second)
    return np.subtract(a, b, dtype=np.int16)


def pixel_pair(first: ImageLike, second: ImageLike) -> tuple[Pixels, Pixels]:
    """The pixels of both, each [H, W, 3]. Raises InputError as `psnr`."""
    a, b = pixels_of(first), pixels_of(second)
    if a.shape != b.shape:
        raise InputError(
            f"images of {_size(a)} and {_size(b)} pixels can't be compared: expected one size"
        )
    return a, b


def pixels_of(image: ImageLike) -> Pixels:
    """The pixels [H, W, 3]. Raises InputError for anything but an 8-bit RGB image."""
    if isinstance(image, Image.Image) and image.mode != "RGB":
        raise InputError(f"an image of mode {image.mode} can't be compared: convert it to RGB")
    pixels = np.asarray(image)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.size == 0:
        raise InputError(
            f"an image of {pixels.dtype} {list(pixels.shape)} can't be compared: "
            "expected uint8 [height, width, 3]"
        )
    return pixels


def _size(pixels: Pixels) -> str:
    return f"{pixels.shape[1]}x{pixels.shape[0]}"
