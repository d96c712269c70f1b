"""Block-diagonal matrices: covariances [B, B] of consecutive columns, together K."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor


def spans(blocks: Sequence[Tensor]) -> Iterator[tuple[slice, Tensor]]:
    """Each block with the columns that it belongs to."""
    start = 0
    for block in blocks:
        yield slice(start, start + len(block)), block
        start += len(block)


def blockwise(
    matrix: Tensor, blocks: Sequence[Tensor], function: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """function(columns of matrix [N, K], their block [B, B]) -> [N, B], side by side [N, K]."""
    out = torch.empty_like(matrix)
    for span, block in spans(blocks):
        out[:, span] = function(matrix[:, span], block)
    return out
