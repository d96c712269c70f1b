"""The value types that travel between rooms. No heavy import: this runs on every board.

All are frozen and compare by value. What is written to disk (`BundleManifest` and all below
it) decodes strictly: an unknown or missing field is an error.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from edgesd.errors import InputError, UsageError, unknown_name

SCHEMA_VERSION = 7
"""Version of `bundle.json`. A reader refuses a newer one; it is raised on any change of meaning.

2: `recipe` and `quality`, both optional; a file of version 1 is read as one without them. 3: the
same for an engine's `checked`. 4: an engine's `plan`, and `built_for`, which was never set;
`prompter`. 5: an engine's `kernels`, the latents'
`halo`. 6: an engine's `halves`, the latents' `levels`, a recipe's `pooled_attention`. 7: footprints
of engines and halves.
"""

Precision = str
"""fp32, fp16, or a quantization scheme in canonical form: w4a8-g64-lr32 (`parse_scheme`)."""
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "w8a16", "w8a8", "w4a16", "w4a8", "w4a4")
"""The number formats, without group and rank."""

TENSORRT_PRECISIONS: tuple[Precision, ...] = PRECISIONS[:-1]
"""Those that TensorRT has: w4a4 is only simulated."""

# What a decoded spec may say. Files that specs are read from may come from anywhere.

_SHA256 = r"\A[0-9a-f]{64}\Z"
_PATH = r"\A(?!/)(?!.*(?:\A|/)\.{0,2}(?:/|\Z))[^\x00-\x1f\x7f\\]{1,200}\Z"
_WORD = r"\A[A-Za-z0-9][A-Za-z0-9._+-]{0,63}\Z"
_LABEL = r"\A[^\x00-\x1f\x7f]{1,200}\Z"
_DTYPE = r"\A(?:float16|float32|float64|u?int(?:8|16|32|64)|bool)\Z"
_PATTERNS = {
    _SHA256: "a SHA-256 in 64 hexadecimal digits",
    _PATH: "a safe path: relative, without .. or control characters",
    _WORD: "one word",
    _LABEL: "a name without control characters",
    _DTYPE: "a number type",
}

Sha256 = Annotated[str, Meta(pattern=_SHA256)]
"""64 hexadecimal digits in lower case: also safe as a file name."""
RelativePath = Annotated[str, Meta(pattern=_PATH)]
"""A file below some folder, with forward slashes: it can't lead out of there by its name."""
Word = Annotated[str, Meta(pattern=_WORD)]
"""A name of a target, an architecture, a backend, a component."""
Label = Annotated[str, Meta(pattern=_LABEL)]
Text = Annotated[str, Meta(max_length=10_000)]
"""For people. Whoever prints it cleans it."""
Bytes = Annotated[int, Meta(ge=0, le=1 << 50)]
Count = Annotated[int, Meta(ge=0, le=(1 << 31) - 1)]
Size = Annotated[int, Meta(ge=1, le=(1 << 31) - 1)]
Pixels = Annotated[int, Meta(ge=1, le=1 << 14)]
Number = Annotated[float, Meta(ge=-1e15, le=1e15)]

_MOST_DIMS, _MOST_TENSORS = 8, 64
_MOST_CONFIG = 100_000
"""Values in a scheduler's configuration; trained_betas has one for each training timestep."""

Dim = Size | Label
"""A fixed size, or the name of a symbolic one: batch, height, width (in the tensor's own unit)."""


class Spec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=False):
    """Base of all specs: immutable, strict when decoded: types, ranges, and names that are used as
    paths."""


_T = TypeVar("_T")


def decode_json(raw: bytes | str, kind: type[_T]) -> _T:
    """`raw` as a value of `kind`. Whatever it is, what is raised is an InputError with one line
    that says what is wrong, and where."""
    try:
        return msgspec.json.decode(raw, type=kind)
    except (msgspec.MsgspecError, UnicodeError) as exc:
        words = " ".join(str(exc).split())
        for pattern, meaning in _PATTERNS.items():
            words = words.replace(f"`str` matching regex {pattern!r}", meaning)
        raise InputError(words) from exc
    except RecursionError as exc:
        raise InputError("it is nested too deeply") from exc


def check_ranges(spec: Spec) -> None:
    """Raise InputError when a spec that was made here says what no decoded one may say."""
    decode_json(msgspec.json.encode(spec), type(spec))


def is_sha256(text: str) -> bool:
    """Whether `text` is a Sha256."""
    return re.match(_SHA256, text) is not None


def is_relative_path(text: str) -> bool:
    """Whether `text` is a RelativePath."""
    return re.match(_PATH, text) is not None


def is_file_name(text: str) -> bool:
    """Whether `text` names a file in a folder, and nothing below or outside it."""
    return is_relative_path(text) and "/" not in text


class Scheme(Spec, frozen=True):
    """How the weights and activations of a layer are represented: wXaY[-gN][-lrR].

    weight_bits: 8 (a scale per output channel) or 4 (a scale per `group` values of K, the reduced
    dimension). activation_bits: 16 leaves activations in floating point. group: 0 for none; with
    activation_bits 4, activations too get a scale per group. rank: of the 16-bit low-rank branch,
    at most; 0 for none.
    """

    weight_bits: int
    activation_bits: int
    group: int = 0
    rank: int = 0

    def __str__(self) -> str:
        group = f"-g{self.group}" if self.group else ""
        rank = f"-lr{self.rank}" if self.rank else ""
        return f"w{self.weight_bits}a{self.activation_bits}{group}{rank}"

    @property
    def simulated(self) -> bool:
        """Whether no engine computes in this format: the picture is right, speed and RAM aren't."""
        return self.activation_bits == 4


METHODS = ("rtn", "gptq", "svdquant")
"""Quantization methods. rtn: round to nearest. gptq: GPTQ codes, plain branch. svdquant: smoothing,
fitted branch."""

PAIR_FORMATS = ("captions", "templates", "coco", "mjhq", "sdci", "emoji")
"""Files that pairs of a wish and a prompt are made from (export.prompter.sources)."""

MERGED_TYPES = ("Q4_0", "Q4_1", "Q4_K_M", "Q8_0", "F16")
"""llama.cpp's types that a prompter's model and adapter may be merged into."""

ADAPTER_STARTS = ("default", "loftq", "loftq-gguf", "loftq-gguf-control", "pissa")
"""What a prompter's adapter is before it is trained (export.prompter.starts)."""

GRIDS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
"""llama.cpp's types that the package gguf can round to: loftq-gguf's for the base."""

OPTIMIZERS = ("adamw", "galore", "galore8bit", "apollo")
"""For a prompter's training of all weights (export.prompter.optimizers)."""

GROUPS = (16, 32, 64, 128, 256)
MAX_RANK = 512
_SCHEME = re.compile(r"w(8|4)a(16|8|4)(?:-g([1-9][0-9]{0,3}))?(?:-lr([1-9][0-9]{0,3}))?")
_EXAMPLES = ("w8a8", "w8a16", "w4a16-g64", "w4a8-g64", "w4a4-g64", "w4a8-g64-lr32")
_SCHEMES = ", ".join(_EXAMPLES)


def parse_scheme(name: str) -> Scheme:
    """`name` as a Scheme. Raises UsageError, naming what is valid, for anything but a scheme."""
    match = _SCHEME.fullmatch(name)
    if not match:
        raise UsageError(unknown_name("precision", name, ("fp32", "fp16", *_EXAMPLES)))
    weights, activations, group, rank = (int(part or 0) for part in match.groups())
    if weights == 8 and (group or activations == 4):
        raise UsageError(
            f"{name}: 8-bit weights have a scale per channel and no group, and go with 8- or "
            f"16-bit activations: valid are {_SCHEMES}"
        )
    if weights == 4 and group not in GROUPS:
        valid = ", ".join(f"-g{size}" for size in GROUPS)
        raise UsageError(f"{name}: 4-bit weights need a group: {valid} (w4a{activations}-g64)")
    if rank > MAX_RANK:
        raise UsageError(f"{name}: the rank must be from 1 to {MAX_RANK}")
    return Scheme(weights, activations, group, rank)


def number_format(precision: Precision) -> str:
    """The member of PRECISIONS that `precision` belongs to: w4a8 for w4a8-g64-lr32.

    Raises UsageError for a name that is no precision.
    """
    if precision in ("fp32", "fp16"):
        return precision
    scheme = parse_scheme(precision)
    return f"w{scheme.weight_bits}a{scheme.activation_bits}"


class TensorSpec(Spec, frozen=True):
    """One input or output of a component. `dtype` is numpy's name (float32, int64 ...)."""

    name: Label
    dtype: Annotated[str, Meta(pattern=_DTYPE)]
    shape: Annotated[tuple[Dim, ...], Meta(max_length=_MOST_DIMS)]


class ComponentSpec(Spec, frozen=True):
    """One network of a pipeline: text_encoder, unet, vae_encoder, vae_decoder ..."""

    name: Label
    inputs: Annotated[tuple[TensorSpec, ...], Meta(max_length=_MOST_TENSORS)]
    outputs: Annotated[tuple[TensorSpec, ...], Meta(max_length=_MOST_TENSORS)]

    def input(self, name: str) -> TensorSpec | None:
        """The input called `name`, or None."""
        return next((t for t in self.inputs if t.name == name), None)


class SchedulerSpec(Spec, frozen=True):
    """A noise schedule: our name for the sampler, and diffusers' scheduler_config.json."""

    name: Word
    config: dict[str, Any]

    def __post_init__(self) -> None:
        """Refuse what no scheduler's configuration holds: when decoded, as an invalid value."""
        count, left = 0, [*self.config.items()]
        while left:
            name, value = left.pop()
            count += 1
            if isinstance(value, dict):
                left += value.items()
            elif isinstance(value, (list, tuple)):
                left += ((name, one) for one in value)
            if (
                count > _MOST_CONFIG
                or (isinstance(value, int) and abs(value) > 1 << 53)
                or (isinstance(value, str) and len(value) > 1000)
            ):
                raise ValueError(f"{name!r} of the scheduler is larger than any is")


class LatentSpec(Spec, frozen=True):
    """How latents relate to pictures: [B, channels, H / scale_factor, W / scale_factor].

    latents = (encoded - shift_factor) * scaling_factor, as in diffusers' AutoencoderKL. halo: how
    far off, in latent pixels, a latent still changes a pixel; None where every one changes all.
    levels: channels of a full autoencoder's decoder, coarsest level first; None for others, and in
    bundles of a schema before 6.
    """

    channels: Annotated[int, Meta(ge=1, le=1024)]
    scale_factor: Annotated[int, Meta(ge=1, le=256)]
    scaling_factor: Annotated[float, Meta(gt=0, le=1e6)]
    shift_factor: Annotated[float, Meta(ge=-1e6, le=1e6)] = 0.0
    halo: Annotated[int, Meta(ge=0, le=4096)] | None = None
    levels: (
        Annotated[
            tuple[Annotated[int, Meta(ge=1, le=1 << 16)], ...], Meta(min_length=1, max_length=8)
        ]
        | None
    ) = None


class ShapeSpec(Spec, frozen=True):
    """Picture sizes in pixels that the graphs accept.

    dynamic: any multiple of `multiple_of`, height and width being the default, and up to `batch`
    rows of the denoiser. Otherwise this size only, and exactly `batch` rows.
    """

    height: Pixels
    width: Pixels
    batch: Annotated[int, Meta(ge=1, le=4096)]
    dynamic: bool
    multiple_of: Pixels


def nearest_multiple(value: int, step: int) -> int:
    """The multiple of `step` that is nearest to `value`, at least `step`."""
    return max(step, round(value / step) * step)


def check_multiple(what: str, value: int, step: int, built_step: int | None = None) -> None:
    """Raise UsageError, with the nearest valid one, for a size that is no multiple of `step`.

    built_step: what a size must be a multiple of for a bundle that is built for it alone.
    """
    if value <= 0 or value % step:
        near = nearest_multiple(value, step)
        message = f"{what} {value} isn't a multiple of {step}: the nearest is {near}"
        if built_step and built_step < step and value > 0 and value % built_step == 0:
            message += "; a bundle of this size alone can be built: edgesd build --size"
        raise UsageError(message)


class PipelineSpec(Spec, frozen=True):
    """What a pipeline is, whatever the precision or backend of its graphs."""

    family: Word
    source: Text
    source_sha256: Sha256
    components: dict[Word, ComponentSpec]
    scheduler: SchedulerSpec
    latent: LatentSpec
    shape: ShapeSpec
    max_tokens: Annotated[int, Meta(ge=2, le=1 << 16)]
    num_inference_steps: Annotated[int, Meta(ge=1, le=_MOST_CONFIG)]
    guidance_scale: Annotated[float, Meta(ge=-1000, le=1000)]


class Parity(Spec, frozen=True):
    """How far a converted component is from its torch source, on the same inputs.

    max_abs: largest absolute difference over all outputs; rel_rms: RMS of the difference over
    RMS of the source (dimensionless); tolerance: the largest rel_rms that passes the gate.
    """

    max_abs: Number
    rel_rms: Number
    tolerance: Number


class LayerRecipe(Spec, frozen=True, omit_defaults=True):
    """What became of one layer. Names are those of the source's modules, below its component.

    kind: conv, linear or embedding. shape: of the source's weight, output channels first.
    scheme: as it is now: "fp16", or a Scheme. method: one of METHODS, or "fp16". rank: of its
    branch, at most the scheme's. bytes: its codes, scales and branch on disk. error: RMS of the
    change of the layer's output over RMS of that output, on calibrated inputs (0 if not measured).
    raised_from: the scheme that was planned, where it is another; reason: why it was raised.
    """

    name: Label
    component: Label
    kind: Label
    shape: Annotated[tuple[Size, ...], Meta(max_length=_MOST_DIMS)]
    scheme: Label
    method: Label
    rank: Count
    bytes: Bytes
    error: float
    raised_from: Label | None = None
    reason: Text | None = None


class CalibrationSpec(Spec, frozen=True):
    """What activations were recorded on: the pipeline's own loop over a file of prompts."""

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


class PictureQuality(Spec, frozen=True, omit_defaults=True):
    """One prompt, drawn by the source's graphs and by the bundle's, from the same seed.

    psnr in dB (None: equal pictures); ssim up to 1; distance by the metric Quality names.
    source, ours: the two pictures as files of the bundle, where they were kept.
    """

    prompt: Annotated[str, Meta(max_length=64_000)]
    seed: Annotated[int, Meta(ge=0)]
    psnr: Number | None
    ssim: Number
    distance: Number
    source: RelativePath | None = None
    ours: RelativePath | None = None


class Quality(Spec, frozen=True):
    """How far the bundle's pictures are from its source's, measured at build.

    psnr: mean and minimum over all pictures, in dB, equal pictures counting as 100. metric: name of
    the perceptual distance ("LPIPS (AlexNet, v0.1)", or what stands in for it). min_psnr: the floor
    asked for. measured_on: the arithmetic that drew the pictures.
    """

    pictures: tuple[PictureQuality, ...]
    num_inference_steps: Count
    guidance_scale: Number
    scheduler: Word
    psnr_mean: Number
    psnr_min: Number
    ssim_mean: Number
    distance_mean: Number
    metric: Text
    measured_on: Text
    min_psnr: Number | None = None


class Footprint(Spec, frozen=True):
    """Bytes that one graph takes in memory, traced when it was built (runtime/footprint.py).

    weights: what stays of them once loaded, mapped or copied; loading: what there is besides while
    they are loaded. streamed: what stays of them in `stream`; in_file: of that, what lies in the
    bundle's file. graph: of the session itself. runs: for growing units (rows times height times
    width of the input) what a run's activations take, and the workspace of edgesd's own kernels.
    spread: how many times as much runs of several sizes take that follow one another.
    """

    weights: Bytes
    loading: Bytes
    streamed: Bytes
    in_file: Bytes
    graph: Bytes
    runs: Annotated[tuple[tuple[Bytes, Bytes, Bytes], ...], Meta(max_length=64)]
    spread: Annotated[float, Meta(ge=1, le=16)] = 1.0


class Half(Spec, frozen=True):
    """A graph of a part of a component, beside the whole one and with the same weights.

    kernels: the same for edgesd's own kernels. weight_bytes: of its weights in their file. spec:
    its inputs and outputs. footprint, kernels_footprint: of the two graphs; None in bundles of a
    schema before 7.
    """

    path: RelativePath
    spec: ComponentSpec
    weight_bytes: Bytes
    kernels: RelativePath | None = None
    footprint: Footprint | None = None
    kernels_footprint: Footprint | None = None


class Halves(Spec, frozen=True):
    """A full autoencoder's decoder in two graphs, of which the second can be run in tiles.

    head: latents -> features. tail: features, and statistics of its group normalizations, to the
    image (export/passes/tiled_decoder.py, runtime/tiles.py).
    """

    head: Half
    tail: Half


class Graph(Spec, frozen=True):
    """A component as an ONNX file. Paths are relative to the folder that holds it.

    kernels: the same for edgesd's own kernels, with the same weights. halves: see Halves.
    """

    component: str
    path: str
    precision: Precision
    parity: Parity
    kernels: str | None = None
    halves: Halves | None = None


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


class Machine(Spec, frozen=True):
    """What a computer is, as far as it can be read from it.

    memory_bytes: RAM that this process may use at most (0: can't be read). target: the nearest
    registered one, or None. l4t: release of the Jetson's Linux (36.4.3), or None.
    """

    arch: str
    model: str
    target: str | None
    memory_bytes: Bytes
    cpu_count: Count
    capabilities: tuple[str, ...]
    l4t: str | None = None


class PrompterSpec(Spec, frozen=True):
    """A small language model that turns a wish into a prompt. base, adapter: GGUF files, relative
    to the bundle; adapter is None where it is merged. domain: what it was tuned for. form: what
    code makes of its line, with "{}" in it. licence: the base model's name and licence. grammar:
    file of the GBNF grammar of its line; None for any words."""

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


class Target(Spec, frozen=True):
    """A board (or computer) that a bundle is built for.

    memory_bytes: RAM that the smallest such board has, shared with a GPU where there is one.
    memory_options: RAM of the other boards sold under this name; each makes a target NAME-8gb.
    capabilities: CPU or GPU features that a bundle may count on (dotprod, sm_87 ...).
    backends: engine backends, best first. flasher: how its storage is written, if edgesd can.
    families: names that stand for the smallest of their members. models, module_ids: how the board
    is recognised (starts of the device-tree model; p3767-0003). No models: any machine of `arch`.
    """

    name: str
    title: str
    arch: str
    backends: tuple[str, ...]
    memory_bytes: int
    cpu_count: int
    precisions: tuple[Precision, ...] = PRECISIONS
    capabilities: tuple[str, ...] = ()
    memory_options: tuple[int, ...] = ()
    families: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    module_ids: tuple[str, ...] = ()
    flasher: str | None = None


class Probe(Spec, frozen=True):
    """A small graph that one kind of operation is timed with (runtime/rates.py).

    kind, form, size: see Rate. graph: its file. scheme: of its layer, where it needs edgesd's own
    kernels. weight_bytes: of its largest weight.
    """

    name: str
    kind: str
    form: str
    size: tuple[int, ...]
    graph: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    weight_bytes: int = 0
    scheme: str | None = None


class Rate(Spec, frozen=True):
    """Seconds that one operation takes on a machine.

    form: which kernel: fp32, int8 or nbits of ONNX Runtime, own8 or own4 of edgesd; "" for what
    has no weights. size: rows, K and N of a product; batch times heads, queries, keys and width of
    attention; elements of its output for others.
    """

    kind: str
    form: str
    size: Annotated[
        tuple[Annotated[int, Meta(ge=1, le=1 << 50)], ...],
        Meta(min_length=1, max_length=_MOST_DIMS),
    ]
    seconds: Annotated[float, Meta(ge=1e-15, le=1e9)]


class Rates(Spec, frozen=True):
    """How fast a machine is, as `edgesd calibrate` measured it.

    instruction_set: of edgesd's own kernels, or None without. threads: per operator; 0 for all.
    process_bytes: resident memory of Python with ONNX Runtime and one small graph.
    """

    machine: str
    onnxruntime: str
    instruction_set: str | None
    threads: Count
    process_bytes: Bytes
    rates: tuple[Rate, ...]


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
    (runtime/kernels.py), taken where they can be used; it refers to the same weights. halves: see
    Halves. footprint, kernels_footprint: of the two graphs, where known (a schema from 7 on).
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
    halves: Halves | None = None
    footprint: Footprint | None = None
    kernels_footprint: Footprint | None = None


class FileEntry(Spec, frozen=True):
    """One file of a bundle."""

    bytes: Bytes
    sha256: Sha256


class BundleManifest(Spec, frozen=True):
    """bundle.json: everything a board must know before it loads a byte of weights."""

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
    required_capabilities: tuple[str, ...] = ()
    recipe: QuantRecipe | None = None
    quality: Quality | None = None
    prompter: PrompterSpec | None = None
