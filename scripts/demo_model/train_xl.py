"""Train the demo model in Stable Diffusion XL's form on soft and on cropped pictures, too.

    python -m scripts.demo_model.train_xl --data DATA --work WORK --start models/emoji

Begins with the weights of ``--start`` (see ``xl``), whose autoencoder and first text encoder stay
as they are. Run again with the same ``--work`` to go on from the checkpoint.

Half of the pictures were scaled down and up again, and their original size says so; three in ten
begin up to 16 pixels further down and right, and their crop says so.
"""

from __future__ import annotations

import random
from pathlib import Path

import torch
from diffusers import AutoencoderTiny, UNet2DConditionModel
from torch import Tensor
from torch.nn import functional
from transformers import CLIPTextModel, CLIPTokenizer

from . import model, stage, xl
from .train_unet import EMPTY_CAPTION_SHARE, diffusion_loss
from .training import Options, averaged, stage_parser

SOFT_SIDES = (16, 96)
MAX_CROP = 16
# Which of a picture's variants (soft, cropped) are made before training, and how often each kind
# of them is sampled.
VARIANTS = [(False, False)] + [(False, True)] * 3 + [(True, False)] * 6 + [(True, True)] * 3
KIND_SHARES = {(False, False): 0.35, (False, True): 0.15, (True, False): 0.35, (True, True): 0.15}


def soften(picture: Tensor, side: int) -> Tensor:
    """A picture [3, S, S], 0 to 255, scaled down to ``side`` and up again."""
    small = functional.interpolate(
        picture[None], size=(side, side), mode="bilinear", antialias=True
    )
    large = functional.interpolate(small, size=picture.shape[-2:], mode="bicubic")
    return large[0].clamp(0.0, 255.0)


def crop(picture: Tensor, top: int, left: int) -> Tensor:
    """The window [3, S, S] of a picture [3, S, S] that begins at (top, left); white beyond it."""
    grown = functional.pad(picture, (0, left, 0, top), value=255.0)
    return grown[:, top:, left:]


def variant(
    picture: Tensor, soft: bool, cropped: bool, rng: random.Random
) -> tuple[Tensor, list[int]]:
    """A picture [3, S, S] and its six size ids, at random."""
    full = picture.shape[-1]
    side = rng.randint(*SOFT_SIDES) if soft else full
    top, left = (rng.randint(0, MAX_CROP) for _ in range(2)) if cropped else (0, 0)
    changed = soften(picture, side) if soft else picture
    return crop(changed, top, left), [side, side, top, left, full, full]


def encode_variants(vae: AutoencoderTiny, pictures: Tensor) -> tuple[Tensor, Tensor]:
    """Latents [N, V, 4, 16, 16] and size ids [N, V, 6] of uint8 pictures [N, 3, S, S]."""
    rng = random.Random(0)
    latents, sizes = [], []
    for picture in pictures:
        made = [variant(picture.float(), soft, cropped, rng) for soft, cropped in VARIANTS]
        latents.append(model.encode_pictures(vae, torch.stack([each[0] for each in made])))
        sizes.append(torch.tensor([each[1] for each in made]))
    return torch.stack(latents), torch.stack(sizes)


def start_of(folder: Path) -> xl.Denoiser:
    """The denoiser that training begins with, made of the first demo model."""
    given = CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32)
    text, text_2 = xl.text_encoders(given)
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    ids = model.token_ids(
        tokenizer, ["a red apple", "rocket", "flat icon, blue cat", "pizza emoji"]
    )
    with torch.no_grad():
        hidden = text(ids, output_hidden_states=True).hidden_states[-2][:, 1:]
        scale = float(hidden.std(dim=-1).mean())
    unet = xl.unet()
    first = UNet2DConditionModel.from_pretrained(folder / "unet")
    xl.begin_with(unet, first, given.final_layer_norm, scale)
    return xl.Denoiser(text, text_2, unet)


def train(options: Options) -> None:
    """Train for the CPU time given; the checkpoint is ``work/xl.pt``."""
    begun = stage.begin(options)
    latents, sizes = encode_variants(begun.vae, begun.pictures)
    shares = torch.tensor([KIND_SHARES[kind] / VARIANTS.count(kind) for kind in VARIANTS])
    tokenizer_2 = CLIPTokenizer.from_pretrained(options.start / "tokenizer", pad_token=xl.PAD_2)
    net = start_of(options.start)
    net.to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]

    def loss_of(rng: random.Random) -> Tensor:
        chosen, captions = begun.pick(rng, EMPTY_CAPTION_SHARE)
        which = torch.multinomial(shares, begun.batch, replacement=True)
        conditioning = xl.Conditioning(
            begun.ids(captions),
            model.token_ids(tokenizer_2, captions),
            torch.tensor([not caption for caption in captions]),
            sizes[chosen, which],
        )
        return diffusion_loss(net, begun.alphas, latents[chosen, which], conditioning)

    begun.fit("xl", net, averaged(net), loss_of)


def main() -> None:
    train(Options(**vars(stage_parser(__doc__, lr=6e-4).parse_args())))


if __name__ == "__main__":
    main()
