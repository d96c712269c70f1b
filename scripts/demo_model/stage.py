"""What a stage of diffusion training begins with: the training set and a pipeline's parts."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from diffusers import AutoencoderTiny, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from . import dataset, model
from .dataset import Emoji
from .training import AVERAGE_DECAY, FLAT, Net, Options, fit, pick, weights_of


@dataclass(frozen=True)
class Stage:
    """The flat pictures, and the parts of the pipeline that it starts from and never changes."""

    options: Options
    emoji: Sequence[Emoji]
    pictures: Tensor  # uint8 [N, 3, S, S]
    weights: Tensor  # [N], how often each is sampled
    tokenizer: CLIPTokenizer
    vae: AutoencoderTiny
    alphas: Tensor  # [1000], share of the picture in the variance

    @property
    def batch(self) -> int:
        return self.options.batch

    def pick(self, rng: random.Random, empty_share: float) -> tuple[Tensor, list[str]]:
        """Indices [batch] of pictures and a caption for each, a share of them empty."""
        return pick(self.emoji, self.weights, self.batch, rng, empty_share)

    def ids(self, captions: list[str]) -> Tensor:
        """Token ids [B, 77]."""
        return model.token_ids(self.tokenizer, captions)

    def latents(self, pictures: Tensor) -> Tensor:
        """Latents [N, 4, 16, 16] of uint8 pictures [N, 3, S, S]."""
        return model.encode_pictures(self.vae, pictures)

    def text(self) -> CLIPTextModel:
        """The text encoder, in fp32; it doesn't train."""
        return text_encoder(self.options).requires_grad_(False)

    def unet(self) -> UNet2DConditionModel:
        """The UNet, in fp32; it doesn't train."""
        return unet(self.options).requires_grad_(False).eval()

    def fit(
        self,
        name: str,
        net: Net,
        average: Net,
        loss_of: Callable[[random.Random], Tensor],
        average_decay: float = AVERAGE_DECAY,
        warmup: int = 200,
        flat: float = FLAT,
    ) -> None:
        """Train ``net`` as the options say; the checkpoint is ``work/NAME.pt``."""
        fit(
            net,
            average,
            loss_of,
            self.options.work / f"{name}.pt",
            cpu_minutes=self.options.cpu_minutes,
            batch=self.batch,
            lr=self.options.lr,
            average_decay=average_decay,
            warmup=warmup,
            flat=flat,
        )


def begin(options: Options) -> Stage:
    """Read the training set and the pipeline to start from; one thread from now on."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    pictures, emoji = dataset.load(options.data, style="flat")
    return Stage(
        options=options,
        emoji=emoji,
        pictures=torch.from_numpy(pictures).permute(0, 3, 1, 2),
        weights=weights_of(emoji),
        tokenizer=CLIPTokenizer.from_pretrained(options.start / "tokenizer"),
        vae=AutoencoderTiny.from_pretrained(options.start / "vae"),
        alphas=model.scheduler().alphas_cumprod,
    )


def text_encoder(options: Options) -> CLIPTextModel:
    """The text encoder of the pipeline to start from, in fp32."""
    folder = options.start / "text_encoder"
    text: CLIPTextModel = CLIPTextModel.from_pretrained(folder, dtype=torch.float32)
    return text


def unet(options: Options) -> UNet2DConditionModel:
    """The UNet of the pipeline to start from, in fp32."""
    given = UNet2DConditionModel.from_pretrained(options.start / "unet")
    return given.to(memory_format=torch.channels_last)
