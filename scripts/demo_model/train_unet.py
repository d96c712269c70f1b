"""Train the text encoder and the UNet, together, on the latents of the flat emoji.

    python -m scripts.demo_model.train_unet --data DATA --work WORK --start PIPELINE

``--start`` is a pipeline folder: its tokenizer and its autoencoder's latents are used, and its
text encoder and UNet unless ``--fresh``. Run again with the same ``--work`` to go on from the
checkpoint.
"""

from __future__ import annotations

import copy
import random
from pathlib import Path

import torch
from diffusers import AutoencoderTiny, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from . import dataset, model
from .training import fit, pick, stage_parser, weights_of

EMPTY_CAPTION_SHARE = 0.1  # for classifier-free guidance
MIN_SNR_GAMMA = 5.0
TIMESTEPS = 1000
AVERAGE_DECAY = 0.999


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


def stratified_timesteps(batch: int) -> Tensor:
    """One timestep from each of ``batch`` equal parts of the range, in random order, [B]."""
    places = (torch.arange(batch) + torch.rand(batch)) / batch
    return (places[torch.randperm(batch)] * TIMESTEPS).long()


def diffusion_loss(net: nn.Module, alphas: Tensor, latents: Tensor, conditioning: object) -> Tensor:
    """Min-SNR weighted error of the v-prediction, a scalar.

    ``net`` takes noisy latents, timesteps and the conditioning, and gives v.
    """
    timesteps = stratified_timesteps(len(latents))
    alpha = alphas[timesteps][:, None, None, None]
    noise = torch.randn_like(latents)
    noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
    wanted = alpha.sqrt() * noise - (1 - alpha).sqrt() * latents
    snr = alpha / (1 - alpha)
    weight = 2.0 * snr.clamp(max=MIN_SNR_GAMMA) / (snr + 1)
    prediction = net(noisy.to(memory_format=torch.channels_last), timesteps, conditioning).float()
    loss: Tensor = (weight * (prediction - wanted).pow(2)).mean()
    return loss


def train(
    data: Path, work: Path, start: Path, *, fresh: bool, cpu_minutes: float, batch: int, lr: float
) -> None:
    """Train for ``cpu_minutes`` of CPU time; the checkpoint is ``work/unet.pt``."""
    torch.set_num_threads(1)
    pictures, emoji = dataset.load(data, style="flat")
    vae = AutoencoderTiny.from_pretrained(start / "vae")
    latents = model.encode_pictures(vae, torch.from_numpy(pictures).permute(0, 3, 1, 2))
    weights = weights_of(emoji)
    tokenizer = CLIPTokenizer.from_pretrained(start / "tokenizer")
    if fresh:
        net = Denoiser(model.text_encoder(len(tokenizer)), model.unet())
    else:
        net = Denoiser(
            CLIPTextModel.from_pretrained(start / "text_encoder", dtype=torch.float32),
            UNet2DConditionModel.from_pretrained(start / "unet"),
        )
    net.to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    average = copy.deepcopy(net).requires_grad_(False).eval()
    alphas = model.scheduler().alphas_cumprod

    def loss_of(rng: random.Random) -> Tensor:
        chosen, captions = pick(emoji, weights, batch, rng, EMPTY_CAPTION_SHARE)
        ids = model.token_ids(tokenizer, captions)
        return diffusion_loss(net, alphas, latents[chosen], ids)

    fit(
        net,
        average,
        loss_of,
        work / "unet.pt",
        cpu_minutes=cpu_minutes,
        batch=batch,
        lr=lr,
        average_decay=AVERAGE_DECAY,
    )


def main() -> None:
    parser = stage_parser(__doc__, lr=8e-4)
    parser.add_argument("--fresh", action="store_true", help="start from random weights")
    train(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
