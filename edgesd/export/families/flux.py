"""FLUX.1 schnell, dev, Fill and Control (Black Forest Labs 2024), and models of the same build.

CLIP's text encoder, of which the embedding of the whole text is read, T5's, and a transformer for
flow matching over 2x2 patches of latents (Esser et al. 2024, arXiv 2403.03206, describe its like).
Their graphs: parts/clip.py, parts/t5.py, parts/flux_transformer.py, parts/vae.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from edgesd.errors import InputError, ParityError, UsageError
from edgesd.export.families import (
    AUTOENCODER,
    TOKENIZER_OF,
    Component,
    ExportSpec,
    Family,
    OwnPipeline,
)
from edgesd.export.families.checkpoint import DIFFUSERS_STEM, TRANSFORMERS_STEM, Checkpoint
from edgesd.export.families.latent_diffusion import (
    CLASSES,
    DECODER,
    ENCODER,
    TOKENIZERS,
    Concat,
    check_classes,
    finished,
    for_images,
    tasks_of,
    with_sampler,
)
from edgesd.export.families.parts.flux_names import MODULATION, TRANSFORMER
from edgesd.export.families.variants import SCHEDULER_CONFIG, Defaults
from edgesd.export.quiet import quiet
from edgesd.runtime.schedulers import create_scheduler, name_from_class, sampler_class
from edgesd.spec.pipeline import (
    DecoderSpec,
    DenoiserSpec,
    ImageTask,
    InputSpec,
    ModulationSpec,
    Part,
    Task,
    TextSpec,
    TokenizerRef,
    Wiring,
    check_multiple,
)

if TYPE_CHECKING:
    from types import SimpleNamespace

    from torch import Tensor

_CLIP, _T5 = TOKENIZER_OF
_CLASSES = {
    _CLIP: ("transformers", ("CLIPTextModel",)),
    _T5: ("transformers", ("T5EncoderModel",)),
    TOKENIZER_OF[_CLIP]: TOKENIZERS,
    TOKENIZER_OF[_T5]: ("transformers", ("T5Tokenizer", "T5TokenizerFast")),
    TRANSFORMER: ("diffusers", ("FluxTransformer2DModel",)),
    AUTOENCODER: CLASSES[AUTOENCODER],
}
_PIPELINE = "FluxPipeline"
_FROM_IMAGES: Mapping[ImageTask, str] = {
    "image": "FluxImg2ImgPipeline",
    "inpaint": "FluxInpaintPipeline",
}
_FILL, _CONTROL = "FluxFillPipeline", "FluxControlPipeline"


@dataclass(frozen=True)
class _Form:
    """What a model was made for. pipeline: diffusers' own. beside: what follows the latents in the
    transformer's sample. of_task: diffusers' pipelines that begin with an image. own: the task of
    those that don't."""

    pipeline: str
    beside: Concat = ()
    of_task: Mapping[ImageTask, str] = field(default_factory=dict)
    own: Task = "text"

    @property
    def masked(self) -> bool:
        """Whether the transformer takes a mask."""
        return "masked" in self.beside


_PLAIN = _Form(_PIPELINE, of_task=_FROM_IMAGES)
_FORMS = {
    _FILL: _Form(_FILL, ("masked",), {"inpaint": _FILL}),
    _CONTROL: _Form(_CONTROL, ("control_latents",), own="control"),
}
"""By diffusers' pipeline, those that aren't plain."""

_EVEN = "use_flow_sigmas"
"""Of a scheduler that lays out sigmas itself."""
_SIZE = ("width", "height")
"""In edgesd.json: nothing in a transformer's config says a size."""
_STEPS_OF_SCHNELL, _NO_GUIDANCE = 4, 0.0
_CHANNELS = 64
"""Of a transformer's tokens, where its config doesn't say it, as in diffusers."""
_MAX_TOKENS = {True: 512, False: 256}
"""Of T5, by whether the model was distilled with guidance, as dev was."""


def export_spec(
    source: Checkpoint,
    size: tuple[int, int] | None = None,
    scheduler: str | None = None,
    batch: int = 1,
    chunks: int = 1,
    tasks: Sequence[ImageTask] = (),
) -> ExportSpec:
    """Read the configs of a FLUX.1 pipeline, as diffusers' own pipeline has them. See
    sd.export_spec for arguments and errors; T5 reads prompts as one chunk."""
    check_classes(source, _CLASSES)
    if chunks != 1:
        raise UsageError(
            f"{source.name}: T5 reads a prompt as one chunk: leave --prompt-chunks out"
        )
    if source.embeddings:
        raise InputError(f"{source.name}: textual inversions of FLUX aren't supported")
    if source.sides:
        raise InputError(f"{source.name}: ControlNets and adapters of FLUX aren't supported")
    given = source.config(f"{TRANSFORMER}/config.json")
    form = _form(source, given)
    defaults = _defaults(source, form, scheduler, bool(given.get("guidance_embeds")))
    with quiet():  # libraries log while they are imported
        from edgesd.export.families.parts import clip, flux_transformer, t5, vae

    own = _diffusers_pipeline(source, form, defaults)
    clip_config, t5_config = (getattr(own, name).config.to_dict() for name in TOKENIZER_OF)
    config = own.transformer.config
    _check_transformer(source.name, form, config, own.vae_scale_factor, clip_config, t5_config)
    tokens = clip.token_count(source.folder(TOKENIZER_OF[_CLIP]), own.tokenizer, clip_config)
    most = _MAX_TOKENS[bool(config.guidance_embeds)]
    longest = t5.token_count(source, TOKENIZER_OF[_T5], own.tokenizer_2, t5_config, most)
    channels = own.transformer.out_channels // flux_transformer.PATCH**2
    latent = vae.latent_spec(
        source,
        own.vae.config,
        channels,
        own.vae_scale_factor,
        shifted=True,
        patch=flux_transformer.PATCH,
    )
    side = own.default_sample_size * latent.scale_factor
    hints = source.hints()
    width, height = (int(hints.get(name, side)) for name in _SIZE)
    for name in _SIZE:
        if size is None and name in hints:
            check_multiple(f"{source.name}/edgesd.json: {name}", int(hints[name]), latent.unit)
    shape = flux_transformer.shape_spec(size, batch, (width, height), latent.unit)
    if tasks and not form.of_task:
        raise UsageError(f"{source.name} draws by a control image alone: leave --task out")
    can = tasks_of(source.name, form.beside, tasks, form.own)
    upcast = bool(own.vae.config.get("force_upcast"))
    components = (
        clip.pooled_text_encoder(source, _CLIP, clip_config, tokens, shape),
        t5.text_encoder(source, _T5, t5_config, longest, shape),
        flux_transformer.flux_modulation(source, MODULATION, TRANSFORMER, config, shape),
        flux_transformer.flux_transformer(
            source, TRANSFORMER, config, longest, shape, latent,
            channels * len(form.beside), form.masked,
        ),
        vae.vae_decoder(source, DECODER, latent, shape, upcast),
        *vae.encoder_for(can, source, ENCODER, latent, shape, upcast),
    )  # fmt: skip
    wiring = _wiring(components, tokens, longest)
    found = finished(
        FAMILY.name, source, defaults, own.scheduler, components, latent, shape,
        for_images(wiring, components, form.beside, can, form.of_task),
        lambda: _own_pipeline(source, form, defaults, longest),
        even_sigmas=not own.scheduler.config.get(_EVEN),
    )  # fmt: skip
    return replace(found, judged_by="lpips")


FAMILY = Family(
    name="flux",
    class_names=(_PIPELINE, *_FROM_IMAGES.values(), *_FORMS),
    weights={
        _CLIP: TRANSFORMERS_STEM,
        _T5: TRANSFORMERS_STEM,
        TRANSFORMER: DIFFUSERS_STEM,
        AUTOENCODER: DIFFUSERS_STEM,
    },
    configs=("scheduler", *TOKENIZER_OF.values()),
    export_spec=export_spec,
)


def _form(source: Checkpoint, config: Mapping[str, Any]) -> _Form:
    """What a model was made for, or is by a LoRA. config: of its transformer."""
    from edgesd.export.families.parts.lora import takes_control

    found = _FORMS.get(str(source.index.get("_class_name")), _PLAIN)
    if found is _PLAIN and takes_control(source.loras, config.get("in_channels", _CHANNELS)):
        return _FORMS[_CONTROL]
    return found


def _defaults(source: Checkpoint, form: _Form, scheduler: str | None, guided: bool) -> Defaults:
    """What a model is sampled with. guided: whether it was distilled with guidance: dev was, and
    schnell was distilled to few steps. Raises InputError for a scheduler, or an option of it, that
    isn't supported, UsageError for a kind of model that FLUX has none of."""
    with quiet():
        from edgesd.export.families.parts.diffusers_pipeline import call_default

    hints = source.hints()
    if "variant" in hints:
        raise UsageError(
            f"{source.name}: FLUX has no variants, as its transformer says what it was distilled "
            "to: leave --variant out"
        )
    steps, guidance = _STEPS_OF_SCHNELL, _NO_GUIDANCE
    if guided:
        with quiet():  # diffusers imports a pipeline when it is asked for
            steps = int(call_default(form.pipeline, "num_inference_steps"))
            guidance = call_default(form.pipeline, "guidance_scale")
    defaults = Defaults(
        scheduler or name_from_class(source.class_of("scheduler")),
        {},
        int(hints.get("num_inference_steps", steps)),
        float(hints.get("guidance_scale", guidance)),
    )
    create_scheduler(defaults.sampler, source.config(SCHEDULER_CONFIG))
    return defaults


def _check_transformer(
    name: str,
    form: _Form,
    config: Mapping[str, Any],
    unit: int,
    clip: Mapping[str, Any],
    t5: Mapping[str, Any],
) -> None:
    """Raise InputError unless the transformer takes what it is given, and gives latents. unit:
    pixels of a latent."""
    for what, takes, makes in (
        ("T5", "joint_attention_dim", t5["d_model"]),
        ("CLIP", "pooled_projection_dim", clip["hidden_size"]),
    ):
        if config[takes] != makes:
            raise InputError(
                f"{name}: the transformer expects embeddings of {what} of width {config[takes]}, "
                f"and {what} makes {makes}: do both belong to one model?"
            )
    takes, makes = config["in_channels"], config["out_channels"] or config["in_channels"]
    wanted = makes * (1 + len(form.beside)) + 4 * unit**2 * form.masked
    if takes != wanted or makes % 4 or config["patch_size"] != 1:
        raise InputError(
            f"{name}: its transformer takes {takes} channels and returns {makes}, in patches of "
            f"{config['patch_size']}: that of a {form.pipeline} takes {wanted}, in patches of 1"
        )
    axes = config["axes_dims_rope"]
    even = all(type(n) is int and n >= 0 and n % 2 == 0 for n in axes)
    if len(axes) != 3 or not even or sum(axes) != config["attention_head_dim"]:
        raise InputError(
            f"{name}: axes_dims_rope of the transformer is {list(axes)}: expected three even "
            f"numbers that add up to its attention_head_dim, {config['attention_head_dim']}"
        )


def _wiring(components: Sequence[Component], tokens: int, longest: int) -> Wiring:
    """How the components are joined. tokens, longest: of CLIP's tokenizer, and of T5's."""
    from edgesd.export.families.parts import clip, flux_transformer, t5

    inputs = [
        InputSpec("sample", "sample"),
        InputSpec("encoder_hidden_states", "joined", (Part(_T5, t5.HIDDEN),)),
        InputSpec(flux_transformer.MODULATION, "modulation"),
    ]
    spec = next(one.spec for one in components if one.name == TRANSFORMER)
    if spec.input(flux_transformer.MASK) is not None:
        inputs.append(InputSpec(flux_transformer.MASK, "pixel_mask"))
    told = [
        InputSpec("timestep", "timestep"),
        InputSpec(flux_transformer.POOLED, "joined", (Part(_CLIP, clip.POOLED),)),
    ]
    spec = next(one.spec for one in components if one.name == MODULATION)
    if spec.input(flux_transformer.GUIDANCE) is not None:
        told.append(InputSpec(flux_transformer.GUIDANCE, "guidance"))
    counts = {_CLIP: tokens, _T5: longest}
    return Wiring(
        texts=tuple(TextSpec(name, folder, "input_ids") for name, folder in TOKENIZER_OF.items()),
        tokenizers={
            folder: TokenizerRef(counts[name], chunked=False)
            for name, folder in TOKENIZER_OF.items()
        },
        denoiser=DenoiserSpec(TRANSFORMER, tuple(inputs), "noise_pred"),
        modulation=ModulationSpec(MODULATION, tuple(told), flux_transformer.MODULATION),
        decoder=DecoderSpec(DECODER, "latents", "image"),
        zero_negative=True,
        cfg=False,
    )


def _diffusers_pipeline(source: Checkpoint, form: _Form, defaults: Defaults) -> Any:
    """diffusers' own pipeline of a model, as its constructor leaves the configs."""
    with quiet():
        import diffusers
        import transformers

        from edgesd.export.families.parts import clip, t5
        from edgesd.export.families.parts.diffusers_pipeline import diffusers_pipeline

    folders = {name: source.folder(name) for name in TOKENIZER_OF.values()}
    unused = {} if form.beside else {"image_encoder": None, "feature_extractor": None}
    return diffusers_pipeline(
        source,
        form.pipeline,
        {
            _CLIP: transformers.CLIPTextModel,
            _T5: transformers.T5EncoderModel,
            TRANSFORMER: diffusers.FluxTransformer2DModel,
            AUTOENCODER: getattr(diffusers, source.class_of(AUTOENCODER)),
        },
        {
            TOKENIZER_OF[_CLIP]: lambda: clip.load_tokenizer(folders[TOKENIZER_OF[_CLIP]]),
            TOKENIZER_OF[_T5]: lambda: t5.load_tokenizer(folders[TOKENIZER_OF[_T5]]),
        },
        sampler_class(defaults.sampler),
        defaults.options,
        **unused,
    )


def _own_pipeline(source: Checkpoint, form: _Form, defaults: Defaults, longest: int) -> OwnPipeline:
    """The same with the sampler's scheduler."""
    from edgesd.export.families.parts.diffusers_pipeline import with_networks_of

    pipeline = with_sampler(_diffusers_pipeline(source, form, defaults), defaults.sampler)
    return OwnPipeline(
        pipeline,
        encoders={name: getattr(pipeline, name) for name in TOKENIZER_OF},
        tokenizers={name: getattr(pipeline, name) for name in TOKENIZER_OF.values()},
        denoiser=pipeline.transformer,
        autoencoder=pipeline.vae,
        encode=lambda prompt: pipeline.encode_prompt(
            prompt, device="cpu", max_sequence_length=longest
        ),
        encoded=_encoded,
        has_size=not source.hints().keys() & {*_SIZE},
        of_task=lambda task: with_networks_of(pipeline, form.of_task[task]),
        takes_size=True,
        options={"max_sequence_length": longest},
        fed=partial(_fed, pipeline.vae.config.latent_channels * (1 + len(form.beside))),
    )


def _encoded(component: str, outputs: Sequence[Tensor]) -> SimpleNamespace | tuple[Tensor, ...]:
    """The pipeline reads the embedding of CLIP, and the first output of T5."""
    from types import SimpleNamespace

    return SimpleNamespace(pooler_output=outputs[0]) if component == _CLIP else tuple(outputs)


def _fed(
    channels: int,
    given: Mapping[str, Any],
) -> tuple[Mapping[str, Tensor], Callable[[Tensor], Tensor]]:
    """What diffusers' pipeline gives its transformer, as ours takes it, and how its output is given
    back. channels: of our sample, which a mask follows. Raises ParityError where tokens aren't
    where ours has them."""
    import torch

    from edgesd.export.families.parts.flux_transformer import MASK, mask_of, packed, unpacked

    ids = given["img_ids"]
    height, width = (int(side) + 1 for side in ids[-1, 1:])
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    grid = torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(-1, 3)
    if not torch.equal(ids, grid.to(ids.dtype)) or bool(given["txt_ids"].any()):
        raise ParityError(f"{TRANSFORMER}: diffusers places tokens where the graph doesn't")
    names = ("encoder_hidden_states", "pooled_projections", "guidance")
    inputs = {name: given[name] for name in names if given[name] is not None}
    sample = unpacked(given["hidden_states"], height, width)
    if sample.shape[1] > channels:
        inputs[MASK] = mask_of(sample[:, channels:])
        sample = sample[:, :channels]
    inputs["sample"] = sample
    inputs["timestep"] = given["timestep"][:1] * 1000
    return inputs, packed
