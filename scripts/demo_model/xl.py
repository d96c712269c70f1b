"""The parts of the demo model in Stable Diffusion XL's form, and what they begin with.

Everything begins with the weights of the first demo model, as far as the shapes allow: a part that
is new begins such that it adds nothing yet.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import (
    AutoencoderTiny,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from . import model

TEXT_LAYERS = 3
SIZE_WIDTH = 32
SIZE_IDS = 6
PAD_2 = "!"  # the second tokenizer's, as in Stable Diffusion XL


@dataclass(frozen=True)
class Conditioning:
    """What the denoiser is told about a batch of ``B`` pictures."""

    ids: Tensor  # [B, 77], padded as the first encoder has it
    ids_2: Tensor  # [B, 77], padded as the second has it
    empty: Tensor  # bool [B]: no caption, so the encoders' outputs are zeros
    sizes: Tensor  # [B, 6]: original height, width, crop top, left, target height, width


class Denoiser(nn.Module):
    """Both text encoders and the UNet as one module; the first encoder doesn't train."""

    def __init__(
        self,
        text: CLIPTextModel,
        text_2: CLIPTextModelWithProjection,
        unet: UNet2DConditionModel,
    ) -> None:
        super().__init__()
        self.text = text.requires_grad_(False)
        self.text_2 = text_2
        self.unet = unet

    def forward(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """v [B, 4, 16, 16] from noisy latents [B, 4, 16, 16] and timesteps [B]."""
        first = self.text(conditioning.ids, output_hidden_states=True)
        second = self.text_2(conditioning.ids_2, output_hidden_states=True)
        hidden = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
        kept = ~conditioning.empty
        added = {
            "text_embeds": second.text_embeds * kept[:, None],
            "time_ids": conditioning.sizes,
        }
        prediction: Tensor = self.unet(
            noisy, timesteps, hidden * kept[:, None, None], added_cond_kwargs=added
        ).sample
        return prediction


def text_config(vocabulary: int, hidden_act: str, pad_token_id: int) -> CLIPTextConfig:
    """Three layers, of which the last but one gives the hidden states."""
    return CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=model.TEXT_WIDTH,
        intermediate_size=4 * model.TEXT_WIDTH,
        num_hidden_layers=TEXT_LAYERS,
        num_attention_heads=4,
        max_position_embeddings=model.TOKENS,
        projection_dim=model.TEXT_WIDTH,
        hidden_act=hidden_act,
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
        pad_token_id=pad_token_id,
    )


def text_encoders(start: CLIPTextModel) -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    """Both encoders, token ids [B, 77] -> hidden states [B, 77, 128], with ``start``'s layers.

    ``start`` has a layer less; its last one is copied to the third, which no hidden state of the
    first encoder depends on.
    """
    vocabulary = start.config.vocab_size
    given = start.state_dict()
    last = f"encoder.layers.{TEXT_LAYERS - 2}."
    added = {
        name.replace(last, f"encoder.layers.{TEXT_LAYERS - 1}."): value
        for name, value in given.items()
        if last in name
    }
    first = CLIPTextModel(text_config(vocabulary, "quick_gelu", vocabulary - 1))
    first.load_state_dict(given | added)
    second = CLIPTextModelWithProjection(text_config(vocabulary, "gelu", 0))
    second.text_model.load_state_dict(given | added)
    return first, second


def unet() -> UNet2DConditionModel:
    """Noisy latents [B, 4, 16, 16], timestep, text [B, 77, 256], pooled [B, 128], sizes [B, 6]."""
    return UNet2DConditionModel(
        sample_size=model.LATENT_SIZE,
        in_channels=model.LATENT_CHANNELS,
        out_channels=model.LATENT_CHANNELS,
        block_out_channels=(32, 64, 128),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2),
        cross_attention_dim=2 * model.TEXT_WIDTH,
        attention_head_dim=(2, 4, 4),
        norm_num_groups=16,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=SIZE_WIDTH,
        projection_class_embeddings_input_dim=model.TEXT_WIDTH + SIZE_IDS * SIZE_WIDTH,
    )


@torch.no_grad()
def begin_with(
    denoiser: UNet2DConditionModel, start: UNet2DConditionModel, norm: nn.LayerNorm, scale: float
) -> None:
    """Give ``denoiser`` the weights of ``start``.

    ``start`` was trained on hidden states behind ``norm``; here they come before it, ``scale``
    being their usual deviation, so the norm's part that is linear moves into the keys and values.
    The second encoder's columns, the second transformer layers and the size ids add zero.
    """
    given = start.state_dict()
    width = norm.weight.shape[0]
    centred = torch.eye(width) - 1.0 / width
    columns = torch.diag(norm.weight) @ centred / scale
    state = denoiser.state_dict()
    for name, value in state.items():
        source = given.get(name)
        if "transformer_blocks.1." in name:
            if "to_out.0." in name or "ff.net.2." in name:
                value.zero_()
            continue
        if source is None:
            if name.startswith("add_embedding.linear_2"):
                value.zero_()
        elif name.endswith(("attn2.to_k.weight", "attn2.to_v.weight")):
            value[:, :width] = source @ columns
            value[:, width:] = 0.0
        elif "proj_in" in name or "proj_out" in name:
            value.copy_(source.reshape(value.shape))
        else:
            value.copy_(source)
    denoiser.load_state_dict(state)


def scheduler() -> EulerDiscreteScheduler:
    """Euler, as Stable Diffusion XL has it, on the noise schedule of the first demo model."""
    return EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        num_train_timesteps=1000,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
    )


def assemble(
    tokenizer: CLIPTokenizer, tokenizer_2: CLIPTokenizer, net: Denoiser, vae: AutoencoderTiny
) -> StableDiffusionXLPipeline:
    """A pipeline of the given parts, without watermark or progress bar."""
    pipeline = StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=net.text,
        text_encoder_2=net.text_2,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        unet=net.unet,
        scheduler=scheduler(),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
