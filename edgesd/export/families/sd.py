"""Stable Diffusion 1.x and 2.x, and models of the same build: LCM, BK-SDM, tiny autoencoders.

CLIP text encoder, UNet2DConditionModel, AutoencoderKL or AutoencoderTiny (Rombach et al. 2022,
arXiv 2112.10752). Their graphs: parts/clip.py, parts/unet.py, parts/vae.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from edgesd.export.families import (
    AUTOENCODER,
    TOKENIZER_OF,
    Component,
    ExportSpec,
    Family,
    OwnPipeline,
)
from edgesd.export.families.checkpoint import TRANSFORMERS_STEM, Checkpoint
from edgesd.export.families.latent_diffusion import (
    CLASSES,
    DECODER,
    ENCODER,
    TOKENIZERS,
    UNET,
    WEIGHTS,
    check_classes,
    check_unet,
    clip_skip,
    concat,
    finished,
    for_images,
    inpaints,
    sampling,
    tasks_of,
    unet_config,
    with_sampler,
)
from edgesd.export.families.variants import Defaults
from edgesd.export.quiet import quiet
from edgesd.runtime.schedulers import sampler_class
from edgesd.spec.pipeline import ImageTask, stable_diffusion

_TEXT_ENCODER = "text_encoder"
_TOKENIZER = TOKENIZER_OF[_TEXT_ENCODER]
_CLASSES = {
    _TEXT_ENCODER: ("transformers", ("CLIPTextModel",)),
    _TOKENIZER: TOKENIZERS,
    **CLASSES,
}
_LCM = "LatentConsistencyModelPipeline"
_LCM_FROM_IMAGE = "LatentConsistencyModelImg2ImgPipeline"
_FROM_IMAGES: Mapping[ImageTask, str] = {
    "image": "StableDiffusionImg2ImgPipeline",
    "inpaint": "StableDiffusionInpaintPipeline",
}
_FROM_TEXT = "StableDiffusionPipeline"


def export_spec(
    source: Checkpoint,
    size: tuple[int, int] | None = None,
    scheduler: str | None = None,
    batch: int = 1,
    chunks: int = 1,
    tasks: Sequence[ImageTask] = (),
) -> ExportSpec:
    """Read the configs of an SD 1.x/2.x pipeline, as diffusers' own pipeline has them.

    size: (width, height) in pixels for static graphs; None for dynamic ones, the model's own size
    being the default. batch: of a static UNet; the batch of the other graphs is 1, since the
    runtime runs them once for each prompt or image. chunks: of a prompt, in a static UNet.
    scheduler: another sampler than the model's own. tasks: beside text to image. Raises InputError
    for a variant of the family, or a scheduler option, that isn't supported, UsageError for a size
    or a task that isn't the model's, or an unknown scheduler.
    """
    check_classes(source, _CLASSES)
    given = unet_config(source)
    defaults = sampling(source, _class_of(source, given), scheduler, given)
    with quiet():  # libraries log while they are imported
        from edgesd.export.families.parts import clip, unet, vae
        from edgesd.export.families.parts.sides import with_sides

    own = _diffusers_pipeline(source, defaults, given)
    text = own.text_encoder.config.to_dict()
    config = own.unet.config
    check_unet(source.name, config, [text])
    beside = concat(source.name, config)
    can = tasks_of(source.name, beside, tasks)
    tokens = clip.token_count(source.folder(_TOKENIZER), own.tokenizer, text)
    latent = vae.latent_spec(source, own.vae.config, config["out_channels"], own.vae_scale_factor)
    shape = unet.shape_spec(size, batch, config, latent.scale_factor)
    states = tokens, text["hidden_size"]
    components: tuple[Component, ...] = (
        clip.text_encoder(source, _TEXT_ENCODER, text, tokens, shape, clip_skip(source)),
        unet.unet(source, UNET, config, states, shape, latent, chunks),
        vae.vae_decoder(source, DECODER, latent, shape),
        *vae.encoder_for(can, source, ENCODER, latent, shape),
    )
    wiring = stable_diffusion(tokens, bool(config["time_cond_proj_dim"]))
    wiring = for_images(wiring, components, beside, can, _FROM_IMAGES)
    components, wiring = with_sides(source, components, config, shape, latent, wiring)
    return finished(
        FAMILY.name, source, defaults, own.scheduler, components, latent, shape, wiring,
        lambda: _own_pipeline(source, defaults, given),
    )  # fmt: skip


FAMILY = Family(
    name="sd",
    class_names=(_FROM_TEXT, *_FROM_IMAGES.values(), _LCM),
    weights={_TEXT_ENCODER: TRANSFORMERS_STEM, **WEIGHTS},
    configs=("scheduler", _TOKENIZER),
    export_spec=export_spec,
)


def _class_of(source: Checkpoint, unet: Mapping[str, Any]) -> str:
    """The pipeline that generates from prompts alone; of a model for inpainting, that. unet: its
    config."""
    class_name = str(source.index["_class_name"])
    if inpaints(source.name, unet):
        return _FROM_IMAGES["inpaint"]
    return _FROM_TEXT if class_name in _FROM_IMAGES.values() else class_name


def _diffusers_pipeline(source: Checkpoint, defaults: Defaults, unet: Mapping[str, Any]) -> Any:
    """diffusers' own pipeline of a model, as its constructor leaves the configs. unet: its
    config."""
    with quiet():
        import diffusers
        import transformers

        from edgesd.export.families.parts.clip import load_tokenizer
        from edgesd.export.families.parts.diffusers_pipeline import diffusers_pipeline

    return diffusers_pipeline(
        source,
        _class_of(source, unet),
        {
            _TEXT_ENCODER: transformers.CLIPTextModel,
            UNET: diffusers.UNet2DConditionModel,
            AUTOENCODER: getattr(diffusers, source.class_of(AUTOENCODER)),
        },
        {_TOKENIZER: lambda: load_tokenizer(source.folder(_TOKENIZER), source.embeddings)},
        sampler_class(defaults.sampler),
        defaults.options,
        safety_checker=None,
        feature_extractor=None,
        image_encoder=None,
        requires_safety_checker=False,
    )


def _own_pipeline(source: Checkpoint, defaults: Defaults, unet: Mapping[str, Any]) -> OwnPipeline:
    """The same with the sampler's scheduler. The pipeline of latent consistency models takes its
    own only: Stable Diffusion's, which feeds such a UNet just as well, takes the others."""
    from edgesd.export.families.parts.diffusers_pipeline import with_networks_of

    pipeline = _diffusers_pipeline(source, defaults, unet)
    own = type(pipeline.scheduler).__name__
    if type(pipeline).__name__ == _LCM and own != sampler_class(defaults.sampler):
        import diffusers

        with quiet():
            plain: Any = diffusers.StableDiffusionPipeline
            pipeline = plain(**pipeline.components, requires_safety_checker=False)
    pipeline = with_sampler(pipeline, defaults.sampler)
    from_images = dict(_FROM_IMAGES)
    if type(pipeline).__name__ == _LCM:
        from_images["image"] = _LCM_FROM_IMAGE
    # The pipeline of latent consistency models has a default size where it is one number only.
    takes_two = hasattr(pipeline, "_is_unet_config_sample_size_int")
    return OwnPipeline(
        pipeline,
        encoders={_TEXT_ENCODER: pipeline.text_encoder},
        tokenizers={_TOKENIZER: pipeline.tokenizer},
        denoiser=pipeline.unet,
        autoencoder=pipeline.vae,
        encode=lambda prompt: pipeline.encode_prompt(prompt, "cpu", 1, False),
        encoded=lambda component, outputs: tuple(outputs),
        has_size=takes_two or isinstance(pipeline.unet.config.sample_size, int),
        of_task=lambda task: with_networks_of(
            pipeline, from_images[task], requires_safety_checker=False
        ),
    )
