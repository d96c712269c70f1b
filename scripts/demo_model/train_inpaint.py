"""Train the demo model to fill a part of a picture, told by a mask.

    python -m scripts.demo_model.train_inpaint --data DATA --work WORK --start models/emoji

The UNet reads the mask and the latents of what is left beside the noisy latents, nine channels as
in Stable Diffusion's inpainting model; what they meet begins as zero. Text encoder and autoencoder
stay as they are. Run again with the same ``--work`` to go on from the checkpoint.
"""

from __future__ import annotations

import random

import torch
from diffusers import AutoencoderTiny, UNet2DConditionModel
from torch import Tensor
from torch.nn import functional

from . import model, stage
from .masks import masks
from .moved import variants
from .train_unet import EMPTY_CAPTION_SHARE, diffusion_loss
from .training import Options, averaged, stage_parser, to_unit_range

VARIANTS = 12
UNMOVED_SHARE = 0.3  # the rest as in `moved`
CHANNELS = 2 * model.LATENT_CHANNELS + 1


def widened(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """The UNet with inputs for a mask and the latents of what is left, which add nothing yet."""
    config = {name: value for name, value in unet.config.items() if name[0] != "_"}
    wide = UNet2DConditionModel.from_config(config, in_channels=CHANNELS)
    state = unet.state_dict()
    given = state["conv_in.weight"]
    state["conv_in.weight"] = torch.zeros(len(given), CHANNELS, *given.shape[2:])
    state["conv_in.weight"][:, : given.shape[1]] = given
    wide.load_state_dict(state)
    return wide


@torch.no_grad()
def left(vae: AutoencoderTiny, pictures: Tensor, mask: Tensor) -> Tensor:
    """What the UNet is told of pictures uint8 [B, 3, S, S] and masks [B, 1, S, S], [B, 5, h, w].

    The mask and the latents of the picture with grey inside, as diffusers' pipeline makes both.
    """
    latents = vae.encode(to_unit_range(pictures) * (mask < 0.5)).latents
    small = functional.interpolate(mask, latents.shape[-2:])
    return torch.cat([small, latents], dim=1)


def train(options: Options) -> None:
    """Train for the CPU time given; the checkpoint is ``work/inpaint.pt``."""
    begun = stage.begin(options)
    text = begun.text()
    pictures = variants(begun.pictures, VARIANTS)
    latents = torch.stack([begun.latents(each) for each in pictures.unbind(1)], dim=1)
    net = widened(begun.unet()).to(memory_format=torch.channels_last).train()

    def predict(noisy: Tensor, timesteps: Tensor, conditioning: tuple[Tensor, Tensor]) -> Tensor:
        hidden, told = conditioning
        v: Tensor = net(torch.cat([noisy, told], dim=1), timesteps, hidden).sample
        return v

    def loss_of(rng: random.Random) -> Tensor:
        chosen, captions = begun.pick(rng, EMPTY_CAPTION_SHARE)
        which = torch.randint(1, VARIANTS, (begun.batch,))
        which[torch.rand(begun.batch) < UNMOVED_SHARE] = 0
        shown = pictures[chosen, which]
        told = left(begun.vae, shown, masks(begun.batch, shown.shape[-1]))
        hidden = text(begun.ids(captions))[0]
        return diffusion_loss(predict, begun.alphas, latents[chosen, which], (hidden, told))

    begun.fit("inpaint", net, averaged(net), loss_of)


def main() -> None:
    train(Options(**vars(stage_parser(__doc__, lr=6e-4, cpu_minutes=26).parse_args())))


if __name__ == "__main__":
    main()
