"""GPTQ: columns are rounded one after the other, the rest makes up for what was lost.

Frantar et al. 2022, arXiv 2210.17323, algorithm 1, with columns in the order of falling
importance (their code's act-order) under scales that are chosen beforehand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from edgesd.export.quantize.blocks import spans
from edgesd.export.quantize.method import Method, Problem, Represented
from edgesd.export.quantize.rounding import code_range, dequantized, group_scales

DAMPING = 0.01
"""Share of the mean diagonal that is added to the diagonal (section 3.3, step 3)."""

_PANEL = 128


@dataclass(frozen=True, repr=False)
class Gptq(Method):
    """Codes that keep the outputs, beside the branch of the weight alone."""

    name = label = "gptq"

    def represent(self, problem: Problem) -> Represented:
        up, down, rest = problem.plain_branch()
        codes, scales, _ = fitted(rest, problem, problem.blocks)
        return Represented(codes, scales, up, down)


METHOD = Gptq


def fitted(
    matrix: Tensor, problem: Problem, blocks: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [N, K] of matrix [N, K] that keep its outputs, scales [N, G], codes times scales."""
    scales = group_scales(matrix, problem.group, problem.bits, problem.importance())
    codes = gptq(matrix, scales, problem.group, problem.bits, blocks)
    return codes, scales, dequantized(codes, scales, problem.group)


def gptq(weight: Tensor, scales: Tensor, group: int, bits: int, blocks: Sequence[Tensor]) -> Tensor:
    """Codes int8 [N, K] of weight [N, K] that keep its outputs on the recorded inputs.

    scales [N, G] for groups of `group` columns. blocks: covariances [B, B] of consecutive columns,
    together K; columns of different blocks are taken to be uncorrelated. Raises
    torch.linalg.LinAlgError when a block isn't a covariance (NaN).
    """
    wide = scales.repeat_interleave(group, 1)[:, : weight.shape[1]]
    codes = torch.empty(weight.shape, dtype=torch.int8)
    for span, block in spans(blocks):
        codes[:, span] = _block(weight[:, span], wide[:, span], bits, block)
    return codes


def _block(weight: Tensor, scales: Tensor, bits: int, covariance: Tensor) -> Tensor:
    low, high = code_range(bits)
    diagonal = covariance.diagonal().double()
    mean = float(diagonal.mean())
    if mean == 0:  # never saw a thing: plain rounding
        return (weight / scales).round().clamp(low, high).to(torch.int8)
    order = torch.argsort(diagonal, descending=True, stable=True)
    damped = covariance.double()[order][:, order]
    damped.diagonal().add_(DAMPING * mean)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    factor = torch.linalg.cholesky(inverse, upper=True).float()
    # A column of the weight is a row here: what runs for each of them goes through whole lines.
    rest, scale = weight.T[order].contiguous(), scales.T[order].contiguous()
    codes = torch.empty_like(rest)
    columns, rows = rest.shape
    for start in range(0, columns, _PANEL):
        stop = min(columns, start + _PANEL)
        panel, errors = rest[start:stop], torch.empty(stop - start, rows)
        inside = factor[start:stop, start:stop]
        divisors = inside.diagonal().tolist()
        for k, divisor in enumerate(divisors):
            column, step = panel[k], scale[start + k]
            code = torch.div(column, step, out=codes[start + k]).round_().clamp_(low, high)
            error = torch.addcmul(column, code, step, value=-1, out=errors[k]).div_(divisor)
            panel[k + 1 :].addr_(inside[k, k + 1 :], error, alpha=-1)
        rest[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    out = torch.empty(weight.shape, dtype=torch.int8)
    out[:, order] = codes.T.to(torch.int8)
    return out
