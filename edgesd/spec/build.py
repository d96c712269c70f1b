"""How a bundle is built: what its graphs and weights depend on, as `bundle.json` has it."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

import msgspec
from msgspec import Meta

from edgesd.errors import UsageError
from edgesd.spec.base import Guidance, Pixels, Sha256, Spec, Word
from edgesd.spec.pipeline import ImageTask
from edgesd.spec.scheme import FLOATING, MAX_RANK, Precision, number_format

_MOST_PROMPTS, _LONGEST_PROMPT = 10_000, 64_000
_MOST_BYTES = 2_000_000
"""Of a list of prompts in JSON: a manifest of at most 16 MB holds both, those of quality twice."""

DEFAULT_METHOD = "svdquant"
MOST_SKIPPED = 64
"""Layers of a text encoder."""

MOST_LORA_SCALE = 100.0
"""Magnitude of the factor that a LoRA is used or merged with."""

MOST_CHUNKS = 32
"""Of tokens, that a prompt is encoded in."""

LEAST_TOKENS, MOST_TOKENS = 2, 512
"""Of a prompt, that T5 is given: the most that diffusers' FluxPipeline takes."""

DEMO, HUB, FOLDER = "demo", "hub", "folder"
"""Where a model was: in edgesd, on the hub, in a folder or a file of the machine that built."""

EMBEDDED = ("emoji", "emoji-xl", "emoji-lcm", "emoji-flux", "emoji-flux-dev")
"""Folders of the pipelines that a checkout of edgesd comes with; the first is `demo`."""

Variant = Literal["base", "turbo", "lightning", "lcm"]
"""Kinds of a model (export/families/variants.py)."""

VARIANTS: tuple[Variant, ...] = get_args(Variant)

Measure = Literal["split", "unsigned", "joint", "ends", "once"]
"""What is done for few bits, by the form of graphs and their place in a pipeline, whatever the
method (docs/quantization.md)."""

MEASURES: tuple[Measure, ...] = get_args(Measure)

Prompts = Annotated[
    tuple[Annotated[str, Meta(max_length=_LONGEST_PROMPT)], ...],
    Meta(max_length=_MOST_PROMPTS),
]


Distance = Annotated[float, Meta(gt=0, le=100)]
"""A limit of a perceptual distance. LPIPS is mostly below 1, a feature distance at most 4."""


class QuantOptions(Spec, frozen=True):
    """How to quantize, beyond the scheme's name.

    method: one of export/quantize/methods. static: activation ranges recorded in calibration,
    instead of dynamic ones. calibration_prompts: None takes the model's own, or general ones;
    quality_prompts: the same, and () generates no images. steps, guidance: of the loop in
    calibration and comparison; None is the model's default. min_psnr: floor in dB for the worst
    image; max_lpips, max_feature_distance: limits of its distances. max_size: limit of the bundle's
    size relative to the fp32 one's; max_time: the same for the estimated time of an image.
    pool_attention: fewer keys and values in the largest self-attention, where images allow.
    measures: those that are taken; None is all of them.
    """

    method: Word = DEFAULT_METHOD
    static: bool = False
    calibration_prompts: Prompts | None = None
    quality_prompts: Prompts | None = None
    steps: Annotated[int, Meta(ge=1, le=100_000)] | None = None
    guidance: Guidance | None = None
    min_psnr: Annotated[float, Meta(ge=0, le=100)] | None = None
    max_lpips: Distance | None = None
    max_feature_distance: Distance | None = None
    max_size: Annotated[float, Meta(gt=0, le=1)] | None = None
    max_time: Annotated[float, Meta(gt=0, le=1e15)] | None = None
    pool_attention: bool = False
    measures: Annotated[tuple[Measure, ...], Meta(max_length=len(MEASURES))] | None = None

    @property
    def limited(self) -> bool:
        """Whether there is a limit that only images can hold."""
        limits = (self.min_psnr, self.max_lpips, self.max_feature_distance)
        return any(one is not None for one in (*limits, self.max_size, self.max_time))


class BuildOptions(Spec, frozen=True):
    """What is built of a model.

    target: a board's name. backend: whose graphs are made; None takes the target's best. size:
    (width, height) in pixels for static graphs, whose denoiser takes `batch`; None exports
    graphs for any size and batch (where plans have fixed shapes: for one image of the model's own
    size). scheduler: the bundle's default sampler, if not the model's own. variant: what kind of
    model it is, where the model itself doesn't tell. quantization: for a precision that is a
    scheme. prompt_chunks: of tokens, that static graphs take of each prompt. clip_skip: last layers
    of the text encoders that aren't used, beyond those that the model's pipeline leaves; None is
    the model's own. max_tokens: of a prompt, that T5 is given; None is the model's own. tasks: what
    the bundle is for beside text to image; inpaint includes image. lora_slots: the largest rank of
    LoRAs that graphs take while they run; None leaves no place for them.
    """

    target: Word
    precision: Annotated[Precision, Meta(max_length=64)] = "fp32"
    backend: Word | None = None
    size: tuple[Pixels, Pixels] | None = None
    batch: Annotated[int, Meta(ge=1, le=4096)] = 1
    scheduler: Word | None = None
    variant: Variant | None = None
    quantization: QuantOptions = QuantOptions()
    prompt_chunks: Annotated[int, Meta(ge=1, le=MOST_CHUNKS)] = 1
    clip_skip: Annotated[int, Meta(ge=0, le=MOST_SKIPPED)] | None = None
    max_tokens: Annotated[int, Meta(ge=LEAST_TOKENS, le=MOST_TOKENS)] | None = None
    tasks: Annotated[tuple[ImageTask, ...], Meta(max_length=8)] = ()
    lora_slots: Annotated[int, Meta(ge=1, le=MAX_RANK)] | None = None

    @property
    def quantized(self) -> bool:
        """Whether the precision is a scheme."""
        return self.precision not in FLOATING

    def check(self) -> None:
        """Raise UsageError for options that contradict each other, or that nothing can build."""
        number_format(self.precision)
        if self.batch > 1 and not self.size:
            raise UsageError("--batch is for static graphs: give --size, too")
        if self.quantization.limited:
            limits = "--min-psnr, --max-lpips, --max-feature-distance, --max-size and --max-time"
            if not self.quantized:
                raise UsageError(
                    f"{limits} are for quantized bundles, and {self.precision} isn't one: choose "
                    "w8a8 or another, or leave them out"
                )
            if self.quantization.quality_prompts == ():
                raise UsageError(f"{limits} are checked on images: leave --no-quality out")
        for what in ("calibration", "quality"):
            prompts = getattr(self.quantization, f"{what}_prompts") or ()
            _check_prompts(what, prompts)


class ModelReference(Spec, frozen=True):
    """The model that a bundle was made of. kind: DEMO, HUB or FOLDER. name: the hub's id; of a
    folder or a file only its name, not its path. sha256: of what was read."""

    kind: Word
    name: Annotated[str, Meta(min_length=1, max_length=1000)]
    sha256: Sha256


SideKind = Literal["controlnet", "adapter"]


class SideReference(Spec, frozen=True):
    """A ControlNet or an adapter that was added to the model, and what it is called: "" where it
    was given no name."""

    kind: SideKind
    name: Annotated[str, Meta(max_length=64)]
    model: ModelReference


class EmbeddingReference(Spec, frozen=True):
    """A textual inversion that was added to the model. sha256: of its file."""

    token: Annotated[str, Meta(min_length=1, max_length=100)]
    sha256: Sha256


class LoraReference(Spec, frozen=True):
    """A LoRA that was merged into the model. name: of its file, without a path. sha256: of that
    file; where another one beside it has its alpha, of the hashes of both, a line each."""

    name: Annotated[str, Meta(min_length=1, max_length=1000)]
    sha256: Sha256
    scale: Annotated[float, Meta(ge=-MOST_LORA_SCALE, le=MOST_LORA_SCALE)]


class BuildRecord(Spec, frozen=True):
    """How a bundle was built; `edgesd build --like` reads it. vae: where its autoencoder is of
    another model. embeddings, sides, loras: in the order in which they were added."""

    model: ModelReference
    options: BuildOptions
    vae: ModelReference | None = None
    embeddings: Annotated[tuple[EmbeddingReference, ...], Meta(max_length=1000)] = ()
    sides: Annotated[tuple[SideReference, ...], Meta(max_length=16)] = ()
    loras: Annotated[tuple[LoraReference, ...], Meta(max_length=1000)] = ()


def _check_prompts(what: str, prompts: tuple[str, ...]) -> None:
    if (
        len(prompts) > _MOST_PROMPTS
        or any(len(prompt) > _LONGEST_PROMPT for prompt in prompts)
        or len(msgspec.json.encode(prompts)) > _MOST_BYTES
    ):
        raise UsageError(
            f"--{what}-prompts: at most {_MOST_PROMPTS} prompts of {_MOST_BYTES / 1e6:g} MB "
            "together, as the bundle holds them: give fewer"
        )
