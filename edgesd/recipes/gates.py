"""Whether a change of a bundle's graphs is accepted, by the images before and after it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

WORST = 6
"""Images that count: the worst ones."""

KERNELS_LOSS = 1.0
"""What the worst images may lose by edgesd's own kernels, in dB of their mean PSNR."""

POOLING_LOSS = 1.0
"""The same for pooled attention."""


@dataclass(frozen=True)
class WorstImages:
    """Figures of the worst images of a bundle beside its source's, in dB. mean: of their PSNR;
    least: that of the worst one."""

    mean: float
    least: float

    @classmethod
    def of(cls, decibels: Sequence[float]) -> WorstImages:
        """Those of the `WORST` worst among images of this PSNR each, in any order."""
        worst = sorted(decibels)[:WORST]
        return cls(statistics.mean(worst), worst[0])


def holds_floor(least: float, floor: float | None) -> bool:
    """Whether the worst image's PSNR is at least `floor`, both in dB; None: no floor was asked."""
    return floor is None or least >= floor


def accept_kernels(before: WorstImages, after: WorstImages, floor: float | None = None) -> bool:
    """Whether images by edgesd's own kernels are near enough to those by ONNX Runtime's."""
    return _accept(before, after, floor, KERNELS_LOSS)


def accept_pooling(before: WorstImages, after: WorstImages, floor: float | None = None) -> bool:
    """Whether pooled attention loses little, whichever images are the worst then."""
    return _accept(before, after, floor, POOLING_LOSS)


def _accept(
    before: WorstImages, after: WorstImages, floor: float | None, allowed_loss: float
) -> bool:
    return after.mean >= before.mean - allowed_loss and holds_floor(after.least, floor)
