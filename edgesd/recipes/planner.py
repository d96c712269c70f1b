"""Predicts disk, memory, build memory and time of a bundle, before it is built.

Networks are made on shapes alone from their configs and traced (export/cost/workload.py);
export/cost/costs.py gives their cost. docs/planner.md derives the formulas and says how far
they are off.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import msgspec

from edgesd.device.capabilities import in_gb
from edgesd.device.targets import all_targets, check_request, get_target, usable_bytes
from edgesd.errors import TargetError
from edgesd.export.backends import get_lowering
from edgesd.export.cost.costs import (
    NODE_FILE_BYTES,
    OTHER_FILES_BYTES,
    build_bytes,
    file_bytes,
)
from edgesd.export.cost.times import multiplications, seconds
from edgesd.export.cost.workload import Workload, split_joined
from edgesd.export.pipeline import export_spec, require_build_tools
from edgesd.export.quantize.assign import planned
from edgesd.export.quantize.methods import get_method
from edgesd.export.source import ModelSource
from edgesd.recipes.estimate import ComponentCost, Estimate, PlanRequest
from edgesd.recipes.footprints import (
    FACTOR_BYTES,
    LORA_BYTES,
    ComponentForm,
    Networks,
    Shape,
    planned_slots,
)
from edgesd.recipes.shapes import fixed_shape
from edgesd.recipes.sources import open_model
from edgesd.runtime.backends import get_backend
from edgesd.runtime.fitting import Batch, Budget, Fitting, images_per_run
from edgesd.runtime.flow import GuidanceMode, Stage, guidance_mode
from edgesd.runtime.footprint import (
    PROCESS_BYTES,
    PROGRAM_BYTES,
    Costs,
    Generation,
    Need,
    computing,
    halo_of,
    prompter_bytes,
    tile_sides,
    units_of,
)
from edgesd.runtime.kernels import computes, instruction_set_of
from edgesd.runtime.memory import MemoryMode
from edgesd.runtime.modulation import ROWS
from edgesd.runtime.rates import Speed
from edgesd.runtime.requests import CompleteRequest, scheduler_of
from edgesd.runtime.tiles import WINDOWS
from edgesd.spec.bundle import Footprint
from edgesd.spec.pipeline import PipelineSpec, check_multiple
from edgesd.spec.scheme import FLOATING, Precision, number_format, parse_scheme
from edgesd.spec.target import Target

_HALVES = ("fp16", "bf16")
_SUGGESTED = ("fp32", "fp16", "w8a8", "w4a8-g64")
"""Precisions that are suggested where another doesn't fit, the finest first."""


def estimate_build(
    model: str, target_name: str, request: PlanRequest, backend: str | None = None
) -> Estimate:
    """Predict what `edgesd build model --target target_name` makes, and what an image takes.

    Raises UsageError, InputError and TargetError as `build` does for what it can't make.
    """
    number_format(request.precision)
    require_build_tools()
    target = get_target(target_name)
    backend = target.backends[0] if backend is None else backend
    check_request(target, request.precision, backend)
    source = open_model(
        model,
        request.variant,
        request.vae,
        config=request.config,
        loras=request.loras,
        sides=request.sides,
        weights=False,
    )
    source = replace(source, max_tokens=request.max_tokens)
    return estimate_source(source, model, target, backend, request)


def estimate_source(
    source: ModelSource, model: str, target: Target, backend: str, request: PlanRequest
) -> Estimate:
    """The same of a source that was resolved, for a target and backend that were checked."""
    planner = _Planner(source, model, target, backend, request)
    found = planner.estimate(request.precision, request.size)
    if found.mode is not None:
        return found
    return msgspec.structs.replace(found, advice=tuple(planner.advice(found)))


def check_prompter(target: Target, file_sizes: Iterable[int]) -> None:
    """Raise TargetError for a prompter of such files that is too large for a target. Its process
    ends before the networks are loaded: the larger of the two counts."""
    needed, usable = prompter_bytes(file_sizes), usable_bytes(target)
    if needed <= usable:
        return
    fits = next((t for t in _larger(target, usable) if usable_bytes(t) >= needed), None)
    advice = f"--target {fits.name} has as much" if fits else "choose a smaller model for it"
    raise TargetError(
        f"the prompter needs {needed / 1e6:.0f} MB, and {target.name} has {usable / 1e6:.0f} MB "
        f"for it: {advice}"
    )


def _calls(pipeline: PipelineSpec, steps: int, size: tuple[int, int]) -> int:
    """How often the pipeline's sampler calls the denoiser in so many steps of an image of a width
    and height."""
    (width, height), scheduler = size, pipeline.scheduler
    request = CompleteRequest("", 0, None, steps, 1.0, height, width, scheduler.name)
    return len(scheduler_of(pipeline, request).timesteps)


@dataclass(frozen=True)
class _Plan:
    """One image, by networks as they would be built. calls: of the denoiser by the sampler, which
    some make twice in a step. forms: of their graphs, by component. lora_bytes: of LoRAs that fill
    all slots, in the process."""

    networks: Networks
    batch: Batch
    steps: int
    calls: int
    fitting: Fitting
    forms: Mapping[str, ComponentForm]
    lora_bytes: int

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in latents."""
        return self.networks.latents(self.batch.width, self.batch.height)

    @cached_property
    def generations(self) -> dict[MemoryMode, Generation]:
        """The sizes that memory depends on, in each mode."""
        return {mode: self.fitting.generation(self.batch, mode) for mode in self.fitting.modes}

    @cached_property
    def tiled(self) -> dict[MemoryMode, frozenset[str]]:
        """Components that run in parts or tiles, in each mode: as few as fit, or else what needs
        least."""
        costs, found = self.fitting.costs, {}
        for mode, generation in self.generations.items():
            fit = replace(self.fitting, memory=mode).choose(self.batch)
            found[mode] = fit.tiled if fit else costs.tilings(mode, generation)[-1]
        return found

    @cached_property
    def needs(self) -> dict[MemoryMode, Need]:
        """Memory in each mode."""
        costs = self.fitting.costs
        return {
            mode: costs.need(mode, generation, tiled=self.tiled[mode])
            for mode, generation in self.generations.items()
        }

    def runs(self, stage: Stage, mode: MemoryMode) -> int:
        """How often a stage runs for an image."""
        shape, batch = self.networks.pipeline.shape, self.batch
        guidance = guidance_mode(shape, batch.count, batch.guided, mode == "fast", None)
        return stage.runs(self.calls, batch.guided, guidance)

    def workloads(self, stage: Stage, mode: MemoryMode) -> tuple[list[Workload], Footprint]:
        """The workloads of a run, one after another, and the footprint of the largest graph."""
        networks, form, (height, width) = self.networks, self.forms[stage.component], self.size
        costs = self.fitting.costs
        shapes = [(height, width, 1)]
        if stage.per == "prompt":
            shapes = [networks.own_shape(stage)]
        elif stage.per == "step":
            shapes = [(height, width, self.generations[mode].batch)]
        elif stage.role == "modulation":
            rows = units_of(stage, self.generations[mode])
            each = rows if networks.pipeline.shape.dynamic else ROWS
            shapes = [(1, 1, each)] * -(-self.generations[mode].rows // each)
        elif stage.component in self.tiled[mode] & costs.splits.keys():
            return self._in_parts(stage, form), costs.splits[stage.component][-1]
        elif stage.component in self.tiled[mode]:
            halo = halo_of(networks.pipeline, stage)
            shapes = [(h, w, 1) for h, w in _tiles((height, width), halo)]
        found = [form.lowered(networks.trace(stage, shape)) for shape in shapes]
        return found, costs.footprints[stage.component]

    def _in_parts(self, stage: Stage, form: ComponentForm) -> list[Workload]:
        """The same of a full autoencoder's decoder or encoder that is streamed."""
        found = []
        for part in self.networks.parts(stage):
            sizes, times = part.shapes(self.size, max(WINDOWS))
            traced = [self.networks.trace_part(stage, part, size) for size in sizes]
            found += [form.lowered(each, part.tiled) for each in traced] * times
        return found

    def seconds(self, stage: Stage, mode: MemoryMode, speed: Speed) -> float:
        """Of all runs of a stage for an image: reading its weights each time included, and once
        the memory that is touched for the first time."""
        workloads, footprint = self.workloads(stage, mode)
        streamed = mode == "stream" or stage.component in self.tiled[mode]
        each = {id(workload): seconds(workload, speed, streamed) for workload in workloads}
        units = units_of(stage, self.generations[mode])
        fresh = speed.seconds("fresh", "", (max(1, sum(computing(footprint, units))),))
        # A network's weights are larger than caches, which hold those of a single operation.
        reading = speed.seconds("read", "", (max(1, footprint.weights),))
        once = sum(each[id(workload)] for workload in workloads) + reading
        return once * self.runs(stage, mode) + fresh

    def cost(self, stage: Stage, speed: Speed | None) -> ComponentCost:
        """The cost of one component."""
        form, modes = self.forms[stage.component], self.fitting.modes
        own = self.networks.trace_own(stage)
        graphs = NODE_FILE_BYTES * len(own.operations) * (2 if form.own_kernels else 1)
        dynamic = self.networks.pipeline.shape.dynamic
        dynamic = dynamic and stage.per != "prompt" and stage.role != "modulation"
        at_size = self.networks.trace(stage, (*self.size, 1)) if dynamic else own
        return ComponentCost(
            bytes=form.on_disk + graphs,
            macs=multiplications(at_size),
            memory={mode: self.needs[mode].parts[stage.component] for mode in modes},
            runs={mode: self.runs(stage, mode) for mode in modes},
            seconds={
                mode: None if speed is None else self.seconds(stage, mode, speed) for mode in modes
            },
        )


class _Planner:
    """Plans builds of one source. target, backend: checked before."""

    def __init__(
        self, source: ModelSource, model: str, target: Target, backend: str, request: PlanRequest
    ) -> None:
        self.source, self.model, self.target = source, model, target
        self.request, self.backend = request, get_backend(backend)
        self.lowering = get_lowering(backend)
        self._known: dict[tuple[int, int] | None, Networks] = {}
        own = self._networks(None)
        self.default, self.assumed = own.pipeline, own.assumed
        """The pipeline with its own size and settings, and what is taken for granted of it."""

    @property
    def usable(self) -> int:
        """Bytes that generating may take."""
        limit = self.request.max_memory
        return usable_bytes(self.target) if limit is None else limit

    def estimate(self, precision: Precision, size: tuple[int, int] | None) -> Estimate:
        """The estimate of one precision and size. Raises UsageError for what can't be generated."""
        request, spec = self.request, self.default
        width, height = size or (spec.shape.width, spec.shape.height)
        check_multiple("width", width, spec.latent.unit)
        check_multiple("height", height, spec.latent.unit)
        guidance = spec.guidance_scale if request.guidance is None else request.guidance
        fixed = (request.fixed and size is not None) or self.lowering.fixed_shapes
        networks = self._networks((width, height) if fixed else None)
        plan = self._plan(networks, precision, (width, height), guidance)
        fit = plan.fitting.choose(plan.batch)
        speed = None if request.rates is None else Speed(request.rates)
        costs = {stage.component: plan.cost(stage, speed) for stage in networks.flow.stages}
        return Estimate(
            model=self.model,
            target=self.target.name,
            backend=self.backend.name,
            precision=precision,
            width=width,
            height=height,
            steps=plan.steps,
            guidance=guidance,
            kernels=self._own_kernels(precision),
            components=costs,
            bundle_bytes=sum(cost.bytes for cost in costs.values()) + OTHER_FILES_BYTES,
            memory={mode: need.resident for mode, need in plan.needs.items()},
            usable_bytes=self.usable,
            needed_bytes=plan.fitting.least(plan.batch)[1],
            mode=None if fit is None else fit.memory,
            build_bytes=_build_bytes(networks, width * height),
            seconds=_together(costs) if speed else None,
            rates=request.rates.machine if request.rates else None,
            assumed=self.assumed,
            judged_by=None if precision in FLOATING else networks.judged_by,
            lora_slots=request.lora_slots,
            lora_bytes=plan.lora_bytes,
        )

    def advice(self, estimate: Estimate) -> Iterator[str]:
        """What fits instead of `estimate`, each planned: another precision, a smaller size, both;
        or else where there is room."""
        size = (estimate.width, estimate.height)
        able = [
            precision
            for precision in _SUGGESTED
            if number_format(precision) in self.target.precisions
            and precision != estimate.precision
        ]
        others = (self.estimate(precision, size) for precision in able)
        finer = next((other for other in others if other.mode), None)
        if finer:
            yield f"--precision {finer.precision} fits: {_fits(finer)}"
        smaller = self._smaller(estimate, [estimate.precision])
        if smaller:
            yield f"--size {smaller.width}x{smaller.height} fits: {_fits(smaller)}"
        if finer or smaller:
            return
        if smaller := self._smaller(estimate, able):
            yield (
                f"--precision {smaller.precision} --size {smaller.width}x{smaller.height} fits: "
                f"{_fits(smaller)}"
            )
            return
        yield self._more_memory(estimate)

    def _more_memory(self, estimate: Estimate) -> str:
        """Advice on more memory, where no precision or size fits."""
        needed = estimate.needed_bytes
        if self.request.max_memory is not None:
            return f"no precision or size fits: --max-memory {-(-needed // 10**6)}MB would do"
        for target in self._larger():
            other = self._on(target).estimate(estimate.precision, self.request.size)
            if other.mode:
                return (
                    f"no precision or size fits: --target {target.name} "
                    f"({in_gb(target.memory_bytes)}) does: {_fits(other)}"
                )
        return (
            f"no precision or size fits, and no target that could run it has {in_gb(needed)} free"
        )

    def _smaller(self, estimate: Estimate, precisions: Sequence[Precision]) -> Estimate | None:
        """The largest size below that of `estimate` that fits, in the first precision that does."""
        step = self.default.shape.multiple_of

        def at(part: int) -> Estimate | None:
            width, height = (
                max(step, n * part // 5 // step * step) for n in (estimate.width, estimate.height)
            )
            if (width, height) == (estimate.width, estimate.height):
                return None
            found = (self.estimate(precision, (width, height)) for precision in precisions)
            return next((other for other in found if other.mode), None)

        least = at(1)  # mostly, what doesn't fit then are the weights
        return None if least is None else next(filter(None, map(at, (4, 3, 2))), least)

    def _larger(self) -> list[Target]:
        """Targets with more memory that run the same: the nearest first."""
        asked = number_format(self.request.precision)
        return [
            target
            for target in _larger(self.target, self.usable)
            if self.backend.name in target.backends and asked in target.precisions
        ]

    def _on(self, target: Target) -> _Planner:
        """The same for another target, whose speed isn't known."""
        other = copy.copy(self)
        other.target, other.request = target, replace(self.request, rates=None)
        return other

    def _networks(self, size: tuple[int, int] | None) -> Networks:
        """Those of a bundle that generates `size` (width, height) alone; None: any."""
        if size not in self._known:
            batch = self.request.batch
            if self.lowering.fixed_shapes and size not in (None, self.request.size):
                _, _, batch = fixed_shape(self.default)
            chunks, tasks = self.request.prompt_chunks, self.request.tasks
            spec = export_spec(self.source, size, self.request.scheduler, batch, chunks, tasks)
            self._known[size] = Networks(spec)
        return self._known[size]

    def _plan(
        self, networks: Networks, precision: Precision, size: tuple[int, int], guidance: float
    ) -> _Plan:
        """One image of a size (width, height) by `networks`."""
        spec, (width, height) = networks.pipeline, size
        guided = networks.flow.guided(guidance)
        count, flow = images_per_run(spec.shape, guided), networks.flow
        encodes = flow.encoder is not None
        batch = Batch(height, width, count, guided, encodes=encodes, sides=flow.sides)
        forms = {
            stage.component: self._form(networks, stage, precision)
            for stage in networks.flow.stages
        }
        shapes = {
            stage.component: self._shapes(networks, stage, batch) for stage in networks.flow.stages
        }
        splits = {
            stage.component: networks.split(stage, forms[stage.component], shapes[stage.component])
            for stage in networks.flow.stages
            if stage.role in ("encoder", "decoder") and spec.latent.levels and spec.shape.dynamic
        }
        footprints = {
            stage.component: networks.footprint(
                stage, forms[stage.component], shapes[stage.component]
            )
            for stage in networks.flow.stages
        }
        filling = sum(form.filling for form in forms.values())
        lora_bytes = (FACTOR_BYTES + LORA_BYTES) * filling
        costs = Costs(spec, footprints, splits, self._process_bytes() + lora_bytes)
        limit = self.request.max_memory
        budget = Budget(limit, usable_bytes(self.target), mapped=True)
        fitting = Fitting(costs, budget, modes=self.backend.memory_modes)
        steps = spec.num_inference_steps if self.request.steps is None else self.request.steps
        calls = _calls(spec, steps, size)
        return _Plan(networks, batch, steps, calls, fitting, forms, lora_bytes)

    def _form(self, networks: Networks, stage: Stage, precision: Precision) -> ComponentForm:
        """A component's graph as it would be built."""
        workload = networks.trace_own(stage)
        quantized = precision not in FLOATING
        layers = split_joined(workload).layers
        once = networks.flow.once
        schemes = planned(layers, parse_scheme(precision), once=once) if quantized else {}
        smoothed = get_method(self.request.method).smooths
        fp32 = networks.in_fp32(stage.component, precision)
        halved = precision in _HALVES and not (fp32 and self.lowering.fp16_arithmetic)
        on_disk = file_bytes(workload, schemes, 2 if halved else 4, smoothed)
        own = self._own_kernels(precision)
        slots, filling = planned_slots(workload, networks.pipeline.wiring, self.request.lora_slots)
        return ComponentForm(precision, self.lowering, schemes, on_disk, own, fp32, slots, filling)

    def _own_kernels(self, precision: Precision) -> bool:
        """Whether edgesd's own kernels will run there: by runtime.kernels."""
        if not self.lowering.own_kernels or number_format(precision) not in ("w8a8", "w4a8"):
            return False
        rates = self.request.rates
        isa = instruction_set_of(self.target.capabilities)
        return computes(isa if rates is None else rates.instruction_set or "", [precision])

    def _shapes(self, networks: Networks, stage: Stage, batch: Batch) -> list[Shape]:
        """The shapes that a component is run at for a batch."""
        spec = networks.pipeline
        height, width = networks.latents(batch.width, batch.height)
        if not spec.shape.dynamic or stage.per == "prompt":
            return [networks.own_shape(stage)]
        if stage.per == "step":
            modes: tuple[GuidanceMode, ...] = ("sequential", "batched")
            batches = {stage.batch(batch.count, batch.guided, mode) for mode in modes}
            return [(height, width, n) for n in sorted(batches)]
        if stage.role == "modulation":
            return []  # as many rows as any
        found = [(height, width, 1)]
        halo = halo_of(spec, stage)
        if halo is not None:
            tall, wide = zip(*_tiles((height, width), halo), strict=True)
            found.append((max(tall), max(wide), 1))
        return found

    def _process_bytes(self) -> int:
        rates = self.request.rates
        process = rates.process_bytes if rates else PROCESS_BYTES
        return process + PROGRAM_BYTES + self.backend.process_bytes


def _build_bytes(networks: Networks, pixels: int) -> int:
    largest = max(networks.trace_own(stage).parameters for stage in networks.flow.stages)
    return build_bytes(largest, pixels)


def _larger(target: Target, usable: int) -> list[Target]:
    """Targets of the same architecture with more than `usable` bytes of memory, nearest first."""
    found = [
        other
        for other in all_targets()
        if other.arch == target.arch and usable_bytes(other) > usable
    ]
    return sorted(found, key=lambda other: (other.models != target.models, other.memory_bytes))


def _tiles(size: tuple[int, int], halo: int | None) -> list[tuple[int, int]]:
    """Heights and widths in latents of what a streamed AutoencoderTiny is run at, one after
    another; all at once without a halo."""
    if halo is None:
        return [size]
    tall, wide = (tile_sides(n, halo) for n in size)
    return [(h, w) for h in tall for w in wide]


def _together(costs: Mapping[str, ComponentCost]) -> dict[str, float]:
    """Seconds of an image in each mode."""
    modes = next(iter(costs.values())).seconds
    return {mode: sum(cost.seconds[mode] or 0 for cost in costs.values()) for mode in modes}


def _fits(estimate: Estimate) -> str:
    assert estimate.mode is not None
    return f"{estimate.memory[estimate.mode] / 1e6:.0f} MB in {estimate.mode} mode"
