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

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from edgesd.errors import InputError, UsageError
from edgesd.export.families import MAX_BATCH, Component, Family, Plan, Sizes
from edgesd.export.quiet import quiet
from edgesd.runtime.schedulers import create_scheduler, sampler_of
from edgesd.spec import (
    ComponentSpec,
    Dim,
    LatentSpec,
    PipelineSpec,
    SchedulerSpec,
    ShapeSpec,
    TensorSpec,
    check_multiple,
    nearest_multiple,
)

if TYPE_CHECKING:
    from edgesd.export.source import ModelSource

_CLASSES = {
    "text_encoder": ("CLIPTextModel",),
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL", "AutoencoderTiny"),
}
_DEFAULTS = {False: (20, 7.5), True: (4, 8.5)}
"""Latent consistency model or not -> steps and guidance."""
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
) -> Plan:
    """Read the configs of an SD 1.x/2.x pipeline.

    size: (width, height) in pixels for static graphs; None for dynamic ones, the model's own size
    being the default. batch: rows of a static UNet; the other graphs take one row, since the
    runtime runs them row by row. scheduler: another sampler than the model's own. Raises InputError
    for a variant of the family, or a scheduler option, that isn't supported, UsageError for a size
    that the model can't draw or an unknown scheduler.
    """
    for component, valid in _CLASSES.items():
        found = source.class_of(component)
        if found not in valid:
            raise InputError(
                f"{source.name}: {component} is a {found}, which isn't supported: "
                f"valid: {', '.join(valid)}"
            )
    text = source.config("text_encoder/config.json")
    unet = source.config("unet/config.json")
    vae = source.config("vae/config.json")
    _check_unet(source.name, unet, text)
    latent = _latent_spec(source, vae, unet)
    shape = _shape_spec(size, batch, unet, latent.scale_factor)
    components = (
        _text_encoder(source, text, shape),
        _unet(source, unet, text, shape, latent),
        _vae_decoder(source, latent, shape),
        _vae_encoder(source, latent, shape),
    )
    config = _scheduler_config(source)
    name = scheduler or sampler_of(source.class_of("scheduler"), config)
    steps, guidance = _DEFAULTS[_is_lcm(source)]
    hints = source.hints()
    steps = int(hints.get("num_inference_steps", steps))
    create_scheduler(name, config).set_timesteps(steps)  # refuses here what the board would
    return Plan(
        PipelineSpec(
            family=FAMILY.name,
            source=source.name,
            source_sha256=source.sha256(),
            components={c.name: c.spec for c in components},
            scheduler=SchedulerSpec(name, config),
            latent=latent,
            shape=shape,
            max_tokens=_tokens(text),
            num_inference_steps=steps,
            guidance_scale=float(hints.get("guidance_scale", guidance)),
        ),
        components,
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


def _scheduler_config(source: ModelSource) -> dict[str, Any]:
    """scheduler_config.json as diffusers' Stable Diffusion pipelines take it.

    Their constructor sets steps_offset to 1 and clip_sample to False, whatever the file says
    (StableDiffusionPipeline.__init__); that of latent consistency models doesn't.
    """
    config = source.config("scheduler/scheduler_config.json")
    if _is_lcm(source):
        return config
    return {**config, "steps_offset": 1, "clip_sample": False}


def _check_unet(name: str, unet: Mapping[str, Any], text: Mapping[str, Any]) -> None:
    for field in _UNSUPPORTED:
        if unet.get(field):
            raise InputError(f"{name}: a UNet with {field}={unet[field]!r} isn't supported")
    channels, context = unet.get("in_channels", 4), unet.get("cross_attention_dim", 1280)
    if channels != unet.get("out_channels", 4):
        raise InputError(
            f"{name}: its UNet takes {channels} channels and returns {unet.get('out_channels', 4)}"
            ": inpainting, depth and editing models aren't supported"
        )
    if context != _width(text):
        raise InputError(
            f"{name}: the UNet expects text embeddings of width {context}, "
            f"and the text encoder makes {_width(text)}: do both belong to one model?"
        )
    if text.get("use_attention_mask"):
        raise InputError(f"{name}: a text encoder with use_attention_mask isn't supported")


def _latent_spec(
    source: ModelSource, vae: Mapping[str, Any], unet: Mapping[str, Any]
) -> LatentSpec:
    tiny = source.class_of("vae") == "AutoencoderTiny"
    levels = vae.get("block_out_channels") or vae.get("decoder_block_out_channels")
    channels = vae.get("latent_channels", 4)
    if channels != unet.get("in_channels", 4):
        raise InputError(
            f"{source.name}: the VAE has {channels} latent channels and the UNet "
            f"{unet.get('in_channels', 4)}: do both belong to one model?"
        )
    scaling = vae.get("scaling_factor")
    return LatentSpec(
        channels=channels,
        scale_factor=2 ** (len(levels or ((64,) * 4 if tiny else (64,))) - 1),
        scaling_factor=float((1.0 if tiny else 0.18215) if scaling is None else scaling),
        shift_factor=float(vae.get("shift_factor") or 0.0),
        halo=_tiny_halo(vae.get("num_decoder_blocks") or (3, 3, 3, 1)) if tiny else None,
        levels=None if tiny else tuple(reversed(levels or (64,))),
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
    step = _unet_multiple(unet) * scale_factor
    if size is None:
        own = unet.get("sample_size") or 64
        rows, columns = own if isinstance(own, list) else (own, own)
        height, width = (nearest_multiple(n * scale_factor, step) for n in (rows, columns))
        return ShapeSpec(height, width, batch=MAX_BATCH, dynamic=True, multiple_of=step)
    width, height = size
    for what, value in (("height", height), ("width", width)):
        check_multiple(what, value, step)
    if not 1 <= batch <= MAX_BATCH:
        raise UsageError(f"batch {batch} is out of range: expected 1 to {MAX_BATCH}")
    return ShapeSpec(height, width, batch=batch, dynamic=False, multiple_of=step)


def _text_encoder(source: ModelSource, text: Mapping[str, Any], shape: ShapeSpec) -> Component:
    def load(weights: bool = True) -> Any:
        return _modules().load_text_encoder(source, weights)

    batch = _dims(shape, 1)[0]
    vocab_size = text.get("vocab_size", 49408)
    return Component(
        ComponentSpec(
            "text_encoder",
            (TensorSpec("input_ids", "int64", (batch, _tokens(text))),),
            (_float("encoder_hidden_states", batch, _tokens(text), _width(text)),),
        ),
        load,
        {},
        ({"batch": 1}, {"batch": 2}) if shape.dynamic else ({}, {}),
        vocab_size,
    )


def _unet(
    source: ModelSource,
    unet: Mapping[str, Any],
    text: Mapping[str, Any],
    shape: ShapeSpec,
    latent: LatentSpec,
) -> Component:
    def load(weights: bool = True) -> Any:
        return _modules().load_unet(source, weights)

    batch, height, width = _dims(shape, latent.scale_factor)
    if not shape.dynamic:
        batch = shape.batch
    inputs = [
        _float("sample", batch, latent.channels, height, width),
        _float("timestep", 1),
        _float("encoder_hidden_states", batch, _tokens(text), _width(text)),
    ]
    if dim := unet.get("time_cond_proj_dim"):
        inputs.append(_float("timestep_cond", batch, dim))
    noise_pred = _float("noise_pred", batch, latent.channels, height, width)
    multiple = _unet_multiple(unet)
    return Component(
        ComponentSpec("unet", tuple(inputs), (noise_pred,)),
        load,
        {"height": multiple, "width": multiple},
        _sizes(shape, latent.scale_factor),
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


def _unet_multiple(unet: Mapping[str, Any]) -> int:
    """Latent rows and columns must be a multiple of this: each level but the last halves them."""
    blocks = unet.get("block_out_channels") or (320, 640, 1280, 1280)
    return int(2 ** (len(blocks) - 1))


def _tokens(text: Mapping[str, Any]) -> int:
    return int(text.get("max_position_embeddings", 77))


def _width(text: Mapping[str, Any]) -> int:
    return int(text.get("hidden_size", 512))
