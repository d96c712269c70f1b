"""Masks that inpainting is calibrated and judged with."""

from __future__ import annotations

import numpy as np

from edgesd.runtime.arrays import Float

_PAINTED = ((0, 0, 1, 1), (0, 1 / 2, 1, 1), (1 / 4, 1 / 4, 3 / 4, 3 / 4), (1 / 2, 0, 1, 1))
"""Top, left, bottom and right of what is painted, as shares of the sides: all of it first."""


def example_mask(index: int, height: int, width: int) -> Float:
    """The mask [1, 1, height, width] of an example: 1 where it is painted, else 0."""
    top, left, bottom, right = _PAINTED[index % len(_PAINTED)]
    mask = np.zeros((1, 1, height, width), np.float32)
    mask[..., int(top * height) : int(bottom * height), int(left * width) : int(right * width)] = 1
    return mask
