"""Round to nearest, with each group's scale chosen to lose least."""

from __future__ import annotations

import torch
from torch import Tensor

_SHRINK = tuple(1 - 0.035 * step for step in range(15))
"""Candidates for a scale, as parts of the one that holds the group's largest magnitude."""


_CACHED = 1 << 17
"""Weights that are worked on at a time: a processor's cache holds them."""


def code_range(bits: int) -> tuple[int, int]:
    """Smallest and largest code: -8 to 7, or -127 to 127 (int8 GEMMs want a symmetric range)."""
    return (-8, 7) if bits == 4 else (-127, 127)


def grouped(weight: Tensor, group: int) -> Tensor:
    """[N, K] -> [N, G, group], the last group filled up with zeros."""
    rows, columns = weight.shape
    count = -(-columns // group)
    padded = torch.nn.functional.pad(weight, (0, count * group - columns))
    return padded.reshape(rows, count, group)


def group_scales(weight: Tensor, group: int, bits: int, importance: Tensor | None = None) -> Tensor:
    """The scale of each group [N, G] that minimises the weighted squared error of rounding.

    weight [N, K]. importance [K]: weight of each column's squared error, the mean square of its
    input; None for equal ones. Scales are positive and exact in float16; a group of zeros gets 1.
    One scale for all K (group >= K) with 8 bits is the largest magnitude's, unsearched.
    """
    low, high = code_range(bits)
    groups = grouped(weight, group)
    largest = torch.maximum(groups.amax(-1) / high, groups.amin(-1) / low).clamp_min(0)
    if bits == 8:
        return _usable(largest)
    weights = torch.ones(weight.shape[1]) if importance is None else importance
    weights = grouped(weights[None], group)
    found = [_searched(groups[at], largest[at], weights, low, high) for at in _parts(weight)]
    return torch.cat(found) if found else largest


def _parts(weight: Tensor) -> list[slice]:
    """Rows of weight [N, K] that are worked on at a time."""
    rows = max(1, _CACHED // max(1, weight.shape[1]))
    return [slice(at, at + rows) for at in range(0, len(weight), rows)]


def _searched(groups: Tensor, largest: Tensor, weights: Tensor, low: int, high: int) -> Tensor:
    """The best scales [N, G] for groups [N, G, group], of those whose largest magnitudes are
    `largest` [N, G]."""
    best, chosen = torch.full_like(largest, torch.inf), _usable(largest)
    for part in _SHRINK:
        scale = _usable(largest * part)
        rounded = (groups / scale[..., None]).round_().clamp_(low, high).mul_(scale[..., None])
        error = (rounded.sub_(groups).square_() * weights).sum(-1)
        better = error < best
        best = torch.where(better, error, best)
        chosen = torch.where(better, scale, chosen)
    return chosen


def round_to_nearest(weight: Tensor, scales: Tensor, group: int, bits: int) -> Tensor:
    """Codes int8 [N, K] of weight [N, K] under the scales [N, G] of its groups."""
    low, high = code_range(bits)
    codes = torch.empty(weight.shape, dtype=torch.int8)
    for part in _parts(weight):
        wide = scales[part].repeat_interleave(group, 1)[:, : weight.shape[1]]
        codes[part] = (weight[part] / wide).round_().clamp_(low, high).to(torch.int8)
    return codes


def rounded(
    matrix: Tensor, group: int, bits: int, importance: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [N, K], scales [N, G], codes times scales [N, K]."""
    scales = group_scales(matrix, group, bits, importance)
    codes = round_to_nearest(matrix, scales, group, bits)
    return codes, scales, dequantized(codes, scales, group)


def dequantized(codes: Tensor, scales: Tensor, group: int) -> Tensor:
    """Codes [N, K] times the scales [N, G] of their groups."""
    return codes * scales.repeat_interleave(group, 1)[:, : codes.shape[1]]


def _usable(scale: Tensor) -> Tensor:
    """Rounded to float16, as it is stored; 1 where it would be zero or too small for it."""
    rounded = scale.clamp_max(65504.0).half().float()
    return torch.where(rounded > 0, rounded, torch.ones_like(rounded))
