"""Number formats of a layer's input: choosing ranges and smoothing, and what they lose.

Everything here works on rows [n, K] as the layer's matrix product sees them (patches of a conv).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from edgesd.export.quantize.layers import Activations, Layer
from edgesd.spec.scheme import Scheme

_MIN_SCALE = 1e-8


def activation_mode(layer: Layer, scheme: Scheme, static: bool) -> str:
    """How a layer's input is represented under a scheme: see layers.Activations.

    An embedding has no input, and a linear that sees one row per run would save nothing.
    """
    if scheme.activation_bits == 16 or layer.kind == "embedding" or layer.one_row:
        return "none"
    if scheme.activation_bits == 4:
        return "group"
    if scheme.weight_bits == 4 and layer.kind == "linear":
        return "group"  # what 4-bit matrix kernels do, on every CPU
    return "static" if static else "dynamic"


def channel_group(layer: Layer, scheme: Scheme) -> int:
    """Channels that share a scale in mode "group".

    8 bits: the group of the weights, as matrix kernels have it. 4 bits: the largest part of it that
    divides the channels.
    """
    if scheme.activation_bits == 8:
        return min(scheme.group, layer.channels)
    return math.gcd(scheme.group, layer.channels)


def fake_quantize(
    rows: Tensor, act: Activations, layer: Layer, ranges: Tensor, steps: Tensor
) -> Tensor:
    """Rows [n, K] as the layer computes with them.

    ranges [T, 2]: of the whole tensor at each timestep, on the rows' scale; steps [n]: which one
    a row belongs to.
    """
    if act.mode == "none":
        return rows
    if act.mode == "group":
        return _by_group(rows, layer, act)
    if act.mode == "dynamic":
        low, high = ranges[:, 0].clamp(max=0), ranges[:, 1].clamp(min=0)
        scale = ((high - low) / 255).clamp_min(_MIN_SCALE)
        zero = (-low / scale).round().clamp(0, 255)
    else:
        assert act.scale is not None and act.zero_point is not None
        scale = torch.from_numpy(act.scale)
        zero = torch.from_numpy(act.zero_point.astype(np.float32))
    if len(scale) > 1:
        scale, zero = scale[steps][:, None], zero[steps][:, None]
    rounded: Tensor = ((rows / scale).round() + zero).clamp(0, 255).sub(zero) * scale
    return rounded


def _by_group(rows: Tensor, layer: Layer, act: Activations) -> Tensor:
    if act.shift is not None:
        shift = torch.from_numpy(act.shift)
        return _rounded(rows + shift, layer, act.group, 2**act.bits - 1) - shift
    return _rounded(rows, layer, act.group, 2 ** (act.bits - 1) - 1)


def _rounded(rows: Tensor, layer: Layer, group: int, high: int) -> Tensor:
    """Rows rounded to `high` steps from 0 to the largest magnitude of each group of channels."""
    taps = rows.shape[1] // layer.channels
    count = -(-layer.channels // group)
    padded = torch.nn.functional.pad(
        rows.reshape(len(rows), taps, layer.channels), (0, count * group - layer.channels)
    ).reshape(len(rows), taps, count, group)
    scale = (padded.abs().amax(-1, keepdim=True) / high).clamp_min(_MIN_SCALE)
    rounded: Tensor = (padded / scale).round() * scale
    out: Tensor = rounded.reshape(len(rows), taps, -1)[..., : layer.channels]
    return out.reshape(rows.shape)


def static_ranges(ranges: Tensor) -> Activations:
    """8-bit ranges for each timestep, and one symmetric range over all, from recorded [T, 2].

    They hold every value that was recorded. Clipping them, with the clip chosen by the squared
    error of inputs or of outputs on sampled rows, made images worse by 2 to 5 dB: the few large
    values that it cuts off are large in the same places of every image.
    """
    low, high = ranges[:, 0].clamp(max=0), ranges[:, 1].clamp(min=0)
    scale = ((high - low) / 255).clamp_min(_MIN_SCALE)
    zero = (-low / scale).round().clamp(0, 255)
    largest = max(float(ranges.abs().max()) / 127, _MIN_SCALE)
    return Activations(
        mode="static",
        bits=8,
        scale=scale.numpy(),
        zero_point=zero.numpy().astype(np.uint8),
        symmetric_scale=np.array([largest], np.float32),
    )


def smoothing(channel_max: Tensor, weight: Tensor, alpha: float) -> Tensor:
    """Factors [C] that inputs are divided by: max|X_j|^alpha / max|W_j|^(1 - alpha).

    SmoothQuant (Xiao et al. 2022, arXiv 2211.10438, eq. 4). channel_max [C]: largest magnitude of
    each input channel; weight [N, K]. Scaled to a geometric mean of 1; dead channels get 1.
    """
    columns = weight.abs().amax(0).reshape(-1, len(channel_max)).amax(0)
    live = (channel_max > 1e-6) & (columns > 1e-6)
    raw = channel_max.clamp_min(1e-6) ** alpha / columns.clamp_min(1e-6) ** (1 - alpha)
    raw = torch.where(live, raw, torch.ones_like(raw))
    if live.any():
        raw = torch.where(live, raw / raw[live].log().mean().exp(), raw)
    return raw.clamp(1e-3, 1e3)
