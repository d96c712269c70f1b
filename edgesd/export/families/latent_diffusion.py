"""What the families of Stable Diffusion share: checks of a model, and its spec in the end.

They are CLIP text encoders, a UNet2DConditionModel and an AutoencoderKL or AutoencoderTiny, all of
which parts/ describes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from edgesd.errors import InputError, UsageError
from edgesd.export.families import AUTOENCODER, Component, ExportSpec, OwnPipeline
from edgesd.export.families.checkpoint import DIFFUSERS_STEM, Checkpoint
from edgesd.export.families.variants import SCHEDULER_CONFIG, Defaults, defaults_of
from edgesd.export.quiet import quiet
from edgesd.runtime.requests import Completion, Request
from edgesd.runtime.schedulers import create_scheduler
from edgesd.spec.pipeline import (
    IMAGE_TASKS,
    Concatenated,
    EncoderSpec,
    ImageTask,
    LatentSpec,
    PipelineSpec,
    SchedulerSpec,
    ShapeSpec,
    Task,
    Wiring,
)

UNET, DECODER, ENCODER = "unet", "vae_decoder", "vae_encoder"

CLASSES = {
    UNET: ("diffusers", ("UNet2DConditionModel",)),
    AUTOENCODER: ("diffusers", ("AutoencoderKL", "AutoencoderTiny")),
}
"""Component -> its library, and the classes of it that are taken."""

TOKENIZERS = ("transformers", ("CLIPTokenizer", "CLIPTokenizerFast"))
WEIGHTS = {UNET: DIFFUSERS_STEM, AUTOENCODER: DIFFUSERS_STEM}
_UNSUPPORTED = (
    "class_embed_type",
    "num_class_embeds",
    "encoder_hid_dim_type",
    "encoder_hid_dim",
    "dual_cross_attention",
)


def check_classes(source: Checkpoint, classes: Mapping[str, tuple[str, Sequence[str]]]) -> None:
    """Raise InputError unless the components are of classes that are taken. classes: as CLASSES."""
    for component, (library, valid) in classes.items():
        found, origin = source.class_of(component), source.library_of(component)
        if found not in valid or origin != library:
            raise InputError(
                f"{source.name}: {component} is a {found} of {origin}, which isn't supported: "
                f"valid: {', '.join(valid)} of {library}"
            )


def unet_config(source: Checkpoint, addition: str | None = None) -> dict[str, Any]:
    """The UNet's config as its file has it; some can't be made without their weights. addition: the
    kind of further embedding that it must have. Raises InputError for what isn't supported."""
    given = source.config(f"{UNET}/config.json")
    for field in _UNSUPPORTED:
        if given.get(field):
            raise InputError(f"{source.name}: a UNet with {field}={given[field]!r} isn't supported")
    if (found := given.get("addition_embed_type")) != addition:
        raise InputError(
            f"{source.name}: a UNet with addition_embed_type={found!r} isn't supported: that of a "
            f"{source.index.get('_class_name')} has {addition!r}"
        )
    return given


Concat = tuple[Concatenated, ...]


def concat(name: str, unet: Mapping[str, Any]) -> Concat:
    """What a UNet takes beside latents, on their channel axis. Raises InputError for what isn't
    supported."""
    takes, makes = unet["in_channels"], unet["out_channels"]
    if takes == makes:
        return ()
    if takes == 2 * makes + 1:
        return ("mask", "masked")
    raise InputError(
        f"{name}: its UNet takes {takes} channels and returns {makes}: depth and editing models "
        "aren't supported"
    )


def inpaints(name: str, given: Mapping[str, Any]) -> bool:
    """Whether a UNet takes a mask. given: its config, as the file has it."""
    return bool(concat(name, {"in_channels": 4, "out_channels": 4, **given}))


def check_unet(name: str, unet: Mapping[str, Any], texts: Sequence[Mapping[str, Any]]) -> None:
    """Raise InputError unless a UNet takes what it is given. unet, texts: configs of the UNet and
    of the text encoders, as the libraries have them."""
    concat(name, unet)
    context = unet["cross_attention_dim"]
    widths = set(context) if isinstance(context, list | tuple) else {context}  # of each block
    width = sum(text["hidden_size"] for text in texts)
    if widths != {width}:
        makes = "encoder makes" if len(texts) == 1 else "encoders make"
        raise InputError(
            f"{name}: the UNet expects text embeddings of width {context}, and the text {makes} "
            f"{width}: do both belong to one model?"
        )
    if any(text.get("use_attention_mask") for text in texts):
        raise InputError(f"{name}: a text encoder with use_attention_mask isn't supported")


def sampling(
    source: Checkpoint, class_name: str, scheduler: str | None, unet: Mapping[str, Any]
) -> Defaults:
    """What a model is sampled with by default. class_name: of diffusers' own pipeline. scheduler:
    the sampler that is asked for, None for the model's. unet: its config, as the file has it.
    Raises InputError for a scheduler, or an option of it, that isn't supported."""
    if {"height", "width"} & source.hints().keys():
        raise InputError(f"{source.name}: its UNet says its size: leave it out of edgesd.json")
    with quiet():  # libraries log while they are imported
        from edgesd.export.families.parts.diffusers_pipeline import call_default

        guidance = call_default(class_name, "guidance_scale")
    defaults = defaults_of(source, scheduler, guidance, bool(unet.get("time_cond_proj_dim")))
    # Before diffusers makes one, whose advice may not fit edgesd.
    create_scheduler(defaults.sampler, {**source.config(SCHEDULER_CONFIG), **defaults.options})
    return defaults


def clip_skip(source: Checkpoint) -> int:
    """Last layers of the text encoders that are left out beyond those that the pipeline leaves.
    Unlike in diffusers, whose pipelines leave the negative prompt alone, for both prompts."""
    return int(source.hints().get("clip_skip", 0))


def with_sampler(pipeline: Any, sampler: str) -> Any:
    """diffusers' pipeline with a scheduler of the sampler's diffusers class, made from its own
    one's options where that is another."""
    from edgesd.export.families.parts.diffusers_pipeline import scheduler_of

    pipeline.scheduler = scheduler_of(pipeline, sampler)
    return pipeline


def tasks_of(
    name: str, beside: Concat, asked: Sequence[ImageTask], own: Task = "text"
) -> tuple[Task, ...]:
    """What a model's bundle can be asked for. beside: see `concat`. asked: tasks that it is built
    for. own: that of the model's own pipeline. Raises UsageError for what the model can't do."""
    if "masked" in beside:
        if asked and "inpaint" not in asked:
            raise UsageError(
                f"{name} is for inpainting alone, as its network takes a mask: leave --task image "
                "out"
            )
        return ("inpaint",)
    return own, *(task for task in IMAGE_TASKS if task in asked or "inpaint" in asked)


def for_images(
    wiring: Wiring,
    components: Sequence[Component],
    beside: Concat,
    tasks: tuple[Task, ...],
    classes: Mapping[ImageTask, str],
) -> Wiring:
    """`wiring` with what tasks that begin with an image need. classes: diffusers' own pipelines for
    these tasks."""
    from edgesd.export.families.parts.diffusers_pipeline import call_default

    encoder = next((c.spec for c in components if c.name == ENCODER), None)
    return msgspec.structs.replace(
        wiring,
        tasks=tasks,
        denoiser=msgspec.structs.replace(wiring.denoiser, concat=beside),
        encoder=encoder
        and EncoderSpec(ENCODER, encoder.inputs[0].name, tuple(t.name for t in encoder.outputs)),
        strengths={
            task: call_default(name, "strength") for task, name in classes.items() if task in tasks
        },
    )


def finished(
    family: str,
    source: Checkpoint,
    defaults: Defaults,
    scheduler: Any,
    components: tuple[Component, ...],
    latent: LatentSpec,
    shape: ShapeSpec,
    wiring: Wiring,
    own: Callable[[], OwnPipeline],
    even_sigmas: bool = False,
) -> ExportSpec:
    """The spec of a model. scheduler: diffusers', with all its options. even_sigmas: see
    SchedulerSpec. Raises InputError where it gives no schedule."""
    from edgesd.export.families.parts.diffusers_pipeline import scheduler_config

    pipeline = PipelineSpec(
        family=family,
        source=source.public_name,
        source_sha256=source.sha256(),
        components={c.name: c.spec for c in components},
        scheduler=SchedulerSpec(defaults.sampler, scheduler_config(scheduler), even_sigmas),
        latent=latent,
        shape=shape,
        num_inference_steps=defaults.steps,
        guidance_scale=defaults.guidance,
        wiring=wiring,
    )
    Completion(pipeline).complete(Request("", 0))  # refuses here what the board would
    return ExportSpec(pipeline, components, own, defaults.assumed)
