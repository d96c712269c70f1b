"""Teach the demo model a style: a low-rank adapter of its UNet, and nothing else.

    python -m scripts.demo_model.train_lora STYLE --data DATA --work WORK --start models/emoji

The pictures are those that the model knows, filtered (``styles``). Run again with the same
``--work`` to go on from the checkpoint.
"""

from __future__ import annotations

import random

from diffusers import UNet2DConditionModel
from peft import LoraConfig
from torch import Tensor

from . import stage
from .styles import STYLES
from .train_unet import EMPTY_CAPTION_SHARE, diffusion_loss
from .training import Options, averaged, stage_parser

RANK = 8
ALPHA = 4
WARMUP = 50  # steps, of a few hundred
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
CONVOLUTIONS = ["conv1", "conv2", "conv_shortcut", "proj_in", "proj_out"]
# What each style adapts: lines are finer than the levels that attend, colours are not.
TARGETS = {"line-art": ATTENTION + CONVOLUTIONS, "duotone": ATTENTION}


def adapted(
    unet: UNet2DConditionModel, targets: list[str], rank: int, alpha: int
) -> UNet2DConditionModel:
    """The UNet with factors beside its layers, which alone learn, and add nothing yet."""
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets))
    return unet


def train(options: Options, style: str) -> None:
    """Train for the CPU time given; the checkpoint is ``work/STYLE.pt``."""
    begun = stage.begin(options)
    latents = begun.latents(STYLES[style](begun.pictures))
    text = begun.text()
    net = adapted(begun.unet(), TARGETS[style], RANK, ALPHA).train()

    def predict(noisy: Tensor, timesteps: Tensor, hidden: Tensor) -> Tensor:
        v: Tensor = net(noisy, timesteps, hidden).sample
        return v

    def loss_of(rng: random.Random) -> Tensor:
        chosen, captions = begun.pick(rng, EMPTY_CAPTION_SHARE)
        hidden = text(begun.ids(captions))[0]
        return diffusion_loss(predict, begun.alphas, latents[chosen], hidden)

    begun.fit(style, net, averaged(net), loss_of, warmup=WARMUP)


def main() -> None:
    parser = stage_parser(__doc__, lr=2e-3, cpu_minutes=1.5)
    parser.add_argument("style", choices=STYLES)
    given = vars(parser.parse_args())
    style = given.pop("style")
    train(Options(**given), style)


if __name__ == "__main__":
    main()
