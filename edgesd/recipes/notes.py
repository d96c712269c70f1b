"""Notes for the user of a build, as values; their text is made where they are shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from edgesd.evaluate.quality import METRIC_NAMES
from edgesd.recipes import gates
from edgesd.recipes.gates import OPTIONS, WorstImages
from edgesd.spec.quality import Gate


@dataclass(frozen=True)
class PlansPending:
    """No board has built TensorRT's plans yet."""

    def __str__(self) -> str:
        return "TensorRT's plans are built where they run, on the first run or by `edgesd finalize`"


@dataclass(frozen=True)
class KeptInFp32:
    """Values of a component that come near fp16's limit. largest: magnitude of the largest one."""

    component: str
    values: int
    largest: float

    def __str__(self) -> str:
        return (
            f"{self.values} values of {self.component} come near fp16's limit or exceed it (up to "
            f"{self.largest:.2g}): they stay in fp32"
        )


@dataclass(frozen=True)
class AllInFp32:
    """A component whose values fp16 can't hold, as the model's config says (force_upcast)."""

    component: str

    def __str__(self) -> str:
        return f"{self.component} computes in fp32, as force_upcast of its config asks for"


@dataclass(frozen=True)
class PoolingMeasured:
    """Whether attention is pooled. before, after: figures without and with it, by the metric of
    the first gate; all limits of `gates` had to hold."""

    accepted: bool
    before: WorstImages
    after: WorstImages
    gates: Sequence[Gate]

    @property
    def figures(self) -> str:
        """Both figures in words."""
        return (
            f"the worst images have a mean {METRIC_NAMES[self.after.metric]} of {self.after} with "
            f"it, {self.before} without"
        )

    def __str__(self) -> str:
        if self.accepted:
            return f"attention is pooled: {self.figures}"
        limits = [f"{OPTIONS[g.metric]} {g.limit:g}" for g in self.gates if g.limit is not None]
        held = f", and {' and '.join(limits)} must hold" if limits else ""
        return (
            f"attention isn't pooled: {self.figures}; {gates.POOLING_LOSS:g} dB may be lost{held}"
        )


@dataclass(frozen=True)
class PoolingFailed:
    """Why there is no graph with pooled attention."""

    reason: str

    def __str__(self) -> str:
        return f"attention isn't pooled: {self.reason}"


Note = PlansPending | KeptInFp32 | AllInFp32 | PoolingMeasured | PoolingFailed
