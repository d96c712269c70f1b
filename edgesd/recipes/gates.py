"""What a build's images are judged by, and whether a change of its graphs is accepted."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edgesd.evaluate.perceptual import Perceptual, find_lpips, open_lpips, open_stand_in
from edgesd.evaluate.quality import holds, nearness, shown, value_of, worst_of
from edgesd.spec.build import QuantOptions
from edgesd.spec.quality import Gate, ImageQuality, Metric

WORST = 6
"""Images that count: the worst ones."""

KERNELS_LOSS = 1.0
"""What the worst images may lose by edgesd's own kernels, in dB of their mean."""

POOLING_LOSS = 1.0
"""The same for pooled attention."""

OPTIONS: dict[Metric, str] = {
    "psnr": "--min-psnr",
    "lpips": "--max-lpips",
    "features": "--max-feature-distance",
}
"""The option that sets a metric's limit."""


@dataclass(frozen=True)
class Judging:
    """How the images of a build are judged. gates: the first is by the metric of the model's
    family, which also decides on changes of graphs; those after it have limits. perceptual: what
    measures distances; features: the feature distance, where it is limited beside LPIPS."""

    gates: tuple[Gate, ...]
    perceptual: Perceptual
    features: Perceptual | None = None

    @property
    def metric(self) -> Metric:
        """The metric that changes are judged by."""
        return self.gates[0].metric


def judging(options: QuantOptions, family: Metric, lpips: Path | None) -> Judging:
    """How to judge the images of a model whose family is judged by the metric `family`; lpips: the
    folder of its weights, if it was given.

    Where that is LPIPS and its weights can't be had, the feature distance stands in for it, under
    its own name. Raises InputError where a limit of LPIPS was asked for and there are none; else as
    `find_lpips` and `open_stand_in`.
    """
    found = find_lpips(lpips) if options.max_lpips is None else open_lpips(lpips)
    perceptual = found or open_stand_in()
    features = None
    if options.max_feature_distance is not None and perceptual.metric != "features":
        features = open_stand_in()
    judge = family if family == "psnr" else perceptual.metric
    return Judging(gates_of(options, judge), perceptual, features)


def gates_of(options: QuantOptions, judge: Metric) -> tuple[Gate, ...]:
    """The gate by `judge`, and those of other metrics that have a limit."""
    limits: dict[Metric, float | None] = {
        "psnr": options.min_psnr,
        "lpips": options.max_lpips,
        "features": options.max_feature_distance,
    }
    first = limits.pop(judge)
    return (
        Gate(judge, first, "family" if first is None else "option"),
        *(Gate(metric, limit, "option") for metric, limit in limits.items() if limit is not None),
    )


@dataclass(frozen=True)
class WorstImages:
    """Figures of the worst images of a bundle beside its source's, by `metric` and in its unit.
    mean: of these images; worst: that of the worst one."""

    metric: Metric
    mean: float
    worst: float

    @classmethod
    def of(cls, images: Sequence[ImageQuality], metric: Metric) -> WorstImages:
        """Those of the `WORST` worst of `images`, in any order."""
        values = sorted(value_of(image, metric) for image in images)
        few = values[:WORST] if metric == "psnr" else values[-WORST:]
        return cls(metric, statistics.mean(few), worst_of(images, metric))

    def loss(self, after: WorstImages) -> float:
        """What the mean of `after` is below this one's, in dB."""
        return nearness(self.metric, self.mean) - nearness(self.metric, after.mean)

    def __str__(self) -> str:
        if self.metric == "psnr":
            return f"{self.mean:.1f} dB (worst {self.worst:.1f})"
        return f"{self.mean:.4f} (worst {self.worst:.4f})"


@dataclass(frozen=True)
class Shortfall:
    """A limit that doesn't hold. worst: figure of the worst image now."""

    gate: Gate
    limit: float
    worst: float

    @property
    def factor(self) -> float:
        """How many times too large the squared error is, about: see `nearness`."""
        if self.gate.metric == "psnr":
            return float(10 ** ((self.limit - self.worst) / 10))
        return self.worst / self.limit

    @property
    def option(self) -> str:
        """The option that asks for the limit."""
        return OPTIONS[self.gate.metric]

    def __str__(self) -> str:
        return f"worst image at {shown(self.gate.metric, self.worst)} where {self.limit:g}"


def shortfall(gates: Sequence[Gate], images: Sequence[ImageQuality]) -> Shortfall | None:
    """The limit that the images are furthest from; None where all hold."""
    missed = [
        Shortfall(gate, gate.limit, worst_of(images, gate.metric))
        for gate in gates
        if gate.limit is not None and not holds(gate, images)
    ]
    return max(missed, key=lambda one: one.factor, default=None)


def accept_kernels(
    before: Sequence[ImageQuality], after: Sequence[ImageQuality], gates: Sequence[Gate]
) -> bool:
    """Whether images by edgesd's own kernels are near enough to those by ONNX Runtime's."""
    return _accept(before, after, gates, KERNELS_LOSS)


def accept_pooling(
    before: Sequence[ImageQuality], after: Sequence[ImageQuality], gates: Sequence[Gate]
) -> bool:
    """Whether pooled attention loses little, whichever images are the worst then."""
    return _accept(before, after, gates, POOLING_LOSS)


def _accept(
    before: Sequence[ImageQuality],
    after: Sequence[ImageQuality],
    gates: Sequence[Gate],
    allowed: float,
) -> bool:
    """`allowed`: dB that the worst images may lose by the first gate's metric; all limits hold."""
    metric = gates[0].metric
    loss = WorstImages.of(before, metric).loss(WorstImages.of(after, metric))
    return loss <= allowed and all(holds(gate, after) for gate in gates)
