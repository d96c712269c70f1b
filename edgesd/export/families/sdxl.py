"""Stable Diffusion XL, and models of the same build: Turbo, Lightning, LCM, SSD-1B, Playground; and
its refiner, which has the second text encoder alone and goes on with latents of another.

Two CLIP text encoders, of which the second also gives an embedding of the whole text, and a UNet
that is told that and sizes (Podell et al. 2023, arXiv 2307.01952). Their graphs: parts/clip.py,
parts/unet.py, parts/vae.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from edgesd.errors import InputError
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
from edgesd.spec.pipeline import (
    SIZE_FILLS,
    DecoderSpec,
    DenoiserSpec,
    Fill,
    ImageTask,
    InputSpec,
    Part,
    TextSpec,
    TokenizerRef,
    Wiring,
)

if TYPE_CHECKING:
    from torch import Tensor

_FIRST, _SECOND = TOKENIZER_OF
_CLASSES = {
    _FIRST: ("transformers", ("CLIPTextModel",)),
    _SECOND: ("transformers", ("CLIPTextModelWithProjection",)),
    **dict.fromkeys(TOKENIZER_OF.values(), TOKENIZERS),
    **CLASSES,
}
_PIPELINE, _FROM_IMAGE = "StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline"
_INPAINTING = "StableDiffusionXLInpaintPipeline"
_FROM_IMAGES: Mapping[ImageTask, str] = {"image": _FROM_IMAGE, "inpaint": _INPAINTING}
_SCORED = "requires_aesthetics_score"
"""Of a refiner, in model_index.json."""
_PENULTIMATE = 1
"""Layers behind the hidden state that is read."""


def export_spec(
    source: Checkpoint,
    size: tuple[int, int] | None = None,
    scheduler: str | None = None,
    batch: int = 1,
    chunks: int = 1,
    tasks: Sequence[ImageTask] = (),
) -> ExportSpec:
    """Read the configs of an SDXL pipeline, as diffusers' own pipeline has them. See sd.export_spec
    for arguments and errors."""
    check_classes(source, _classes(source))
    given = unet_config(source, addition="text_time")
    defaults = sampling(source, _class_of(source, given), scheduler, given)
    with quiet():  # libraries log while they are imported
        from edgesd.export.families.parts import clip, unet, vae
        from edgesd.export.families.parts.sides import with_sides

    own = _diffusers_pipeline(source, defaults, given)
    encoders = _encoders(own)
    texts = {name: encoder.config.to_dict() for name, encoder in encoders.items()}
    config = own.unet.config
    check_unet(source.name, config, list(texts.values()))
    beside = concat(source.name, config)
    can = tasks_of(source.name, beside, tasks, "refine" if _refines(source) else "text")
    tokens = _token_count(source, own, texts)
    ids: Fill = "aesthetic_ids" if _refines(source) else "size_ids"
    added = _added_widths(source.name, config, texts[_SECOND], ids)
    latent = vae.latent_spec(
        source, own.vae.config, config["out_channels"], own.vae_scale_factor, per_channel=True
    )
    shape = unet.shape_spec(size, batch, config, latent.scale_factor)
    states = tokens, sum(text["hidden_size"] for text in texts.values())
    behind, upcast = _PENULTIMATE + clip_skip(source), bool(own.vae.config.force_upcast)
    components: tuple[Component, ...] = (
        *(
            clip.text_encoder(
                source, name, text, tokens, shape, behind, False, pooled=name == _SECOND
            )
            for name, text in texts.items()
        ),
        unet.unet(source, UNET, config, states, shape, latent, chunks, added),
        vae.vae_decoder(source, DECODER, latent, shape, upcast),
        *vae.encoder_for(can, source, ENCODER, latent, shape, upcast),
    )
    zero_negative = bool(own.config.force_zeros_for_empty_prompt)
    wiring = _wiring(components, tokens, ids, zero_negative)
    wiring = for_images(wiring, components, beside, can, _FROM_IMAGES)
    components, wiring = with_sides(source, components, config, shape, latent, wiring)
    return finished(
        FAMILY.name, source, defaults, own.scheduler, components, latent, shape, wiring,
        lambda: _own_pipeline(source, defaults, given),
    )  # fmt: skip


FAMILY = Family(
    name="sdxl",
    class_names=(_PIPELINE, *_FROM_IMAGES.values()),
    weights={_FIRST: TRANSFORMERS_STEM, _SECOND: TRANSFORMERS_STEM, **WEIGHTS},
    configs=("scheduler", *TOKENIZER_OF.values()),
    export_spec=export_spec,
)


def _refines(source: Checkpoint) -> bool:
    return source.index.get(_SCORED) is True


def _class_of(source: Checkpoint, unet: Mapping[str, Any]) -> str:
    """The pipeline that the model is run by: of all but refiners and models for inpainting, that
    without an image. unet: its config."""
    if inpaints(source.name, unet):
        return _INPAINTING
    return _FROM_IMAGE if _refines(source) else _PIPELINE


def _classes(source: Checkpoint) -> dict[str, tuple[str, Sequence[str]]]:
    """The components that the model has, as CLASSES."""
    absent = (_FIRST, TOKENIZER_OF[_FIRST]) if _refines(source) else ()
    return {name: valid for name, valid in _CLASSES.items() if name not in absent}


def _encoders(own: Any) -> dict[str, Any]:
    """The text encoders of diffusers' pipeline, in the order in which their outputs are joined."""
    return {name: getattr(own, name) for name in TOKENIZER_OF if getattr(own, name) is not None}


def _token_count(source: Checkpoint, own: Any, texts: Mapping[str, Mapping[str, Any]]) -> int:
    """Tokens of a prompt, for each of its encoders."""
    from edgesd.export.families.parts import clip

    counts = {
        name: clip.token_count(source.folder(folder), getattr(own, folder), texts[name])
        for name, folder in TOKENIZER_OF.items()
        if name in texts
    }
    if len(set(counts.values())) > 1:
        found = " and ".join(f"{name}'s {count}" for name, count in counts.items())
        raise InputError(
            f"{source.name}: its text encoders take different numbers of tokens ({found}), and "
            "what they make is joined token by token: do both belong to one model?"
        )
    return counts[_SECOND]


def _added_widths(
    name: str, unet: Mapping[str, Any], text: Mapping[str, Any], ids: Fill
) -> tuple[int, int]:
    """Widths of the text's embedding and of the ids of sizes that the UNet is told. Raises
    InputError unless that is what it takes."""
    embedding, count = text["projection_dim"], SIZE_FILLS[ids]
    each, takes = unet["addition_time_embed_dim"], unet["projection_class_embeddings_input_dim"]
    if takes != count * each + embedding:
        raise InputError(
            f"{name}: the UNet is told {takes} values, and {count} sizes of {each} with a text "
            f"embedding of {embedding} are {count * each + embedding}: do all networks belong to "
            "one model?"
        )
    return embedding, count


def _wiring(components: Sequence[Component], tokens: int, ids: Fill, zero_negative: bool) -> Wiring:
    """How the components are joined. ids: how what the UNet is told of sizes is filled."""
    from edgesd.export.families.parts import clip, unet

    specs = {component.name: component.spec for component in components}
    texts = [name for name in TOKENIZER_OF if name in specs]
    inputs = [
        InputSpec("sample", "sample"),
        InputSpec("timestep", "timestep"),
        InputSpec(
            "encoder_hidden_states", "joined", tuple(Part(name, clip.HIDDEN) for name in texts)
        ),
        InputSpec(unet.TEXT_EMBEDS, "joined", (Part(_SECOND, clip.POOLED),)),
        InputSpec(unet.TIME_IDS, ids),
    ]
    if specs[UNET].input("timestep_cond") is not None:
        inputs.append(InputSpec("timestep_cond", "guidance_embedding"))
    return Wiring(
        texts=tuple(TextSpec(name, TOKENIZER_OF[name], "input_ids") for name in texts),
        tokenizers={TOKENIZER_OF[name]: TokenizerRef(tokens) for name in texts},
        denoiser=DenoiserSpec(UNET, tuple(inputs), "noise_pred"),
        decoder=DecoderSpec(DECODER, "latents", "image"),
        zero_negative=zero_negative,
    )


def _diffusers_pipeline(source: Checkpoint, defaults: Defaults, unet: Mapping[str, Any]) -> Any:
    """diffusers' own pipeline of a model, as its constructor leaves the configs. unet: its
    config."""
    with quiet():
        import diffusers
        import transformers

        from edgesd.export.families.parts.clip import load_tokenizer
        from edgesd.export.families.parts.diffusers_pipeline import diffusers_pipeline

    present = _classes(source)
    networks = {
        _FIRST: transformers.CLIPTextModel,
        _SECOND: transformers.CLIPTextModelWithProjection,
        UNET: diffusers.UNet2DConditionModel,
        AUTOENCODER: getattr(diffusers, source.class_of(AUTOENCODER)),
    }
    tokenizers = {
        name: partial(load_tokenizer, source.folder(name), source.embeddings)
        for name in TOKENIZER_OF.values()
    }
    absent = {name: None for name in (*networks, *tokenizers) if name not in present}
    scored = {_SCORED: True} if _refines(source) else {}
    return diffusers_pipeline(
        source,
        _class_of(source, unet),
        {name: cls for name, cls in networks.items() if name in present},
        {name: make for name, make in tokenizers.items() if name in present},
        sampler_class(defaults.sampler),
        defaults.options,
        **absent,
        **scored,
        feature_extractor=None,
        image_encoder=None,
        add_watermarker=False,
        force_zeros_for_empty_prompt=source.index.get("force_zeros_for_empty_prompt", True),
    )


def _own_pipeline(source: Checkpoint, defaults: Defaults, unet: Mapping[str, Any]) -> OwnPipeline:
    """The same with the sampler's scheduler."""
    from edgesd.export.families.parts.diffusers_pipeline import with_networks_of

    pipeline = with_sampler(_diffusers_pipeline(source, defaults, unet), defaults.sampler)
    return OwnPipeline(
        pipeline,
        encoders=_encoders(pipeline),
        tokenizers={
            name: getattr(pipeline, name)
            for name in TOKENIZER_OF.values()
            if name in _classes(source)
        },
        denoiser=pipeline.unet,
        autoencoder=pipeline.vae,
        encode=lambda prompt: pipeline.encode_prompt(prompt, None, "cpu", 1, False),
        encoded=_encoded,
        has_size=isinstance(pipeline.unet.config.sample_size, int),
        of_task=lambda task: with_networks_of(
            pipeline,
            _FROM_IMAGES[task],
            requires_aesthetics_score=_refines(source),
            force_zeros_for_empty_prompt=pipeline.config.force_zeros_for_empty_prompt,
            add_watermarker=False,
        ),
    )


class _Encoded(SimpleNamespace):
    """What the pipeline reads of an encoder: its hidden states, and its first output."""

    hidden_states: Sequence[Tensor]
    first: Tensor

    def __getitem__(self, index: int) -> Tensor:
        return (self.first,)[index]


def _encoded(component: str, outputs: Sequence[Tensor]) -> _Encoded:
    """The last output is the text's embedding where there is one, and is read first."""
    hidden = outputs[0]
    behind = [hidden * 0] * _PENULTIMATE
    return _Encoded(hidden_states=[hidden, *behind], first=outputs[-1])
