"""How images are generated so that they fit into memory: in which mode, and what would fit instead.

Nothing here changes anything: what is asked comes in as values, and the answer is one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from edgesd.errors import ResourceError
from edgesd.runtime.backends.base import Backend
from edgesd.runtime.bundle import Bundle
from edgesd.runtime.flow import GuidanceMode, guidance_mode
from edgesd.runtime.footprint import (
    Drawing,
    Need,
    drawing_need,
    text_values,
    with_margin,
)
from edgesd.runtime.memory import MEMORY_MODES, MemoryMode, resident_bytes
from edgesd.runtime.old_bundles import assumed_footprint
from edgesd.runtime.tiles import WINDOWS
from edgesd.spec.bundle import DecoderPart, Footprint
from edgesd.spec.pipeline import PipelineSpec

HEADROOM_BYTES = 64 << 20
"""Left for others where a mode is chosen by what is free."""


@dataclass(frozen=True)
class Batch:
    """Images that are generated at a time. height, width: in pixels. guided: with guidance, which
    takes two rows of the denoiser for each image. previews: whether unfinished ones are decoded."""

    height: int
    width: int
    count: int = 1
    guided: bool = False
    previews: bool = False


@dataclass(frozen=True)
class Costs:
    """What the networks of a pipeline take. footprints: by component. split: of the decoder's
    head and tail, where it can be run so. process: bytes of the process without any component."""

    pipeline: PipelineSpec
    footprints: Mapping[str, Footprint]
    split: tuple[Footprint, Footprint] | None
    process: int

    def need(self, mode: MemoryMode, drawing: Drawing, window: int = max(WINDOWS)) -> Need:
        """Memory of a drawing in a mode. window: side in latents of a streamed decoder's tiles."""
        return drawing_need(
            self.pipeline.latent,
            self.footprints,
            self.split,
            self.process,
            mode,
            drawing,
            self.pipeline.shape.dynamic,
            window,
        )

    def loaded(self, components: Iterable[str], streamed: bool) -> int:
        """What components take once they are loaded: their weights, at least."""
        found = [self.footprints[name] for name in components if name in self.footprints]
        return sum(each.graph + (each.streamed if streamed else each.weights) for each in found)


@dataclass(frozen=True)
class Budget:
    """Bytes that may be taken. limit: by the whole process, mapped weights included (--max-memory);
    without one, what is free counts. free: what the machine can still give; None where it isn't
    known. taken: of a need, what the process has already."""

    limit: int | None = None
    free: int | None = None
    taken: int = 0


@dataclass(frozen=True)
class Fit:
    """How a batch is generated. window: see `Costs.need`. weights_kept: bytes of a component's
    weights that stay mapped while they are streamed; none where nothing limits the process."""

    memory: MemoryMode
    window: int
    drawing: Drawing
    weights_kept: Mapping[str, int] = field(default_factory=dict)


def unimported_bytes(backends: Iterable[Backend]) -> int:
    """Of the libraries of backends, if they have yet to be imported."""
    return max((backend.unimported_bytes() for backend in backends), default=0)


def process_bytes(backends: Collection[Backend]) -> int:
    """What this process takes without any component, backends included."""
    for_good = sum(backend.process_bytes for backend in backends)
    return resident_bytes() + unimported_bytes(backends) + for_good


def bundle_costs(
    bundle: Bundle,
    components: Iterable[str],
    own_kernels: Callable[[str], bool],
    process: int,
    whole: Collection[str] = (),
) -> Costs:
    """What a bundle's networks take; of bundles that don't say it, an estimate that is rather too
    large. own_kernels: whether a component's graph for edgesd's own kernels is run. whole: the
    components that aren't split."""

    def footprint(component: str, part: DecoderPart | None = None) -> Footprint:
        described, own = part or bundle.manifest.engines[component], own_kernels(component)
        found = described.kernels_footprint if own else described.footprint
        return found or assumed_footprint(bundle, component, part, own)

    parts = None
    for component in components:
        split = bundle.manifest.engines[component].split
        if split is not None and component not in whole:
            parts = footprint(component, split.head), footprint(component, split.tail)
    footprints = {component: footprint(component) for component in components}
    return Costs(bundle.manifest.pipeline, footprints, parts, process)


@dataclass(frozen=True)
class Fitting:
    """Chooses how batches are generated. memory, guidance: the modes that were asked for; None
    takes what fits best."""

    costs: Costs
    budget: Budget
    memory: MemoryMode | None = None
    guidance: GuidanceMode | None = None

    def check(self, batch: Batch) -> Fit:
        """The fastest way that fits. Raises ResourceError, which says what would fit, where none
        does, and UsageError as `guidance_mode`."""
        found = self.choose(batch)
        if found is None:
            raise ResourceError(self._shortage(batch))
        return found

    def choose(self, batch: Batch) -> Fit | None:
        """The fastest way that fits, or None. Raises UsageError as `guidance_mode`."""
        for mode in self._modes:
            drawing = self.drawing(batch, mode)
            for window in WINDOWS if mode == "stream" else WINDOWS[:1]:
                need = self.costs.need(mode, drawing, window)
                if self._fits(need, mode):
                    return Fit(mode, window, drawing, self._weights_kept(need, mode))
        return None

    def drawing(self, batch: Batch, memory: MemoryMode) -> Drawing:
        """What a batch takes at a time in a memory mode. Raises UsageError as `guidance_mode`."""
        spec = self.costs.pipeline
        scale = spec.latent.scale_factor
        fast = memory == "fast"
        mode = guidance_mode(spec.shape, batch.count, batch.guided, fast, self.guidance)
        return Drawing(
            batch.height // scale,
            batch.width // scale,
            scale,
            batch.count,
            batch.count * (2 if mode == "batched" else 1),
            text_values(spec.components["text_encoder"]),
            batch.previews,
        )

    @property
    def _modes(self) -> tuple[MemoryMode, ...]:
        return (self.memory,) if self.memory else MEMORY_MODES

    def _fits(self, need: Need, mode: MemoryMode) -> bool:
        required = self._required(need, mode)
        if self.budget.limit is not None:
            return required <= self.budget.limit
        spare = 0 if self.memory or mode == "stream" else HEADROOM_BYTES
        return self.budget.free is None or required + spare <= self.budget.free

    def _required(self, need: Need, mode: MemoryMode) -> int:
        """Bytes that the limit must allow; without one, that must be free: what can be taken back
        isn't in that."""
        if self.budget.limit is not None:
            return with_margin(need.resident, self.costs.process)
        held = need.held if mode == "stream" else need.resident
        return max(0, held - self.budget.taken)

    def _weights_kept(self, need: Need, mode: MemoryMode) -> dict[str, int]:
        """What is left of the limit keeps weights mapped."""
        limit = self.budget.limit
        if limit is None or mode != "stream":
            return {}
        return {
            name: max(0, limit - with_margin(part, self.costs.process))
            for name, part in need.parts.items()
        }

    def _least(self, batch: Batch) -> int:
        """Bytes that would do, in the mode that takes least."""
        return min(
            self._required(self.costs.need(mode, self.drawing(batch, mode), min(WINDOWS)), mode)
            for mode in self._modes
        )

    def _shortage(self, batch: Batch) -> str:
        """Why nothing fits, and what would: each is tried."""
        ways = list(self._ways(batch))
        needed = -(-self._least(batch) // 10**6)
        several = f", {batch.count} at a time," if batch.count > 1 else ""
        what = f"{batch.width}x{batch.height} pixels{several}"
        if self.budget.limit is not None:
            cures = " or ".join([f"allow {needed} MB", *ways])
            return (
                f"{what} need about {needed} MB of memory, mapped weights included, and "
                f"--max-memory is {self.budget.limit / 1e6:.0f} MB: {cures}"
            )
        cures = " or ".join(["end other programs", *ways])
        return (
            f"{what} need about {needed} MB more of memory, and "
            f"{(self.budget.free or 0) / 1e6:.0f} MB are free: {cures}"
        )

    def _ways(self, batch: Batch) -> Iterator[str]:
        shape = self.costs.pipeline.shape
        if batch.count > 1 and shape.dynamic and self.choose(replace(batch, count=1)):
            yield "--batch 1"
        if batch.previews and self.choose(replace(batch, previews=False)):
            yield "no --preview"
        if self.memory in ("fast", "balanced") and replace(self, memory="stream").choose(batch):
            yield "--memory stream"
        for part in (3, 2, 1) if shape.dynamic else ():
            step = shape.multiple_of
            height, width = (
                max(step, n * part // 4 // step * step) for n in (batch.height, batch.width)
            )
            smaller = replace(batch, height=height, width=width)
            if smaller != batch and self.choose(smaller):
                yield f"--size {width}x{height}"
                return
