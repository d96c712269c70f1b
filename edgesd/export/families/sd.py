"""Stable Diffusion 1.x and 2.x, and models of the same build: LCM, BK-SDM, tiny autoencoders.

CLIP text encoder, UNet2DConditionModel, AutoencoderKL or AutoencoderTiny (Rombach et al. 2022,
arXiv 2112.10752). Graphs, with h, w in the unit of the tensor:

    text_encoder  input_ids int64 [batch, tokens] -> encoder_hidden_states [batch, tokens, C]
    unet          sample [batch, 4, h, w], timestep [1], encoder_hidden_states [batch, tokens, C]
                  (and timestep_cond [batch, D] where guidance is distilled) -> noise_pred
    vae_decoder   latents [batch, 4, h, w] -> image [batch, 3, h, w] in about -1 to 1
    vae_encoder   image [batch, 3, h, w] in -1 to 1 -> mean, std (AutoencoderKL) or latents

All latents are in the space that the UNet works in: scaling is part of the VAE graphs.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from edgesd.errors import InputError, UsageError
from edgesd.export.families import MAX_BATCH, Component, ExportSpec, Family, Sizes
from edgesd.export.quiet import quiet
from edgesd.runtime.schedulers import create_scheduler, sampler_class, sampler_of
from edgesd.spec.base import Dim
from edgesd.spec.pipeline import (
    ComponentSpec,
    LatentSpec,
    PipelineSpec,
    SchedulerSpec,
    ShapeSpec,
    TensorSpec,
    check_multiple,
)

if TYPE_CHECKING:
    from edgesd.export.source import ModelSource

_CLASSES = {
    "text_encoder": ("transformers", ("CLIPTextModel",)),
    "tokenizer": ("transformers", ("CLIPTokenizer", "CLIPTokenizerFast")),
    "unet": ("diffusers", ("UNet2DConditionModel",)),
    "vae": ("diffusers", ("AutoencoderKL", "AutoencoderTiny")),
}
"""Component -> its library, and the classes of it that are taken."""
_STEPS = {False: 20, True: 4}
"""Latent consistency model or not -> steps."""
_COLOURS = 3
"""Channels of an image."""
_UNSUPPORTED = (
    "class_embed_type",
    "num_class_embeds",
    "addition_embed_type",
    "encoder_hid_dim_type",
    "encoder_hid_dim",
    "dual_cross_attention",
)


def plan(
    source: ModelSource,
    size: tuple[int, int] | None = None,
    scheduler: str | None = None,
    batch: int = 1,
) -> ExportSpec:
    """Read the configs of an SD 1.x/2.x pipeline, as diffusers' own pipeline has them.

    size: (width, height) in pixels for static graphs; None for dynamic ones, the model's own size
    being the default. batch: rows of a static UNet; the other graphs take one row, since the
    runtime runs them row by row. scheduler: another sampler than the model's own. Raises InputError
    for a variant of the family, or a scheduler option, that isn't supported, UsageError for a size
    that the model can't generate or an unknown scheduler.
    """
    for component, (library, valid) in _CLASSES.items():
        found, origin = source.class_of(component), source.library_of(component)
        if found not in valid or origin != library:
            raise InputError(
                f"{source.name}: {component} is a {found} of {origin}, which isn't supported: "
                f"valid: {', '.join(valid)} of {library}"
            )
    given = source.config("unet/config.json")
    for field in _UNSUPPORTED:  # before the network is made: some can't be without their weights
        if given.get(field):
            raise InputError(f"{source.name}: a UNet with {field}={given[field]!r} isn't supported")
    options = source.config("scheduler/scheduler_config.json")
    name = scheduler or sampler_of(source.class_of("scheduler"), options)
    create_scheduler(name, options)  # before diffusers, whose advice may not fit edgesd
    make_own = partial(_modules().own_pipeline, source, sampler_class(name))
    own = make_own()
    text = own.text_encoder.config.to_dict()
    unet, vae = own.unet.config, own.vae.config
    _check_unet(source.name, unet, text)
    tokens = _tokens(source, own.tokenizer, text)
    latent = _latent_spec(source, vae, unet, own.vae_scale_factor)
    shape = _shape_spec(size, batch, unet, latent.scale_factor)
    components = (
        _text_encoder(source, text, tokens, shape),
        _unet(source, unet, text, tokens, shape, latent),
        _vae_decoder(source, latent, shape),
        _vae_encoder(source, latent, shape),
    )
    config = _modules().scheduler_config(own.scheduler)
    hints = source.hints()
    steps = int(hints.get("num_inference_steps", _STEPS[_is_lcm(source)]))
    guidance = inspect.signature(own.__call__).parameters["guidance_scale"].default
    create_scheduler(name, config).set_timesteps(steps)  # refuses here what the board would
    return ExportSpec(
        PipelineSpec(
            family=FAMILY.name,
            source=source.name,
            source_sha256=source.sha256(),
            components={c.name: c.spec for c in components},
            scheduler=SchedulerSpec(name, config),
            latent=latent,
            shape=shape,
            max_tokens=tokens,
            num_inference_steps=steps,
            guidance_scale=float(hints.get("guidance_scale", guidance)),
        ),
        components,
        lambda: _modules().with_sampler(make_own(), sampler_class(name)),
    )


FAMILY = Family(
    name="sd",
    class_names=(
        "StableDiffusionPipeline",
        "StableDiffusionImg2ImgPipeline",
        "LatentConsistencyModelPipeline",
    ),
    weights={
        "text_encoder": "model",
        "unet": "diffusion_pytorch_model",
        "vae": "diffusion_pytorch_model",
    },
    configs=("scheduler", "tokenizer"),
    plan=plan,
)


def _is_lcm(source: ModelSource) -> bool:
    return source.index.get("_class_name") == "LatentConsistencyModelPipeline"


def _check_unet(name: str, unet: Mapping[str, Any], text: Mapping[str, Any]) -> None:
    channels, context = unet["in_channels"], unet["cross_attention_dim"]
    if channels != unet["out_channels"]:
        raise InputError(
            f"{name}: its UNet takes {channels} channels and returns {unet['out_channels']}"
            ": inpainting, depth and editing models aren't supported"
        )
    widths = set(context) if isinstance(context, list | tuple) else {context}  # of each block
    if widths != {text["hidden_size"]}:
        raise InputError(
            f"{name}: the UNet expects text embeddings of width {context}, and the text encoder "
            f"makes {text['hidden_size']}: do both belong to one model?"
        )
    if text.get("use_attention_mask"):
        raise InputError(f"{name}: a text encoder with use_attention_mask isn't supported")


def _tokens(source: ModelSource, tokenizer: Any, text: Mapping[str, Any]) -> int:
    """Tokens of a prompt with its padding: as many as diffusers' tokenizer gives."""
    tokens, most = tokenizer.model_max_length, text["max_position_embeddings"]
    folder = source.root / "tokenizer"
    if not 2 <= tokens <= most:
        raise InputError(
            f"{folder}/tokenizer_config.json: model_max_length is missing or isn't 2 to {most}, as "
            f"many tokens as the text encoder takes: set it to {most}"
        )
    if (last := max(tokenizer.get_vocab().values())) >= text["vocab_size"]:
        raise InputError(
            f"{folder} gives token ids up to {last}, and the text encoder has embeddings for "
            f"{text['vocab_size']} only: save the text encoder that these tokens were added to"
        )
    return int(tokens)


def _latent_spec(
    source: ModelSource, vae: Mapping[str, Any], unet: Mapping[str, Any], scale_factor: int
) -> LatentSpec:
    """diffusers' Stable Diffusion pipelines scale latents, and leave an autoencoder's shift_factor,
    latents_mean and latents_std alone."""
    tiny = source.class_of("vae") == "AutoencoderTiny"
    if vae["latent_channels"] != unet["in_channels"]:
        raise InputError(
            f"{source.name}: the VAE has {vae['latent_channels']} latent channels and the UNet "
            f"{unet['in_channels']}: do both belong to one model?"
        )
    for channels in ("in_channels", "out_channels"):
        if vae[channels] != _COLOURS:
            raise InputError(
                f"{source.name}: its VAE has {channels}={vae[channels]}: only images of three "
                "colours are supported"
            )
    scaling = vae["scaling_factor"]
    if scaling is None or not math.isfinite(scaling) or scaling == 0:
        raise InputError(
            f"{source.root}/vae/config.json: scaling_factor is {scaling}: expected a number that "
            "latents are divided by, such as 0.18215"
        )
    return LatentSpec(
        channels=vae["latent_channels"],
        scale_factor=scale_factor,
        scaling_factor=float(scaling),
        halo=_tiny_halo(vae["num_decoder_blocks"]) if tiny else None,
        levels=None if tiny else tuple(reversed(vae["block_out_channels"])),
    )


def _tiny_halo(blocks: Sequence[int]) -> int:
    """Latent pixels that a pixel of AutoencoderTiny's decoder sees to each side: each level has a
    convolution, and blocks of three; a pixel before upsampling is two behind it."""
    reach = 1  # the last convolution
    for level in reversed(range(len(blocks))):
        reach += 3 * blocks[level] + 1
        if level:
            reach = -(-reach // 2)
    return reach


def _shape_spec(
    size: tuple[int, int] | None, batch: int, unet: Mapping[str, Any], scale_factor: int
) -> ShapeSpec:
    """Sizes that diffusers generates, multiples of `scale_factor`, and none in their place.

    Graphs for any size take multiples of all the UNet's levels, which is faster, or of
    `scale_factor` if the model's own size is none.
    """
    step = _unet_multiple(unet) * scale_factor
    if size is None:
        own = unet["sample_size"]
        sides = tuple(own) if isinstance(own, list | tuple) else (own, own)
        if len(sides) != 2 or not all(type(side) is int and side > 0 for side in sides):
            raise InputError(
                f"the UNet's sample_size is {own!r}, which says no default size: give --size"
            )
        height, width = (side * scale_factor for side in sides)
        even = height % step == 0 and width % step == 0
        return ShapeSpec(height, width, MAX_BATCH, True, step if even else scale_factor)
    width, height = size
    for what, value in (("height", height), ("width", width)):
        check_multiple(what, value, scale_factor)
    if not 1 <= batch <= MAX_BATCH:
        raise UsageError(f"batch {batch} is out of range: expected 1 to {MAX_BATCH}")
    even = height % step == 0 and width % step == 0
    return ShapeSpec(height, width, batch, False, step if even else scale_factor)


def _text_encoder(
    source: ModelSource, text: Mapping[str, Any], tokens: int, shape: ShapeSpec
) -> Component:
    def load(weights: bool = True) -> Any:
        return _modules().load_text_encoder(source, weights)

    batch = _dims(shape, 1)[0]
    return Component(
        ComponentSpec(
            "text_encoder",
            (TensorSpec("input_ids", "int64", (batch, tokens)),),
            (_float("encoder_hidden_states", batch, tokens, text["hidden_size"]),),
        ),
        load,
        {},
        ({"batch": 1}, {"batch": 2}) if shape.dynamic else ({}, {}),
        text["vocab_size"],
    )


def _unet(
    source: ModelSource,
    unet: Mapping[str, Any],
    text: Mapping[str, Any],
    tokens: int,
    shape: ShapeSpec,
    latent: LatentSpec,
) -> Component:
    multiple = _unet_multiple(unet)
    follow = shape.dynamic and shape.multiple_of % (multiple * latent.scale_factor) != 0

    def load(weights: bool = True) -> Any:
        return _modules().load_unet(source, weights, follow)

    batch, height, width = _dims(shape, latent.scale_factor)
    if not shape.dynamic:
        batch = shape.batch
    inputs = [
        _float("sample", batch, latent.channels, height, width),
        _float("timestep", 1),
        _float("encoder_hidden_states", batch, tokens, text["hidden_size"]),
    ]
    if dim := unet["time_cond_proj_dim"]:
        inputs.append(_float("timestep_cond", batch, dim))
    noise_pred = _float("noise_pred", batch, latent.channels, height, width)
    return Component(
        ComponentSpec("unet", tuple(inputs), (noise_pred,)),
        load,
        {} if follow else {"height": multiple, "width": multiple},
        _odd_sizes(shape, latent.scale_factor, multiple)
        if follow
        else _sizes(shape, latent.scale_factor),
    )


def _vae_decoder(source: ModelSource, latent: LatentSpec, shape: ShapeSpec) -> Component:
    def load(weights: bool = True) -> Any:
        return _modules().load_vae_decoder(source, latent, weights)

    batch, height, width = _dims(shape, latent.scale_factor)
    _, rows, columns = _dims(shape, 1)
    return Component(
        ComponentSpec(
            "vae_decoder",
            (_float("latents", batch, latent.channels, height, width),),
            (_float("image", batch, 3, rows, columns),),
        ),
        load,
        {},
        _sizes(shape, latent.scale_factor),
    )


def _vae_encoder(source: ModelSource, latent: LatentSpec, shape: ShapeSpec) -> Component:
    def load(weights: bool = True) -> Any:
        return _modules().load_vae_encoder(source, latent, weights)

    batch, height, width = _dims(shape, latent.scale_factor)
    _, rows, columns = _dims(shape, 1)
    tiny = source.class_of("vae") == "AutoencoderTiny"
    names = ("latents",) if tiny else ("mean", "std")
    return Component(
        ComponentSpec(
            "vae_encoder",
            (_float("image", batch, 3, rows, columns),),
            tuple(_float(name, batch, latent.channels, height, width) for name in names),
        ),
        load,
        {"height": latent.scale_factor, "width": latent.scale_factor},
        _sizes(shape, 1),
    )


def _modules() -> Any:
    """The torch side. Its libraries log while they are imported."""
    with quiet():
        from edgesd.export.families import modules
    return modules


def _float(name: str, *shape: Dim) -> TensorSpec:
    return TensorSpec(name, "float32", shape)


def _dims(shape: ShapeSpec, unit: int) -> tuple[Dim, Dim, Dim]:
    """Batch, height, width of a tensor whose elements are `unit` pixels wide; one static row."""
    if shape.dynamic:
        return "batch", "height", "width"
    return 1, shape.height // unit, shape.width // unit


def _sizes(shape: ShapeSpec, unit: int) -> tuple[Sizes, ...]:
    """Where to check: the pipeline's own size, and a smaller oblong one in a batch of 2."""
    if not shape.dynamic:
        return {}, {}
    step = shape.multiple_of
    height = max(2 * step, shape.height // 2 // step * step)
    return (
        {"batch": 1, "height": shape.height // unit, "width": shape.width // unit},
        {"batch": 2, "height": height // unit, "width": (height + step) // unit},
    )


def _odd_sizes(shape: ShapeSpec, unit: int, multiple: int) -> tuple[Sizes, ...]:
    """The same for a UNet that takes any size: the smaller one is no multiple of any level's."""
    rows = max(2 * multiple, shape.height // unit // 2) | 1
    return (
        {"batch": 1, "height": shape.height // unit, "width": shape.width // unit},
        {"batch": 2, "height": rows, "width": rows + multiple + 1},
    )


def _unet_multiple(unet: Mapping[str, Any]) -> int:
    """Latent rows and columns that are a multiple of this are halved at each level but the last,
    and doubled again."""
    return int(2 ** (len(unet["block_out_channels"]) - 1))
