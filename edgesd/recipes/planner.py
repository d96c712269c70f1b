"""What a bundle would take, before anything is built: disk, memory, build memory, time.

Networks are made on shapes alone from their configs and traced (export/cost/workload.py);
export/cost/costs.py says what that costs. docs/planner.md derives the formulas and says how far
they are off.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import msgspec

from edgesd.device.capabilities import in_gb
from edgesd.device.targets import all_targets, check_request, get_target, usable_bytes
from edgesd.errors import TargetError
from edgesd.export.backends import get_lowering
from edgesd.export.cost.costs import NODE_FILE_BYTES, file_bytes
from edgesd.export.cost.cpu_lowering import lower_workload
from edgesd.export.cost.times import multiplications, seconds
from edgesd.export.cost.workload import Workload, split_workload
from edgesd.export.families import ExportSpec
from edgesd.export.pipeline import export_spec, require_build_tools
from edgesd.export.quantize.assign import LayerScheme, planned
from edgesd.export.quantize.layers import Layer
from edgesd.export.source import ModelSource, resolve_source
from edgesd.recipes import DEMO, demo_model, fixed_shape
from edgesd.recipes.footprints import Networks, Shape
from edgesd.runtime.backends import get_backend
from edgesd.runtime.flow import flow_of
from edgesd.runtime.footprint import Drawing, Need, computing, drawing_need, text_values
from edgesd.runtime.kernels import computes
from edgesd.runtime.memory import MemoryMode
from edgesd.runtime.rates import Rates, Speed
from edgesd.runtime.tiles import TILE, WINDOWS, margin_of, tail_shapes, tiles_of
from edgesd.spec.base import Spec
from edgesd.spec.bundle import Footprint
from edgesd.spec.pipeline import check_multiple
from edgesd.spec.scheme import Precision, number_format, parse_scheme
from edgesd.spec.target import Target

PROCESS_BYTES = 76 << 20
"""Python with ONNX Runtime and one small session (measured on x86-64; calibrate measures it)."""

PROGRAM_BYTES = 14 << 20
"""What `edgesd generate` loads besides: Click, Pillow, the board's description."""

_BUILD_BYTES, _BUILD_PER_WEIGHT, _BUILD_PER_PIXEL = 700 << 20, 9.2, 7600
"""Memory of a build, measured: torch and its libraries; for each weight of the largest network,
whose graph is compared with its source; for each pixel, of the decoder's calibration."""
_OTHER_FILES = 400_000
"""Tokenizer, manifest, licences."""

_SUGGESTED = ("fp32", "fp16", "w8a8", "w4a8-g64")
"""Precisions that are suggested where another doesn't fit, the finest first."""

_KERNELS = {
    "dotprod": "neon_dotprod",
    "avx512_vnni": "avx512_vnni",
    "avx_vnni": "avx_vnni",
    "avx2": "avx2",
}
"""Capability -> the instruction set of edgesd's own kernels that it gives."""


class ComponentCost(Spec, frozen=True):
    """One component. bytes: of its files; macs: multiplications of one run of one row, by kind of
    operation. By --memory mode: memory: peak of the process while it is loaded and runs alone;
    runs: in an image; seconds: of all these runs, None where rates aren't known."""

    bytes: int
    macs: dict[str, int]
    memory: dict[str, int]
    runs: dict[str, int]
    seconds: dict[str, float | None]


class BuildPlan(Spec, frozen=True):
    """What `edgesd plan` predicts.

    memory: peak resident set of `edgesd generate` in each mode (or of the GPU); usable_bytes: what
    the target, or the limit asked for, allows; mode: the fastest that fits, None for none.
    seconds: of an image by mode, without loading; None where the target was never calibrated.
    rates: which machine they were measured on. advice: what would fit where this doesn't.
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
    mode: str | None
    build_bytes: int
    seconds: dict[str, float] | None
    rates: str | None
    advice: tuple[str, ...] = ()


@dataclass(frozen=True)
class Wish:
    """What is to be planned; None takes the model's own. max_memory: bytes, instead of the
    target's RAM. rates: how fast the target is. fixed: of graphs for `size` alone, whose denoiser
    takes `batch` rows; others generate any size, and so are those for TensorRT. scheduler: the
    bundle's default sampler."""

    precision: Precision
    size: tuple[int, int] | None = None
    steps: int | None = None
    guidance: float | None = None
    max_memory: int | None = None
    method: str = "svdquant"
    rates: Rates | None = None
    fixed: bool = False
    batch: int = 1
    scheduler: str | None = None


def make_plan(model: str, target_name: str, wish: Wish, backend: str | None = None) -> BuildPlan:
    """Predict what `edgesd build model --target target_name` makes, and what an image takes.

    Raises UsageError, InputError and TargetError as `build` does for what it can't make.
    """
    number_format(wish.precision)
    require_build_tools()
    target = get_target(target_name)
    backend = target.backends[0] if backend is None else backend
    check_request(target, wish.precision, backend)
    source = resolve_source(str(demo_model()) if model == DEMO else model)
    return plan_source(source, model, target, backend, wish)


def plan_source(
    source: ModelSource, model: str, target: Target, backend: str, wish: Wish
) -> BuildPlan:
    """The same of a source that was resolved, for a target and backend that were checked."""
    planner = _Planner(source, model, target, backend, wish)
    found = planner.plan(wish.precision, wish.size)
    if found.mode is not None:
        return found
    return msgspec.structs.replace(found, advice=tuple(planner.advice(found)))


def check_plan(plan: BuildPlan) -> None:
    """Raise TargetError for a bundle that can't generate on its target in any mode, with what
    could."""
    if plan.mode is not None:
        return
    least = min(plan.memory, key=lambda mode: plan.memory[mode])
    advice = "; ".join(plan.advice) or "no target that edgesd knows has as much"
    raise TargetError(
        f"{plan.model} in {plan.precision} at {plan.width}x{plan.height} needs "
        f"{plan.memory[least] / 1e6:.0f} MB in {least} mode, and {plan.target} has "
        f"{plan.usable_bytes / 1e6:.0f} MB for it: {advice}"
    )


@dataclass(frozen=True)
class _Component:
    """A component as it would be built. split: footprints of the head and tail of a decoder that
    has them."""

    choices: Mapping[Layer, LayerScheme]
    on_disk: int
    footprint: Footprint
    split: tuple[Footprint, Footprint] | None


class _Planner:
    def __init__(
        self, source: ModelSource, model: str, target: Target, backend: str, wish: Wish
    ) -> None:
        self.source, self.model, self.target, self.backend = source, model, target, backend
        self.wish = wish
        self.speed = None if wish.rates is None else Speed(wish.rates)
        self.usable = usable_bytes(target) if wish.max_memory is None else wish.max_memory
        self.lowering, self.modes = get_lowering(backend), get_backend(backend).memory_modes
        self._known: dict[tuple[int, int] | None, Networks] = {}
        self.networks = self._networks_of(None)

    def _networks_of(self, size: tuple[int, int] | None) -> Networks:
        """Those of a bundle that generates `size` (width, height) alone; None: any."""
        if size not in self._known:
            batch = self.wish.batch
            if size is not None and self.lowering.fixed_shapes and size != self.wish.size:
                _, _, batch = fixed_shape(self._known[None].pipeline)
            plan: ExportSpec = export_spec(self.source, size, self.wish.scheduler, batch)
            self._known[size] = Networks(plan)
        return self._known[size]

    def _fix(self, size: tuple[int, int] | None) -> None:
        """Take the networks of what would be built for images of `size`."""
        shape = self._known[None].pipeline.shape
        fixed = (self.wish.fixed and size is not None) or self.lowering.fixed_shapes
        self.networks = self._networks_of((size or (shape.width, shape.height)) if fixed else None)

    def plan(self, precision: Precision, size: tuple[int, int] | None) -> BuildPlan:
        """The plan of one precision and size. Raises UsageError for what can't be generated."""
        wish = self.wish
        spec = self._known[None].pipeline
        width, height = size or (spec.shape.width, spec.shape.height)
        check_multiple("width", width, spec.latent.scale_factor)
        check_multiple("height", height, spec.latent.scale_factor)
        self._fix(size)
        spec = self.networks.pipeline
        steps = spec.num_inference_steps if wish.steps is None else wish.steps
        guidance = spec.guidance_scale if wish.guidance is None else wish.guidance
        flow = flow_of(spec)
        guided = flow.guided(guidance)
        own = self._own_kernels(precision)
        tall, wide = self.networks.latents(width, height)
        costs: dict[str, ComponentCost] = {}
        needs: dict[MemoryMode, Need] = {}
        found: dict[str, _Component] = {}
        for name in self.networks.components:
            one = self.networks.trace(name, self.networks.own_shape(name))
            choices = self._choices(one, precision)
            on_disk = self._file_bytes(one, choices, precision)
            at = self._shapes(name, (tall, wide), guided)
            made = self.networks.footprint(
                name, precision, choices, on_disk, own, self.lowering, at
            )
            split = None
            if name == "vae_decoder" and spec.latent.levels and spec.shape.dynamic:
                split = self.networks.split(choices, own, at)
            found[name] = _Component(choices, on_disk, made, split)
        for mode in self.modes:
            needs[mode] = self._need(found, mode, (tall, wide), guided)
        for name, component in found.items():
            one = self.networks.trace(name, self.networks.own_shape(name))
            generated = self.modes if name in flow.components else ()
            graphs = NODE_FILE_BYTES * len(one.operations) * (2 if own else 1)
            runs: dict[str, int] = {
                mode: self._runs(name, mode, steps, guided) for mode in generated
            }
            took: dict[str, tuple[float, float] | None] = dict.fromkeys(generated)
            units = 1 if name == "text_encoder" else tall * wide
            for mode in generated:
                if self.speed is not None:
                    run = self._workloads(name, component, mode, (tall, wide), guided, own)
                    took[mode] = _seconds(self.speed, *run, units, mode == "stream")
            asked = tall, wide
            if name == "vae_encoder":
                asked = height, width
            at_size = one if not spec.shape.dynamic else self.networks.trace(name, (*asked, 1))
            costs[name] = ComponentCost(
                bytes=component.on_disk + graphs,
                macs=multiplications(at_size),
                memory={mode: needs[mode].parts[name] for mode in generated},
                runs=runs,
                seconds={
                    mode: None if once is None else once[0] * runs[mode] + once[1]
                    for mode, once in took.items()
                },
            )
        peaks: dict[str, int] = {mode: need.resident for mode, need in needs.items()}
        return BuildPlan(
            model=self.model,
            target=self.target.name,
            backend=self.backend,
            precision=precision,
            width=width,
            height=height,
            steps=steps,
            guidance=guidance,
            kernels=own,
            components=costs,
            bundle_bytes=sum(cost.bytes for cost in costs.values()) + _OTHER_FILES,
            memory=peaks,
            usable_bytes=self.usable,
            mode=next((mode for mode in self.modes if peaks[mode] <= self.usable), None),
            build_bytes=self._build_bytes(width * height),
            seconds={
                mode: sum(costs[name].seconds[mode] or 0 for name in flow.components)
                for mode in self.modes
            }
            if self.speed
            else None,
            rates=wish.rates.machine if wish.rates else None,
        )

    def advice(self, plan: BuildPlan) -> Iterator[str]:
        """What fits instead of `plan`, each planned: another precision, a smaller size, both; or
        else where there is room."""
        size = (plan.width, plan.height)
        able = [
            precision
            for precision in _SUGGESTED
            if number_format(precision) in self.target.precisions and precision != plan.precision
        ]
        found = False
        for precision in able:
            other = self.plan(precision, size)
            if other.mode:
                found = True
                yield f"--precision {precision} fits: {_fits(other)}"
                break
        if smaller := self._smaller(plan, [plan.precision]):
            found = True
            yield f"--size {smaller.width}x{smaller.height} fits: {_fits(smaller)}"
        if found:
            return
        if smaller := self._smaller(plan, able):
            yield (
                f"--precision {smaller.precision} --size {smaller.width}x{smaller.height} fits: "
                f"{_fits(smaller)}"
            )
            return
        least = min(plan.memory.values())
        if self.wish.max_memory is not None:
            yield f"no precision or size fits: --max-memory {-(-least // 10**6)}MB would do"
            return
        for target in self._larger():
            other = self._on(target).plan(plan.precision, self.wish.size)
            if other.mode:
                yield (
                    f"no precision or size fits: --target {target.name} "
                    f"({in_gb(target.memory_bytes)}) does: {_fits(other)}"
                )
                return
        yield f"no precision or size fits, and no target that could run it has {in_gb(least)} free"

    def _smaller(self, plan: BuildPlan, precisions: Sequence[Precision]) -> BuildPlan | None:
        """The largest size below that of `plan` that fits, in the first precision that does."""
        step = self._known[None].pipeline.shape.multiple_of

        def at(part: int) -> BuildPlan | None:
            size = [max(step, n * part // 5 // step * step) for n in (plan.width, plan.height)]
            if (size[0], size[1]) == (plan.width, plan.height):
                return None
            found = (self.plan(precision, (size[0], size[1])) for precision in precisions)
            return next((other for other in found if other.mode), None)

        least = at(1)  # mostly, what doesn't fit then are the weights
        return None if least is None else next(filter(None, map(at, (4, 3, 2))), least)

    def _larger(self) -> list[Target]:
        """Targets with more memory that run the same: the nearest first."""
        asked = number_format(self.wish.precision)
        found = [
            target
            for target in all_targets()
            if target.arch == self.target.arch
            and self.backend in target.backends
            and asked in target.precisions
            and usable_bytes(target) > self.usable
        ]
        same = self.target.models
        return sorted(found, key=lambda target: (target.models != same, target.memory_bytes))

    def _on(self, target: Target) -> _Planner:
        """The same for another target, whose speed isn't known."""
        other = copy.copy(self)
        other.target, other.usable = target, usable_bytes(target)
        other.wish, other.speed = replace(self.wish, rates=None), None
        return other

    def _own_kernels(self, precision: Precision) -> bool:
        """Whether edgesd's own kernels will run there: by runtime.kernels."""
        if not self.lowering.own_kernels or number_format(precision) not in ("w8a8", "w4a8"):
            return False
        if self.wish.rates is not None:
            isa = self.wish.rates.instruction_set or ""
        else:
            has = self.target.capabilities
            isa = next((isa for feature, isa in _KERNELS.items() if feature in has), "")
        return computes(isa, [precision])

    def _rows(self, guided: bool) -> tuple[int, ...]:
        """Rows of the denoiser's runs for one image: one by one, or both halves of guidance."""
        shape = self.networks.pipeline.shape
        if not shape.dynamic:
            return (shape.batch,)
        return (1, 2) if guided else (1,)

    def _shapes(self, name: str, size: tuple[int, int], guided: bool) -> list[Shape]:
        """What a component is run at for an image of `size` in latents; (): as it was built."""
        spec, (height, width) = self.networks.pipeline, size
        if not spec.shape.dynamic or name not in ("unet", "vae_decoder"):
            return [self.networks.own_shape(name)]
        if name == "unet":
            return [(height, width, rows) for rows in self._rows(guided)]
        found = [(height, width, 1)]
        if spec.latent.halo is not None:
            tall, wide = (
                max(
                    tile.last - tile.first
                    for tile in tiles_of(n, TILE, margin_of(spec.latent.halo))
                )
                for n in size
            )
            found.append((tall, wide, 1))
        return found

    def _drawing(self, mode: MemoryMode, size: tuple[int, int], guided: bool) -> Drawing:
        """One image, or as many as a fixed number of rows generates, of `size` in latents."""
        spec = self.networks.pipeline
        rows = self._rows(guided)
        values = text_values(spec.components["text_encoder"])
        count = 1
        if not spec.shape.dynamic:
            count = max(1, spec.shape.batch // (2 if guided and spec.shape.batch % 2 == 0 else 1))
        number = rows[-1] if mode == "fast" else rows[0]
        return Drawing(*size, spec.latent.scale_factor, count, number, values)

    def _need(
        self,
        components: Mapping[str, _Component],
        mode: MemoryMode,
        size: tuple[int, int],
        guided: bool,
    ) -> Need:
        """Memory of an image of `size` (height, width) in latents, as the pipeline counts it."""
        spec = self.networks.pipeline
        return drawing_need(
            spec.latent,
            {name: components[name].footprint for name in flow_of(spec).components},
            components["vae_decoder"].split,
            self._base(),
            mode,
            self._drawing(mode, size, guided),
            spec.shape.dynamic,
            max(WINDOWS),
        )

    def _runs(self, name: str, mode: MemoryMode, steps: int, guided: bool) -> int:
        """How often a component runs in an image."""
        rows = 2 if guided else 1
        if name == "unet":
            return steps * (1 if mode == "fast" else rows)
        return rows if name == "text_encoder" else 1

    def _workloads(
        self,
        name: str,
        component: _Component,
        mode: MemoryMode,
        size: tuple[int, int],
        guided: bool,
        own: bool,
    ) -> tuple[list[Workload], Footprint]:
        """What a run computes, one after another, and the footprint of the graph that does most."""
        height, width = size
        choices, spec = component.choices, self.networks.pipeline

        def made(h: int, w: int, rows: int = 1) -> Workload:
            return lower_workload(self.networks.trace(name, (h, w, rows)), choices, own, own)

        if name == "text_encoder":
            shape = self.networks.own_shape(name)
            return [made(*shape)], component.footprint
        if name == "unet":
            rows = self._rows(guided)
            return [
                made(height, width, rows[-1] if mode == "fast" else rows[0])
            ], component.footprint
        if mode == "stream" and component.split is not None:
            head = split_workload(self.networks.trace(name, (height, width, 1)))[0]
            shapes, drawings = tail_shapes(height, width)
            tails = [
                lower_workload(
                    split_workload(self.networks.trace(name, (h, w, 1)))[1], choices, own, own, True
                )
                for h, w in shapes
            ]
            return [lower_workload(head, choices, own, own), *tails * drawings], component.split[1]
        halo = spec.latent.halo
        if mode == "stream" and halo is not None and spec.shape.dynamic:
            tall, wide = (
                [tile.last - tile.first for tile in tiles_of(n, TILE, margin_of(halo))]
                for n in (height, width)
            )
            return [made(h, w) for h in tall for w in wide], component.footprint
        return [made(height, width)], component.footprint

    def _choices(self, workload: Workload, precision: Precision) -> dict[Layer, LayerScheme]:
        if precision in ("fp32", "fp16"):
            return {}
        return dict(planned(workload.layers, parse_scheme(precision)))

    def _file_bytes(
        self, workload: Workload, choices: Mapping[Layer, LayerScheme], precision: Precision
    ) -> int:
        smoothed = self.wish.method == "svdquant"
        return file_bytes(workload, choices, 2 if precision == "fp16" else 4, smoothed)

    def _base(self) -> int:
        rates = self.wish.rates
        process = rates.process_bytes if rates else PROCESS_BYTES
        return process + PROGRAM_BYTES + get_backend(self.backend).process_bytes

    def _build_bytes(self, pixels: int) -> int:
        largest = max(self.source.parameters(name) for name in self.source.family.weights)
        return int(_BUILD_BYTES + _BUILD_PER_WEIGHT * largest + _BUILD_PER_PIXEL * pixels)


def _seconds(
    speed: Speed, made: Sequence[Workload], footprint: Footprint, units: int, streamed: bool
) -> tuple[float, float]:
    """Of one run of a component that computes `made`, reading its weights included; and of the
    memory that runs touch for the first time. units: see footprint.computing."""
    each = {id(workload): seconds(workload, speed, streamed) for workload in made}
    fresh = speed.seconds("fresh", "", (max(1, sum(computing(footprint, units))),))
    # A network's weights are larger than caches, which hold those of a single operation.
    reading = speed.seconds("read", "", (max(1, footprint.weights),))
    return sum(each[id(workload)] for workload in made) + reading, fresh


def _fits(plan: BuildPlan) -> str:
    assert plan.mode is not None
    return f"{plan.memory[plan.mode] / 1e6:.0f} MB in {plan.mode} mode"
