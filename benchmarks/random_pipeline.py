"""Writes a Stable Diffusion 1.5 pipeline of true size with random weights: for speed and memory.

python -m benchmarks.random_pipeline FOLDER [--tiny-vae] [--channels N]

The networks' configurations are those of the published model; the tokenizer is the embedded
model's, whose ids are a part of CLIP's. Weights are fp16, 2.1 GB. What it generates is noise.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from edgesd.recipes import demo_model


def write_pipeline(folder: Path, tiny_vae: bool = False, channels: int = 320) -> None:
    """Write the pipeline to the new folder `folder`; the same weights each time. tiny_vae: with an
    autoencoder of TAESD's size. channels: of the UNet's first level; the others have 2 and 4 times
    as many."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=64,
        cross_attention_dim=768,
        attention_head_dim=8,
        block_out_channels=(channels, 2 * channels, 4 * channels, 4 * channels),
    )
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        sample_size=512,
    )
    text = CLIPTextModel(
        CLIPTextConfig(
            hidden_size=768,
            intermediate_size=3072,
            num_attention_heads=12,
            num_hidden_layers=12,
            projection_dim=768,
            vocab_size=49408,
            eos_token_id=49407,
            bos_token_id=49406,
        )
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    if tiny_vae:
        vae = AutoencoderTiny()
    for name, part in (("unet", unet), ("vae", vae), ("text_encoder", text)):
        part.half().save_pretrained(folder / name)
    scheduler.save_pretrained(folder / "scheduler")
    shutil.copytree(demo_model() / "tokenizer", folder / "tokenizer")
    (folder / "model_index.json").write_text(
        '{"_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.30.0", '
        '"feature_extractor": [null, null], "safety_checker": [null, null], '
        '"scheduler": ["diffusers", "DDIMScheduler"], '
        '"text_encoder": ["transformers", "CLIPTextModel"], '
        '"tokenizer": ["transformers", "CLIPTokenizer"], '
        '"unet": ["diffusers", "UNet2DConditionModel"], '
        f'"vae": ["diffusers", "{type(vae).__name__}"]}}'
    )
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\nRandom weights.\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tiny-vae", action="store_true", help="an autoencoder of TAESD's size")
    parser.add_argument(
        "--channels", type=int, default=320, help="of the UNet's first level (default: 320)"
    )
    given = parser.parse_args()
    write_pipeline(given.folder, given.tiny_vae, given.channels)


if __name__ == "__main__":
    main()
