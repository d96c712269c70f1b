"""Hues: which one a picture has, how far two of them are apart, and how to repaint a picture."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from PIL import Image

# Hue of each colour word, in degrees.
HUES = {
    "red": 0.0,
    "orange": 25.0,
    "yellow": 48.0,
    "green": 125.0,
    "blue": 212.0,
    "purple": 275.0,
    "pink": 330.0,
}
# Pixels below these (of 255) are grey, black or white and have no hue worth speaking of.
MIN_SATURATION = 60
MIN_VALUE = 60
# A repainted picture keeps pixels further than this from its own main hue (a green stalk).
TINT_WINDOW_DEGREES = 35.0
# A picture this close to the wanted hue is not repainted.
SAME_HUE_DEGREES = 8.0


def hue_distance(a: float, b: float) -> float:
    """Smallest angle between two hues, in degrees (0 to 180)."""
    return abs((a - b + 180.0) % 360.0 - 180.0)


def main_hue(image: Image.Image) -> float | None:
    """Most common hue of the coloured pixels, in degrees; None for a picture without colour."""
    hsv = np.asarray(image.convert("HSV"))
    coloured = (hsv[..., 1] > MIN_SATURATION) & (hsv[..., 2] > MIN_VALUE)
    if not coloured.any():
        return None
    counts = np.bincount(hsv[..., 0][coloured], minlength=256)
    smooth = np.convolve(np.tile(counts, 3), np.bartlett(17), "same")[256:512]
    return float(smooth.argmax()) / 255.0 * 360.0


def tint(image: Image.Image, colour: str) -> Image.Image:
    """Repaint the pixels near the main hue in ``colour``; other hues, greys and white stay."""
    hue = main_hue(image)
    target = HUES[colour]
    if hue is None or (colour != "pink" and hue_distance(hue, target) < SAME_HUE_DEGREES):
        return image
    hsv: npt.NDArray[np.float32] = np.asarray(image.convert("HSV")).astype(np.float32)
    degrees = hsv[..., 0] / 255.0 * 360.0
    near = np.abs((degrees - hue + 180.0) % 360.0 - 180.0) < TINT_WINDOW_DEGREES
    mask = near & (hsv[..., 1] > MIN_SATURATION) & (hsv[..., 2] > MIN_VALUE)
    hsv[..., 0] = np.where(mask, target / 360.0 * 255.0, hsv[..., 0])
    if colour in ("yellow", "orange", "pink"):  # else they read as brown
        hsv[..., 2] = np.where(mask, np.minimum(255.0, hsv[..., 2] * 1.15), hsv[..., 2])
    if colour == "pink":
        hsv[..., 1] = np.where(mask, hsv[..., 1] * 0.6, hsv[..., 1])
    bands = [Image.fromarray(hsv[..., band].astype(np.uint8)) for band in range(3)]
    return Image.merge("HSV", bands).convert("RGB")
