"""What a bundle would take, before anything is built: disk, memory, build memory, time.

Networks are made on shapes alone from their configs and traced (export/workload.py); build/costs.py
says what that costs. docs/planner.md derives the formulas and says how far they are off.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec

from edgesd.build import BYTES_ON_GPU, DEMO, demo_model
from edgesd.build.arena import arena_bytes
from edgesd.build.costs import (
    NODE_FILE_BYTES,
    Memory,
    file_bytes,
    half_bytes,
    memory,
    multiplications,
    seconds,
)
from edgesd.device.capabilities import in_gb
from edgesd.device.targets import OS_BYTES, check_request, get_target, usable_bytes
from edgesd.engines import onnxruntime, tensorrt
from edgesd.export.families import Component, Plan
from edgesd.export.pipeline import plan_pipeline, require_build_tools
from edgesd.export.quantize.assign import Choice, planned
from edgesd.export.quantize.layers import Layer
from edgesd.export.source import ModelSource, resolve_source
from edgesd.export.work_on_cpu import lowered
from edgesd.export.workload import Workload, halves, trace
from edgesd.runtime.kernels import computes
from edgesd.runtime.memory import MEMORY_MODES, MemoryMode
from edgesd.runtime.pipeline import DRAWING
from edgesd.runtime.rates import Speed
from edgesd.runtime.tiles import TILE, margin_of, tail_shapes, tiles_of
from edgesd.spec import (
    Precision,
    Rates,
    Spec,
    Target,
    check_multiple,
    number_format,
    parse_scheme,
)

PROCESS_BYTES = 76 << 20
"""Python with ONNX Runtime and one small session (measured on x86-64; calibrate measures it)."""

PROGRAM_BYTES = 14 << 20
"""What `edgesd generate` loads besides: Click, Pillow, the board's description."""

_COPIES = 5
"""Of the picture's values in fp32, from the decoder's output to bytes."""

CUDA_BYTES = 400 << 20
"""A process's share of CUDA and TensorRT, besides its plans. Assumed: no board was measured."""

_BUILD_BYTES, _BUILD_PER_WEIGHT, _BUILD_PER_PIXEL = 700 << 20, 9.2, 7600
"""Memory of a build, measured: torch and its libraries; for each weight of the largest network,
whose graph is compared with its source; for each pixel, of the decoder's calibration."""
_OTHER_FILES = 400_000
"""Tokenizer, manifest, licences."""

_SUGGESTED = ("fp16", "w8a8", "w4a8-g64")
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
    runs: in a picture; seconds: of all these runs, None where rates aren't known."""

    bytes: int
    macs: dict[str, int]
    memory: dict[str, int]
    runs: dict[str, int]
    seconds: dict[str, float | None]


class BuildPlan(Spec, frozen=True):
    """What `edgesd plan` predicts.

    memory: peak resident set of `edgesd generate` in each mode (or of the GPU); usable_bytes: what
    the target, or the limit asked for, allows; mode: the fastest that fits, None for none.
    seconds: of a picture by mode, without loading; None where the target was never calibrated.
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
    target's RAM. rates: how fast the target is."""

    precision: Precision
    size: tuple[int, int] | None = None
    steps: int | None = None
    guidance: float | None = None
    max_memory: int | None = None
    method: str = "svdquant"
    rates: Rates | None = None


def make_plan(model: str, target_name: str, wish: Wish, backend: str | None = None) -> BuildPlan:
    """Predict what `edgesd build model --target target_name` makes, and what a picture takes.

    Raises UsageError, InputError and TargetError as `build` does for what it can't make.
    """
    number_format(wish.precision)
    require_build_tools()
    target = get_target(target_name)
    backend = backend or target.backends[0]
    check_request(target, wish.precision, backend)
    source = resolve_source(str(demo_model()) if model == DEMO else model)
    planner = _Planner(source, model, target, backend, wish)
    found = planner.plan(wish.precision, wish.size)
    if found.mode is not None:
        return found
    return msgspec.structs.replace(found, advice=planner.advice(found))


@dataclass(frozen=True)
class _Part:
    """A component in one mode: its memory, how often it runs in a picture, and seconds of that."""

    memory: Memory
    runs: int
    seconds: float | None


class _Planner:
    def __init__(
        self, source: ModelSource, model: str, target: Target, backend: str, wish: Wish
    ) -> None:
        self.source, self.model, self.target, self.backend = source, model, target, backend
        self.wish = wish
        self.whole: Plan = plan_pipeline(source)
        self.speed = None if wish.rates is None else Speed(wish.rates)
        self.usable = usable_bytes(target) if wish.max_memory is None else wish.max_memory
        self.gpu = backend == tensorrt.BACKEND
        self.modes: tuple[MemoryMode, ...] = MEMORY_MODES[:2] if self.gpu else MEMORY_MODES
        self._traced: dict[tuple[str, int, int, int], Workload] = {}

    def plan(self, precision: Precision, size: tuple[int, int] | None) -> BuildPlan:
        """The plan of one precision and size. Raises UsageError for what can't be drawn."""
        spec, wish = self.whole.pipeline, self.wish
        width, height = size or (spec.shape.width, spec.shape.height)
        check_multiple("width", width, spec.shape.multiple_of)
        check_multiple("height", height, spec.shape.multiple_of)
        steps = spec.num_inference_steps if wish.steps is None else wish.steps
        guidance = spec.guidance_scale if wish.guidance is None else wish.guidance
        guided = guidance > 1 and spec.components["unet"].input("timestep_cond") is None
        own = self._own_kernels(precision)
        costs: dict[str, ComponentCost] = {}
        parts: dict[str, dict[str, _Part]] = {}
        for component in self.whole.components:
            one = self._trace(component, *self._latents(component, width, height), 1)
            choices = self._choices(one, precision)
            on_disk = self._file_bytes(one, choices, precision)
            graphs = NODE_FILE_BYTES * len(one.operations) * (2 if own else 1)
            picture = 0 if component.name != "vae_decoder" else _COPIES * 12 * width * height
            done: dict[tuple[tuple[int, int, int], ...], tuple[list[Workload], Memory]] = {}
            found: dict[str, _Part] = {}
            for mode in self.modes if component.name in DRAWING else ():
                if self._in_halves(component, mode):
                    found[mode] = self._decoder_in_halves(component, (width, height), choices, own)
                    continue
                shapes, runs = self._runs(component, mode, (width, height), steps, guided)
                if tuple(shapes) not in done:  # modes differ in few components
                    made = [lowered(self._trace(component, *s), choices, own, own) for s in shapes]
                    takes = (
                        self._on_gpu(one, precision)
                        if self.gpu
                        else memory(made, choices, on_disk, picture)
                    )
                    done[tuple(shapes)] = made, takes
                made, takes = done[tuple(shapes)]
                found[mode] = _Part(takes, runs, self._seconds(made, takes, mode, runs))
            parts[component.name] = found
            costs[component.name] = ComponentCost(
                bytes=on_disk + graphs,
                macs=multiplications(one),
                memory={mode: self._alone(part, mode) for mode, part in found.items()},
                runs={mode: part.runs for mode, part in found.items()},
                seconds={mode: part.seconds for mode, part in found.items()},
            )
        drawing = [costs[name] for name in DRAWING]
        peaks: dict[str, int] = {
            mode: max(cost.memory[mode] for cost in drawing) for mode in self.modes
        }
        peaks["fast"] = self._together([parts[name]["fast"].memory for name in DRAWING])
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
            seconds={mode: sum(cost.seconds[mode] or 0 for cost in drawing) for mode in self.modes}
            if self.speed
            else None,
            rates=wish.rates.machine if wish.rates else None,
        )

    def advice(self, plan: BuildPlan) -> tuple[str, ...]:
        """What fits instead of `plan`: another precision, a smaller size; or else what has room."""
        found = []
        able = [p for p in _SUGGESTED if number_format(p) in self.target.precisions]
        for precision in able:
            other = self.plan(precision, (plan.width, plan.height))
            if other.mode and other.bundle_bytes < plan.bundle_bytes:
                found.append(f"--precision {precision} fits: {_fits(other)}")
                break
        step = self.whole.pipeline.shape.multiple_of
        for part in (4, 3, 2, 1):
            sizes = [max(step, n * part // 5 // step * step) for n in (plan.width, plan.height)]
            other = self.plan(plan.precision, (sizes[0], sizes[1]))
            if other.mode:
                found.append(f"--size {other.width}x{other.height} fits: {_fits(other)}")
                break
        if not found:
            least = min(plan.memory.values())
            found.append(
                f"no precision or size fits: a target with {in_gb(least + OS_BYTES)} of memory or "
                "more would"
            )
        return tuple(found)

    def _own_kernels(self, precision: Precision) -> bool:
        """Whether edgesd's own kernels will run there: by runtime.kernels."""
        if self.backend != onnxruntime.BACKEND or number_format(precision) not in ("w8a8", "w4a8"):
            return False
        if self.wish.rates is not None:
            isa = self.wish.rates.instruction_set or ""
        else:
            has = self.target.capabilities
            isa = next((isa for feature, isa in _KERNELS.items() if feature in has), "")
        return computes(isa, [precision])

    def _runs(
        self,
        component: Component,
        mode: MemoryMode,
        size: tuple[int, int],
        steps: int,
        guided: bool,
    ) -> tuple[list[tuple[int, int, int]], int]:
        """Shapes (height, width, rows) that a component runs at, one after another, and how often
        that happens in a picture: as runtime.pipeline.Pipeline does it."""
        height, width = self._latents(component, *size)
        rows = 2 if guided else 1
        if component.name == "unet":
            batched = mode == "fast"
            return [(height, width, rows if batched else 1)], steps * (1 if batched else rows)
        halo = self.whole.pipeline.latent.halo
        if component.name == "vae_decoder" and mode == "stream" and halo is not None:
            tall, wide = (
                [tile.last - tile.first for tile in tiles_of(n, TILE, margin_of(halo))]
                for n in (height, width)
            )
            return [(h, w, 1) for h in tall for w in wide], 1
        return [(height, width, 1)], rows if component.name == "text_encoder" else 1

    def _seconds(
        self, made: Sequence[Workload], takes: Memory, mode: MemoryMode, runs: int
    ) -> float | None:
        """Of all runs in a picture, of reading weights in each, and of the memory that they touch
        for the first time."""
        if self.speed is None:
            return None
        streamed = mode == "stream"
        each = {id(workload): seconds(workload, self.speed, streamed) for workload in made}
        fresh = self.speed.seconds("fresh", "", (max(1, takes.activations + takes.workspace),))
        # A network's weights are larger than caches, which hold those of a single operation.
        reading = self.speed.seconds("read", "", (max(1, takes.weights),))
        return runs * (sum(each[id(workload)] for workload in made) + reading) + fresh

    def _in_halves(self, component: Component, mode: MemoryMode) -> bool:
        """Whether a full autoencoder's decoder is run by runtime/tiles.py."""
        full = component.name == "vae_decoder" and self.whole.pipeline.latent.levels is not None
        return full and mode == "stream"

    def _decoder_in_halves(
        self,
        component: Component,
        size: tuple[int, int],
        choices: Mapping[Layer, Choice],
        own: bool,
    ) -> _Part:
        """The decoder's head on all latents, its tail on tiles; one half is there at a time."""
        height, width = self._latents(component, *size)
        head = lowered(halves(self._trace(component, height, width, 1))[0], choices, own, own)
        shapes, drawings = tail_shapes(height, width)
        tails = [
            lowered(halves(self._trace(component, h, w, 1))[1], choices, own, own, tail=True)
            for h, w in shapes
        ]
        features = head.sizes[head.outputs[0]]
        behind = _COPIES * 12 * size[0] * size[1] + features
        found = [
            memory(made, choices, half_bytes(made[0], choices), besides)
            for made, besides in (([head], 0), (tails, behind))
        ]
        largest = max(found, key=lambda m: m.graph + m.streamed + m.activations + m.workspace)
        return _Part(largest, 1, self._seconds([head, *tails * drawings], largest, "stream", 1))

    def _latents(self, component: Component, width: int, height: int) -> tuple[int, int]:
        """Height and width of a component's input, in its own unit."""
        unit = 1 if component.name == "vae_encoder" else self.whole.pipeline.latent.scale_factor
        return height // unit, width // unit

    def _trace(self, component: Component, height: int, width: int, rows: int) -> Workload:
        key = (component.name, height, width, rows)
        if key not in self._traced:
            sizes = {"batch": rows, "height": height, "width": width}
            self._traced[key] = trace(component, sizes)
        return self._traced[key]

    def _choices(self, workload: Workload, precision: Precision) -> dict[Layer, Choice]:
        if precision in ("fp32", "fp16"):
            return {}
        return dict(planned(workload.layers, parse_scheme(precision)))

    def _file_bytes(
        self, workload: Workload, choices: Mapping[Layer, Choice], precision: Precision
    ) -> int:
        smoothed = self.wish.method == "svdquant"
        return file_bytes(workload, choices, 2 if precision == "fp16" else 4, smoothed)

    def _alone(self, part: _Part, mode: str) -> int:
        """Peak of the process while a component is loaded and runs, and no other is there."""
        m = part.memory
        weights = m.streamed if mode == "stream" else m.weights
        return self._base() + m.graph + weights + max(m.loading, m.activations + m.workspace)

    def _together(self, parts: Sequence[Memory]) -> int:
        """Peak of the process with all components loaded."""
        loaded = sum(part.graph + part.weights + part.activations for part in parts)
        return self._base() + loaded + max(part.workspace for part in parts)

    def _on_gpu(self, workload: Workload, precision: Precision) -> Memory:
        """Of a TensorRT plan: weights as they are computed with, activations in fp16."""
        weights = int(BYTES_ON_GPU[number_format(precision)] * workload.parameters)
        touched = arena_bytes([lowered(workload, {}, False, False)])
        return Memory(weights, 0, weights, touched // (1 if precision == "fp32" else 2), 0, 0)

    def _base(self) -> int:
        rates = self.wish.rates
        process = rates.process_bytes if rates else PROCESS_BYTES
        return process + PROGRAM_BYTES + (CUDA_BYTES if self.gpu else 0)

    def _build_bytes(self, pixels: int) -> int:
        largest = max(self.source.parameters(name) for name in self.source.family.weights)
        return int(_BUILD_BYTES + _BUILD_PER_WEIGHT * largest + _BUILD_PER_PIXEL * pixels)


def _fits(plan: BuildPlan) -> str:
    assert plan.mode is not None
    return f"{plan.memory[plan.mode] / 1e6:.0f} MB in {plan.mode} mode"
