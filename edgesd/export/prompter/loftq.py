"""LoftQ on the grids of GGUF files: a rounded weight, and an adapter that begins as the rounding
error (Li et al. 2023, arXiv 2310.08659, algorithm 1)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from edgesd.export.prompter.gguf_files import Update
from edgesd.runtime.arrays import Float


def loftq(
    weight: Float, rounding: Callable[[Float], Float], rank: int, iterations: int
) -> tuple[Float, Update]:
    """Weight [out, in] -> values on the grid, and an update of `rank` for which their sum is near
    the weight.

    Alternates Q = rounding(W - BA) and BA = the best approximation of W - Q of that rank, from
    BA = 0. a and b share the singular values' roots.
    """
    low_rank = np.zeros_like(weight)
    for _ in range(iterations):
        grid = rounding(weight - low_rank)
        update = _principal(weight - grid, rank)
        low_rank = update.b @ update.a
    return grid, update


def random_like(update: Update, chance: np.random.Generator) -> Update:
    """The control: an update of the same singular values in random directions.

    What LoftQ gains over it is owed to the directions; what both gain, to a start that isn't 0.
    """
    norms = np.linalg.norm(update.a, axis=1)
    a, b = (
        np.linalg.qr(chance.standard_normal((size, len(norms))))[0].astype(np.float32)
        for size in (update.a.shape[1], update.b.shape[0])
    )
    return Update(np.ascontiguousarray(norms[:, None] * a.T), b * norms)


def _principal(matrix: Float, rank: int) -> Update:
    """The singular vectors of the largest values, by the eigenvectors of the smaller Gram matrix:
    several times as fast as a whole decomposition."""
    if matrix.shape[0] > matrix.shape[1]:
        turned = _principal(np.ascontiguousarray(matrix.T), rank)
        return Update(np.ascontiguousarray(turned.b.T), np.ascontiguousarray(turned.a.T))
    exact = matrix.astype(np.float64)
    squares, vectors = np.linalg.eigh(exact @ exact.T)
    values = np.sqrt(np.maximum(squares[::-1][:rank], np.finfo(np.float64).tiny))
    left = vectors[:, ::-1][:, :rank]
    roots = np.sqrt(values)
    a = (left.T @ exact) / roots[:, None]
    return Update(a.astype(np.float32), (left * roots).astype(np.float32))
