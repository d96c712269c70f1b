"""Train a small AutoencoderKL, to judge what decoding in tiles does to pictures.

    python -m scripts.demo_model.train_kl --data DATA --work WORK [--cpu-minutes 16]

Of Stable Diffusion's build (factor 8, group normalization over the whole picture, attention in the
middle), with a fiftieth of its weights. It sees crops of 128x128 pixels of collages of emoji, and
is saved as ``work/kl``; ``collage`` makes larger ones to judge by.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F  # noqa: N812 - the field's habit
from diffusers import AutoencoderKL
from torch import Tensor

from . import dataset
from .train_autoencoder import Options, half_precision, picture_loss, psnr, run
from .training import to_unit_range

CROP = 128
INK = 245
KL_WEIGHT = 1e-6
Pictures = npt.NDArray[np.uint8]


def autoencoder() -> AutoencoderKL:
    """Factor 8: [B, 3, 8 h, 8 w] <-> [B, 4, h, w]."""
    return AutoencoderKL(
        block_out_channels=(16, 32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=CROP,
        scaling_factor=1.0,
    )


def collage(pictures: Pictures, height: int, width: int, rng: np.random.Generator) -> Pictures:
    """Emoji [N, S, S, 3] of three sizes, strewn on a ground of two colours -> [height, width, 3].

    White is glass: what lies on a ground is multiplied with it.
    """
    low, high = rng.uniform(40, 255, (2, 3))
    slope = np.linspace(0, 1, width)[None, :, None]
    canvas = np.broadcast_to(low + (high - low) * slope, (height, width, 3)).copy()
    side = pictures.shape[1]
    for _ in range(max(4, height * width // side**2)):
        picture = pictures[rng.integers(len(pictures))].astype(np.float64)
        scale = rng.integers(3)
        if scale == 0:
            picture = picture.reshape(side // 2, 2, side // 2, 2, 3).mean((1, 3))
        elif scale == 2:
            picture = picture.repeat(2, 0).repeat(2, 1)
        size = len(picture)
        top, left = (int(rng.integers(-size // 2, length)) for length in (height, width))
        rows = slice(max(0, top), min(height, top + size))
        columns = slice(max(0, left), min(width, left + size))
        part = picture[rows.start - top : rows.stop - top, columns.start - left :]
        part = part[:, : columns.stop - columns.start]
        inked = part.min(2, keepdims=True) < INK
        canvas[rows, columns] = np.where(inked, part, canvas[rows, columns] * part / 255)
    made: Pictures = canvas.clip(0, 255).astype(np.uint8)
    return made


def as_batch(pictures: list[Pictures]) -> Tensor:
    """Pictures [H, W, 3] -> [B, 3, H, W] in -1 to 1."""
    return to_unit_range(torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2))


def train(options: Options) -> AutoencoderKL:
    """Train, save below ``options.work``, and return the averaged network."""
    pictures, _ = dataset.load(options.data)
    rng = np.random.default_rng(0)
    shown = as_batch([collage(pictures, 256, 256, np.random.default_rng(seed)) for seed in (1, 2)])
    net = autoencoder().to(memory_format=torch.channels_last)

    def loss_of(_rng: random.Random) -> Tensor:
        crops = [collage(pictures, CROP, CROP, rng) for _ in range(options.batch)]
        wanted = as_batch(crops).to(memory_format=torch.channels_last)
        with half_precision():
            latents = net.encode(wanted).latent_dist
            drawn = net.decode(latents.sample()).sample.float()
        loss: Tensor = (
            F.mse_loss(drawn, wanted)
            + picture_loss(drawn, wanted)
            + KL_WEIGHT * latents.kl().float().mean()
        )
        return loss

    def score_of(average: Any) -> str:
        with torch.no_grad():
            drawn = average.decode(average.encode(shown).latent_dist.mean).sample
        return f"collages {psnr(drawn, shown):.2f} dB"

    average = run("kl", net, options, loss_of, score_of)
    average.to(memory_format=torch.contiguous_format).save_pretrained(options.work / "kl")
    return average


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, required=True, help="folder made by prepare_data")
    parser.add_argument("--work", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--cpu-minutes", type=float, default=16.0)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    given = parser.parse_args()
    train(
        Options(
            data=given.data,
            work=given.work,
            teacher=None,
            denoiser=None,
            tokenizer=None,
            cpu_minutes=given.cpu_minutes,
            batch=given.batch,
            lr=given.lr,
        )
    )


if __name__ == "__main__":
    main()
