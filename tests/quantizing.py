"""What tests of quantized layers share."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from edgesd.export.quantize.layers import Layer

Array = npt.NDArray[np.float32]


def normal(*shape: int, seed: int = 0) -> Array:
    """Normally distributed values, the same each time."""
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def patches(x: npt.NDArray[Any], layer: Layer) -> Array:
    """im2col by loops: [B, C, H, W] -> [B, H', W', K], tap by tap. Rows for others."""
    if layer.kind != "conv":
        return x
    top, left, bottom, right = layer.pads
    padded = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)))
    (kernel_h, kernel_w), (step_h, step_w) = layer.kernel, layer.strides
    height = (padded.shape[2] - kernel_h) // step_h + 1
    width = (padded.shape[3] - kernel_w) // step_w + 1
    out = np.empty((len(x), height, width, layer.columns), np.float32)
    for row in range(height):
        for column in range(width):
            part = padded[:, :, row * step_h :, column * step_w :][:, :, :kernel_h, :kernel_w]
            out[:, row, column] = part.transpose(0, 2, 3, 1).reshape(len(x), -1)
    return out
