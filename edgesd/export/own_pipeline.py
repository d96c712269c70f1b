"""The gate before the networks: they must be fed what diffusers' own pipeline feeds them.

Parity compares a graph with its module on inputs that follow from the export spec: it can't see
a spec that is wrong. Here diffusers' pipeline generates, and edgesd's loop beside it, with networks
that compute next to nothing and write down what they are given: token ids, the sample and its size,
timesteps, all else that the denoiser is told, and the latents that are decoded. Where a task begins
with an image, both are given one, and a mask.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial, wraps
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from edgesd.errors import EdgesdError, ParityError
from edgesd.export.families import ExportSpec, OwnPipeline
from edgesd.export.families.parts.diffusers_pipeline import scheduler_config
from edgesd.export.quiet import quiet
from edgesd.export.torch_runner import any_batch
from edgesd.runtime.arrays import Array, Float
from edgesd.runtime.backends.fake import FakeRunner
from edgesd.runtime.conditioning import Prompts, with_size_ids
from edgesd.runtime.denoise import denoise
from edgesd.runtime.flow import flow_of
from edgesd.runtime.modulation import modulated
from edgesd.runtime.noise import BatchNoise
from edgesd.runtime.refined import is_refiner
from edgesd.runtime.requests import (
    CompleteRequest,
    Completion,
    Request,
    painted_whole,
    scheduler_of,
    shown,
)
from edgesd.runtime.schedulers import SCHEDULERS, name_from_class, sampler_class
from edgesd.runtime.tasks import TASKS
from edgesd.runtime.tasks.beginning import Beginning
from edgesd.runtime.tokenizer import PromptTokenizer
from edgesd.spec.pipeline import (
    IMAGE_TASKS,
    ComponentSpec,
    InputSpec,
    LatentSpec,
    PipelineSpec,
    SchedulerSpec,
    Wiring,
)
from edgesd.text import first_sentence

if TYPE_CHECKING:
    from PIL import Image

_log = logging.getLogger(__name__)

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
_SECOND_COUNT, _SECOND_GUIDANCE = 7, 3.0
"""Of steps, beside the model's own: spacings that agree for one count may differ for another. With
guidance, so that the negative half is seen, and of an oblong size where any can be asked for."""

_BEGUN = 0.5
"""Which part of the denoising is done when a refiner goes on: it has steps left, however few there
are."""

_STRENGTH = 0.6
"""Of an image, beside the one that nobody asks for."""

_STEP = 8
"""Pixels that diffusers' pipelines take multiples of, whatever their autoencoder does."""

_TOLERANCE = 1e-3
"""Of what is fed, relative to its largest value: samplers round in another order."""
_LOOSE = 1e-2
"""The same of samplers that aren't exact."""


@dataclass
class _Fed:
    """What the networks were given for one image: step by step, and at the end. inputs: of the
    denoiser at the first step, but its sample and timestep, by name."""

    samples: list[Float] = field(default_factory=list)
    timesteps: list[float] = field(default_factory=list)
    inputs: dict[str, Float] = field(default_factory=dict)
    decoded: list[Float] = field(default_factory=list)


Tokenizers = Mapping[str, PromptTokenizer]
"""By the folders that a wiring names."""


def check_own_pipeline(export: ExportSpec, tokenizers: Tokenizers) -> None:
    """Compare `export`, and the tokenizers made for it, with diffusers' own pipeline of its source.

    Raises ParityError that names what differs: token ids, default size, timesteps, guidance, what
    the denoiser is given at some step, or the decoder.
    """
    own = export.own()
    pipeline = own.pipeline
    spec = _comparable(export.pipeline, pipeline.scheduler)
    pipeline.set_progress_bar_config(disable=True)
    for each in (pipeline, own.autoencoder, *own.encoders.values()):
        each.__class__ = _on_cpu(type(each))
    try:
        with quiet(), torch.inference_mode():
            _check_tokens(own, spec, tokenizers)
            for asked in _asked(spec):
                _check_image(own, spec, tokenizers, asked)
    except EdgesdError:
        raise
    except Exception as exc:  # diffusers and the libraries below it, each with its own exceptions
        raise ParityError(
            f"{spec.source}: diffusers' own {type(pipeline).__name__} can't generate with this "
            f"export: {first_sentence(exc)}"
        ) from exc


def _comparable(spec: PipelineSpec, scheduler: Any) -> PipelineSpec:
    """A pipeline with the sampler of diffusers' scheduler, where that is of another class, as
    diffusers lacks packages for the sampler's; with a warning then."""
    wanted, found = sampler_class(spec.scheduler.name), type(scheduler).__name__
    if found == wanted:
        return spec
    _log.warning(
        "the sampler %s isn't compared with diffusers' %s, which needs more packages (scipy, "
        "torchsde): what else the networks are fed is, with %s",
        spec.scheduler.name,
        wanted,
        found,
    )
    own = SchedulerSpec(
        name_from_class(found), scheduler_config(scheduler), spec.scheduler.even_sigmas
    )
    return msgspec.structs.replace(spec, scheduler=own)


def _on_cpu(cls: type[Any]) -> type[Any]:
    """A class of a pipeline or network that lies on the meta device, which takes its inputs on the
    CPU."""
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


def _asked(spec: PipelineSpec) -> Iterator[Request]:
    """The images that are generated: as the pipeline does where nobody says otherwise, and one that
    differs in all that its graphs allow."""
    own = Request(_PROMPTS[1], _SEED, num_inference_steps=spec.num_inference_steps)
    if is_refiner(spec):
        own = replace(own, denoising_end=_BEGUN)
    guidance = max(spec.guidance_scale, _SECOND_GUIDANCE)
    other = replace(own, num_inference_steps=_SECOND_COUNT, guidance_scale=guidance)
    for task in IMAGE_TASKS:
        # diffusers encodes what is painted without the mean and std that it decodes it with.
        if task in spec.wiring.tasks and (task == "image" or spec.latent.mean is None):
            image = _with_image(spec, other, masked=task == "inpaint")
            yield image
            yield replace(image, strength=_STRENGTH)
    if spec.wiring.tasks[0] in IMAGE_TASKS:
        return
    # One is shown a grey picture, the other an uneven one.
    own, other = painted_whole(spec, own), _controlled(spec, other)
    yield own
    shape = spec.shape
    if shape.dynamic:
        higher = shape.height + math.lcm(shape.multiple_of, _STEP)
        other = replace(other, height=higher, width=shape.width)
    yield other


def _controlled(spec: PipelineSpec, asked: Request) -> Request:
    """The request with a control image, where the pipeline takes one."""
    if spec.wiring.tasks[0] != "control":
        return asked
    return replace(asked, controls=(shown(_uneven(spec)),))


def _with_image(spec: PipelineSpec, asked: Request, masked: bool) -> Request:
    """The request with an image of the pipeline's own size, half of which is painted."""
    from PIL import Image

    shape = spec.shape
    mask = np.zeros((shape.height, shape.width), np.uint8)
    mask[:, shape.width // 2 :] = 255
    return replace(
        asked,
        image=_uneven(spec),
        mask=Image.fromarray(mask) if masked else None,
        denoising_end=None,
    )


def _uneven(spec: PipelineSpec) -> Image.Image:
    """A picture of the pipeline's own size."""
    from PIL import Image

    shape, rng = spec.shape, np.random.default_rng(_SEED)
    return Image.fromarray(rng.integers(0, 256, (shape.height, shape.width, 3), np.uint8))


def _check_tokens(own: OwnPipeline, spec: PipelineSpec, tokenizers: Tokenizers) -> None:
    """The ids that the pipeline gives its text encoders."""
    seen: dict[str, list[int]] = {}
    wiring = spec.wiring
    for text in wiring.texts:
        _replace_encoder(own, spec.components[text.component], seen.__setitem__)
    for text in wiring.texts:
        for prompt in _prompts(own.tokenizers[text.tokenizer]):
            own.encode(prompt)
            wanted = seen[text.component]
            found = tokenizers[text.tokenizer].encode(prompt)[0][0].tolist()
            if found != wanted:
                pairs = enumerate(zip(found, wanted, strict=False))
                at = next((i for i, (a, b) in pairs if a != b), min(len(found), len(wanted)))
                raise ParityError(
                    f"{text.tokenizer}: {prompt[:60]!r} becomes {len(found)} token ids, "
                    f"{found[at : at + 4]} from the {at + 1}. on; diffusers feeds {len(wanted)}, "
                    f"{wanted[at : at + 4]}"
                )


def _replace_encoder(
    own: OwnPipeline, spec: ComponentSpec, note: Callable[[str, list[int]], object]
) -> None:
    """Let a text encoder compute next to nothing, and note its name and the ids of a prompt."""

    def encode(input_ids: torch.Tensor, **_: object) -> object:
        note(spec.name, input_ids[0].tolist())
        outputs = _encoded(spec, input_ids.numpy()).values()
        return own.encoded(spec.name, [torch.from_numpy(values) for values in outputs])

    own.encoders[spec.name].forward = encode


def _encoded(spec: ComponentSpec, ids: npt.NDArray[np.int64]) -> dict[str, Float]:
    """Stand-ins for the outputs of a text encoder, of tokens [batch, tokens, C] or of a whole
    prompt [batch, C], which differ between prompts, encoders and outputs."""
    found: dict[str, Float] = {}
    for place, tensor in enumerate(spec.outputs):
        width = int(tensor.shape[-1])
        waves = np.arange(1, width + 1, dtype=np.float32) / width + np.float32(place)
        phase = np.float32(len(spec.name))
        values = np.sin(ids[..., None].astype(np.float32) * waves + phase)
        found[tensor.name] = values if len(tensor.shape) == 3 else values.mean(axis=1)
    return found


def _told(wiring: Wiring) -> list[InputSpec]:
    """What the denoiser is told, be it by a modulation. Sides give zeros."""
    modulation = () if wiring.modulation is None else wiring.modulation.inputs
    inputs = (*wiring.denoiser.inputs, *modulation)
    return [one for one in inputs if one.fill not in ("side", "modulation")]


def _joined_rows(given: Mapping[str, Array], width: int) -> Float:
    """A stand-in for a modulation: its inputs side by side, and zeros [rows, width]."""
    rows = [values.reshape(len(values), -1) for _, values in sorted(given.items())]
    found: Float = np.concatenate(rows, axis=1, dtype=np.float32)
    return np.pad(found, ((0, 0), (0, width - found.shape[1])))


def _split_rows(spec: ComponentSpec, rows: Float) -> dict[str, Float]:
    """The inputs that `_joined_rows` made `rows` of."""
    found, at = {}, 0
    for tensor in sorted(spec.inputs, key=lambda tensor: tensor.name):
        width = math.prod(n for n in tensor.shape[1:] if isinstance(n, int))
        values = rows[:, at : at + width]
        found[tensor.name] = values.reshape(len(rows), *tensor.shape[1:])
        at += width
    return found


def _predict(wiring: Wiring, given: Mapping[str, Float], fed: _Fed, channels: int) -> Float:
    """A stand-in for the denoiser: notes its inputs, depends on all of them, and is of limited
    size. channels: of what it makes, latents."""
    inputs = _told(wiring)
    by_fill = {one.fill: given[one.name] for one in inputs}
    sample = by_fill["sample"]
    fed.samples.append(sample.copy())
    fed.timesteps.append(float(by_fill["timestep"].reshape(-1)[0]))
    rows = np.zeros(len(sample), np.float32)
    for one in inputs:
        if one.fill not in ("sample", "timestep"):
            value = given[one.name]
            fed.inputs.setdefault(one.name, value.copy())
            rows += np.tanh(value).mean(axis=tuple(range(1, value.ndim)), dtype=np.float64)
    mixed = np.tanh(sample * np.float32(0.9) + np.roll(sample, 1, -1) * np.float32(0.1))
    behind = mixed[:, channels:]  # a mask, and what it leaves
    if behind.size:
        mixed = mixed[:, :channels] + behind.mean(axis=1, keepdims=True) * np.float32(0.2)
    out: Float = mixed + rows[:, None, None, None] * np.float32(0.2)
    return out


def _moments(spec: PipelineSpec, image: Float) -> tuple[Float, Float]:
    """Stand-ins for mean and deviation of an image's latents [1, C, h, w], as the autoencoder
    itself has them."""
    unit, channels = spec.latent.scale_factor, spec.latent.channels
    _, colours, height, width = image.shape
    blocks = image.reshape(1, colours, height // unit, unit, width // unit, unit)
    seen = np.resize(blocks.mean((3, 5))[0], (channels, height // unit, width // unit))[None]
    scale = np.arange(1, channels + 1, dtype=np.float32)[:, None, None] / channels
    mean: Float = (seen * 4 * scale).astype(np.float32)
    spread: Float = (0.1 + np.abs(seen) * scale).astype(np.float32)
    return mean, spread


def _encode_theirs(spec: PipelineSpec, image: torch.Tensor) -> SimpleNamespace:
    """The same as diffusers' autoencoders give them."""
    mean, spread = (torch.from_numpy(values) for values in _moments(spec, image.numpy()))
    if len(spec.wiring.image_encoder.outputs) == 1:
        return SimpleNamespace(latents=mean)
    parameters = torch.cat([mean, 2 * spread.log()], dim=1)
    return SimpleNamespace(latent_dist=DiagonalGaussianDistribution(parameters))


def _encode_ours(spec: PipelineSpec, image: Float) -> tuple[Float, ...]:
    """The same as an encoder's graph gives them."""
    (mean, spread), (scale, shift) = _moments(spec, image), _scaling(spec.latent)
    found = (mean - shift) * scale, spread * scale
    return found[: len(spec.wiring.image_encoder.outputs)]


def _check_image(
    own: OwnPipeline, spec: PipelineSpec, tokenizers: Tokenizers, asked: Request
) -> None:
    """One image by both."""
    theirs, ours = _Fed(), _Fed()
    steps = asked.num_inference_steps
    problem: EdgesdError | None = None
    try:
        _generate_ours(spec, tokenizers, asked, ours)
    except EdgesdError as exc:
        problem = exc
    try:
        _generate_theirs(own, spec, asked, theirs)
    except Exception:
        if problem is not None and steps != spec.num_inference_steps:
            return  # a number of steps that neither has
        raise
    if problem is not None:
        if not np.isfinite(theirs.samples[-1]).all():
            return
        raise ParityError(f"{steps} steps: diffusers runs them, edgesd doesn't: {problem}")
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
    for name, value in ours.inputs.items():
        _compare(f"{name} of {spec.wiring.denoiser.component}", value, theirs.inputs[name])
    allowed = _TOLERANCE if SCHEDULERS[spec.scheduler.name].exact else _LOOSE
    for index, (sample, other) in enumerate(zip(ours.samples, theirs.samples, strict=True)):
        what = f"{spec.scheduler.name}: the sample of step {index + 1} of {steps}"
        _compare(what, sample, other, allowed)
    for latents, other in zip(ours.decoded, theirs.decoded, strict=True):
        _compare(f"what is decoded after {steps} steps", latents, other, allowed)


def _compare(what: str, found: Float, wanted: Float, allowed: float = _TOLERANCE) -> None:
    if found.shape != wanted.shape:
        raise ParityError(f"{what}: {list(found.shape)}, in diffusers {list(wanted.shape)}")
    if not np.isfinite(wanted).all():
        return
    off = float(np.abs(found - wanted).max() / max(1e-9, float(np.abs(wanted).max())))
    if not off <= allowed:
        raise ParityError(
            f"{what} differs from diffusers' by {off:.1e} of its largest value (allowed "
            f"{allowed:.0e})"
        )


def _few(values: list[float]) -> str:
    shown = ", ".join(f"{value:g}" for value in values[:4])
    return f"{shown}{', ...' if len(values) > 4 else ''} ({len(values)})"


def _generate_theirs(own: OwnPipeline, spec: PipelineSpec, asked: Request, fed: _Fed) -> None:
    wiring = spec.wiring
    inputs = _told(wiring)
    names = {one.fill: one.name for one in inputs}
    sample, timestep = names["sample"], names["timestep"]

    def predict(*places: Any, **others: Any) -> tuple[torch.Tensor]:
        back: Callable[[torch.Tensor], torch.Tensor] = _same
        if own.fed is not None:
            tensors, back = own.fed(others)
        else:
            first, second = places
            tensors = {
                sample: first, timestep: torch.as_tensor(second), **dict(_tensors(others))
            }  # fmt: skip
        for name in sorted(tensors.keys() - {one.name for one in inputs}):
            raise ParityError(f"{wiring.denoiser.component}: diffusers feeds it {name}, too")
        values = {one.name: tensors[one.name].numpy() for one in inputs}
        made = _predict(wiring, values, fed, spec.latent.channels)
        return (back(torch.from_numpy(made)),)

    def decode(latents: torch.Tensor, **_: object) -> tuple[torch.Tensor]:
        fed.decoded.append(latents.numpy())
        return (torch.zeros(1, 3, 1, 1),)

    for text in wiring.texts:
        _replace_encoder(own, spec.components[text.component], lambda component, ids: None)
    own.denoiser.forward, own.autoencoder.decode = predict, decode
    _prepare_scheduler(own.pipeline.scheduler)
    size: dict[str, int | None] = {}
    if asked.height is not None:
        size = {"height": asked.height, "width": asked.width}
    elif not spec.shape.dynamic or not own.has_size:
        size = {"height": spec.shape.height, "width": spec.shape.width}
    more: dict[str, Any] = dict(size)
    if asked.denoising_end is not None:
        latents = torch.from_numpy(_begun(spec, Completion(spec).complete(asked)))
        more = {"image": latents, "denoising_start": asked.denoising_end}
    guidance, pipeline = asked.guidance_scale, own.pipeline
    if wiring.encoder is not None:
        own.autoencoder.encode = partial(_encode_theirs, spec)
    if asked.controls:
        more["control_image"] = asked.controls[0].picture.decoded()
    if asked.image is not None:
        complete = Completion(spec).complete(asked)
        assert complete.task is not None
        pipeline = own.of_task(complete.task)
        pipeline.set_progress_bar_config(disable=True)
        pipeline.__class__ = _on_cpu(type(pipeline))
        more = {"image": asked.image}
        if asked.mask is not None:
            more["mask_image"] = asked.mask
        if asked.mask is not None or own.takes_size:
            more |= {"height": complete.height, "width": complete.width}
        if asked.strength is not None:
            more["strength"] = asked.strength
    pipeline(
        asked.prompt,
        num_inference_steps=asked.num_inference_steps,
        guidance_scale=spec.guidance_scale if guidance is None else guidance,
        generator=torch.Generator("cpu").manual_seed(asked.seed),
        output_type="pt",
        **own.options,
        **more,
    )


def _same(made: torch.Tensor) -> torch.Tensor:
    return made


def _begun(spec: PipelineSpec, request: CompleteRequest) -> Float:
    """A stand-in for latents [1, C, h, w] that another model began."""
    height, width = (side // spec.latent.scale_factor for side in (request.height, request.width))
    found: Float = np.random.default_rng(request.seed).standard_normal(
        (1, spec.latent.channels, height, width), np.float32
    )
    return found


def _tensors(arguments: Mapping[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """Arguments that are tensors, those within dictionaries included."""
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor):
            yield name, value
        elif isinstance(value, dict):
            yield from _tensors(value)


def _prepare_scheduler(scheduler: Any) -> None:
    """Tell diffusers' scheduler what it otherwise takes from elsewhere: the seed of its noise, and
    the index of its first step. It looks for the latter by the timestep, and finds the second where
    karras sigmas make the first two timesteps the same: it runs past its end then."""
    if getattr(scheduler, "noise_sampler_seed", 0) is None:
        scheduler.noise_sampler_seed = _SEED
    if hasattr(scheduler, "set_begin_index"):
        set_timesteps = scheduler.set_timesteps

        @wraps(set_timesteps)
        def begun(*args: Any, **options: Any) -> None:
            set_timesteps(*args, **options)
            scheduler.set_begin_index(0)

        scheduler.set_timesteps = begun


def _generate_ours(spec: PipelineSpec, tokenizers: Tokenizers, asked: Request, fed: _Fed) -> None:
    wiring, latent = spec.wiring, spec.latent
    request = Completion(spec).complete(asked)
    guided = flow_of(spec).guided(request.guidance_scale, request.true_cfg_scale)

    def encode(component: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
        (ids,) = inputs.values()
        return dict(_encoded(spec.components[component], ids))

    conditioned = Prompts(wiring.texts, tokenizers).conditioned(
        [request.positive],
        [request.negative] if guided else None,
        encode,
        lambda component: None,
    )
    conditioned = with_size_ids(conditioned, request, 1)
    denoiser = spec.components[wiring.denoiser.component]
    output, own = wiring.denoiser.output, wiring.modulation
    scheduler, noise = scheduler_of(spec, request), BatchNoise([request.seed])
    begun = None if request.denoising_end is None else _begun(spec, request)
    begin = Beginning(spec, [request], scheduler, noise, begun, partial(_encode_ours, spec))
    start = TASKS[request.task or wiring.tasks[0]].prepare(begin)
    modulation = None
    if own is not None:
        made = spec.components[own.component]
        width = int(made.outputs[0].shape[-1])
        steps = scheduler.timesteps[start.first_step : start.last_step]
        stand_in = FakeRunner(
            any_batch(made), lambda given: {own.output: _joined_rows(given, width)}
        )
        with stand_in as runner:
            modulation = modulated(wiring, runner, steps, conditioned, 1, request.guidance_scale)

    def predict(inputs: Mapping[str, Array]) -> dict[str, Array]:
        given = dict(inputs)
        if own is not None:
            (name,) = (one.name for one in wiring.denoiser.inputs if one.fill == "modulation")
            given |= _split_rows(spec.components[own.component], given.pop(name))
        return {output: _predict(wiring, given, fed, latent.channels)}

    latents = denoise(
        wiring,
        {denoiser.name: FakeRunner(any_batch(denoiser), predict)},
        scheduler,
        start,
        conditioned,
        request.guidance_scale,
        noise,
        modulation=modulation,
    )
    fed.decoded.append(_descaled(latent, latents))


def _descaled(latent: LatentSpec, latents: Float) -> Float:
    """Latents [B, C, h, w] as the autoencoder itself takes them."""
    scale, shift = _scaling(latent)
    found: Float = latents / scale + shift
    return found


def _scaling(latent: LatentSpec) -> tuple[Float, Float]:
    """Scale and shift [C, 1, 1] of each channel: latents are what the autoencoder itself makes,
    less the shift, times the scale."""
    scale: Float = np.full((latent.channels, 1, 1), latent.scaling_factor, np.float32)
    shift: Float = np.full_like(scale, latent.shift_factor)
    if latent.mean is not None and latent.std is not None:
        scale /= np.array(latent.std, np.float32)[:, None, None]
        shift = np.array(latent.mean, np.float32)[:, None, None]
    return scale, shift
