"""Train the text encoder and the UNet, together, on the latents of the flat emoji.

    python -m scripts.demo_model.train_unet --data DATA --work WORK --start PIPELINE

``--start`` is a pipeline folder: its tokenizer and its autoencoder's latents are used, and its
text encoder and UNet unless ``--fresh``. Run again with the same ``--work`` to go on from the
checkpoint.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TypeVar

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel

from . import model, stage
from .training import TIMESTEPS, Options, averaged, stage_parser, stratified

EMPTY_CAPTION_SHARE = 0.1  # for classifier-free guidance
MIN_SNR_GAMMA = 5.0

Conditioning = TypeVar("Conditioning")


class Denoiser(nn.Module):
    """The text encoder and the UNet as one module: they train together."""

    def __init__(self, text: CLIPTextModel, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.text = text
        self.unet = unet

    def forward(self, noisy: Tensor, timesteps: Tensor, ids: Tensor) -> Tensor:
        """v [B, 4, 16, 16] from noisy latents [B, 4, 16, 16], timesteps [B], token ids [B, 77]."""
        hidden = self.text(ids)[0]
        prediction: Tensor = self.unet(noisy, timesteps, hidden).sample
        return prediction


def diffusion_loss(
    net: Callable[[Tensor, Tensor, Conditioning], Tensor],
    alphas: Tensor,
    latents: Tensor,
    conditioning: Conditioning,
) -> Tensor:
    """Min-SNR weighted error of the v-prediction, a scalar.

    ``net`` takes noisy latents, timesteps and the conditioning, and gives v.
    """
    timesteps = stratified(len(latents), TIMESTEPS)
    alpha = alphas[timesteps][:, None, None, None]
    noise = torch.randn_like(latents)
    noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
    wanted = alpha.sqrt() * noise - (1 - alpha).sqrt() * latents
    snr = alpha / (1 - alpha)
    weight = 2.0 * snr.clamp(max=MIN_SNR_GAMMA) / (snr + 1)
    prediction = net(noisy.to(memory_format=torch.channels_last), timesteps, conditioning).float()
    loss: Tensor = (weight * (prediction - wanted).pow(2)).mean()
    return loss


def train(options: Options, fresh: bool) -> None:
    """Train for the CPU time given; the checkpoint is ``work/unet.pt``."""
    begun = stage.begin(options)
    latents = begun.latents(begun.pictures)
    if fresh:
        net = Denoiser(model.text_encoder(len(begun.tokenizer)), model.unet())
    else:
        net = Denoiser(stage.text_encoder(options), stage.unet(options))
    net.to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]

    def loss_of(rng: random.Random) -> Tensor:
        chosen, captions = begun.pick(rng, EMPTY_CAPTION_SHARE)
        return diffusion_loss(net, begun.alphas, latents[chosen], begun.ids(captions))

    begun.fit("unet", net, averaged(net), loss_of)


def main() -> None:
    parser = stage_parser(__doc__, lr=8e-4)
    parser.add_argument("--fresh", action="store_true", help="start from random weights")
    given = vars(parser.parse_args())
    fresh = given.pop("fresh")
    train(Options(**given), fresh)


if __name__ == "__main__":
    main()
