"""How images are generated so that they fit into memory: in which mode, and what would fit instead.

Nothing here changes anything: what is asked comes in as values, and the answer is one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from edgesd.errors import ResourceError
from edgesd.runtime.backends import get_backend
from edgesd.runtime.backends.base import Backend
from edgesd.runtime.bundle import Bundle
from edgesd.runtime.flow import GuidanceMode, flow_of, guidance_mode
from edgesd.runtime.footprint import (
    HEADROOM_BYTES,
    PROCESS_BYTES,
    PROGRAM_BYTES,
    Costs,
    Generation,
    Need,
    text_values,
    with_margin,
)
from edgesd.runtime.memory import MEMORY_MODES, MemoryMode, resident_bytes
from edgesd.runtime.old_bundles import assumed_footprint
from edgesd.runtime.tiles import WINDOWS
from edgesd.spec.bundle import ComponentPart, Footprint
from edgesd.spec.pipeline import ShapeSpec


@dataclass(frozen=True)
class Batch:
    """Images that are generated at a time. height, width: in pixels. guided: with guidance, which
    doubles the denoiser's batch. previews: whether unfinished images are decoded. chunks: of
    tokens, that a prompt has. encodes: whether they begin with an image. sides: side components
    that run. picture_bytes: while the user's pictures are read, and images are laid over them.
    steps: of denoising; None for the pipeline's own."""

    height: int
    width: int
    count: int = 1
    guided: bool = False
    previews: bool = False
    chunks: int = 1
    encodes: bool = False
    sides: frozenset[str] = frozenset()
    picture_bytes: int = 0
    steps: int | None = None


@dataclass(frozen=True)
class Budget:
    """Bytes that may be used. limit: by the whole process, mapped weights included (--max-memory);
    without one, what is free counts. free: what the machine can still give; None where it isn't
    known. taken: of a need, what the process has already. mapped: whether weights in their file
    count, too, which the system may take back."""

    limit: int | None = None
    free: int | None = None
    taken: int = 0
    mapped: bool = False


@dataclass(frozen=True)
class Fit:
    """How a batch is generated. window: see `Costs.need`; tiled: see `Costs.tilings`. weights_kept:
    bytes of a component's weights that stay mapped while they are streamed; none where nothing
    limits the process."""

    memory: MemoryMode
    window: int
    generation: Generation
    tiled: frozenset[str] = frozenset()
    weights_kept: Mapping[str, int] = field(default_factory=dict)


def images_per_run(shape: ShapeSpec, guided: bool) -> int:
    """Images that a bundle of a fixed batch generates at a time; 1 for other bundles."""
    if shape.dynamic:
        return 1
    return shape.batch // 2 if guided and shape.batch % 2 == 0 else shape.batch


def unimported_bytes(backends: Iterable[Backend]) -> int:
    """Of the libraries of backends, if they have yet to be imported."""
    return max((backend.unimported_bytes() for backend in backends), default=0)


def process_bytes(backends: Collection[Backend]) -> int:
    """Memory of this process without any component, backends included."""
    for_good = sum(backend.process_bytes for backend in backends)
    return resident_bytes() + unimported_bytes(backends) + for_good


def memory_modes(backends: Collection[Backend]) -> tuple[MemoryMode, ...]:
    """The modes that differ for all of `backends`, the fastest first."""
    return tuple(mode for mode in MEMORY_MODES if all(mode in b.memory_modes for b in backends))


def bundle_costs(
    bundle: Bundle,
    components: Iterable[str],
    own_kernels: Callable[[str], bool],
    process: int,
    whole: Collection[str] = (),
) -> Costs:
    """Memory of a bundle's networks; for bundles without footprints an estimate that is rather too
    large. own_kernels: whether a component's graph for edgesd's own kernels is run. whole: the
    components that aren't split."""

    def footprint(component: str, part: ComponentPart | None = None) -> Footprint:
        described, own = part or bundle.manifest.engines[component], own_kernels(component)
        found = described.kernels_footprint if own else described.footprint
        return found or assumed_footprint(bundle, component, part, own)

    splits = {
        component: tuple(footprint(component, part) for part in split.parts)
        for component in components
        if (split := bundle.manifest.engines[component].split) and component not in whole
    }
    footprints = {component: footprint(component) for component in components}
    return Costs(bundle.manifest.pipeline, footprints, splits, process)


@dataclass(frozen=True)
class Fitting:
    """Chooses how batches are generated. memory, guidance: the modes that were asked for; None
    takes what fits best, of `modes`, the fastest first."""

    costs: Costs
    budget: Budget
    memory: MemoryMode | None = None
    guidance: GuidanceMode | None = None
    modes: tuple[MemoryMode, ...] = MEMORY_MODES

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
            generation = self.generation(batch, mode)
            for tiled in self.costs.tilings(mode, generation):
                for window in WINDOWS if tiled else WINDOWS[:1]:
                    need = self.costs.need(mode, generation, window, tiled)
                    if self._fits(need, mode):
                        kept = self._weights_kept(need, mode)
                        return Fit(mode, window, generation, tiled, kept)
        return None

    def generation(self, batch: Batch, memory: MemoryMode) -> Generation:
        """The sizes that a batch's memory depends on, in a memory mode. Raises UsageError as
        `guidance_mode`."""
        spec = self.costs.pipeline
        scale, fast = spec.latent.scale_factor, memory == "fast"
        mode = guidance_mode(spec.shape, batch.count, batch.guided, fast, self.guidance)
        return Generation(
            batch.height // scale,
            batch.width // scale,
            scale,
            batch.count,
            flow_of(spec).denoiser.batch(batch.count, batch.guided, mode),
            text_values(spec) * batch.chunks * (2 if batch.guided else 1),
            batch.previews,
            batch.chunks,
            batch.encodes,
            batch.sides,
            batch.picture_bytes,
            (batch.steps or spec.num_inference_steps) * batch.count * (2 if batch.guided else 1),
        )

    @property
    def _modes(self) -> tuple[MemoryMode, ...]:
        return (self.memory,) if self.memory else self.modes

    def _fits(self, need: Need, mode: MemoryMode) -> bool:
        required = self._required(need)
        if self.budget.limit is not None:
            return required <= self.budget.limit
        spare = 0 if mode == self._modes[-1] else HEADROOM_BYTES
        return self.budget.free is None or required + spare <= self.budget.free

    def _required(self, need: Need) -> int:
        """Bytes that the limit must allow; without one, that must be free: what can be taken back
        isn't in that."""
        if self.budget.limit is not None:
            return with_margin(need.resident, self.costs.process)
        held = need.resident if self.budget.mapped else need.held
        return max(0, held - self.budget.taken)

    def _weights_kept(self, need: Need, mode: MemoryMode) -> dict[str, int]:
        """Bytes of weights that may stay mapped within the limit."""
        limit = self.budget.limit
        if limit is None or mode != "stream":
            return {}
        kept = {}
        for group in need.together:
            left = max(0, limit - with_margin(need.parts[group[0]], self.costs.process))
            # The smaller ones first: what they leave is for the others.
            weights = {name: self.costs.footprints[name].weights for name in group}
            for place, name in enumerate(sorted(group, key=lambda name: weights[name])):
                kept[name] = min(weights[name], left // (len(group) - place))
                left -= kept[name]
        return kept

    def least(self, batch: Batch) -> tuple[MemoryMode, int]:
        """The mode that needs least, and the bytes it needs."""
        found = {
            mode: self._required(self.costs.need(mode, self.generation(batch, mode), min(WINDOWS)))
            for mode in self._modes
        }
        mode = min(found, key=lambda mode: found[mode])
        return mode, found[mode]

    def _shortage(self, batch: Batch) -> str:
        """Why nothing fits, and which changes would make it fit; each is tried."""
        ways = list(self._ways(batch))
        needed = -(-self.least(batch)[1] // 10**6)
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
        if batch.chunks > 1 and self.choose(replace(batch, chunks=1)):
            yield "a shorter prompt"
        if batch.previews and self.choose(replace(batch, previews=False)):
            yield "no --preview"
        if batch.picture_bytes and self.choose(replace(batch, picture_bytes=0)):
            yield "smaller pictures"
        last = self.modes[-1]
        if self.memory in self.modes[:-1] and replace(self, memory=last).choose(batch):
            yield f"--memory {last}"
        for part in (3, 2, 1) if shape.dynamic else ():
            step = shape.multiple_of
            height, width = (
                max(step, n * part // 4 // step * step) for n in (batch.height, batch.width)
            )
            smaller = replace(batch, height=height, width=width)
            if smaller != batch and self.choose(smaller):
                yield f"--size {width}x{height}"
                return


def least_memory(bundle: Bundle) -> tuple[MemoryMode, int]:
    """The mode in which a process on another machine needs least to generate an image of the
    bundle's own size and guidance, and the bytes that must be free for it. Whether edgesd's own
    kernels run there isn't known: the smaller figure is taken."""
    return min((_least_memory(bundle, own) for own in (False, True)), key=lambda found: found[1])


def _least_memory(bundle: Bundle, own: bool) -> tuple[MemoryMode, int]:
    spec, engines = bundle.manifest.pipeline, bundle.manifest.engines
    flow, backend = flow_of(spec), get_backend(bundle.manifest.backend)
    guided = flow.guided(spec.guidance_scale)
    count = images_per_run(spec.shape, guided)
    encodes, sides = flow.encoder is not None, flow.sides
    height, width = spec.shape.height, spec.shape.width
    batch = Batch(height, width, count, guided, encodes=encodes, sides=sides)

    def own_kernels(component: str) -> bool:
        return own and engines[component].kernels is not None

    process = PROCESS_BYTES + PROGRAM_BYTES + backend.process_bytes
    costs = bundle_costs(bundle, flow.components, own_kernels, process)
    return Fitting(costs, Budget(), modes=backend.memory_modes).least(batch)
