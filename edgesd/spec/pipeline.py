"""What a pipeline is, whatever the precision or backend of its graphs."""

from __future__ import annotations

from typing import Annotated, Any

from msgspec import Meta

from edgesd.errors import UsageError
from edgesd.spec.base import (
    DTYPE,
    MOST_CONFIG,
    MOST_DIMS,
    MOST_TENSORS,
    Dim,
    Label,
    Pixels,
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
    """One network of a pipeline: text_encoder, unet, vae_encoder, vae_decoder ..."""

    name: Label
    inputs: Annotated[tuple[TensorSpec, ...], Meta(max_length=MOST_TENSORS)]
    outputs: Annotated[tuple[TensorSpec, ...], Meta(max_length=MOST_TENSORS)]

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
                count > MOST_CONFIG
                or (isinstance(value, int) and abs(value) > 1 << 53)
                or (isinstance(value, str) and len(value) > 1000)
            ):
                raise ValueError(f"{name!r} of the scheduler is larger than any is")


class LatentSpec(Spec, frozen=True):
    """How latents relate to images: [B, channels, H / scale_factor, W / scale_factor].

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
    """Image sizes in pixels that the graphs accept.

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
    num_inference_steps: Annotated[int, Meta(ge=1, le=MOST_CONFIG)]
    guidance_scale: Annotated[float, Meta(ge=-1000, le=1000)]
