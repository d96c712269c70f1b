"""What drawing takes in memory: one estimate for `plan`, `build` and the pipeline itself.

A Footprint tells of one graph what it takes (spec.Footprint); these functions add graphs up for a
memory mode, a size, a number of images at a time and the denoiser's rows. All figures are bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from edgesd.runtime.memory import MemoryMode
from edgesd.runtime.tiles import MARGIN, TILE, margin_of, tiles_of
from edgesd.spec.bundle import Footprint
from edgesd.spec.pipeline import ComponentSpec, LatentSpec

_COPIES = 5
"""Of an image's values in fp32, from the decoder's output to bytes."""

_TEXT_COPIES = 10
"""Of a prompt's embedding, both halves of guidance (measured with 16 images at a time)."""

_MARGIN = 0.13
"""What estimates were too low by at most, as a part of what drawing adds to the process."""


@dataclass(frozen=True)
class Drawing:
    """What is generated at a time. height, width: of the latents; scale: pixels of a latent; count:
    images; rows: of the denoiser's runs; text_values: of one prompt's embedding; previews:
    whether unfinished images are decoded, while the denoiser is loaded."""

    height: int
    width: int
    scale: int
    count: int = 1
    rows: int = 1
    text_values: int = 0
    previews: bool = False

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
    """A component as one drawing takes it. resident: while it is loaded and computes, without the
    process. in_file: of that, what lies in the bundle's file and can be read again from there, so
    that the system may take it back. loaded: what stays when it doesn't compute; workspace: of
    its kernels, which components share one after another."""

    resident: int
    in_file: int = 0
    loaded: int = 0
    workspace: int = 0


@dataclass(frozen=True)
class Need:
    """resident: peak of the process, mapped files included (VmHWM). held: of that, what can't be
    taken back. parts: peaks while each component is there, the process included."""

    resident: int
    held: int
    parts: Mapping[str, int]


def computing(footprint: Footprint, units: int) -> tuple[int, int]:
    """Activations and workspace of a run of `units`: rows times height times width of the input.

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


def decoder(footprint: Footprint, drawing: Drawing, mode: MemoryMode, margin: int | None) -> Part:
    """A decoder, in tiles where weights are streamed and it has a margin (AutoencoderTiny)."""
    behind = _COPIES * drawing.image_bytes
    height, width = drawing.height, drawing.width
    if mode != "stream" or margin is None:
        return whole(footprint, height * width, mode, behind)
    sides = [[t.last - t.first for t in tiles_of(n, TILE, margin)] for n in (height, width)]
    several = any(len(set(side)) > 1 for side in sides)
    return whole(footprint, max(sides[0]) * max(sides[1]), mode, behind, several)


def decoder_in_parts(
    head: Footprint, tail: Footprint, drawing: Drawing, features: int, window: int
) -> Part:
    """A full autoencoder's decoder that is streamed (runtime/tiles.py): one part is there at a
    time. features: bytes of what the head makes of one latent; window: side of a tile."""
    height, width = drawing.height, drawing.width
    first = whole(head, height * width, "stream", features * height * width)
    tile = min(height, window) * min(width, window)
    behind = _COPIES * drawing.image_bytes + features * height * width
    several = max(height, width) > window - 2 * MARGIN
    second = whole(tail, tile, "stream", behind, several)
    return max(first, second, key=lambda part: part.resident)


def with_margin(estimate: int, process: int) -> int:
    """What a drawing surely stays below: for limits that must hold."""
    return estimate + int(_MARGIN * max(0, estimate - process))


def drawing_need(
    latent: LatentSpec,
    footprints: Mapping[str, Footprint],
    split: tuple[Footprint, Footprint] | None,
    process: int,
    mode: MemoryMode,
    drawing: Drawing,
    tiled: bool,
    window: int,
) -> Need:
    """A drawing by a text encoder, a UNet and a decoder. split: of the decoder, where it is run in
    them. tiled: whether the decoder takes tiles of any size. process, window: as in `together` and
    `decoder_in_parts`."""
    parts = {
        "text_encoder": whole(footprints["text_encoder"], 1, mode),
        "unet": whole(footprints["unet"], drawing.height * drawing.width * drawing.rows, mode),
    }
    if mode == "stream" and split is not None:
        features = 4 * (latent.levels or (0,))[0]
        parts["vae_decoder"] = decoder_in_parts(*split, drawing, features, window)
    else:
        margin = margin_of(latent.halo) if tiled and latent.halo is not None else None
        parts["vae_decoder"] = decoder(footprints["vae_decoder"], drawing, mode, margin)
    return together(parts, process, mode, drawing)


def text_values(text_encoder: ComponentSpec) -> int:
    """Values of one prompt's embedding."""
    return math.prod(n for n in text_encoder.outputs[0].shape if isinstance(n, int))


def together(parts: Mapping[str, Part], process: int, mode: MemoryMode, drawing: Drawing) -> Need:
    """The whole drawing. parts: text encoder, denoiser and decoder, in order of their runs.
    process: what the process takes without any component."""
    base = process + drawing.kept_bytes
    alone = {name: base + part.resident for name, part in parts.items()}
    if mode == "fast":
        loaded = sum(part.loaded for part in parts.values())
        peak = base + loaded + max(part.workspace for part in parts.values())
        peak = max(peak, *alone.values())
        return Need(peak, peak, alone)
    if drawing.previews:
        _, denoiser, last = parts  # names
        alone[last] += parts[denoiser].resident
    held = {name: alone[name] - part.in_file for name, part in parts.items()}
    return Need(max(alone.values()), max(held.values()), alone)
