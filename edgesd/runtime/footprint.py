"""Estimates the memory of generating images, for `plan`, `build`, `deploy` and `generate`.

A Footprint is the memory of one graph (spec.bundle.Footprint); `Costs` adds graphs up for a memory
mode, a size, a number of images at a time and the denoiser's batch. All figures are bytes.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from edgesd.runtime.flow import Stage, flow_of
from edgesd.runtime.memory import MemoryMode
from edgesd.runtime.modulation import ROWS
from edgesd.runtime.tiles import (
    DECODER_MARGINS,
    TILE,
    WINDOWS,
    encoder_window,
    margins_of,
    tiles_of,
)
from edgesd.spec.bundle import Footprint
from edgesd.spec.pipeline import PipelineSpec

PROCESS_BYTES = 76 << 20
"""Python with ONNX Runtime and one small session (measured on x86-64; profile measures it)."""

PROGRAM_BYTES = 14 << 20
"""What `edgesd generate` loads besides: Click, Pillow, the board's description."""

HEADROOM_BYTES = 64 << 20
"""Left for other programs where a mode is chosen by free memory."""

_PROMPTER_BYTES = 80 << 20
"""Of a prompter's process, besides its files (measured: 72 MB)."""

_COPIES = 5
"""Of an image's values in fp32, from the decoder's output to bytes, or to the encoder's input."""

_AUTOENCODERS = ("encoder", "decoder")
"""Roles of stages that can be run in parts or tiles."""

_TEXT_COPIES = 5
"""Of each prompt's embedding (measured with 16 images at a time)."""

_MARGIN = 0.13
"""Largest error of estimates that were too low, relative to what generating adds to the process."""


@dataclass(frozen=True)
class Generation:
    """Sizes that the memory of generating depends on. height, width: of the latents; scale: pixels
    of a latent; count: images; batch: of the denoiser; text_values: of an image's embeddings;
    previews: whether unfinished images are decoded, while the denoiser is loaded; chunks: of
    tokens, that a prompt has; encodes: whether images are encoded first; sides: side components
    that run; picture_bytes: while pictures are read, and images are laid over them; rows: that a
    modulation makes."""

    height: int
    width: int
    scale: int
    count: int = 1
    batch: int = 1
    text_values: int = 0
    previews: bool = False
    chunks: int = 1
    encodes: bool = False
    sides: frozenset[str] = frozenset()
    picture_bytes: int = 0
    rows: int = 1

    @property
    def image_bytes(self) -> int:
        """Of one image's values in fp32."""
        return 4 * 3 * self.height * self.width * self.scale**2

    @property
    def kept_bytes(self) -> int:
        """Of what is kept of all images: embeddings with and without the prompt, joined and
        copied for each run; images of 8 bits."""
        return self.count * (_TEXT_COPIES * 4 * self.text_values + self.image_bytes // 4)


@dataclass(frozen=True)
class Part:
    """Memory of one component. resident: while it is loaded and computes, without
    the process. in_file: of that, what lies in the bundle's file and can be read again from there,
    so that the system may take it back. loaded: what stays when it doesn't compute; workspace: of
    its kernels, which components share one after another."""

    resident: int
    in_file: int = 0
    loaded: int = 0
    workspace: int = 0


@dataclass(frozen=True)
class Need:
    """resident: peak of the process, mapped files included (VmHWM). held: of that, what can't be
    taken back. parts: peaks while each component is there, the process included. together:
    components that are there at once."""

    resident: int
    held: int
    parts: Mapping[str, int]
    together: tuple[tuple[str, ...], ...]


def computing(footprint: Footprint, units: int) -> tuple[int, int]:
    """Activations and workspace of a run of `units`: batch times height times width of the input.

    Between sizes that were traced in proportion; beyond, as of the largest.
    """
    found = []
    for place in (1, 2):
        below, most = (0, 0), 0
        for run in footprint.runs:
            most = max(most, run[place])  # a run never touches less than a smaller one
            if units <= run[0]:
                part = (units - below[0]) / max(1, run[0] - below[0])
                # What is smaller than the smallest one takes as much, at most.
                found.append(int(below[1] + part * (most - below[1])) if below[0] else most)
                break
            below = run[0], most
        else:
            found.append(-(-most * units // below[0]) if below[0] else 0)
    return found[0], found[1]


def whole(
    footprint: Footprint, units: int, mode: MemoryMode, behind: int = 0, spread: bool = False
) -> Part:
    """A component that is run at `units`. behind: what is made of its output meanwhile. spread:
    whether runs of several sizes follow one another."""
    activations, workspace = computing(footprint, units)
    activations = int(activations * (footprint.spread if spread else 1)) + behind
    streamed = mode == "stream"
    weights = footprint.streamed if streamed else footprint.weights
    loaded = footprint.graph + weights + activations
    resident = footprint.graph + weights + max(footprint.loading, activations + workspace)
    return Part(resident, footprint.in_file if streamed else 0, loaded, workspace)


def tile_sides(size: int, halo: int) -> list[int]:
    """Sides of an AutoencoderTiny's tiles, in latents, along `size`, with their margins."""
    return [tile.last - tile.first for tile in tiles_of(size, TILE, margins_of(halo))]


def autoencoder_in_tiles(footprint: Footprint, generation: Generation, halo: int) -> Part:
    """An AutoencoderTiny's decoder or encoder, weights streamed."""
    sides = [tile_sides(n, halo) for n in (generation.height, generation.width)]
    several = any(len(set(side)) > 1 for side in sides)
    units, behind = max(sides[0]) * max(sides[1]), _COPIES * generation.image_bytes
    return whole(footprint, units, "stream", behind, several)


def decoder_in_parts(
    head: Footprint, tail: Footprint, generation: Generation, features: int, window: int
) -> Part:
    """A full autoencoder's decoder that is streamed (runtime/tiles.py): one part is there at a
    time. features: bytes of what the head makes of one latent; window: side of a tile."""
    height, width = generation.height, generation.width
    first = whole(head, height * width, "stream", features * height * width)
    tile = min(height, window) * min(width, window)
    behind = _COPIES * generation.image_bytes + features * height * width
    several = max(height, width) > window - sum(DECODER_MARGINS)
    second = whole(tail, tile, "stream", behind, several)
    return max(first, second, key=lambda part: part.resident)


def encoder_in_parts(
    parts: Sequence[Footprint], generation: Generation, levels: Sequence[int], window: int
) -> Part:
    """A full autoencoder's encoder that is streamed (runtime/tiles.py): one part is there at a
    time, with what it takes and makes. levels: channels, of the last part first. window: as of the
    decoder."""
    image, area = _COPIES * generation.image_bytes, generation.height * generation.width
    found, taken = [], 0
    for index, footprint in enumerate(parts[:-1]):
        larger = 2 ** (len(parts) - 2 - index)  # than the latents is what the part makes
        most = encoder_window(window, index)
        tall, wide = (min(larger * n, most) for n in (generation.height, generation.width))
        made = 4 * levels[max(0, len(levels) - 1 - index)] * area * larger**2
        found.append(whole(footprint, tall * wide, "stream", image + taken + made))
        taken = made
    found.append(whole(parts[-1], area, "stream", image + taken))
    return max(found, key=lambda part: part.resident)


def with_margin(estimate: int, process: int) -> int:
    """An upper bound of the memory of generating, for limits that must hold."""
    return estimate + int(_MARGIN * max(0, estimate - process))


def prompter_bytes(file_sizes: Iterable[int]) -> int:
    """Memory of a prompter's process, about. It ends before any network is loaded."""
    return _PROMPTER_BYTES + sum(file_sizes)


def text_values(pipeline: PipelineSpec) -> int:
    """Values of one prompt's embeddings."""
    shapes = (
        tensor.shape
        for stage in flow_of(pipeline).texts
        for tensor in pipeline.components[stage.component].outputs
    )
    return sum(math.prod(n for n in shape if isinstance(n, int)) for shape in shapes)


def modulation_bytes(pipeline: PipelineSpec) -> int:
    """Of what a modulation makes for one step, of one half of guidance and one image."""
    modulation = pipeline.wiring.modulation
    made = modulation and pipeline.components[modulation.component].output(modulation.output)
    width = made.shape[-1] if made else 0
    return 4 * width if isinstance(width, int) else 0


@dataclass(frozen=True)
class Costs:
    """What the networks of a pipeline take. footprints: by component. splits: of the parts of an
    autoencoder that can be run so, by component. process: bytes of the process without any
    component."""

    pipeline: PipelineSpec
    footprints: Mapping[str, Footprint]
    splits: Mapping[str, tuple[Footprint, ...]]
    process: int

    def need(
        self,
        mode: MemoryMode,
        generation: Generation,
        window: int = max(WINDOWS),
        tiled: frozenset[str] | None = None,
    ) -> Need:
        """Memory of generating in a mode. window: side in latents of a decoder's tiles. tiled: one
        of `tilings`; None: the one that needs least."""
        tiled = self.tilings(mode, generation)[-1] if tiled is None else tiled
        groups = [
            {
                stage.component: self._in_tiles(stage, generation, window)
                if stage.component in tiled
                else self._whole(stage, mode, generation)
                for stage in group
            }
            for group in self._groups(generation)
        ]
        base, reading = self.process + generation.kept_bytes, generation.picture_bytes
        base += generation.rows * modulation_bytes(self.pipeline)
        return together(groups, base, mode, generation.previews, reading)

    def loaded(self, components: Iterable[str], streamed: bool) -> int:
        """Memory of components once they are loaded: their weights, at least."""
        found = [self.footprints[name] for name in components if name in self.footprints]
        return sum(each.graph + (each.streamed if streamed else each.weights) for each in found)

    def tilings(self, mode: MemoryMode, generation: Generation) -> list[frozenset[str]]:
        """Which components run in parts or tiles, with weights streamed: sets of which one may be
        taken, the fastest first and what needs least last. In `stream` all that can; in `balanced`
        none, or those that would take more memory than all others; in `fast` none."""
        none, able = frozenset[str](), self.tileable
        if mode != "balanced":
            return [able if mode == "stream" else none]
        parts = [
            {stage.component: self._whole(stage, mode, generation) for stage in group}
            for group in self._groups(generation)
        ]
        others = max(_at_once(group.values()) for group in parts if not able & group.keys())
        large = frozenset(
            name
            for group in parts
            for name, part in group.items()
            if name in able and part.resident > others
        )
        return [none, large] if large else [none]

    @property
    def tileable(self) -> frozenset[str]:
        """Components that can be run in parts or tiles."""
        return frozenset(
            stage.component
            for stage in flow_of(self.pipeline).stages
            if stage.component in self.splits or halo_of(self.pipeline, stage) is not None
        )

    def _groups(self, generation: Generation) -> list[list[Stage]]:
        """The groups of the flow, of the stages that run."""
        flow = flow_of(self.pipeline)
        groups = [
            [
                stage
                for stage in group
                if stage.role != "side" or stage.component in generation.sides
            ]
            for group in flow.groups
            if generation.encodes or flow.encoder not in group
        ]
        return [group for group in groups if group]

    def _whole(self, stage: Stage, mode: MemoryMode, generation: Generation) -> Part:
        footprint = self.footprints[stage.component]
        if stage.role in _AUTOENCODERS:
            behind = _COPIES * generation.image_bytes
        else:
            further = (generation.chunks - 1) * generation.batch if stage.per == "step" else 0
            behind = further * footprint.chunk
        return whole(footprint, units_of(stage, generation), mode, behind)

    def _in_tiles(self, stage: Stage, generation: Generation, window: int) -> Part:
        levels = self.pipeline.latent.levels or (0,)
        parts = self.splits.get(stage.component)
        if parts is None:
            halo = halo_of(self.pipeline, stage) or 0
            return autoencoder_in_tiles(self.footprints[stage.component], generation, halo)
        if stage.role == "decoder":
            return decoder_in_parts(parts[0], parts[-1], generation, 4 * levels[0], window)
        return encoder_in_parts(parts, generation, levels, window)


def halo_of(pipeline: PipelineSpec, stage: Stage) -> int | None:
    """Of an AutoencoderTiny's decoder or encoder that can be run in tiles; None of others."""
    return pipeline.latent.halo_of(stage.role) if pipeline.shape.dynamic else None


def units_of(stage: Stage, generation: Generation) -> int:
    """Units of one run of a stage, for `computing`; 1 for a prompt, rows of a modulation."""
    if stage.per == "prompt":
        return 1
    if stage.role == "modulation":
        return min(generation.rows, ROWS)
    batch = generation.batch if stage.per == "step" else 1
    return generation.height * generation.width * batch


def together(
    groups: Sequence[Mapping[str, Part]],
    base: int,
    mode: MemoryMode,
    previews: bool = False,
    reading: int = 0,
) -> Need:
    """All components together. groups: those that are loaded together, in order of their
    runs. base: of the process without any. previews: whether the last group also runs
    beside the one before it, on unfinished images. reading: while pictures are read, which is
    beside networks only where these stay loaded."""
    if mode == "fast":
        parts = {name: part for group in groups for name, part in group.items()}
        peak = base + _at_once([*parts.values(), Part(reading, workspace=reading)])
        alone = {name: base + part.resident for name, part in parts.items()}
        return Need(peak, peak, alone, (tuple(parts),))
    peaks = [base + _at_once(group.values()) for group in groups]
    names = [tuple(group) for group in groups]
    if previews:
        peaks[-1] += _at_once(groups[-2].values())
        names[-2:] = [names[-2] + names[-1]]
    held = [
        peak - sum(part.in_file for part in group.values())
        for peak, group in zip(peaks, groups, strict=True)
    ]
    alone = {name: peak for peak, group in zip(peaks, groups, strict=True) for name in group}
    if previews:
        alone |= dict.fromkeys(groups[-2], peaks[-1])
    read = base + reading
    return Need(max(*peaks, read), max(*held, read), alone, tuple(names))


def _at_once(parts: Collection[Part]) -> int:
    """Memory of parts that are loaded together, and run one after another."""
    loaded = sum(part.loaded for part in parts) + max(part.workspace for part in parts)
    return max(loaded, *(part.resident for part in parts))
