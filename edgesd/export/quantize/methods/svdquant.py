"""SVDQuant: a 16-bit low-rank branch takes what 4 bits can't hold, and gives back what they lose.

Li et al. 2024, arXiv 2411.05007. Section 4.2: outliers move from activations into weights by a
factor per channel (smoothing); the branch is the truncated SVD of the smoothed weight, and its
residual is quantized. Here the SVD is taken in the metric of the recorded inputs rather than that
of independent channels, and branch and codes are fitted in turn, as LoftQ does with weights alone
(Li et al. 2023, arXiv 2310.08659, algorithm 1): the branch that best repairs given codes is known
in closed form.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from edgesd.errors import EdgesdError
from edgesd.export.quantize.blocks import blockwise, spans
from edgesd.export.quantize.method import Method, Problem, Represented
from edgesd.export.quantize.methods.gptq import Gptq, fitted
from edgesd.export.quantize.rounding import rounded

DAMPING = 1e-4
"""Share of the mean diagonal that is added to a covariance's diagonal, so that it has a factor."""

_EXACT = 512
"""Up to this size of the smaller side the SVD is exact; above, by subspace iteration."""
_OVERSAMPLING, _ITERATIONS = 16, 6

_ROUNDS = 4
_BIG = 4 << 20
"""Weights of a layer from which on one round less precise search must do."""

Quantizer = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
"""A matrix [N, K] -> codes [N, K], scales [N, G], codes times scales [N, K]."""


@dataclass(frozen=True, repr=False)
class SvdQuant(Method):
    """Smoothing, and a branch that is fitted to the codes; the last codes come from GPTQ."""

    name, label, smooths = "svdquant", "svdquant+gptq", True

    def represent(self, problem: Problem) -> Represented:
        if not problem.rank:
            return Gptq(self.static, self.measures).represent(problem)
        noise, importance = problem.noise(), problem.importance()

        def plain(part: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return rounded(part, problem.group, problem.bits, importance)

        def last(part: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return fitted(part, problem, _noisy(problem.blocks, noise))

        rounds = _ROUNDS if problem.matrix.numel() < _BIG else 2
        found = svdquant(problem.matrix, problem.rank, problem.blocks, noise, plain, last, rounds)
        return Represented(*found)


METHOD = SvdQuant


def _noisy(blocks: Sequence[Tensor], noise: Tensor | None) -> list[Tensor]:
    if noise is None:
        return list(blocks)
    return [block + torch.diag(noise[span].square()) for span, block in spans(blocks)]


def _factor(full: Tensor, damping: float) -> Tensor:
    """Lower factor of full [B, B], with as much on the diagonal as it takes.

    Covariances are summed in fp32: of inputs that never change, such as what an image's sizes are
    embedded to, they are singular, and rounding takes eigenvalues below zero, by up to about 1e-6
    of the largest one.
    """
    for more in (1.0, 10.0, 100.0, 1000.0):
        damped = full.clone()
        damped.diagonal().add_(more * damping)
        factor: Tensor
        factor, info = torch.linalg.cholesky_ex(damped)
        if not info:
            return factor
    raise EdgesdError(
        "the recorded covariance of a layer's inputs has eigenvalues far below zero, which no "
        "inputs have: remove the folder of what builds keep, and build again"
    )


class Metric:
    """The norm |M|^2 = E |M x|^2 + sum over k of noise[k]^2 |M[:, k]|^2, over recorded inputs x.

    blocks: covariances [B, B] of consecutive columns, together K; noise [K] >= 0: RMS error of the
    quantized input. Both enter as they are: smoothed, where the input is.
    """

    def __init__(self, blocks: Sequence[Tensor], noise: Tensor | None = None) -> None:
        self.factors: list[Tensor] = []
        for span, block in spans(blocks):
            full = block.double().clone()
            mean = float(full.diagonal().mean())
            if noise is not None:
                full.diagonal().add_(noise[span].double().square())
            self.factors.append(_factor(full, DAMPING * mean if mean > 0 else 1.0).float())

    def apply(self, matrix: Tensor) -> Tensor:
        """M [N, K] -> M L with L L^T the metric, so that |M|^2 is its sum of squares."""
        return blockwise(matrix, self.factors, torch.matmul)

    def undo(self, matrix: Tensor) -> Tensor:
        """M L [r, K] -> M."""

        def solve(part: Tensor, factor: Tensor) -> Tensor:
            solved: Tensor = torch.linalg.solve_triangular(factor, part, upper=False, left=False)
            return solved

        return blockwise(matrix, self.factors, solve)

    def undo_transposed(self, matrix: Tensor) -> Tensor:
        """M [N, K] -> M L^-T."""

        def solve(part: Tensor, factor: Tensor) -> Tensor:
            solved: Tensor = torch.linalg.solve_triangular(factor.T, part, upper=True, left=False)
            return solved

        return blockwise(matrix, self.factors, solve)


def low_rank(weighted: Tensor, rank: int, metric: Metric) -> tuple[Tensor, Tensor]:
    """(up [N, r], down [r, K]) with |M - up down| least in the metric, r at most `rank`. weighted
    [N, K]: the metric applied to M."""
    basis = top_singular(weighted, rank)
    return _balanced(basis, metric.undo(basis.T @ weighted))


class Fit:
    """A weight W [N, K], with what is computed of it once for all codes Q that it is tried with.

    blocks, noise: see Metric; None for inputs in 16 bits.
    """

    def __init__(self, weight: Tensor, blocks: Sequence[Tensor], noise: Tensor | None) -> None:
        self.weight, self.blocks, self.noise = weight, blocks, noise
        self.metric = Metric(blocks, noise)
        self.weighted = self.metric.apply(weight)
        self.covered = None if noise is None else _covered(weight, blocks)

    def beside(self, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Of codes times scales Q [N, K]: what a branch has to be, times the metric's factor, and
        (W - Q) E x x^T, of which `loss` is.

        The branch B of a rank with the least E |(W - Q - B) x|^2 + |(W - B) noise|^2: with
        S = E x x^T + noise^2 = L L^T, the unconstrained optimum is Y S^-1 with
        Y = (W - Q) E x x^T + W noise^2 = W S - Q E x x^T; the best of a rank is its SVD in the
        metric S. Codes of the next round carry what the branch doesn't, which is what noise passes
        through.
        """
        if self.covered is None:
            rest = self.weight - residual
            return self.metric.apply(rest), _covered(rest, self.blocks)
        spoiled = _covered(residual, self.blocks)
        return self.weighted - self.metric.undo_transposed(spoiled), self.covered - spoiled

    def loss(self, residual: Tensor, lost: Tensor, up: Tensor, down: Tensor) -> float:
        """E |(W - Q - B) x|^2 + |Q noise|^2, B = up down. lost: (W - Q) E x x^T."""
        left = lost - up @ _covered(down, self.blocks)
        total = float(((self.weight - residual - up @ down) * left).sum())
        if self.noise is not None:
            total += float((residual * self.noise).square().sum())
        return total


def svdquant(
    weight: Tensor,
    rank: int,
    blocks: Sequence[Tensor],
    noise: Tensor | None,
    quantize: Quantizer,
    last: Quantizer,
    rounds: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes [N, K], scales [N, G], up [N, r] and down [r, K] (exact in float16) for one weight.

    weight [N, K] and the inputs' covariance `blocks` are smoothed. noise [K]: RMS error of the
    quantized input, which passes through the codes alone, as the branch sees the input in 16 bits;
    None for inputs in 16 bits. quantize: used in all rounds but the `last` one. Each of
    `rounds` takes the branch that is best for the present codes, then codes for what is left.
    """
    fit = Fit(weight, blocks, noise)
    up, down = _rounded_to_fp16(low_rank(fit.weighted, rank, fit.metric))
    best: tuple[float, tuple[Tensor, Tensor, Tensor, Tensor]] | None = None
    for index in range(rounds):
        chosen = last if index + 1 == rounds else quantize
        codes, scales, residual = chosen(weight - up @ down)
        wanted, lost = fit.beside(residual)
        up, down = _rounded_to_fp16(low_rank(wanted, rank, fit.metric))
        loss = fit.loss(residual, lost, up, down)
        if best is None or loss < best[0]:
            best = loss, (codes, scales, up, down)
    assert best is not None
    return best[1]


def top_singular(matrix: Tensor, rank: int) -> Tensor:
    """The first left singular vectors [N, r] of a matrix [N, K], r = min(rank, N, K).

    Exact for small matrices; else by subspace iteration from a fixed start (Halko et al. 2011,
    arXiv 0909.4061, algorithm 4.4).
    """
    rows, columns = matrix.shape
    rank = min(rank, rows, columns)
    if min(rows, columns) <= _EXACT:
        wide = matrix.double()
        if rows <= columns:
            vectors: Tensor = torch.linalg.eigh(wide @ wide.T)[1]
            return vectors[:, -rank:].flip(1).float()
        right: Tensor = torch.linalg.eigh(wide.T @ wide)[1]
        left: Tensor = torch.linalg.qr(wide @ right[:, -rank:].flip(1))[0]
        return left.float()
    width = min(rank + _OVERSAMPLING, rows, columns)
    start = torch.randn(columns, width, generator=torch.Generator().manual_seed(0))
    basis: Tensor = torch.linalg.qr(matrix @ start)[0]
    for _ in range(_ITERATIONS):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis)[0])[0]
    small = basis.T @ matrix
    order: Tensor = torch.linalg.eigh((small @ small.T).double())[1].flip(1)[:, :rank]
    return basis @ order.float()


def _covered(matrix: Tensor, blocks: Sequence[Tensor]) -> Tensor:
    """M E x x^T [N, K]."""
    return blockwise(matrix, blocks, torch.matmul)


def _balanced(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """The same product with both factors of like magnitude per rank, so that float16 holds them."""
    size = (down.norm(dim=1) / up.norm(dim=0).clamp_min(1e-30)).sqrt().clamp(1e-6, 1e6)
    return up * size, down / size[:, None]


def _rounded_to_fp16(factors: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return factors[0].half().float(), factors[1].half().float()
