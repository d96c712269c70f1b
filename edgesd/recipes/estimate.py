"""Requests to `edgesd plan`, and its estimates, which planner.py makes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from edgesd.errors import TargetError
from edgesd.runtime.rates import Rates
from edgesd.spec.base import Spec
from edgesd.spec.build import DEFAULT_METHOD, SideKind, Variant
from edgesd.spec.pipeline import ImageTask
from edgesd.spec.quality import Metric
from edgesd.spec.scheme import Precision


class ComponentCost(Spec, frozen=True):
    """One component. bytes: of its files; macs: multiplications of one run of batch 1, by kind of
    operation. By --memory mode: memory: peak of the process while it is loaded and runs alone;
    runs: in an image; seconds: of all these runs, None where rates aren't known."""

    bytes: int
    macs: dict[str, int]
    memory: dict[str, int]
    runs: dict[str, int]
    seconds: dict[str, float | None]


class Estimate(Spec, frozen=True):
    """What `edgesd plan` predicts.

    memory: peak resident set of `edgesd generate` in each mode (or of the GPU); usable_bytes: what
    the target, or the limit asked for, allows; needed_bytes: what would be enough for the mode that
    takes least; mode: the fastest that fits, None for none. seconds: of an image by mode, without
    loading; None where the target was never profiled. rates: which machine they were measured
    on. advice: what would fit where this doesn't. assumed: what the model doesn't say of itself.
    judged_by: the metric that judges a quantized bundle's images (`ExportSpec.judged_by`).
    lora_slots: memory and seconds are with LoRAs of this rank in all slots, which are `lora_bytes`
    of the memory.
    """

    model: str
    target: str
    backend: str
    precision: str
    width: int
    height: int
    steps: int
    guidance: float
    kernels: bool
    components: dict[str, ComponentCost]
    bundle_bytes: int
    memory: dict[str, int]
    usable_bytes: int
    needed_bytes: int
    mode: str | None
    build_bytes: int
    seconds: dict[str, float] | None
    rates: str | None
    advice: tuple[str, ...] = ()
    assumed: str = ""
    judged_by: Metric | None = None
    lora_slots: int | None = None
    lora_bytes: int = 0


@dataclass(frozen=True)
class PlanRequest:
    """A request for an estimate; None takes the model's own. max_memory: bytes, instead of the
    target's RAM. rates: how fast the target is. fixed: of graphs for `size` alone, whose denoiser
    takes `batch`; others generate any size, and so are those for TensorRT. scheduler: the bundle's
    default sampler. variant: the kind of model that it is said to be. vae: of which model its
    autoencoder is. config: a diffusers folder with the configs of a model that is a single file.
    prompt_chunks: of a prompt, in fixed graphs. max_tokens: that T5 is given of it. tasks: beside
    text to image. sides: see `recipes.sources.open_model`, and loras, which are merged. lora_slots:
    the largest rank of LoRAs that graphs take."""

    precision: Precision
    size: tuple[int, int] | None = None
    steps: int | None = None
    guidance: float | None = None
    max_memory: int | None = None
    method: str = DEFAULT_METHOD
    rates: Rates | None = None
    fixed: bool = False
    batch: int = 1
    scheduler: str | None = None
    variant: Variant | None = None
    vae: str | None = None
    config: Path | None = None
    prompt_chunks: int = 1
    max_tokens: int | None = None
    tasks: tuple[ImageTask, ...] = ()
    sides: tuple[tuple[SideKind, str], ...] = ()
    loras: tuple[str, ...] = ()
    lora_slots: int | None = None


def check_estimate(estimate: Estimate) -> None:
    """Raise TargetError for a bundle that can't generate on its target in any mode, with what
    could."""
    if estimate.mode is not None:
        return
    least = min(estimate.memory, key=lambda mode: estimate.memory[mode])
    advice = "; ".join(estimate.advice) or "no target that edgesd knows has as much"
    raise TargetError(
        f"{estimate.model} in {estimate.precision} at {estimate.width}x{estimate.height} needs "
        f"{estimate.needed_bytes / 1e6:.0f} MB in {least} mode, and {estimate.target} has "
        f"{estimate.usable_bytes / 1e6:.0f} MB for it: {advice}"
    )
