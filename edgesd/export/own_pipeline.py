"""The gate before the networks: they must be fed what diffusers' own pipeline feeds them.

Parity compares a graph with its module on inputs that follow from the export spec: it can't see
a spec that is wrong. Here diffusers' pipeline generates, and edgesd's loop beside it, with networks
that compute next to nothing and write down what they are given: token ids, the sample and its size,
timesteps, the embedding of the guidance scale, and the latents that are decoded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import torch

from edgesd.errors import EdgesdError, ParityError
from edgesd.export.families import ExportSpec, OwnPipeline
from edgesd.export.quiet import quiet
from edgesd.runtime.arrays import Array, Float
from edgesd.runtime.backends.fake import FakeRunner
from edgesd.runtime.conditioning import Conditioned, Encoded
from edgesd.runtime.denoise import Start, denoise
from edgesd.runtime.flow import flow_of
from edgesd.runtime.noise import BatchNoise
from edgesd.runtime.schedulers import create_scheduler
from edgesd.runtime.tokenizer import PromptTokenizer
from edgesd.spec.pipeline import ComponentSpec, PipelineSpec, TensorSpec
from edgesd.text import first_sentence

_PROMPTS = (
    "",
    "a red apple",
    "It's  3 DOGS, caf\u00e9!",
    "\u65e5\u672c \U0001f600",
    "a very long word, " * 40,
)
_TOGETHER = 6
"""Added tokens in one prompt: all of them stay, whatever the tokenizer makes of them."""

_SEED = 5
_SECOND_COUNT = 7
"""Of steps, beside the model's own: spacings that agree for one count may differ for another."""

_TOLERANCE = 1e-3
"""Of what is fed, relative to its largest value: samplers round in another order."""


@dataclass
class _Fed:
    """What the networks of one drawing were given: step by step, and at the end."""

    samples: list[Float] = field(default_factory=list)
    timesteps: list[float] = field(default_factory=list)
    conditions: list[Float] = field(default_factory=list)
    decoded: Float | None = None


def check_own_pipeline(export: ExportSpec, tokenizer: PromptTokenizer) -> None:
    """Compare `export`, and the tokenizer made for it, with diffusers' own pipeline of its source.

    Raises ParityError that names what differs: token ids, default size, timesteps, guidance, what
    the UNet is given at some step, or the decoder.
    """
    spec = export.pipeline
    own = export.own()
    pipeline = own.pipeline
    pipeline.set_progress_bar_config(disable=True)
    pipeline.__class__ = _on_cpu(type(pipeline))
    try:
        with quiet(), torch.inference_mode():
            _check_tokens(own, tokenizer)
            for steps in dict.fromkeys((spec.num_inference_steps, _SECOND_COUNT)):
                _check_drawing(own, spec, tokenizer, steps)
    except EdgesdError:
        raise
    except Exception as exc:  # diffusers and the libraries below it, each with its own exceptions
        raise ParityError(
            f"{spec.source}: diffusers' own {type(pipeline).__name__} can't generate with this "
            f"export: {first_sentence(exc)}"
        ) from exc


def _on_cpu(cls: type[Any]) -> type[Any]:
    """The pipeline class, whose networks lie on the meta device, with its work on the CPU."""
    device = property(lambda _: torch.device("cpu"))
    return type(cls.__name__, (cls,), {"_execution_device": device, "device": device})


def _prompts(tokenizer: Any) -> Iterator[str]:
    """Those that every model has to take, and some with every token that was added to this one:
    alone, beside others, in other letters, inside of words, and where it is cut."""
    yield from _PROMPTS
    added = list(tokenizer.added_tokens_encoder)
    for first in range(0, len(added), _TOGETHER):
        some = added[first : first + _TOGETHER]
        yield " ".join(some)
        yield "".join(f"a{token}b {token.upper()}  {token} ," for token in some)
        yield "word " * 73 + " ".join(some)


def _check_tokens(own: OwnPipeline, tokenizer: PromptTokenizer) -> None:
    """The ids that the pipeline gives its text encoder."""
    seen: list[list[int]] = []
    encoder, theirs = own.encoders["text_encoder"], own.tokenizers["tokenizer"]

    def encode(input_ids: torch.Tensor, **_: object) -> tuple[torch.Tensor]:
        seen.append(input_ids[0].tolist())
        return (_embedding(input_ids.numpy(), encoder.config.hidden_size),)

    encoder.forward = encode
    for prompt in _prompts(theirs):
        own.encode(prompt)
        found = tokenizer.encode(prompt)[0][0].tolist()
        if found != seen[-1]:
            pairs = enumerate(zip(found, seen[-1], strict=False))
            at = next((i for i, (a, b) in pairs if a != b), min(len(found), len(seen[-1])))
            raise ParityError(
                f"tokenizer: {prompt[:60]!r} becomes {len(found)} token ids, {found[at : at + 4]} "
                f"from the {at + 1}. on; diffusers feeds {len(seen[-1])}, {seen[-1][at : at + 4]}"
            )


def _embedding(ids: npt.NDArray[np.int64], width: int) -> torch.Tensor:
    """What stands in for text embeddings [rows, tokens, width]: differs from prompt to prompt."""
    waves = np.arange(1, width + 1, dtype=np.float32) / width
    return torch.from_numpy(np.sin(ids[..., None].astype(np.float32) * waves))


def _predict(sample: Float, states: Float, cond: Float | None) -> Float:
    """What stands in for the UNet: takes all its inputs in, row by row, and is of limited size."""
    rows: Float = states.mean(axis=(1, 2), dtype=np.float64).astype(np.float32)
    if cond is not None:
        rows = rows + cond.mean(axis=1, dtype=np.float64).astype(np.float32)
    mixed = np.tanh(sample * np.float32(0.9) + np.roll(sample, 1, -1) * np.float32(0.1))
    out: Float = mixed + rows[:, None, None, None] * np.float32(0.2)
    return out


def _check_drawing(
    own: OwnPipeline, spec: PipelineSpec, tokenizer: PromptTokenizer, steps: int
) -> None:
    """One image of `steps` steps by both, at the spec's guidance and with what is generated where
    nobody says otherwise."""
    theirs, ours = _Fed(), _Fed()
    problem: EdgesdError | None = None
    try:
        _generate_ours(spec, tokenizer, steps, ours)
    except EdgesdError as exc:
        problem = exc
    try:
        _generate_theirs(own, spec, steps, theirs)
    except Exception:
        if problem is not None and steps != spec.num_inference_steps:
            return  # a number of steps that neither has
        raise
    if problem is not None:
        if not np.isfinite(theirs.samples[-1]).all():
            return
        raise ParityError(f"{steps} steps: diffusers generates them, edgesd doesn't: {problem}")
    size, wanted = (fed.samples[0].shape[-2:] for fed in (ours, theirs))
    if size != wanted:
        scale = spec.latent.scale_factor
        raise ParityError(
            f"the image's size is {size[1] * scale}x{size[0] * scale} pixels, in diffusers "
            f"{wanted[1] * scale}x{wanted[0] * scale}"
        )
    same = len(ours.timesteps) == len(theirs.timesteps)
    if not same or not np.allclose(ours.timesteps, theirs.timesteps, rtol=1e-4, atol=1e-2):
        raise ParityError(
            f"{spec.scheduler.name}: {steps} steps have the timesteps {_few(ours.timesteps)}, in "
            f"diffusers {_few(theirs.timesteps)}"
        )
    for index, (sample, other) in enumerate(zip(ours.samples, theirs.samples, strict=True)):
        _compare(f"{spec.scheduler.name}: the sample of step {index + 1} of {steps}", sample, other)
    for condition, other in zip(ours.conditions, theirs.conditions, strict=True):
        _compare("the embedding of the guidance scale", condition, other)
    assert ours.decoded is not None and theirs.decoded is not None
    _compare(f"what is decoded after {steps} steps", ours.decoded, theirs.decoded)


def _compare(what: str, found: Float, wanted: Float) -> None:
    if found.shape != wanted.shape:
        raise ParityError(f"{what}: {list(found.shape)}, in diffusers {list(wanted.shape)}")
    if not np.isfinite(wanted).all():
        return
    off = float(np.abs(found - wanted).max() / max(1e-9, float(np.abs(wanted).max())))
    if not off <= _TOLERANCE:
        raise ParityError(
            f"{what} differs from diffusers' by {off:.1e} of its largest value (allowed "
            f"{_TOLERANCE:.0e})"
        )


def _few(values: list[float]) -> str:
    shown = ", ".join(f"{value:g}" for value in values[:4])
    return f"{shown}{', ...' if len(values) > 4 else ''} ({len(values)})"


def _generate_theirs(own: OwnPipeline, spec: PipelineSpec, steps: int, fed: _Fed) -> None:
    encoder = own.encoders["text_encoder"]

    def encode(input_ids: torch.Tensor, **_: object) -> tuple[torch.Tensor]:
        return (_embedding(input_ids.numpy(), encoder.config.hidden_size),)

    def predict(sample: torch.Tensor, timestep: Any, **given: Any) -> tuple[torch.Tensor]:
        cond = given.get("timestep_cond")
        cond = None if cond is None else cond.numpy()
        _note(fed, sample.numpy(), float(timestep), cond)
        out = _predict(sample.numpy(), given["encoder_hidden_states"].numpy(), cond)
        return (torch.from_numpy(out),)

    def decode(latents: torch.Tensor, **_: object) -> tuple[torch.Tensor]:
        fed.decoded = latents.numpy()
        return (torch.zeros(1, 3, 1, 1),)

    encoder.forward, own.denoiser.forward, own.autoencoder.decode = encode, predict, decode
    size: dict[str, int] = {}
    if not spec.shape.dynamic or not own.has_size:
        size = {"height": spec.shape.height, "width": spec.shape.width}
    own.pipeline(
        _PROMPTS[1],
        num_inference_steps=steps,
        guidance_scale=spec.guidance_scale,
        generator=torch.Generator("cpu").manual_seed(_SEED),
        output_type="pt",
        **size,
    )


def _generate_ours(spec: PipelineSpec, tokenizer: PromptTokenizer, steps: int, fed: _Fed) -> None:
    unet, latent = spec.components["unet"], spec.latent
    width = unet.inputs[2].shape[-1]
    assert isinstance(width, int)
    guided = flow_of(spec).guided(spec.guidance_scale)
    (states,) = next(one.parts for one in spec.wiring.denoiser.inputs if one.parts)

    def encode(prompt: str) -> Encoded:
        return {states: _embedding(tokenizer.encode(prompt)[0], width).numpy()}

    def predict(inputs: Mapping[str, Array]) -> dict[str, Array]:
        given: dict[str, Any] = dict(inputs)
        cond = given.get("timestep_cond")
        _note(fed, given["sample"], float(given["timestep"][0]), cond)
        return {"noise_pred": _predict(given["sample"], given["encoder_hidden_states"], cond)}

    scheduler = create_scheduler(spec.scheduler.name, spec.scheduler.config)
    scheduler.set_timesteps(steps)
    noise = BatchNoise([_SEED])
    rows, columns = (side // latent.scale_factor for side in (spec.shape.height, spec.shape.width))
    first = noise((1, latent.channels, rows, columns)) * np.float32(scheduler.init_noise_sigma)
    latents = denoise(
        spec.wiring,
        {unet.name: FakeRunner(_of_any_batch(unet), predict)},
        scheduler,
        Start(first),
        Conditioned(encode(_PROMPTS[1]), encode("") if guided else None),
        spec.guidance_scale,
        noise,
    )
    fed.decoded = latents / np.float32(latent.scaling_factor) + np.float32(latent.shift_factor)


def _of_any_batch(spec: ComponentSpec) -> ComponentSpec:
    def freed(tensor: TensorSpec) -> TensorSpec:
        if tensor.name == "timestep":
            return tensor
        return msgspec.structs.replace(tensor, shape=("batch", *tensor.shape[1:]))

    return msgspec.structs.replace(spec, inputs=tuple(freed(t) for t in spec.inputs))


def _note(fed: _Fed, sample: Float, timestep: float, cond: Float | None) -> None:
    fed.samples.append(sample.copy())
    fed.timesteps.append(timestep)
    if cond is not None:
        fed.conditions.append(np.array(cond, np.float32))
