"""Train a ControlNet that makes the demo model follow a sketch.

    python -m scripts.demo_model.train_control --data DATA --work WORK --start models/emoji

The ControlNet begins as the UNet of ``--start``, which stays as it is, as the text encoder and the
autoencoder do (Zhang et al., Adding Conditional Control, arXiv 2302.05543). The sketches are edges
of the pictures (``sketch``), moved with them. Run again with the same ``--work`` to go on from the
checkpoint.
"""

from __future__ import annotations

import random

import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from torch import Tensor

from . import sketch, stage
from .moved import variants
from .train_unet import EMPTY_CAPTION_SHARE, diffusion_loss
from .training import Options, averaged, stage_parser

HINT_CHANNELS = (8, 16, 32, 32)
VARIANTS = 8


def control_of(unet: UNet2DConditionModel) -> ControlNetModel:
    """A ControlNet with the weights of the UNet, which adds nothing yet.

    Hints [B, 3, 128, 128] of 0 to 1 -> what is added to the UNet's skip connections.
    """
    return ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=HINT_CHANNELS)


def controlled(
    unet: UNet2DConditionModel,
    control: ControlNetModel,
    noisy: Tensor,
    timesteps: Tensor,
    conditioning: tuple[Tensor, Tensor],
) -> Tensor:
    """v [B, 4, 16, 16]; conditioning: hidden states [B, 77, 128], hints [B, 3, 128, 128]."""
    hidden, hints = conditioning
    down, middle = control(noisy, timesteps, hidden, hints, return_dict=False)
    v: Tensor = unet(
        noisy,
        timesteps,
        hidden,
        down_block_additional_residuals=down,
        mid_block_additional_residual=middle,
    ).sample
    return v


def train(options: Options) -> None:
    """Train for the CPU time given; the checkpoint is ``work/control.pt``."""
    begun = stage.begin(options)
    text, unet = begun.text(), begun.unet()
    latents, levels = [], []
    for pictures in variants(begun.pictures, VARIANTS).unbind(1):
        latents.append(begun.latents(pictures))
        levels.append(torch.cat([sketch.edge_levels(part) for part in torch.split(pictures, 64)]))
    net = control_of(unet).to(memory_format=torch.channels_last).train()

    def predict(noisy: Tensor, timesteps: Tensor, conditioning: tuple[Tensor, Tensor]) -> Tensor:
        return controlled(unet, net, noisy, timesteps, conditioning)

    def loss_of(rng: random.Random) -> Tensor:
        chosen, captions = begun.pick(rng, EMPTY_CAPTION_SHARE)
        at = [(rng.randrange(VARIANTS), number) for number in chosen.tolist()]
        hints = sketch.drawn_by_hand(torch.stack([levels[which][n] for which, n in at]))
        hidden = text(begun.ids(captions))[0]
        wanted = torch.stack([latents[which][n] for which, n in at])
        return diffusion_loss(predict, begun.alphas, wanted, (hidden, hints))

    begun.fit("control", net, averaged(net), loss_of)


def main() -> None:
    train(Options(**vars(stage_parser(__doc__, lr=1e-3, cpu_minutes=34).parse_args())))


if __name__ == "__main__":
    main()
