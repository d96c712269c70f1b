"""Notes for the user of a build, as values; their text is made where they are shown."""

from __future__ import annotations

from dataclasses import dataclass

from edgesd.recipes import gates
from edgesd.recipes.gates import WorstImages


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
    """Whether attention is pooled. before, after: figures without and with it."""

    accepted: bool
    before: WorstImages
    after: WorstImages
    floor: float | None

    @property
    def figures(self) -> str:
        """Both figures in words."""
        return (
            f"the worst images have a mean PSNR of {self.after.mean:.1f} dB (least "
            f"{self.after.least:.1f}) with it, {self.before.mean:.1f} ({self.before.least:.1f}) "
            "without"
        )

    def __str__(self) -> str:
        if self.accepted:
            return f"attention is pooled: {self.figures}"
        held = "" if self.floor is None else f", and --min-psnr {self.floor:g} must hold"
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
