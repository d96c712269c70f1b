"""What a pipeline is, whatever the precision or backend of its graphs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

import msgspec
from msgspec import Meta

from edgesd.errors import BundleError, UsageError
from edgesd.spec.base import (
    DTYPE,
    MOST_CONFIG,
    MOST_DIMS,
    MOST_TENSORS,
    Dim,
    Guidance,
    Label,
    Pixels,
    RelativePath,
    Sha256,
    Spec,
    Text,
    Word,
)


class TensorSpec(Spec, frozen=True):
    """One input or output of a component. `dtype` is numpy's name (float32, int64 ...)."""

    name: Label
    dtype: Annotated[str, Meta(pattern=DTYPE)]
    shape: Annotated[tuple[Dim, ...], Meta(max_length=MOST_DIMS)]


class ComponentSpec(Spec, frozen=True):
    """One network of a pipeline."""

    name: Label
    inputs: Annotated[tuple[TensorSpec, ...], Meta(max_length=MOST_TENSORS)]
    outputs: Annotated[tuple[TensorSpec, ...], Meta(max_length=MOST_TENSORS)]

    def input(self, name: str) -> TensorSpec | None:
        """The input called `name`, or None."""
        return next((t for t in self.inputs if t.name == name), None)

    def output(self, name: str) -> TensorSpec | None:
        """The output called `name`, or None."""
        return next((t for t in self.outputs if t.name == name), None)


_PART_OF_SIZE = re.compile(r"(batch|height|width)(?:([*/])([1-9][0-9]{0,3}))?")


def size_of(dim: Dim, sizes: Mapping[str, int]) -> int:
    """What a dimension is where `sizes` has the symbolic ones: a size of these, or an exact part or
    multiple of one, as height/2 and height*8 are.

    Raises KeyError for another name.
    """
    if isinstance(dim, int):
        return dim
    found = _PART_OF_SIZE.fullmatch(dim)
    if found is None or found[2] is None:
        return sizes[dim]
    number = int(found[3])
    return sizes[found[1]] * number if found[2] == "*" else sizes[found[1]] // number


def is_size(dim: Dim) -> bool:
    """Whether `size_of` knows a dimension by batch, height and width."""
    return isinstance(dim, int) or _PART_OF_SIZE.fullmatch(dim) is not None


class SchedulerSpec(Spec, frozen=True):
    """A noise schedule: our name for the sampler, and diffusers' scheduler_config.json.

    even_sigmas: n steps have the sigmas 1 to 1/n, evenly spaced, before they are shifted, as
    diffusers' FluxPipeline has them; for samplers that take a list of sigmas.
    """

    name: Word
    config: dict[str, Any]
    even_sigmas: bool = False

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
                count > MOST_CONFIG
                or (isinstance(value, int) and abs(value) > 1 << 53)
                or (isinstance(value, str) and len(value) > 1000)
            ):
                raise ValueError(f"{name!r} of the scheduler is larger than any is")


_PerChannel = Annotated[
    tuple[Annotated[float, Meta(ge=-1e6, le=1e6)], ...], Meta(min_length=1, max_length=1024)
]


class LatentSpec(Spec, frozen=True):
    """How latents relate to images: [B, channels, H / scale_factor, W / scale_factor].

    latents = (encoded - shift_factor) * scaling_factor, as in diffusers' AutoencoderKL; where each
    channel has a mean and std, (encoded - mean) * scaling_factor / std instead. halo: how
    far off, in latent pixels, a latent still changes a pixel; None where every one changes all.
    levels: channels of a full autoencoder's decoder, coarsest level first; None for others, and in
    bundles of a schema before 6. encoder_halo: how far off, in latents, a pixel still changes a
    latent; None where every one changes all. patch: sides, in latents, of what is one token to the
    denoiser.
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
    mean: _PerChannel | None = None
    std: _PerChannel | None = None
    encoder_halo: Annotated[int, Meta(ge=0, le=4096)] | None = None
    patch: Annotated[int, Meta(ge=1, le=64)] = 1

    def __post_init__(self) -> None:
        """Refuse statistics that aren't one number for each channel, as invalid values."""
        if (self.mean is None) != (self.std is None):
            raise ValueError("latents have a mean and a std, or neither")
        for values in (self.mean, self.std):
            if values is not None and len(values) != self.channels:
                raise ValueError(
                    f"{len(values)} values of mean or std for {self.channels} channels of latents"
                )
        if self.std is not None and min(self.std) <= 0:
            raise ValueError(f"the std of a channel of latents is {min(self.std)}")

    @property
    def unit(self) -> int:
        """Pixels that a side of any image is a multiple of: those of a token, or of a latent."""
        return self.scale_factor * self.patch

    def halo_of(self, role: str) -> int | None:
        """The halo of the decoder or the encoder; None for all else."""
        return {"decoder": self.halo, "encoder": self.encoder_halo}.get(role)


class ShapeSpec(Spec, frozen=True):
    """Image sizes in pixels that the graphs accept.

    dynamic: any multiple of `multiple_of`, height and width being the default, and a batch
    of the denoiser up to `batch`. Otherwise this size only, and exactly `batch`.
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


Fill = Literal[
    "sample", "timestep", "joined", "guidance", "guidance_embedding", "size_ids", "aesthetic_ids",
    "mask", "masked", "pixel_mask", "control", "control_latents", "side", "modulation",
]  # fmt: skip
"""How an input is filled at each step.

sample: the latents, scaled as the scheduler wants them [batch, C, h, w], followed by `concat` in
the denoiser. timestep: [1]. joined: outputs of text encoders, joined on their last axis.
guidance: the guidance scale [batch], and guidance_embedding: an embedding of it [batch, D], for
models distilled with it. size_ids: what the model is told of the image's sizes [batch, 6], height
before width and top before left: original size, crop, target size. aesthetic_ids: original size,
crop, aesthetic score [batch, 5]. mask, masked: what the task gives of each image: where to paint
[batch, 1, h, w], latents of the rest [batch, C, h, w]; pixel_mask: where to paint, at the size of
the image [batch, 1, H, W]; control_latents: latents of a control image [batch, C, h, w]. control:
the image that a side component is shown [batch, 3, H, W]. side: the sum of outputs of side
components, each times its scale; zeros where none of them runs. modulation: what the wiring's
modulation makes of the timestep [batch, D].
"""

SIZE_FILLS: Mapping[Fill, int] = {"size_ids": 6, "aesthetic_ids": 5}
"""Fills by what a request says of the image's sizes -> how many numbers that is; each half of
guidance has its own."""

GIVEN_BY_TASKS: frozenset[Fill] = frozenset(("mask", "masked", "pixel_mask", "control_latents"))


class Part(Spec, frozen=True):
    """One output of one component."""

    component: Word
    output: Label


class InputSpec(Spec, frozen=True):
    """One input of the denoiser or a side component, and how it is filled.

    parts: what is joined, or for `side` added; empty for all others.
    """

    name: Label
    fill: Fill
    parts: Annotated[tuple[Part, ...], Meta(max_length=MOST_TENSORS)] = ()

    def __post_init__(self) -> None:
        """Refuse parts where nothing reads them: when decoded, as an invalid value."""
        if bool(self.parts) != (self.fill in ("joined", "side")):
            raise ValueError(f"{self.name!r} is filled as {self.fill!r} of {len(self.parts)} parts")


_Inputs = Annotated[tuple[InputSpec, ...], Meta(max_length=MOST_TENSORS)]


class TokenizerRef(Spec, frozen=True):
    """A tokenizer. max_tokens: of a prompt, with its padding. chunked: whether a longer prompt is
    encoded in chunks of so many (runtime/chunks.py), instead of being cut."""

    max_tokens: Annotated[int, Meta(ge=2, le=1 << 16)]
    chunked: bool = True


class TextSpec(Spec, frozen=True):
    """A text encoder. input: its token ids [1, tokens], from one of the wiring's tokenizers."""

    component: Word
    tokenizer: RelativePath
    input: Label


class SideSpec(Spec, frozen=True):
    """A component beside the denoiser, which is shown a control image, and whose outputs fill
    inputs of the denoiser. It runs for requests that name it.

    when: once, before the first step (an adapter), or at each step (a ControlNet). `once` sees
    neither prompt, sample nor timestep.
    """

    component: Word
    when: Literal["once", "each_step"]
    inputs: _Inputs

    @property
    def name(self) -> str:
        """What requests call it: what stands behind the first hyphen of its component's name."""
        return self.component.partition("-")[2] or self.component


Concatenated = Literal["mask", "masked", "control_latents"]
"""What may follow the latents in a denoiser's sample."""


class DenoiserSpec(Spec, frozen=True):
    """The denoiser. output: what it predicts, of the latents' shape. concat: what follows the
    latents on the channel axis of its sample."""

    component: Word
    inputs: _Inputs
    output: Label
    concat: Annotated[tuple[Concatenated, ...], Meta(max_length=2)] = ()

    def input_of(self, fill: Fill) -> InputSpec | None:
        """The first input that is filled so, or None."""
        return next((one for one in self.inputs if one.fill == fill), None)


class ModulationSpec(Spec, frozen=True):
    """A component that makes, of the timestep and of what stays the same in all steps, what the
    denoiser is told of them in each step. It runs before the first one. inputs: filled with
    timestep, guidance or outputs of text encoders, each [rows, ...]. output: [rows, D]."""

    component: Word
    inputs: _Inputs
    output: Label


class DecoderSpec(Spec, frozen=True):
    """What makes an image [1, 3, H, W] in about -1 to 1 of latents [1, C, h, w]."""

    component: Word
    input: Label
    output: Label


class EncoderSpec(Spec, frozen=True):
    """What makes latents of an image [1, 3, H, W] in -1 to 1. outputs: mean and deviation, which
    latents are drawn by, or the latents alone, each [1, C, h, w] as the denoiser sees them."""

    component: Word
    input: Label
    outputs: Annotated[tuple[Label, ...], Meta(min_length=1, max_length=2)]


Task = Literal["text", "refine", "control", "image", "inpaint"]
"""What denoising starts from. text: noise. refine: what a base model began. control: noise, beside
latents of a control image. image: an image with noise. inpaint: the same, where only what a mask
covers is made anew."""

ImageTask = Literal["image", "inpaint"]

IMAGE_TASKS: tuple[ImageTask, ...] = get_args(ImageTask)
"""Tasks that begin with an image."""

ENCODING_TASKS: tuple[Task, ...] = ("control", *IMAGE_TASKS)
"""Tasks that need the encoder."""

_Strength = Annotated[float, Meta(ge=0, le=1)]


class Wiring(Spec, frozen=True):
    """How the components of a pipeline are joined; runtime/flow.py says in which order they run.

    tokenizers: by folder of the bundle, which holds tokenizer.json and tokenizer_spec.json. tasks:
    what the pipeline can be asked for. zero_negative: without a negative prompt, zeros stand for
    its encoding, instead of that of "". encoder: of images; None where no task needs it.
    strengths: of each of these tasks, the part of the steps that is taken where nobody says it.
    cfg: whether the guidance scale asks for classifier-free guidance, which runs the denoiser with
    the negative prompt, too; that of other models is an input, or they have none, and a request's
    true_cfg_scale asks for it. modulation: what fills an input of the denoiser; None where it takes
    the timestep itself.
    """

    texts: Annotated[tuple[TextSpec, ...], Meta(min_length=1, max_length=8)]
    tokenizers: Annotated[dict[RelativePath, TokenizerRef], Meta(max_length=8)]
    denoiser: DenoiserSpec
    decoder: DecoderSpec
    sides: Annotated[tuple[SideSpec, ...], Meta(max_length=16)] = ()
    tasks: Annotated[tuple[Task, ...], Meta(min_length=1, max_length=8)] = ("text",)
    zero_negative: bool = False
    encoder: EncoderSpec | None = None
    strengths: dict[Task, _Strength] = msgspec.field(default_factory=dict)
    cfg: bool = True
    modulation: ModulationSpec | None = None

    @property
    def autoencoder(self) -> tuple[str, ...]:
        """The components that are halves of the autoencoder."""
        encoders = () if self.encoder is None else (self.encoder.component,)
        return *encoders, self.decoder.component

    @property
    def image_encoder(self) -> EncoderSpec:
        """What encodes images, where a task begins with one. Raises BundleError without."""
        if self.encoder is None:
            raise BundleError("nothing encodes images in this pipeline: build it with --task image")
        return self.encoder

    @property
    def filled(self) -> tuple[DenoiserSpec | SideSpec | ModulationSpec, ...]:
        """The components with filled inputs, in the order in which they run."""
        sides = sorted(self.sides, key=lambda side: side.when != "once")
        modulation = () if self.modulation is None else (self.modulation,)
        return *sides, *modulation, self.denoiser

    def input_of(self, component: str, fill: Fill) -> str | None:
        """Name of the input of a component that is filled so, or None."""
        inputs = (one for spec in self.filled if spec.component == component for one in spec.inputs)
        return next((one.name for one in inputs if one.fill == fill), None)


def stable_diffusion(max_tokens: int = 77, distilled: bool = False) -> Wiring:
    """The wiring of Stable Diffusion 1.x and 2.x: one text encoder. distilled: with guidance, whose
    scale is an input. Bundles of a schema before 8 have no other."""
    states = Part("text_encoder", "encoder_hidden_states")
    inputs = [
        InputSpec("sample", "sample"),
        InputSpec("timestep", "timestep"),
        InputSpec("encoder_hidden_states", "joined", (states,)),
    ]
    if distilled:
        inputs.append(InputSpec("timestep_cond", "guidance_embedding"))
    return Wiring(
        texts=(TextSpec(states.component, "tokenizer", "input_ids"),),
        tokenizers={"tokenizer": TokenizerRef(max_tokens)},
        denoiser=DenoiserSpec("unet", tuple(inputs), "noise_pred"),
        decoder=DecoderSpec("vae_decoder", "latents", "image"),
    )


def wiring_before_schema_8(components: Mapping[str, ComponentSpec], max_tokens: int) -> Wiring:
    """The wiring of a bundle that doesn't say it."""
    denoiser = components.get(stable_diffusion().denoiser.component)
    distilled = denoiser is not None and denoiser.input("timestep_cond") is not None
    return stable_diffusion(max_tokens, distilled)


class PipelineSpec(Spec, frozen=True):
    """What a pipeline is, whatever the precision or backend of its graphs."""

    family: Word
    source: Text
    source_sha256: Sha256
    components: dict[Word, ComponentSpec]
    scheduler: SchedulerSpec
    latent: LatentSpec
    shape: ShapeSpec
    num_inference_steps: Annotated[int, Meta(ge=1, le=MOST_CONFIG)]
    guidance_scale: Guidance
    wiring: Wiring
