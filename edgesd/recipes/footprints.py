"""What a pipeline's graphs take in memory, traced: what `plan` predicts and bundles carry.

Networks are made on shapes alone (export/cost/workload.py); export/cost/costs.py says what a
workload costs. How footprints add up for an image is runtime/footprint.py's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import msgspec

from edgesd.engines.bundle import update_manifest
from edgesd.export.backends import get_lowering
from edgesd.export.backends.base import Lowering
from edgesd.export.cost.arena import arena_bytes
from edgesd.export.cost.costs import memory, part_bytes
from edgesd.export.cost.cpu_lowering import lower_workload
from edgesd.export.cost.workload import Workload, split_workload, trace
from edgesd.export.families import ExportSpec
from edgesd.export.quantize.assign import LayerScheme
from edgesd.export.quantize.layers import Layer
from edgesd.runtime.bundle import open_bundle
from edgesd.runtime.tiles import TILE, WINDOWS, margin_of, tail_shapes
from edgesd.spec.bundle import BundleManifest, Footprint
from edgesd.spec.scheme import Precision, number_format, parse_scheme

Shape = tuple[int, int, int]
"""Height, width and rows of a component's input; height and width in its own unit."""


class Networks:
    """The components of a plan, traced at any size; each is traced once at one."""

    def __init__(self, plan: ExportSpec) -> None:
        self.pipeline = plan.pipeline
        self.components = {component.name: component for component in plan.components}
        self._traced: dict[tuple[str, Shape], Workload] = {}

    def trace(self, name: str, shape: Shape) -> Workload:
        """A component's workload. Raises EdgesdError when it can't be run on shapes alone."""
        if (name, shape) not in self._traced:
            height, width, rows = shape
            sizes = {"batch": rows, "height": height, "width": width}
            made = trace(self.components[name], sizes)
            if shape != self.own_shape(name):
                made = _with_layers_of(self.trace(name, self.own_shape(name)), made)
            self._traced[name, shape] = made
        return self._traced[name, shape]

    def latents(self, width: int, height: int) -> tuple[int, int]:
        """Height and width in latents of an image's in pixels."""
        unit = self.pipeline.latent.scale_factor
        return height // unit, width // unit

    def own_shape(self, name: str) -> Shape:
        """That of the component at the pipeline's own size, of one row."""
        shape = self.pipeline.shape
        if name == "vae_encoder":
            return shape.height, shape.width, 1
        height, width = self.latents(shape.width, shape.height)
        return height, width, 1 if shape.dynamic or name != "unet" else shape.batch

    def footprint(
        self,
        name: str,
        precision: Precision,
        choices: Mapping[Layer, LayerScheme],
        on_disk: int,
        own: bool,
        lowering: Lowering,
        at: Iterable[Shape] = (),
    ) -> Footprint:
        """Of a component's graph. on_disk: bytes of its weights' file. own: for edgesd's own
        kernels. lowering: of the backend. at: shapes that matter; () for all that a bundle may be
        run at."""
        shapes, gpu = set(at) or {*self._shapes(name)}, lowering.weight_bytes
        if name == "text_encoder":
            shapes = {self.own_shape(name)}
        runs: dict[int, tuple[int, int]] = {}
        for shape in sorted(shapes):
            made = lower_workload(self.trace(name, shape), choices, own, own)
            takes = memory([made], choices, on_disk)
            touched = takes.activations, takes.workspace
            if gpu is not None:
                touched = arena_bytes([made]) // (1 if precision == "fp32" else 2), 0
            height, width, rows = shape
            units = 1 if name == "text_encoder" else height * width * rows
            runs[units] = max(runs.get(units, (0, 0)), touched)
        every = tuple((units, *runs[units]) for units in sorted(runs))
        if gpu is not None:
            weights = int(gpu[number_format(precision)] * made.parameters)
            return Footprint(weights, 0, weights, 0, 0, every)
        in_file = 0 if precision == "fp16" else takes.in_file
        tiled = name == "vae_decoder" and any(max(shape) > TILE for shape in shapes)
        spread = self._spread(choices, own) if tiled else 1.0
        return Footprint(
            takes.weights, takes.loading, takes.streamed, in_file, takes.graph, every, spread
        )

    def split(
        self, choices: Mapping[Layer, LayerScheme], own: bool, at: Iterable[Shape] = ()
    ) -> tuple[Footprint, Footprint]:
        """Of a full autoencoder's decoder that is split: its head, and its tail at each window.
        at: as in `footprint`, of the head."""

        def made(shape: Shape, which: int) -> Workload:
            part = split_workload(self.trace("vae_decoder", shape))[which]
            return lower_workload(part, choices, own, own, tail=which == 1)

        found = []
        windows = sorted(WINDOWS)
        tails = [[(h, w, 1) for h, w in tail_shapes(4 * n, 4 * n, n)[0]] for n in windows]
        heads = sorted(set(at) or self._shapes("vae_decoder"))
        for which, series in enumerate(([[shape] for shape in heads], tails)):
            runs = {}
            for index, shapes in enumerate(series):
                parts = [made(shape, which) for shape in shapes]
                takes = memory(parts, choices, part_bytes(parts[0], choices))
                units = windows[index] ** 2 if which else shapes[0][0] * shapes[0][1]
                runs[units] = takes.activations, takes.workspace
            every = tuple((units, *runs[units]) for units in sorted(runs))
            found.append(
                Footprint(
                    takes.weights, takes.loading, takes.streamed, takes.in_file, takes.graph, every
                )
            )
        return found[0], found[1]

    def _shapes(self, name: str) -> list[Shape]:
        """Where a component is traced: a quarter, one, four and sixteen times its own area; and
        at several images at a time."""
        height, width, rows = self.own_shape(name)
        shape = self.pipeline.shape
        if not shape.dynamic:
            return [(height, width, rows)]
        unit = 1 if name == "vae_encoder" else self.pipeline.latent.scale_factor
        step = max(1, shape.multiple_of // unit)
        small = [max(step, n // 2 // step * step) for n in (height, width)]
        found = [(small[0], small[1], 1), *((n * height, n * width, 1) for n in (1, 2, 4))]
        if name == "unet":
            found += [(height, width, 2), (height, width, 32)]
        return found

    def _spread(self, choices: Mapping[Layer, LayerScheme], own: bool) -> float:
        """How much more tiles of several sizes touch, one after another, than the largest."""
        halo = self.pipeline.latent.halo
        if halo is None or not self.pipeline.shape.dynamic:
            return 1.0
        sides = [TILE + n * margin_of(halo) for n in (1, 2)]
        made = {
            (h, w): lower_workload(self.trace("vae_decoder", (h, w, 1)), choices, own, own)
            for h in sides
            for w in sides
        }
        row = [sides[0], sides[1], sides[0]]
        series = [made[h, w] for h in row for w in row]
        return max(1.0, arena_bytes(series) / arena_bytes([made[sides[1], sides[1]]]))


def _with_layers_of(one: Workload, other: Workload) -> Workload:
    """`other` with the layers of the same network at another size: of several rows, a linear of the
    timestep's vector looks like one of many rows."""
    known = {op.layer.name: op.layer for op in one.operations if op.layer is not None}
    return replace(
        other,
        operations=tuple(
            op if op.layer is None else replace(op, layer=known[op.layer.name])
            for op in other.operations
        ),
    )


def choices_of(
    manifest: BundleManifest, component: str, layers: Sequence[Layer]
) -> dict[Layer, LayerScheme]:
    """The scheme that each layer of a component has in a bundle; none of those in fp32."""
    if manifest.recipe is None:
        return {}
    made = {la.name: la.scheme for la in manifest.recipe.layers if la.component == component}
    return {
        layer: None if made[layer.name] == "fp16" else parse_scheme(made[layer.name])
        for layer in layers
        if layer.name in made
    }


def write_footprints(root: Path, plan: ExportSpec) -> None:
    """Let the manifest of the bundle folder `root` say what its graphs take. Raises EdgesdError."""
    manifest = open_bundle(root).manifest
    networks = Networks(plan)
    engines = {}
    for name, engine in manifest.engines.items():
        found: dict[str, object] = {}
        workload = networks.trace(name, networks.own_shape(name))
        choices = choices_of(manifest, name, workload.layers)
        on_disk = manifest.files[f"{name}/weights.bin"].bytes
        lowering = get_lowering(engine.backend)
        split = engine.split
        for own, field in ((False, "footprint"), (True, "kernels_footprint")):
            if own and engine.kernels is None:
                continue
            found[field] = networks.footprint(
                name, engine.precision, choices, on_disk, own, lowering
            )
            if split is not None:
                head, tail = networks.split(choices, own)
                split = msgspec.structs.replace(
                    split,
                    head=msgspec.structs.replace(split.head, **{field: head}),
                    tail=msgspec.structs.replace(split.tail, **{field: tail}),
                )
        engines[name] = msgspec.structs.replace(engine, split=split, **found)
    update_manifest(root, msgspec.structs.replace(manifest, engines=engines))
