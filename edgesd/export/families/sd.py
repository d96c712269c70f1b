"""Stable Diffusion 1.x and 2.x, and models of the same build: LCM, BK-SDM, tiny autoencoders.

CLIP text encoder, UNet2DConditionModel, AutoencoderKL or AutoencoderTiny (Rombach et al. 2022,
arXiv 2112.10752). Their graphs: parts/clip.py, parts/unet.py, parts/vae.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgesd.errors import InputError
from edgesd.export.families import ExportSpec, Family, OwnPipeline
from edgesd.export.families.checkpoint import Checkpoint
from edgesd.export.families.variants import SCHEDULER_CONFIG, Defaults, defaults_of
from edgesd.export.quiet import quiet
from edgesd.runtime.schedulers import create_scheduler, sampler_class
from edgesd.spec.pipeline import PipelineSpec, SchedulerSpec, stable_diffusion

_TEXT_ENCODER, _UNET, _VAE, _TOKENIZER = "text_encoder", "unet", "vae", "tokenizer"
_CLASSES = {
    _TEXT_ENCODER: ("transformers", ("CLIPTextModel",)),
    _TOKENIZER: ("transformers", ("CLIPTokenizer", "CLIPTokenizerFast")),
    _UNET: ("diffusers", ("UNet2DConditionModel",)),
    _VAE: ("diffusers", ("AutoencoderKL", "AutoencoderTiny")),
}
"""Component -> its library, and the classes of it that are taken."""
_LCM = "LatentConsistencyModelPipeline"
_FROM_TEXT = {"StableDiffusionImg2ImgPipeline": "StableDiffusionPipeline"}
"""Pipelines that begin with an image -> the one that generates from prompts alone."""
_UNSUPPORTED = (
    "class_embed_type",
    "num_class_embeds",
    "addition_embed_type",
    "encoder_hid_dim_type",
    "encoder_hid_dim",
    "dual_cross_attention",
)


def export_spec(
    source: Checkpoint,
    size: tuple[int, int] | None = None,
    scheduler: str | None = None,
    batch: int = 1,
    chunks: int = 1,
) -> ExportSpec:
    """Read the configs of an SD 1.x/2.x pipeline, as diffusers' own pipeline has them.

    size: (width, height) in pixels for static graphs; None for dynamic ones, the model's own size
    being the default. batch: of a static UNet; the batch of the other graphs is 1, since the
    runtime runs them once for each prompt or image. chunks: of a prompt, in a static UNet.
    scheduler: another sampler than the model's own. Raises InputError for a variant of the family,
    or a scheduler option, that isn't supported, UsageError for a size that the model can't generate
    or an unknown scheduler.
    """
    for component, (library, valid) in _CLASSES.items():
        found, origin = source.class_of(component), source.library_of(component)
        if found not in valid or origin != library:
            raise InputError(
                f"{source.name}: {component} is a {found} of {origin}, which isn't supported: "
                f"valid: {', '.join(valid)} of {library}"
            )
    given = source.config(f"{_UNET}/config.json")
    for field in _UNSUPPORTED:  # before the network is made: some can't be without their weights
        if given.get(field):
            raise InputError(f"{source.name}: a UNet with {field}={given[field]!r} isn't supported")
    with quiet():  # libraries log while they are imported
        from edgesd.export.families.parts import clip, unet, vae
        from edgesd.export.families.parts.diffusers_pipeline import (
            default_guidance,
            scheduler_config,
        )

        guidance = default_guidance(_class_of(source))
    defaults = defaults_of(source, scheduler, guidance, bool(given.get("time_cond_proj_dim")))
    # Before diffusers makes one, whose advice may not fit edgesd.
    create_scheduler(defaults.sampler, {**source.config(SCHEDULER_CONFIG), **defaults.options})
    own = _diffusers_pipeline(source, defaults)
    text_config = own.text_encoder.config.to_dict()
    unet_config, vae_config = own.unet.config, own.vae.config
    _check_unet(source.name, unet_config, text_config)
    tokens = clip.token_count(source.folder(_TOKENIZER), own.tokenizer, text_config)
    latent = vae.latent_spec(source, vae_config, unet_config["in_channels"], own.vae_scale_factor)
    shape = unet.shape_spec(size, batch, unet_config, latent.scale_factor)
    states = tokens, text_config["hidden_size"]
    components = (
        clip.text_encoder(source, _TEXT_ENCODER, text_config, tokens, shape),
        unet.unet(source, _UNET, unet_config, states, shape, latent, chunks),
        vae.vae_decoder(source, "vae_decoder", latent, shape),
    )
    config = scheduler_config(own.scheduler)
    sampler, steps = defaults.sampler, defaults.steps
    create_scheduler(sampler, config).set_timesteps(steps)  # refuses here what the board would
    return ExportSpec(
        PipelineSpec(
            family=FAMILY.name,
            source=source.public_name,
            source_sha256=source.sha256(),
            components={c.name: c.spec for c in components},
            scheduler=SchedulerSpec(sampler, config),
            latent=latent,
            shape=shape,
            num_inference_steps=steps,
            guidance_scale=defaults.guidance,
            wiring=stable_diffusion(tokens, bool(unet_config["time_cond_proj_dim"])),
        ),
        components,
        lambda: _own_pipeline(source, defaults),
        defaults.assumed,
    )


FAMILY = Family(
    name="sd",
    class_names=("StableDiffusionPipeline", *_FROM_TEXT, _LCM),
    weights={
        _TEXT_ENCODER: "model",
        _UNET: "diffusion_pytorch_model",
        _VAE: "diffusion_pytorch_model",
    },
    configs=("scheduler", _TOKENIZER),
    export_spec=export_spec,
)


def _class_of(source: Checkpoint) -> str:
    """The pipeline that generates from prompts alone."""
    class_name = str(source.index["_class_name"])
    return _FROM_TEXT.get(class_name, class_name)


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


def _diffusers_pipeline(source: Checkpoint, defaults: Defaults) -> Any:
    """diffusers' own text-to-image pipeline of a model, as its constructor leaves the configs."""
    with quiet():
        import diffusers
        import transformers

        from edgesd.export.families.parts.clip import load_tokenizer
        from edgesd.export.families.parts.diffusers_pipeline import diffusers_pipeline

    return diffusers_pipeline(
        source,
        _class_of(source),
        {
            _TEXT_ENCODER: transformers.CLIPTextModel,
            _UNET: diffusers.UNet2DConditionModel,
            _VAE: getattr(diffusers, source.class_of(_VAE)),
        },
        {_TOKENIZER: lambda: load_tokenizer(source.folder(_TOKENIZER))},
        sampler_class(defaults.sampler),
        defaults.options,
        safety_checker=None,
        feature_extractor=None,
        image_encoder=None,
        requires_safety_checker=False,
    )


def _own_pipeline(source: Checkpoint, defaults: Defaults) -> OwnPipeline:
    """The same with a scheduler of the sampler's diffusers class, made from its own one's options
    where that is another. The pipeline of latent consistency models takes its own only: Stable
    Diffusion's, which feeds such a UNet just as well, takes the others."""
    pipeline, cls = _diffusers_pipeline(source, defaults), sampler_class(defaults.sampler)
    if type(pipeline.scheduler).__name__ != cls:
        import diffusers

        with quiet():
            other = getattr(diffusers, cls).from_config(pipeline.scheduler.config)
            if type(pipeline).__name__ == _LCM:
                plain: Any = diffusers.StableDiffusionPipeline
                pipeline = plain(**pipeline.components, requires_safety_checker=False)
            pipeline.scheduler = other
    # The pipeline of latent consistency models has a default size where it is one number only.
    takes_two = hasattr(pipeline, "_is_unet_config_sample_size_int")
    return OwnPipeline(
        pipeline,
        encoders={_TEXT_ENCODER: pipeline.text_encoder},
        tokenizers={_TOKENIZER: pipeline.tokenizer},
        denoiser=pipeline.unet,
        autoencoder=pipeline.vae,
        encode=lambda prompt: pipeline.encode_prompt(prompt, "cpu", 1, False),
        has_size=takes_two or isinstance(pipeline.unet.config.sample_size, int),
    )
