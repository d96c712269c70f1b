"""The parts of the demo model, and how they are put together to a Stable Diffusion pipeline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderTiny,
    DDIMScheduler,
    DiffusionPipeline,
    SchedulerMixin,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Tokenizer

LATENT_CHANNELS = 4
LATENT_SIZE = 16
TEXT_WIDTH = 128
TOKENS = 77
# The autoencoder of the first stage works at this size; its latents are kept ever after.
TEACHER_SIZE = 64


def teacher_autoencoder() -> AutoencoderTiny:
    """Factor 4: [B, 3, 64, 64] <-> [B, 4, 16, 16]. Its encoder defines the latents."""
    return AutoencoderTiny(
        encoder_block_out_channels=(32,) * 3,
        decoder_block_out_channels=(32,) * 3,
        num_encoder_blocks=(0, 1, 1),
        num_decoder_blocks=(3, 2, 0),
        latent_channels=LATENT_CHANNELS,
        scaling_factor=1.0,
    )


def autoencoder() -> AutoencoderTiny:
    """Factor 8: [B, 3, 128, 128] <-> [B, 4, 16, 16].

    The encoder is the teacher's with a halving convolution in front of it, so that it can give
    the teacher's latents. Most blocks of the decoder sit at 16x16 and 32x32, where they cost
    little; the last level has none, which makes it a learned two-fold upsampling of the 64x64
    features.
    """
    return AutoencoderTiny(
        encoder_block_out_channels=(32,) * 4,
        decoder_block_out_channels=(48,) * 4,
        num_encoder_blocks=(0, 0, 1, 1),
        num_decoder_blocks=(8, 5, 2, 0),
        latent_channels=LATENT_CHANNELS,
        scaling_factor=1.0,
    )


def text_encoder(vocabulary: int) -> CLIPTextModel:
    """Token ids [B, 77] -> encoder_hidden_states [B, 77, 128]."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
            projection_dim=TEXT_WIDTH,
            hidden_act="quick_gelu",
            bos_token_id=vocabulary - 2,
            eos_token_id=vocabulary - 1,
            pad_token_id=vocabulary - 1,
        )
    )


def unet() -> UNet2DConditionModel:
    """Noisy latents [B, 4, 16, 16], timestep, text [B, 77, 128] -> v [B, 4, 16, 16]."""
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(32, 64, 128),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def scheduler() -> DDIMScheduler:
    """The noise schedule of Stable Diffusion with v-prediction."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        num_train_timesteps=1000,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
    )


def token_ids(
    tokenizer: CLIPTokenizer | T5Tokenizer, captions: list[str], length: int = TOKENS
) -> Tensor:
    """Token ids [B, length]."""
    encoded = tokenizer(
        captions, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
    )
    ids: Tensor = encoded.input_ids
    return ids


@torch.no_grad()
def encode_pictures(encoder: AutoencoderTiny, pictures: Tensor) -> Tensor:
    """Latents [N, 4, 16, 16] of uint8 pictures [N, 3, S, S], scaled down to what it takes."""
    side = LATENT_SIZE * 2 ** (len(encoder.config.encoder_block_out_channels) - 1)
    latents = []
    for batch in torch.split(pictures, 64):
        scaled = batch.float() / 127.5 - 1.0
        factor = scaled.shape[-1] // side
        if factor > 1:
            scaled = torch.nn.functional.avg_pool2d(scaled, factor)
        latents.append(encoder.encode(scaled).latents)
    return torch.cat(latents)


def assemble(
    tokenizer: CLIPTokenizer,
    text: CLIPTextModel,
    denoiser: UNet2DConditionModel,
    vae: AutoencoderTiny,
) -> StableDiffusionPipeline:
    """A pipeline of the given parts, without safety checker or progress bar."""
    pipeline = StableDiffusionPipeline(**parts(tokenizer, text, denoiser, vae, scheduler()))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def parts(
    tokenizer: CLIPTokenizer,
    text: CLIPTextModel,
    denoiser: UNet2DConditionModel,
    vae: AutoencoderTiny,
    scheduler: SchedulerMixin,
) -> dict[str, Any]:
    """Arguments of a pipeline's class with one text encoder: no safety checker."""
    return {
        "vae": vae,
        "text_encoder": text,
        "tokenizer": tokenizer,
        "unet": denoiser,
        "scheduler": scheduler,
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


def save_pipeline(pipeline: DiffusionPipeline, folder: Path) -> None:
    """Write the pipeline in fp16, with the classic tokenizer files next to ``tokenizer.json``."""
    pipeline.to(torch.float16)
    pipeline.save_pretrained(folder)
    for config_path in folder.glob("text_encoder*/config.json"):
        _load_in_fp32(config_path)
    for tokenizer in folder.glob("tokenizer*"):
        _write_classic_files(tokenizer)


def _load_in_fp32(config_path: Path) -> None:
    """transformers would otherwise load a text encoder in the stored type, diffusers the rest in
    fp32, and the two would not fit together."""
    config = json.loads(config_path.read_text(encoding="utf-8"))
    config["dtype"] = "float32"
    config_path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _write_classic_files(tokenizer: Path) -> None:
    fast = json.loads((tokenizer / "tokenizer.json").read_text(encoding="utf-8"))
    if fast["model"]["type"] != "BPE":  # T5's classic file is sentencepiece's own
        return
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in fast["model"]["merges"]]
    vocabulary = json.dumps(fast["model"]["vocab"], ensure_ascii=False)
    (tokenizer / "vocab.json").write_text(vocabulary, encoding="utf-8")
    lines = ["#version: 0.2", *merges, ""]
    (tokenizer / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
