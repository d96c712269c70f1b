"""Tiny random pipelines of every kind that edgesd takes, as diffusers saves them.

Weights are random and few (0.1 to 0.4 M a pipeline), but all that changes how values flow is there:
hidden states of another layer than the last, projections, `!` as padding, ids of sizes, guidance as
an input. The same seeds give the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from edgesd.engines.bundle import write_manifest
from edgesd.export.families import ExportSpec
from edgesd.export.source import ModelSource
from edgesd.export.tokenizer import write_tokenizer
from edgesd.export.torch_runner import TorchRunner, any_batch
from edgesd.runtime.bundle import open_bundle
from edgesd.runtime.pipeline import Pipeline
from edgesd.runtime.settings import Settings
from edgesd.spec.bundle import (
    SCHEMA_VERSION,
    BundleManifest,
    Engine,
    Footprint,
    Licence,
    Parity,
)
from tests.support import file_entries

WORDS = "a red green blue yellow purple apple star cat dog house tree sea sketch of the on in photo"
TOKENS, WIDTH, PROJECTION, SIZE = 77, 16, 12, 16
"""Tokens of a prompt, width of a text encoder, of a projected text; latents' height and width."""

NEW_WORD = "<toy>"
LEVELS = (16, 32)
"""Channels of UNets and autoencoders."""

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
TRAILING = {"timestep_spacing": "trailing"}


def clip_tokenizer(pad: str = "<|endoftext|>") -> Any:
    """A CLIP tokenizer of characters and a few words. pad: what fills prompts up."""
    letters = sorted({chr(code) for code in range(33, 127)})
    tokens = ["!", *(c for c in letters if c != "!"), *(f"{c}</w>" for c in letters)]
    merges: list[tuple[str, str]] = []
    vocab = {token: i for i, token in enumerate(tokens)}
    for word in WORDS.split():
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:
            pair = (parts[0], parts[1])
            if pair not in merges:
                merges.append(pair)
                vocab.setdefault("".join(pair), len(vocab))
            parts = ["".join(pair), *parts[2:]]
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocab[special] = len(vocab)
    made: Any = transformers.CLIPTokenizer
    return made(vocab=vocab, merges=merges, pad_token=pad, model_max_length=TOKENS)


def clip(tokenizer: Any, projection: int | None = None, **more: Any) -> Any:
    """A text encoder of three layers. projection: of the second of SDXL."""
    settings = {
        "hidden_act": "quick_gelu" if projection is None else "gelu",
        "eos_token_id": tokenizer.eos_token_id,
        **({} if projection is None else {"projection_dim": projection}),
    }
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **(settings | more),
    )
    if projection is None:
        return transformers.CLIPTextModel(config)
    return transformers.CLIPTextModelWithProjection(config)


def t5_tokenizer(length: int = 512) -> Any:
    """A T5 tokenizer (unigram) of characters and a few words."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    pieces += [(chr(code), -8.0) for code in range(33, 127)]
    pieces += [(f"\u2581{word}", -4.0) for word in WORDS.split()]
    made: Any = transformers.T5TokenizerFast
    return made(vocab=pieces, extra_ids=0, model_max_length=length)


def t5(tokenizer: Any, width: int = 2 * WIDTH) -> Any:
    """T5's encoder of version 1.1, with a gated activation, of two layers."""
    return transformers.T5EncoderModel(
        transformers.T5Config(
            vocab_size=len(tokenizer),
            d_model=width,
            d_ff=2 * width,
            d_kv=8,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            relative_attention_num_buckets=8,
            relative_attention_max_distance=20,
        )
    )


def vae(**more: Any) -> Any:
    """An AutoencoderKL of one halving."""
    return diffusers.AutoencoderKL(
        block_out_channels=LEVELS,
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * len(LEVELS),
        up_block_types=("UpDecoderBlock2D",) * len(LEVELS),
        sample_size=SIZE * 2,
        **more,
    )


def unet(context: int = WIDTH, **more: Any) -> Any:
    """A UNet of a level without attention and one with it."""
    settings: dict[str, Any] = {
        "block_out_channels": LEVELS,
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 2,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }
    return diffusers.UNet2DConditionModel(
        sample_size=SIZE, cross_attention_dim=context, **(settings | more)
    )


def sdxl_unet(ids: int = 6, context: int = 2 * WIDTH, **more: Any) -> Any:
    """The same with linear projections, more transformer layers in one level, heads by level, and
    `ids` sizes that it is told."""
    settings: dict[str, Any] = {
        "use_linear_projection": True,
        "transformer_layers_per_block": (1, 2),
        "attention_head_dim": (2, 4),
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 8 * ids + PROJECTION,
    }
    return unet(context, **(settings | more))


def flux_transformer(**more: Any) -> Any:
    """Two double and two single blocks, for latents of four channels."""
    settings: dict[str, Any] = {
        "in_channels": 16,
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 2 * WIDTH,
        "pooled_projection_dim": WIDTH,
        "axes_dims_rope": (4, 6, 6),
    }
    made: Any = diffusers.FluxTransformer2DModel(**(settings | more))
    with torch.no_grad():  # else a prompt changes images by less than one of 255 levels
        made.context_embedder.weight.mul_(8)
    return made


def _sd(scheduler: Any, cls: Any = None, pad: str = "<|endoftext|>", **unet_: Any) -> Any:
    tokenizer = clip_tokenizer(pad)
    encoder = clip(tokenizer, hidden_act="gelu" if pad == "!" else "quick_gelu")
    return (cls or diffusers.StableDiffusionPipeline)(
        vae=vae(),
        text_encoder=encoder,
        tokenizer=tokenizer,
        unet=unet(**unet_),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _inpainting(scheduler: Any) -> Any:
    """Nine channels: latents, a mask, and what it leaves of an image."""
    return _sd(scheduler, diffusers.StableDiffusionInpaintPipeline, in_channels=9, out_channels=4)


def _xl_inpainting(scheduler: Any) -> Any:
    parts = _sdxl(scheduler, in_channels=9, out_channels=4).components
    return diffusers.StableDiffusionXLInpaintPipeline(**parts, add_watermarker=False)


def _sdxl(
    scheduler: Any, old_eos: bool = False, force_zeros: bool = True, vae_: Any = None, **unet_: Any
) -> Any:
    """old_eos: the second encoder's config says 2, as SDXL's do."""
    one, two = clip_tokenizer(), clip_tokenizer("!")
    eos = {"eos_token_id": 2} if old_eos else {}
    return diffusers.StableDiffusionXLPipeline(
        vae=vae(scaling_factor=0.13025, force_upcast=True, **(vae_ or {})),
        text_encoder=clip(one),
        text_encoder_2=clip(two, PROJECTION, **eos),
        tokenizer=one,
        tokenizer_2=two,
        unet=sdxl_unet(**unet_),
        scheduler=scheduler,
        add_watermarker=False,
        force_zeros_for_empty_prompt=force_zeros,
    )


def _flux(distilled: bool, cls: Any = None, **transformer: Any) -> Any:
    """distilled: with guidance, as dev is; schnell isn't."""
    one, two = clip_tokenizer(), t5_tokenizer()
    dynamic = {"use_dynamic_shifting": True, "shift": 3.0} if distilled else {"shift": 1.0}
    return (cls or diffusers.FluxPipeline)(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**dynamic),
        vae=vae(
            scaling_factor=0.3611,
            shift_factor=0.1159,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        text_encoder=clip(one),
        text_encoder_2=t5(two),
        tokenizer=one,
        tokenizer_2=two,
        transformer=flux_transformer(guidance_embeds=distilled, **transformer),
    )


def _with_word(pipeline: Any) -> Any:
    """An SDXL with a word that was added to both tokenizers, as textual inversion does: its id is
    above that of the end of a text."""
    for number in "", "_2":
        tokenizer = getattr(pipeline, f"tokenizer{number}")
        encoder = getattr(pipeline, f"text_encoder{number}")
        tokenizer.add_tokens([NEW_WORD])
        encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    return pipeline


def _refiner() -> Any:
    """One text encoder, the second, and an aesthetic score among what the UNet is told."""
    parts = {**_sdxl(_euler()).components, "tokenizer": None, "text_encoder": None}
    parts["unet"] = sdxl_unet(ids=5, context=WIDTH)
    return diffusers.StableDiffusionXLImg2ImgPipeline(
        **parts,
        requires_aesthetics_score=True,
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    )


def _euler(**more: Any) -> Any:
    return diffusers.EulerDiscreteScheduler(**BETAS, steps_offset=1, **more)


def _ancestral() -> Any:
    return diffusers.EulerAncestralDiscreteScheduler(**BETAS, steps_offset=1, **TRAILING)


def _pndm() -> Any:
    return diffusers.PNDMScheduler(
        **BETAS, skip_prk_steps=True, steps_offset=1, set_alpha_to_one=False
    )


def _v_prediction() -> Any:
    options = {"prediction_type": "v_prediction", "clip_sample": False, "steps_offset": 1}
    return diffusers.DDIMScheduler(**BETAS, **options)


def _lcm() -> Any:
    return diffusers.LCMScheduler(**BETAS)


PIPELINES: Mapping[str, Callable[[], Any]] = {
    "sd": lambda: _sd(_pndm()),
    # Padding, activation, projections and heads of 2.x.
    "sd2-v": lambda: _sd(
        _v_prediction(), pad="!", use_linear_projection=True, attention_head_dim=(2, 4)
    ),
    "sd-turbo": lambda: _sd(_euler(**TRAILING)),
    "lcm": lambda: _sd(_lcm(), diffusers.LatentConsistencyModelPipeline, time_cond_proj_dim=8),
    "sdxl": lambda: _sdxl(_euler()),
    "sdxl-turbo": lambda: _sdxl(_ancestral(), old_eos=True),
    "sdxl-lightning": lambda: _sdxl(_euler(**TRAILING), old_eos=True),
    # "" is encoded where there is no negative prompt.
    "sdxl-encoded-negative": lambda: _sdxl(_euler(), force_zeros=False),
    # A LoRA of LCM merged: guidance as in any model; and a distilled one: guidance as an input.
    "sdxl-lcm-lora": lambda: _sdxl(_lcm()),
    "sdxl-lcm": lambda: _sdxl(_lcm(), time_cond_proj_dim=8),
    # As SSD-1B: no block in the middle, layers by block, fewer on the way down.
    "sdxl-pruned": lambda: _sdxl(
        _euler(),
        mid_block_type=None,
        transformer_layers_per_block=((1,), (2,)),
        reverse_transformer_layers_per_block=((2, 1), (1, 1)),
    ),
    # As Playground 2.5: latents with a mean and deviation of each channel.
    "sdxl-per-channel": lambda: _sdxl(
        _euler(),
        vae_={"latents_mean": [-1.6, 1.1, 0.5, 0.2], "latents_std": [8.5, 5.8, 6.1, 4.9]},
    ),
    # The end of a text is the highest id, or the first that equals the config's.
    "sdxl-word": lambda: _with_word(_sdxl(_euler())),
    "sdxl-word-old-eos": lambda: _with_word(_sdxl(_euler(), old_eos=True)),
    "sdxl-refiner": _refiner,
    "sd-inpaint": lambda: _inpainting(_pndm()),
    "sdxl-inpaint": lambda: _xl_inpainting(_euler()),
    "flux-schnell": lambda: _flux(False),
    "flux-dev": lambda: _flux(True),
    # Beside latents: those of what a mask leaves, and the mask's pixels; those of a control image.
    "flux-fill": lambda: _flux(True, diffusers.FluxFillPipeline, in_channels=48, out_channels=16),
    "flux-control": lambda: _flux(
        True, diffusers.FluxControlPipeline, in_channels=32, out_channels=16
    ),
}
"""Name -> what makes diffusers' pipeline."""


def _shaken(net: Any) -> Any:
    """A network with norms and biases away from 1 and 0, and all else away from zeros: else one
    that is left out isn't noticed."""
    net.eval().requires_grad_(False)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.ndim == 1 or not bool(parameter.any()):
                parameter += 0.05 * torch.randn_like(parameter)
    return net


def controlnet(net: Any, seed: int = 0) -> Any:
    """A ControlNet for a UNet, whose control image is twice as large as latents."""
    torch.manual_seed(500 + seed)
    found: Any = diffusers.ControlNetModel.from_unet(
        net, conditioning_embedding_out_channels=LEVELS
    )
    _shaken(found)
    with torch.no_grad():  # else what it is shown changes images by less than one of 255 levels
        found.controlnet_cond_embedding.conv_out.weight.mul_(100)
    return found


def adapter(net: Any, seed: int = 0, channels: int = 3) -> Any:
    """An adapter for a UNet as `for_adapter` makes it. channels: of its control image."""
    torch.manual_seed(600 + seed)
    levels = net.config.block_out_channels
    settings: dict[str, Any] = {"downscale_factor": 2, "channels": [*levels]}
    if net.config.addition_embed_type:  # the last one is for the block in the middle
        own = {"downscale_factor": 4, "channels": [*levels, levels[-1]]}
        settings = {"adapter_type": "full_adapter_xl", **own}
    found: Any = diffusers.T2IAdapter(in_channels=channels, num_res_blocks=1, **settings)
    return _shaken(found)


def for_adapter(pipeline: Any) -> Any:
    """A pipeline with a UNet that adapters fit: of 1.x with attention in the first block, as an
    adapter's first feature is of the whole size; of SDXL with three levels."""
    torch.manual_seed(700)
    if pipeline.unet.config.addition_embed_type:
        pipeline.unet = _shaken(
            sdxl_unet(
                block_out_channels=(16, 32, 32),
                down_block_types=("DownBlock2D", *("CrossAttnDownBlock2D",) * 2),
                up_block_types=(*("CrossAttnUpBlock2D",) * 2, "UpBlock2D"),
                transformer_layers_per_block=(1, 1, 2),
                attention_head_dim=(2, 4, 4),
            )
        )
    else:
        pipeline.unet = _shaken(
            unet(
                down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            )
        )
    return pipeline


def tiny(name: str) -> Any:
    """diffusers' pipeline `name` in fp32, with the same weights every time."""
    torch.manual_seed(sum(map(ord, name)))
    pipeline = PIPELINES[name]()
    for net in pipeline.components.values():
        if isinstance(net, torch.nn.Module):
            _shaken(net)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def write_tiny(name: str, folder: Path) -> Path:
    """The pipeline `name` in the new `folder`, as diffusers saves it."""
    tiny(name).save_pretrained(folder)
    return folder


def on_torch(
    source: ModelSource,
    export: ExportSpec,
    folder: Path,
    settings: Settings | None = None,
) -> Pipeline:
    """edgesd's pipeline of a model, whose networks are those that would be exported: without the
    time that exporting takes. folder: for its tokenizers; new."""
    spec = export.pipeline
    engines = {}
    footprint = Footprint(1, 0, 1, 0, 1, ((1, 1, 1),))
    for name in spec.components:
        (folder / name).mkdir(parents=True)
        (folder / name / "model.onnx").write_bytes(b"x")
        parity, path = Parity(0.0, 0.0, 1e-4), f"{name}/model.onnx"
        engines[name] = Engine(name, path, "onnxruntime", "fp32", parity, footprint=footprint)
    for name, tokenizer in spec.wiring.tokenizers.items():
        write_tokenizer(
            source.folder(name),
            folder / name,
            tokenizer.max_tokens,
            source.embeddings,
            source.class_of(name),
        )
    manifest = BundleManifest(
        schema_version=SCHEMA_VERSION,
        name=source.name,
        target="x86-64-cpu",
        arch="x86_64",
        backend="onnxruntime",
        precision="fp32",
        pipeline=spec,
        engines=engines,
        licence=Licence("CC0-1.0"),
        tools={},
        files=file_entries(folder),
    )
    write_manifest(folder, manifest)
    components = {component.name: component for component in export.components}

    def open_runner(name: str) -> TorchRunner:
        return TorchRunner(any_batch(components[name].spec), components[name].load())

    return Pipeline(open_bundle(folder), settings or Settings(made_here=True), open_runner)


def diffusers_images(
    pipeline: Any, prompts: Sequence[str], seeds: Sequence[int], **options: Any
) -> list[Any]:
    """What diffusers' pipeline makes, image by image of a batch. options: of its call."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    with torch.inference_mode():
        images: list[Any] = pipeline([*prompts], generator=generators, **options).images
    return images
