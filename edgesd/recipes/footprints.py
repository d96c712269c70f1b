"""Traces the memory of a pipeline's graphs: `plan` predicts with it, and bundles include it.

Networks are made on shapes alone (export/cost/workload.py); export/cost/costs.py says what a
workload costs. How footprints add up for an image is runtime/footprint.py's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import msgspec

from edgesd.export.backends import get_lowering
from edgesd.export.backends.base import Lowering
from edgesd.export.cost.arena import arena_bytes
from edgesd.export.cost.costs import memory, part_bytes
from edgesd.export.cost.cpu_lowering import NO_SLOTS, Slots, lower_workload
from edgesd.export.cost.workload import Workload, split_joined, split_workload, trace
from edgesd.export.families import ExportSpec
from edgesd.export.families.parts.shapes import TOKENS
from edgesd.export.passes.lora_slots import has_slot, modulates, takes_loras
from edgesd.export.quantize.assign import LayerScheme
from edgesd.export.quantize.layers import Layer
from edgesd.runtime.flow import Stage, flow_of
from edgesd.runtime.modulation import ROWS
from edgesd.runtime.tiles import (
    TILE,
    WINDOWS,
    Margins,
    encoder_window,
    margins_of,
    part_shapes,
)
from edgesd.spec.bundle import BundleManifest, Engine, Footprint, split_of
from edgesd.spec.pipeline import Wiring
from edgesd.spec.scheme import Precision, parse_scheme

Shape = tuple[int, int, int]
"""Height, width and batch of a component's input; height and width in latents."""

_ENCODER_MARGINS: Margins = 3, 3
"""Of the tiles of a full autoencoder's encoder, about: its graphs say it."""

FACTOR_BYTES, LORA_BYTES = 4, 2
"""Of each value that fills slots: as graphs take it, and in the file that it is read from."""

_CHUNK_MARGIN = 2.2
"""How many times as much as is traced a further chunk takes at most: measured on the embedded model
in 8 and 4 bits, with both halves of guidance in one run; fp32 takes what is traced."""


@dataclass(frozen=True)
class ComponentForm:
    """How a component's graph is built. schemes: of its quantized layers. on_disk: bytes of its
    weights' file. own_kernels: for edgesd's own kernels. fp32: on a GPU, what isn't quantized stays
    in fp32. slots: for LoRAs; filling: values that fill them. attention: in 8 bits, by edgesd's own
    kernels."""

    precision: Precision
    lowering: Lowering
    schemes: Mapping[Layer, LayerScheme]
    on_disk: int
    own_kernels: bool = False
    fp32: bool = False
    slots: Slots = NO_SLOTS
    filling: int = 0
    attention: bool = True

    @property
    def factors(self) -> int:
        """Bytes of what always fills the slots, as graphs of fixed shapes have it."""
        return FACTOR_BYTES * self.filling if self.lowering.fixed_shapes else 0

    def lowered(self, workload: Workload, tiled: bool = False) -> Workload:
        """A workload as the graph runs it. tiled: of an autoencoder's part that is run in tiles."""
        own = self.own_kernels
        workload = split_joined(workload) if self.schemes else workload
        attention = own and self.attention
        return lower_workload(workload, self.schemes, own, attention, tiled, slots=self.slots)


@dataclass(frozen=True)
class AutoencoderPart:
    """A part of a full autoencoder's decoder or encoder. which: its place. larger: how much larger
    than the latents is the smaller of what it takes and makes, whose pixels are its unit. decodes:
    whether it is a decoder's. tiled: whether it is run in tiles (runtime/tiles.py). norms: its
    group normalizations."""

    which: int
    larger: int
    decodes: bool
    tiled: bool
    norms: int

    def window(self, window: int) -> int:
        """Side of its tiles. window: that of a decoder's."""
        return window if self.decodes else encoder_window(window, self.which)

    def shapes(self, size: tuple[int, int], window: int) -> tuple[list[tuple[int, int]], int]:
        """What it is run at, one after another, for an image of `size` in latents, and how often
        all of that."""
        height, width = (side * self.larger for side in size)
        if not self.tiled:
            return [(height, width)], 1
        return part_shapes((height, width), self.window(window), self._margins, self.norms)

    def largest(self, window: int) -> list[tuple[int, int]]:
        """What it is run at in one pass over an image of several tiles."""
        side = 4 * window if self.decodes else 3 * (self.window(window) - sum(_ENCODER_MARGINS))
        shapes, _ = part_shapes((side, side), self.window(window), self._margins, self.norms)
        return shapes

    @property
    def _margins(self) -> Margins | None:
        return None if self.decodes else _ENCODER_MARGINS


class Networks:
    """The components of a pipeline that is built, traced at any size; each is traced once at one.

    Raises EdgesdError where a component can't be run on shapes alone.
    """

    def __init__(self, spec: ExportSpec) -> None:
        self.pipeline, self.assumed, self.judged_by = spec.pipeline, spec.assumed, spec.judged_by
        self.flow = flow_of(spec.pipeline)
        self._components = {component.name: component for component in spec.components}
        self._traced: dict[tuple[str, Shape, int], Workload] = {}

    def in_fp32(self, component: str, precision: Precision) -> bool:
        """Whether what isn't quantized of a component stays in fp32 on a GPU."""
        upcast = self._components[component].fp32 and precision != "bf16"  # which holds as much
        return precision == "fp32" or upcast

    def trace(self, stage: Stage, shape: Shape, chunks: int = 1) -> Workload:
        """The workload of a stage's component. chunks: of prompts, where it takes any number."""
        return self._trace(stage, self._in_own_unit(stage, shape), chunks)

    def _in_own_unit(self, stage: Stage, shape: Shape) -> Shape:
        height, width, batch = shape
        unit = self.pipeline.latent.scale_factor if stage.role == "encoder" else 1
        return height * unit, width * unit, batch

    def _trace(self, stage: Stage, shape: Shape, chunks: int) -> Workload:
        """The same by a shape in the component's own unit, which is pixels for an encoder."""
        name = stage.component
        key = name, shape, chunks
        if key not in self._traced:
            height, width, batch = shape
            sizes = {"batch": batch, "height": height, "width": width}
            sizes[TOKENS] = chunks * self._chunk_tokens
            self._traced[key] = trace(self._components[name], sizes)
        return self._traced[key]

    @property
    def _chunk_tokens(self) -> int:
        wiring = self.pipeline.wiring
        return max(tokenizer.max_tokens for tokenizer in wiring.tokenizers.values())

    def trace_own(self, stage: Stage) -> Workload:
        """The same at the pipeline's own size."""
        return self.trace(stage, self.own_shape(stage))

    def parts(self, stage: Stage) -> list[AutoencoderPart]:
        """Of a full autoencoder's decoder or encoder, in order."""
        decodes, scale = stage.role == "decoder", self.pipeline.latent.scale_factor
        found = split_workload(self.trace_own(stage))
        return [
            AutoencoderPart(
                which=which,
                larger=1 if decodes else max(1, scale // 2 ** (which + 1)),
                decodes=decodes,
                tiled=(which == len(found) - 1) == decodes,
                norms=sum(op.kind == "group_norm" for op in part.operations),
            )
            for which, part in enumerate(found)
        ]

    def trace_part(self, stage: Stage, part: AutoencoderPart, shape: tuple[int, int]) -> Workload:
        """The workload of a part. shape: height and width in its own unit."""
        scale = 1 if part.decodes else self.pipeline.latent.scale_factor // part.larger
        height, width = (side * scale for side in shape)
        return split_workload(self._trace(stage, (height, width, 1), 1))[part.which]

    def latents(self, width: int, height: int) -> tuple[int, int]:
        """Height and width in latents of an image's in pixels."""
        unit = self.pipeline.latent.scale_factor
        return height // unit, width // unit

    def own_shape(self, stage: Stage) -> Shape:
        """The shape of a component's input at the pipeline's own size: for one image, or the fixed
        batch."""
        shape = self.pipeline.shape
        height, width = self.latents(shape.width, shape.height)
        if stage.role == "modulation":
            return 1, 1, 1 if shape.dynamic else ROWS
        return height, width, shape.batch if stage.per == "step" and not shape.dynamic else 1

    def footprint(self, stage: Stage, form: ComponentForm, at: Iterable[Shape] = ()) -> Footprint:
        """The footprint of a component's graph. at: shapes that matter; () for all that a bundle
        may be run at."""
        shapes = sorted(set(at) or self._shapes(stage))
        parameters = self.trace_own(stage).parameters
        on_gpu = form.lowering.gpu_bytes(parameters, form.schemes, form.fp32)
        runs: dict[int, tuple[int, int]] = {}
        for shape in shapes:
            workload = form.lowered(self.trace(stage, shape))
            takes = memory([workload], form.schemes, form.on_disk)
            touched = takes.activations, takes.workspace
            if on_gpu is not None:
                touched = arena_bytes([workload]) // (1 if form.fp32 else 2), on_gpu[1]
            height, width, batch = shape
            units = 1 if stage.per == "prompt" else height * width * batch
            runs[units] = max(runs.get(units, (0, 0)), touched)
        if on_gpu is not None:
            weights = on_gpu[0] + form.factors
            return Footprint(weights, 0, weights, 0, 0, _sorted(runs))
        # What is unpacked anew lies where other values of the run do later.
        streamed = takes.streamed - min(takes.anew, min(touched[0] for touched in runs.values()))
        tiled = stage.role in ("encoder", "decoder") and any(max(shape) > TILE for shape in shapes)
        return Footprint(
            weights=takes.weights,
            loading=takes.loading,
            streamed=streamed,
            in_file=0 if form.precision == "fp16" else takes.in_file,
            graph=takes.graph,
            runs=_sorted(runs),
            spread=self._spread(stage, form) if tiled else 1.0,
            chunk=self._chunk(stage, form, shapes[0]),
        )

    def _chunk(self, stage: Stage, form: ComponentForm, shape: Shape) -> int:
        """What one further chunk of a prompt takes in a batch of one, at most: at a small size,
        where the embeddings of tokens are a larger part of what is there at a time."""
        inputs = self._components[stage.component].spec.inputs
        if not any(TOKENS in tensor.shape for tensor in inputs):
            return 0
        few, more = (
            memory([form.lowered(self.trace(stage, (*shape[:2], 1), chunks))], form.schemes, 0)
            for chunks in (1, 2)
        )
        traced = more.activations + more.workspace - few.activations - few.workspace
        return max(0, int(_CHUNK_MARGIN * traced))

    def split(
        self, stage: Stage, form: ComponentForm, at: Iterable[Shape] = ()
    ) -> tuple[Footprint, ...]:
        """Of the parts of a full autoencoder's decoder or encoder: those in tiles at each window.
        at: as in `footprint`, of the other one."""
        sizes = sorted({(height, width) for height, width, _ in set(at) or self._shapes(stage)})
        found = []
        for part in self.parts(stage):
            shapes_at = {height * width: [(height, width)] for height, width in sizes}
            if part.tiled:
                shapes_at = {part.window(n) ** 2: part.largest(n) for n in sorted(WINDOWS)}
            found.append(self._part(stage, part, form, shapes_at))
        return tuple(found)

    def _part(
        self,
        stage: Stage,
        part: AutoencoderPart,
        form: ComponentForm,
        shapes_at: Mapping[int, list[tuple[int, int]]],
    ) -> Footprint:
        """shapes_at: by units, what is run one after another."""
        runs = {}
        for units, shapes in shapes_at.items():
            parts = [
                form.lowered(self.trace_part(stage, part, shape), part.tiled) for shape in shapes
            ]
            takes = memory(parts, form.schemes, part_bytes(parts[0], form.schemes))
            runs[units] = takes.activations, takes.workspace
        return Footprint(
            takes.weights, takes.loading, takes.streamed, takes.in_file, takes.graph, _sorted(runs)
        )

    def _shapes(self, stage: Stage) -> list[Shape]:
        """Where a component is traced: a quarter, one, four and sixteen times its own area; and
        at several images at a time. Of a prompt there is one size."""
        height, width, batch = self.own_shape(stage)
        shape = self.pipeline.shape
        if not shape.dynamic or stage.per == "prompt":
            return [(height, width, batch)]
        if stage.role == "modulation":
            return [(1, 1, rows) for rows in (1, 4, ROWS)]
        step = max(1, shape.multiple_of // self.pipeline.latent.scale_factor)
        small = [max(step, n // 2 // step * step) for n in (height, width)]
        found = [(small[0], small[1], 1), *((n * height, n * width, 1) for n in (1, 2, 4))]
        if stage.per == "step":
            found += [(height, width, 2), (height, width, 32)]
        return found

    def _spread(self, stage: Stage, form: ComponentForm) -> float:
        """How much more tiles of several sizes touch, one after another, than the largest."""
        halo = self.pipeline.latent.halo_of(stage.role)
        if halo is None or not self.pipeline.shape.dynamic:
            return 1.0
        sides = [TILE + sum(margins_of(halo)[:n]) for n in (1, 2)]
        tiles = {(h, w): form.lowered(self.trace(stage, (h, w, 1))) for h in sides for w in sides}
        row = [sides[0], sides[1], sides[0]]
        series = [tiles[h, w] for h in row for w in row]
        return max(1.0, arena_bytes(series) / arena_bytes([tiles[sides[1], sides[1]]]))


def _sorted(runs: Mapping[int, tuple[int, int]]) -> tuple[tuple[int, int, int], ...]:
    return tuple((units, *runs[units]) for units in sorted(runs))


def schemes_of(
    manifest: BundleManifest, component: str, layers: Sequence[Layer]
) -> dict[Layer, LayerScheme]:
    """The scheme that each layer of a component has in a bundle; none of those in fp32."""
    if manifest.recipe is None:
        return {}
    written = {la.name: la.scheme for la in manifest.recipe.layers if la.component == component}
    found = {la: written.get(la.name) or written.get(la.module) for la in layers}
    return {
        layer: None if name == "fp16" else parse_scheme(name)
        for layer, name in found.items()
        if name is not None
    }


def planned_slots(workload: Workload, wiring: Wiring, rank: int | None) -> tuple[Slots, int]:
    """The slots that a component's graph gets, at their largest rank, and the values that fill
    them. workload: of its own size."""
    if rank is None or not takes_loras(workload.component, wiring):
        return NO_SLOTS, 0
    found = (op.layer for op in workload.operations if op.layer is not None)
    rows = modulates(workload.component, wiring)
    layers = [layer for layer in dict.fromkeys(found) if has_slot(layer, rows)]
    values = rank * sum(layer.rows + layer.columns for layer in layers)
    return Slots(rank, frozenset(layer.name for layer in layers)), values


def _slots_of(engine: Engine) -> tuple[Slots, int]:
    """The same of a graph that was built."""
    slots = engine.slots
    if slots is None:
        return NO_SLOTS, 0
    values = slots.rank * sum(slot.inputs + slot.outputs for slot in slots.layers)
    return Slots(slots.rank, frozenset(slot.name for slot in slots.layers)), values


def footprinted(
    manifest: BundleManifest, spec: ExportSpec, attention: bool = True
) -> BundleManifest:
    """The manifest of a bundle that was built from `spec`, with what its graphs take. attention:
    in 8 bits, where graphs are for edgesd's own kernels. Raises EdgesdError."""
    networks = Networks(spec)
    engines = dict(manifest.engines)
    for stage in networks.flow.stages:
        engine = engines[stage.component]
        workload = split_joined(networks.trace_own(stage))
        schemes = schemes_of(manifest, stage.component, workload.layers)
        on_disk = manifest.files[f"{stage.component}/weights.bin"].bytes
        lowering = get_lowering(engine.backend)
        for own, field in ((False, "footprint"), (True, "kernels_footprint")):
            if own and engine.kernels is None:
                continue
            fp32 = networks.in_fp32(stage.component, engine.precision)
            slots, filling = _slots_of(engine)
            form = ComponentForm(
                engine.precision,
                lowering,
                schemes,
                on_disk,
                own,
                fp32,
                slots,
                filling,
                attention,
            )
            found: dict[str, object] = {field: networks.footprint(stage, form)}
            if engine.split is not None:
                parts = zip(engine.split.parts, networks.split(stage, form), strict=True)
                found["split"] = split_of(
                    msgspec.structs.replace(part, **{field: footprint}) for part, footprint in parts
                )
            engine = msgspec.structs.replace(engine, **found)
        engines[stage.component] = engine
    return msgspec.structs.replace(manifest, engines=engines)
