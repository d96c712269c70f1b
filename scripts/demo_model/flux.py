"""The parts of the demo model in FLUX's form, and how they are put together to a pipeline."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from unittest import mock

import torch
from diffusers import (
    AutoencoderTiny,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)
from tokenizers import Tokenizer, pre_tokenizers, trainers
from tokenizers.models import Unigram
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

from . import model
from .dataset import Emoji
from .train_tokenizer import corpus

PIECES = 2048
TOKENS = 24
PATCH = 2  # latents are packed 2x2 to a token
GRID = model.LATENT_SIZE // PATCH
CHANNELS = model.LATENT_CHANNELS * PATCH**2
HEADS, HEAD_WIDTH = 6, 32
PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"


def tokenizer(emoji: Sequence[Emoji]) -> T5Tokenizer:
    """A unigram model of the captions, of at most ``PIECES`` pieces, with T5's special tokens."""
    unigram = Tokenizer(Unigram())
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=PIECES - 2,
        special_tokens=[UNKNOWN],
        unk_token=UNKNOWN,
        show_progress=False,
    )
    unigram.train_from_iterator(corpus(list(emoji)), trainer)
    found = json.loads(unigram.to_str())["model"]["vocab"]
    pieces = [(special, 0.0) for special in (PAD, END, UNKNOWN)]
    pieces += [(piece, score) for piece, score in found if piece != UNKNOWN]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=TOKENS)


def token_ids(tokenizer: T5Tokenizer, captions: list[str]) -> Tensor:
    """Token ids [B, 24]."""
    return model.token_ids(tokenizer, captions, TOKENS)


def text_encoder(vocabulary: int) -> T5EncoderModel:
    """Token ids [B, 24] -> hidden states [B, 24, 128]: T5 v1.1."""
    return T5EncoderModel(
        T5Config(
            vocab_size=vocabulary,
            d_model=model.TEXT_WIDTH,
            d_ff=4 * model.TEXT_WIDTH,
            d_kv=32,
            num_layers=3,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
        )
    )


def transformer(guidance: bool) -> FluxTransformer2DModel:
    """Packed latents [B, 64, 16], text [B, 24, 128], pooled [B, 128], sigma [B] -> velocity.

    guidance: whether the guidance scale [B] is an input, as in FLUX.1-dev.
    """
    return FluxTransformer2DModel(
        in_channels=CHANNELS,
        num_layers=2,
        num_single_layers=6,
        attention_head_dim=HEAD_WIDTH,
        num_attention_heads=HEADS,
        joint_attention_dim=model.TEXT_WIDTH,
        pooled_projection_dim=model.TEXT_WIDTH,
        guidance_embeds=guidance,
        axes_dims_rope=(4, 14, 14),
    )


@torch.no_grad()
def begin(net: FluxTransformer2DModel) -> None:
    """The initial weights of Diffusion Transformers (Peebles & Xie, arXiv 2212.09748).

    Modulations and the last layer give zero, so each block begins as the identity.
    """
    for name, module in net.named_modules():
        if isinstance(module, nn.Linear):
            if name == "proj_out" or ".norm" in name or name.startswith("norm_out"):
                nn.init.zeros_(module.weight)
            elif name.startswith("time_text_embed"):
                nn.init.normal_(module.weight, std=0.02)
            else:
                nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)


def pack(latents: Tensor) -> Tensor:
    """[B, 4, 16, 16] -> [B, 64, 16], as ``FluxPipeline`` does: the channel varies slowest."""
    batch = len(latents)
    patches = latents.reshape(batch, model.LATENT_CHANNELS, GRID, PATCH, GRID, PATCH)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, GRID * GRID, CHANNELS)


class Denoiser(nn.Module):
    """The T5 encoder and the transformer as one module: they train together."""

    def __init__(self, text: T5EncoderModel, transformer: FluxTransformer2DModel) -> None:
        super().__init__()
        self.text = text
        self.transformer = transformer
        places = torch.zeros(GRID, GRID, 3)
        places[..., 1] = torch.arange(GRID)[:, None]
        places[..., 2] = torch.arange(GRID)[None]
        self.register_buffer("image_ids", places.reshape(-1, 3), persistent=False)
        self.register_buffer("text_ids", torch.zeros(TOKENS, 3), persistent=False)

    def forward(
        self,
        noisy: Tensor,
        sigmas: Tensor,
        ids: Tensor,
        pooled: Tensor,
        guidance: Tensor | None = None,
    ) -> Tensor:
        """Velocity [B, 64, 16] from packed latents [B, 64, 16], sigmas [B], T5's token ids
        [B, 24] and CLIP's pooled output [B, 128]."""
        velocity: Tensor = self.transformer(
            hidden_states=noisy,
            encoder_hidden_states=self.text(ids)[0],
            pooled_projections=pooled,
            timestep=sigmas,
            guidance=guidance,
            img_ids=self.image_ids,
            txt_ids=self.text_ids,
            return_dict=False,
        )[0]
        return velocity


def plain_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``scaled_dot_product_attention`` as two matrix products; [B, heads, tokens, width]."""
    if dropout_p or is_causal or enable_gqa:
        raise ValueError("only attention without dropout, over all tokens, is plain")
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    scores = torch.matmul(query, key.transpose(-1, -2)) * factor
    if attn_mask is not None:
        scores = scores + attn_mask
    return torch.matmul(scores.softmax(dim=-1).to(value.dtype), value)


@contextmanager
def quick_steps() -> Iterator[None]:
    """bfloat16 products, and attention without torch's fused one.

    The fused one's gradient takes 40% of a step on a CPU, at this width and length.
    """
    with (
        mock.patch.object(functional, "scaled_dot_product_attention", plain_attention),
        torch.autocast("cpu", torch.bfloat16),
    ):
        yield


def scheduler(dynamic: bool) -> FlowMatchEulerDiscreteScheduler:
    """Euler on straight paths. dynamic: the shift grows with the picture, as in FLUX.1-dev."""
    return FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=dynamic)


def assemble(
    clip_tokenizer: CLIPTokenizer,
    clip: CLIPTextModel,
    t5_tokenizer: T5Tokenizer,
    net: Denoiser,
    vae: AutoencoderTiny,
) -> FluxPipeline:
    """A pipeline of the given parts, without progress bar."""
    pipeline = FluxPipeline(
        scheduler=scheduler(bool(net.transformer.config.guidance_embeds)),
        vae=vae,
        text_encoder=clip,
        tokenizer=clip_tokenizer,
        text_encoder_2=net.text,
        tokenizer_2=t5_tokenizer,
        transformer=net.transformer,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
