"""Writes a pipeline of true size with random weights: for speed and memory.

python -m benchmarks.random_pipeline FOLDER [--model sdxl] [--tiny-vae] [--channels N]
    [--controlnet FOLDER] [--blocks 2 4] [--t5-layers 4]

The networks' configurations are those of the published models; the tokenizers are the embedded
model's, whose ids are a part of CLIP's, and T5's of characters. Weights are fp16: 2.1 GB for Stable
Diffusion 1.5, 7 GB for SDXL and SDXL-Turbo, 0.7 GB for a ControlNet of sd15's UNet; FLUX.1's are
bf16, 34 GB of them unless --blocks and --t5-layers make it less deep. What they generate is noise.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    ControlNetModel,
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    ModelMixin,
    UNet2DConditionModel,
)
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from benchmarks.random_weights import write_random
from edgesd.files import atomic_dir, atomic_write
from edgesd.recipes import demo_model

CLIP_L = CLIPTextConfig(
    hidden_size=768,
    intermediate_size=3072,
    num_attention_heads=12,
    num_hidden_layers=12,
    projection_dim=768,
    vocab_size=49408,
    eos_token_id=2,
    bos_token_id=0,
    pad_token_id=1,
)
CLIP_BIG_G = CLIPTextConfig(
    hidden_size=1280,
    intermediate_size=5120,
    num_attention_heads=20,
    num_hidden_layers=32,
    projection_dim=1280,
    hidden_act="gelu",
    vocab_size=49408,
    eos_token_id=2,
    bos_token_id=0,
    pad_token_id=1,
)
T5_XXL = T5Config(
    vocab_size=32128,
    d_model=4096,
    d_kv=64,
    d_ff=10240,
    num_layers=24,
    num_heads=64,
    feed_forward_proj="gated-gelu",
)
T5_TOKENS = 512
SD15_UNET: dict[str, Any] = {
    "sample_size": 64,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "block_out_channels": (320, 640, 1280, 1280),
}
SDXL_UNET: dict[str, Any] = {
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
_VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
_FLUX_VAE: dict[str, Any] = {
    **_VAE,
    "latent_channels": 16,
    "sample_size": 1024,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
_BETAS: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}
_PAD_2 = "!"
"""What SDXL's second tokenizer fills a prompt with."""

Parts = Mapping[str, Callable[[], Any]]
"""Folder -> what makes a network or scheduler."""


def sd15(tiny_vae: bool, channels: int = 320) -> Parts:
    """Stable Diffusion 1.5. channels: of the UNet's first level; the others have 2 and 4 times as
    many."""
    widths = tuple(channels * factor for factor in (1, 2, 4, 4))
    return {
        "unet": lambda: UNet2DConditionModel(**{**SD15_UNET, "block_out_channels": widths}),
        "vae": AutoencoderTiny if tiny_vae else lambda: AutoencoderKL(**_VAE, sample_size=512),
        "text_encoder": lambda: CLIPTextModel(CLIP_L),
        "scheduler": lambda: DDIMScheduler(**_BETAS, clip_sample=False, set_alpha_to_one=False),
    }


def sdxl(tiny_vae: bool, turbo: bool = False) -> Parts:
    """SDXL, or SDXL-Turbo: the same networks, made for 512x512 pixels and few steps."""

    def vae() -> Any:
        return AutoencoderKL(**_VAE, sample_size=1024, scaling_factor=0.13025, force_upcast=True)

    return {
        "unet": lambda: UNet2DConditionModel(**SDXL_UNET, sample_size=64 if turbo else 128),
        "vae": (lambda: AutoencoderTiny(scaling_factor=1.0)) if tiny_vae else vae,
        "text_encoder": lambda: CLIPTextModel(CLIP_L),
        "text_encoder_2": lambda: CLIPTextModelWithProjection(CLIP_BIG_G),
        "scheduler": lambda: (
            EulerAncestralDiscreteScheduler(**_BETAS, timestep_spacing="trailing")
            if turbo
            else EulerDiscreteScheduler(**_BETAS, timestep_spacing="leading")
        ),
    }


def flux(
    tiny_vae: bool, dev: bool = False, double: int = 19, single: int = 38, t5_layers: int = 24
) -> Parts:
    """FLUX.1-schnell, or -dev: with guidance as an input, and noise that is shifted by the image's
    size. double, single: blocks of the transformer with streams of their own for text and image,
    and with one for both."""
    shifts: dict[str, Any] = {"shift": 3.0, "use_dynamic_shifting": True} if dev else {}
    return {
        "transformer": lambda: FluxTransformer2DModel(
            num_layers=double, num_single_layers=single, guidance_embeds=dev
        ),
        "vae": AutoencoderTiny if tiny_vae else lambda: AutoencoderKL(**_FLUX_VAE),
        "text_encoder": lambda: CLIPTextModel(CLIP_L),
        "text_encoder_2": lambda: T5EncoderModel(
            T5Config(**{**T5_XXL.to_dict(), "num_layers": t5_layers})
        ),
        "scheduler": lambda: FlowMatchEulerDiscreteScheduler(**shifts),
    }


MODELS: dict[str, tuple[str, Callable[..., Parts]]] = {
    "sd15": ("StableDiffusionPipeline", sd15),
    "sdxl": ("StableDiffusionXLPipeline", sdxl),
    "sdxl-turbo": (
        "StableDiffusionXLPipeline",
        lambda tiny_vae: sdxl(tiny_vae, turbo=True),
    ),
    "flux-schnell": ("FluxPipeline", flux),
    "flux-dev": ("FluxPipeline", lambda tiny_vae, **depth: flux(tiny_vae, dev=True, **depth)),
}
"""Name -> class of the pipeline, and what makes its parts."""


def write_pipeline(
    folder: Path, model: str = "sd15", *, tiny_vae: bool = False, **options: int
) -> None:
    """Write a pipeline to the new folder `folder`, one network in memory at a time, of FLUX.1 none;
    the same weights each time. tiny_vae: with an autoencoder of TAESD's size. options: of `sd15`,
    or of `flux`."""
    class_name, make = MODELS[model]
    parts = make(tiny_vae, **options)
    with atomic_dir(folder) as out:
        index: dict[str, Any] = {"_class_name": class_name, "_diffusers_version": "0.30.0"}
        write = _write_streamed if class_name == "FluxPipeline" else _write_made
        for name, made in parts.items():
            part = write(made, out / name)
            index[name] = [type(part).__module__.partition(".")[0], type(part).__name__]
        for name in parts:
            if name.startswith("text_encoder"):
                tokenizer = name.replace("text_encoder", "tokenizer")
                index[tokenizer] = ["transformers", _write_tokenizer(out, tokenizer, index[name])]
        if class_name == "StableDiffusionXLPipeline":
            index["force_zeros_for_empty_prompt"] = True
        elif class_name == "FluxPipeline":
            index |= {"image_encoder": [None, None], "feature_extractor": [None, None]}
        else:
            index |= {"safety_checker": [None, None], "feature_extractor": [None, None]}
        _write(out / "model_index.json", json.dumps(index, indent=2))
        _write(out / "README.md", "---\nlicense: apache-2.0\n---\nRandom weights.\n")


def _write_made(make: Callable[[], Any], folder: Path) -> Any:
    """A network as its library initializes it, or a scheduler."""
    with _half():
        part = make()
    part.save_pretrained(folder)
    return part


def _write_streamed(make: Callable[[], Any], folder: Path) -> Any:
    """A network that is nowhere in memory, or a scheduler."""
    with torch.device("meta"):
        part: Any = make()
    if not isinstance(part, nn.Module):
        part.save_pretrained(folder)
        return part
    folder.mkdir()
    if isinstance(part, ModelMixin):
        part.save_config(folder)
        write_random(folder, "diffusion_pytorch_model", part)
    else:
        config: Any = part.config
        config.architectures = [type(part).__name__]
        config.save_pretrained(folder)
        write_random(folder, "model", part)
    return part


def write_controlnet(folder: Path, channels: int = 320) -> None:
    """Write a ControlNet for the UNet of `sd15` to the new folder `folder`: its first half, as in
    Zhang et al. 2023, arXiv 2302.05543, but for the convolutions that begin as zeros. channels: as
    of `sd15`."""
    widths = tuple(channels * factor for factor in (1, 2, 4, 4))
    config = {name: value for name, value in SD15_UNET.items() if name != "sample_size"}
    with _half():
        net = ControlNetModel(**{**config, "block_out_channels": widths})
        for convolution in (*net.controlnet_down_blocks, net.controlnet_mid_block):
            torch.nn.init.normal_(convolution.weight, std=0.01)
    net.save_pretrained(folder)
    _write(folder / "README.md", "---\nlicense: apache-2.0\n---\nRandom weights.\n")


@contextmanager
def _half() -> Iterator[None]:
    """Make networks in fp16 at once: SDXL's UNet takes 10 GB in fp32."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float16)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _write_tokenizer(root: Path, name: str, encoder: Sequence[str]) -> str:
    """A tokenizer in the folder `name`, for a text encoder of that class: its own class."""
    if encoder[1] == "T5EncoderModel":
        pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
        pieces += [(chr(code), -8.0) for code in range(33, 127)]
        tokenizer = T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=T5_TOKENS)
        tokenizer.save_pretrained(root / name)
        return "T5TokenizerFast"
    shutil.copytree(demo_model() / "tokenizer", root / name)
    if name != "tokenizer":
        path = root / name / "tokenizer_config.json"
        _write(path, json.dumps({**json.loads(path.read_text()), "pad_token": _PAD_2}))
    return "CLIPTokenizer"


def _write(path: Path, text: str) -> None:
    with atomic_write(path) as file:
        file.write(text.encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", choices=MODELS, default="sd15", help="(default: sd15)")
    parser.add_argument("--tiny-vae", action="store_true", help="an autoencoder of TAESD's size")
    parser.add_argument(
        "--channels", type=int, help="of the first level of sd15's UNet (default: 320)"
    )
    parser.add_argument(
        "--controlnet", type=Path, metavar="FOLDER", help="write a ControlNet for sd15, too"
    )
    add_depth(parser)
    given = parser.parse_args()
    if given.controlnet and given.model != "sd15":
        parser.error("--controlnet is for --model sd15")
    options = depth_options(parser, given)
    if given.channels is not None:
        options["channels"] = given.channels
    if given.channels is not None and given.model != "sd15":
        parser.error("--channels is for --model sd15")
    write_pipeline(given.folder, given.model, tiny_vae=given.tiny_vae, **options)
    if given.controlnet:
        write_controlnet(given.controlnet, **options)


def add_depth(parser: argparse.ArgumentParser) -> None:
    """Options that make FLUX.1 less deep."""
    parser.add_argument(
        "--blocks",
        type=int,
        nargs=2,
        metavar=("DOUBLE", "SINGLE"),
        help="of FLUX.1 (default: 19 38)",
    )
    parser.add_argument("--t5-layers", type=int, help="of FLUX.1's T5 (default: 24)")


def depth_options(parser: argparse.ArgumentParser, given: argparse.Namespace) -> dict[str, int]:
    """Those of `flux`, as given."""
    options: dict[str, int] = {}
    if given.blocks:
        options["double"], options["single"] = given.blocks
    if given.t5_layers:
        options["t5_layers"] = given.t5_layers
    if options and not given.model.startswith("flux"):
        parser.error("--blocks and --t5-layers are for FLUX.1")
    return options


if __name__ == "__main__":
    main()
