"""How alike the structure of two images is: local brightness, contrast and correlation."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from edgesd.errors import InputError
from edgesd.evaluate.psnr import ImageLike, pixel_pair

WINDOW = 11
"""Width of the Gaussian window in pixels, and the smallest side of an image."""
_SIGMA = 1.5
_C1, _C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2

_Plane = npt.NDArray[np.float64]


def ssim(first: ImageLike, second: ImageLike) -> float:
    """Mean structural similarity of two images [H, W, 3] of 8 bits: 1 for equal ones, else less.

    Wang et al. 2004, eq. 13, with its constants: means, variances and covariance under a Gaussian
    window of 11x11 pixels and sigma 1.5, K1 = 0.01, K2 = 0.03, L = 255; only where the window lies
    wholly inside. Each channel by itself; the mean over places and channels. It doesn't matter
    which image comes first.
    Raises InputError as `psnr`, and for images of fewer than 11 pixels on a side.
    """
    pixels_a, pixels_b = pixel_pair(first, second)
    height, width, _ = pixels_a.shape
    if min(height, width) < WINDOW:
        raise InputError(
            f"SSIM of images of {width}x{height} pixels can't be taken: "
            f"expected {WINDOW}x{WINDOW} or more"
        )
    a, b = pixels_a.astype(np.float64), pixels_b.astype(np.float64)
    mean_a, mean_b = _blur(a), _blur(b)
    variances = _blur(a**2 + b**2) - mean_a**2 - mean_b**2
    covariance = _blur(a * b) - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + _C1) / (mean_a**2 + mean_b**2 + _C1)
    return float(np.mean(luminance * (2 * covariance + _C2) / (variances + _C2)))


def gaussian_window() -> _Plane:
    """The 11 weights of one axis; they add up to 1."""
    places = np.arange(WINDOW) - WINDOW // 2
    weights = np.exp(-0.5 * (places / _SIGMA) ** 2)
    return np.asarray(weights / weights.sum())


def _blur(plane: _Plane) -> _Plane:
    """Weighted mean under the window, [H, W, C] -> [H - 10, W - 10, C]; one axis at a time."""
    weights = gaussian_window()
    rows, columns = plane.shape[0] - WINDOW + 1, plane.shape[1] - WINDOW + 1
    down = weights[0] * plane[:rows]
    for i in range(1, WINDOW):
        down += weights[i] * plane[i : i + rows]
    across = weights[0] * down[:, :columns]
    for i in range(1, WINDOW):
        across += weights[i] * down[:, i : i + columns]
    return np.asarray(across)
