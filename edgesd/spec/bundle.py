"""What a bundle is: `bundle.json` and what it holds."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

import msgspec
from msgspec import Meta

from edgesd.spec.base import (
    MOST_DIMS,
    Bytes,
    Count,
    Label,
    Number,
    Pixels,
    RelativePath,
    Sha256,
    Size,
    Spec,
    Text,
    Word,
)
from edgesd.spec.build import BuildRecord
from edgesd.spec.lora import LoraSlots
from edgesd.spec.pipeline import ComponentSpec, PipelineSpec
from edgesd.spec.quality import Quality
from edgesd.spec.scheme import Precision

SCHEMA_VERSION = 11
"""Version of `bundle.json`. A reader refuses a newer one; it is raised on any change of meaning.

2: `recipe` and `quality`, both optional; a file of version 1 is read as one without them. 3: the
same for an engine's `checked`. 4: an engine's `plan`, and `built_for`, which was never set;
`prompter`. 5: an engine's `kernels`, the latents'
`halo`. 6: an engine's `halves`, the latents' `levels`, a recipe's `pooled_attention`. 7: footprints
of engines and of a decoder's head and tail. 8: the pipeline's `wiring`, in the place
of `max_tokens`. 9: inputs filled with ids of the image's sizes. 10: the wiring's `encoder` and
`strengths`, tasks that begin with an image; inputs filled with sums of what sides give, and sizes
such as height/2; the sides that a bundle was built with; the
`middle` and `margins` of an encoder's parts. 11: inputs filled with the guidance scale, with
masks in pixels and latents of control images, the wiring's `cfg` and `modulation`, a tokenizer's
`chunked`, the latents' `patch`, a schedule's `even_sigmas`; the gates that images
were judged by; measures of few bits in what was built.
"""


class Parity(Spec, frozen=True):
    """How far a converted component is from its torch source, on the same inputs.

    max_abs: largest absolute difference over all outputs; rel_rms: RMS of the difference over
    RMS of the source (dimensionless); tolerance: the largest rel_rms that passes the gate.
    """

    max_abs: Number
    rel_rms: Number
    tolerance: Number


class LayerRecipe(Spec, frozen=True, omit_defaults=True):
    """How one layer was quantized. Names are those of the source's modules, below its component.

    kind: conv, linear or embedding. shape: of the source's weight, output channels first.
    scheme: as it is now: "fp16", or a Scheme. method: a method, or "fp16". rank: of its
    branch, at most the scheme's. bytes: its codes, scales and branch on disk. error: RMS of the
    change of the layer's output over RMS of that output, on calibrated inputs (0 if not measured).
    planned_scheme: the one that was planned, where it is another; reason: why it was promoted.
    """

    name: Label
    component: Label
    kind: Label
    shape: Annotated[tuple[Size, ...], Meta(max_length=MOST_DIMS)]
    scheme: Label
    method: Label
    rank: Count
    bytes: Bytes
    error: float
    planned_scheme: Label | None = msgspec.field(name="raised_from", default=None)
    reason: Text | None = None


class CalibrationSpec(Spec, frozen=True):
    """How activations were recorded: in the pipeline's own loop over a file of prompts."""

    prompts: Count
    prompts_sha256: Sha256
    num_inference_steps: Count
    guidance_scale: Number
    scheduler: Word
    height: Pixels
    width: Pixels


class QuantRecipe(Spec, frozen=True):
    """How a pipeline was quantized. name: the scheme asked for, in canonical form.

    simulated: some layer's number format is computed by no engine, but imitated in fp32.
    pooled_attention: the largest self-attention has fewer keys and values
    (export/passes/pooled_attention.py).
    """

    name: Label
    simulated: bool
    layers: tuple[LayerRecipe, ...]
    calibration: CalibrationSpec | None = None
    pooled_attention: bool = False


MOST_MARGIN = 16
"""Of a part's tiles, to one side."""

_Margin = Annotated[int, Meta(ge=0, le=MOST_MARGIN)]


class Footprint(Spec, frozen=True):
    """Bytes that one graph takes in memory, traced when it was built (runtime/footprint.py).

    weights: what stays of them once loaded, mapped or copied; loading: what there is besides while
    they are loaded. streamed: what stays of them in `stream`; in_file: of that, what lies in the
    bundle's file. graph: of the session itself. runs: for growing units (batch times height times
    width of the input) what a run's activations take, and the workspace of edgesd's own kernels.
    spread: how many times as much runs of several sizes take that follow one another. chunk: what
    each further chunk of a prompt takes, for each of the batch (runtime/chunks.py).
    """

    weights: Bytes
    loading: Bytes
    streamed: Bytes
    in_file: Bytes
    graph: Bytes
    runs: Annotated[tuple[tuple[Bytes, Bytes, Bytes], ...], Meta(max_length=64)]
    spread: Annotated[float, Meta(ge=1, le=16)] = 1.0
    chunk: Bytes = 0


class ComponentPart(Spec, frozen=True):
    """A graph of a part of a component, beside the whole one and with the same weights.

    kernels: the same for edgesd's own kernels. weight_bytes: of its weights in their file. spec:
    its inputs and outputs. footprint, kernels_footprint: of the two graphs; None in bundles of a
    schema before 7. margins: of the tiles that it is run in, above (left) and below (right); None
    for a part that isn't, and for a decoder's tail (runtime/tiles.py).
    """

    path: RelativePath
    spec: ComponentSpec
    weight_bytes: Bytes
    kernels: RelativePath | None = None
    footprint: Footprint | None = None
    kernels_footprint: Footprint | None = None
    margins: tuple[_Margin, _Margin] | None = None


class SplitComponent(Spec, frozen=True):
    """A full autoencoder's decoder or encoder in graphs that follow one another.

    head, middle, tail: in this order. Of a decoder, which has no middle, the tail can be run in
    tiles; of an encoder, all but the tail (export/passes/split_autoencoder.py, runtime/tiles.py).
    """

    head: ComponentPart
    tail: ComponentPart
    middle: Annotated[tuple[ComponentPart, ...], Meta(max_length=16)] = ()

    @property
    def parts(self) -> tuple[ComponentPart, ...]:
        """All, in the order in which they run."""
        return self.head, *self.middle, self.tail


def split_of(parts: Iterable[ComponentPart]) -> SplitComponent:
    """The component that `parts` are, at least two."""
    head, *middle, tail = parts
    return SplitComponent(head, tail, tuple(middle))


class Graph(Spec, frozen=True):
    """A component as an ONNX file. Paths are relative to the folder that holds it.

    kernels: the same for edgesd's own kernels, with the same weights. split: see SplitComponent.
    slots: places for LoRAs, of both graphs.
    """

    component: str
    path: str
    precision: Precision
    parity: Parity
    kernels: str | None = None
    split: SplitComponent | None = msgspec.field(name="halves", default=None)
    slots: LoraSlots | None = None


class GraphSet(Spec, frozen=True):
    """All graphs of a pipeline, in the folder `root`, with what else the pipeline needs.

    assets: further files (tokenizer.json, model card, licences), relative to `root`.
    """

    root: str
    pipeline: PipelineSpec
    precision: Precision
    graphs: dict[str, Graph]
    assets: tuple[str, ...]
    licence: Licence
    tools: dict[str, str]
    recipe: QuantRecipe | None = None


class Licence(Spec, frozen=True):
    """Licence of the weights: SPDX-like name as the model card states it, and its files."""

    name: Text
    files: tuple[RelativePath, ...] = ()


class PrompterSpec(Spec, frozen=True):
    """A small language model that turns a short prompt into a prompt. base, adapter: GGUF files,
    relative to the bundle; adapter is None where it is merged. domain: what it was tuned for. form:
    what code makes of its line, with "{}" in it. licence: the base model's name and licence.
    grammar: file of the GBNF grammar of its line; None for any words."""

    base: RelativePath
    adapter: RelativePath | None
    domain: Text
    form: Text
    licence: Text
    grammar: RelativePath | None = None

    @property
    def files(self) -> tuple[str, ...]:
        """Those that are there."""
        return tuple(name for name in (self.base, self.adapter, self.grammar) if name)


class Environment(Spec, frozen=True):
    """Where a TensorRT plan was built, and the only place where it runs.

    module: TensorRT's Python package. sm: the GPU's compute capability. l4t: a Jetson's release.
    """

    module: str
    version: str
    sm: str
    l4t: str | None = None

    def __str__(self) -> str:
        release = f", L4T {self.l4t}" if self.l4t else ""
        return f"{self.module} {self.version}, {self.sm}{release}"


class Engine(Spec, frozen=True):
    """What a runner loads for one component: a graph, and for TensorRT perhaps a plan of it.

    plan: the bundle's file of a plan that was built beforehand, for the one environment `built_for`
    (both or neither). checked: what a compiler made of the graph where it was built, which says
    nothing of the board: "built for sm_86 by ...". kernels: the same graph for edgesd's own kernels
    (runtime/kernels.py), taken where they can be used; it refers to the same weights. split: see
    SplitComponent. footprint, kernels_footprint: of the two graphs, where known (a schema from 7
    on). slots: places for LoRAs in all of them (a schema from 10 on).
    """

    component: Word
    path: RelativePath
    backend: Word
    precision: Precision
    parity: Parity
    built_for: Environment | None = None
    plan: RelativePath | None = None
    checked: Text | None = None
    kernels: RelativePath | None = None
    split: SplitComponent | None = msgspec.field(name="halves", default=None)
    footprint: Footprint | None = None
    kernels_footprint: Footprint | None = None
    slots: LoraSlots | None = None


class FileEntry(Spec, frozen=True):
    """One file of a bundle."""

    bytes: Bytes
    sha256: Sha256


class BundleManifest(Spec, frozen=True):
    """bundle.json: everything a board must know before it loads a byte of weights.

    build: how it was built (a schema from 8 on); no board needs it.
    """

    schema_version: Size
    name: Annotated[str, Meta(min_length=1, max_length=1000)]
    target: Word
    arch: Word
    backend: Word
    precision: Precision
    pipeline: PipelineSpec
    engines: dict[Word, Engine]
    licence: Licence
    tools: dict[Text, Text]
    files: dict[str, FileEntry]
    recipe: QuantRecipe | None = None
    quality: Quality | None = None
    prompter: PrompterSpec | None = None
    build: BuildRecord | None = None
