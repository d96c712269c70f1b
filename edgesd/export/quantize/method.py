"""The interface of a quantization method: its configuration, and how it represents a weight."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from edgesd.spec.build import MEASURES


@dataclass(frozen=True)
class Problem:
    """A weight whose codes and branch are to be chosen.

    matrix [N, K]: smoothed, where the inputs are. bits, group: of the codes. rank: of the branch, 0
    for none. blocks: covariance of the inputs (blocks.py). noise: RMS of what the inputs' number
    format changes in each column [K]; None for inputs in 16 bits.
    """

    matrix: Tensor
    bits: int
    group: int
    rank: int
    blocks: Sequence[Tensor]
    noise: Callable[[], Tensor | None]

    def importance(self) -> Tensor:
        """Mean square of each column of the input [K]."""
        diagonal = torch.cat([block.diagonal() for block in self.blocks])
        return diagonal.clamp_min(float(diagonal.mean()) * 1e-4 + 1e-12)

    def plain_branch(self) -> tuple[Tensor, Tensor, Tensor]:
        """up, down of the branch of the weight alone, and the rest of the weight [N, K]."""
        up, down = plain_branch(self.matrix, self.rank)
        return up, down, self.matrix if self.rank == 0 else self.matrix - up @ down


class Represented(NamedTuple):
    """codes [N, K], scales [N, G]; up [N, r] and down [r, K] of the branch, exact in float16."""

    codes: Tensor
    scales: Tensor
    up: Tensor
    down: Tensor


@dataclass(frozen=True, repr=False)
class Method(ABC):
    """How codes are chosen. static: activation ranges are recorded ones, not those of the current
    tensor. measures: see spec/build.py.

    name: of its file. label: as a recipe has it. smooths: outliers of the inputs move into the
    weights, where that pays. correlates: the inputs' covariance is used, and has to be recorded.
    """

    static: bool = False
    measures: frozenset[str] = frozenset(MEASURES)
    name: ClassVar[str]
    label: ClassVar[str]
    smooths: ClassVar[bool] = False
    correlates: ClassVar[bool] = True

    def __repr__(self) -> str:
        # Part of the cache's keys: what was quantized before is found again. `ends` and `once`
        # choose the schemes of layers, not what becomes of one under a scheme.
        left = sorted(set(MEASURES) - self.measures - {"ends", "once"})
        without = f", without={left}" if left else ""
        return f"Method(name={self.name!r}, static={self.static!r}{without})"

    @abstractmethod
    def represent(self, problem: Problem) -> Represented:
        """Codes and branch of a weight."""


def plain_branch(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """up and down of the truncated SVD of the weight alone, exact in float16."""
    if rank == 0:
        return torch.zeros(len(matrix), 0), torch.zeros(0, matrix.shape[1])
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    root = values[:rank].sqrt()
    up, down = left[:, :rank] * root, right[:rank] * root[:, None]
    return up.half().float(), down.half().float()
