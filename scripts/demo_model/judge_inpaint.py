"""Measure what a model of the demo's makes of masked pictures.

    python -m scripts.demo_model.judge_inpaint --pipeline PIPELINE --data DATA

The pictures are those of the prompts, moved as no picture of training was, so that the prompt alone
doesn't tell what belongs under the mask. PSNR inside and outside of the mask, and of the
differences between neighbours across its border (the seam), against the whole picture. ``--pipeline
models/emoji`` measures what a model without a mask's input does.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import StableDiffusionInpaintPipeline
from PIL import Image
from torch import Tensor

from . import dataset, masks
from .contact_sheet import tile
from .judge import mixed_names, reconstructed
from .judge_sketch import as_images, as_tensor
from .moved import moved
from .sampling import draw, settings_of
from .training import to_unit_range
from .vocabulary import SHEET_PROMPTS


def decibels(errors: Tensor, where: Tensor) -> Tensor:
    """PSNR [N] of errors [N, 3, H, W], of 255, at the places [N, 1, H, W]."""
    mean = (errors.square() * where).sum(dim=(1, 2, 3)) / (3 * where.sum(dim=(1, 2, 3))).clamp(1)
    return -10 * torch.log10(mean / 255.0**2 + 1e-10)


def seams(drawn: Tensor, wanted: Tensor, mask: Tensor) -> Tensor:
    """PSNR [N] of the steps from a pixel to the next where the mask begins or ends."""
    errors, places = [], []
    for axis in (2, 3):
        errors.append((drawn.diff(dim=axis) - wanted.diff(dim=axis)).flatten(2)[..., None])
        places.append(mask.diff(dim=axis).abs().flatten(2)[..., None])
    return decibels(torch.cat(errors, dim=2), torch.cat(places, dim=2))


def partial_masks(count: int, side: int) -> Tensor:
    """[N, 1, S, S] of 0 and 1: boxes and blobs in turn."""
    made = [masks.box(side) if number % 2 else masks.blob(side) for number in range(count)]
    return torch.stack(made)[:, None]


def fill(
    pipeline: StableDiffusionInpaintPipeline,
    prompts: Sequence[str],
    pictures: Tensor,
    mask: Tensor,
    **settings: float,
) -> list[Image.Image]:
    """uint8 pictures [N, 3, S, S] with what the prompts say under masks [N, 1, S, S]."""
    height, width = pictures.shape[-2:]
    given = {"image": to_unit_range(pictures), "mask_image": mask}
    return draw(pipeline, prompts, given, seed=0, height=height, width=width, **settings)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--pipeline", type=Path, required=True, help="pipeline folder")
    parser.add_argument("--data", type=Path, required=True, help="folder made by prepare_data")
    parser.add_argument("--limit", type=int, default=60, help="prompts")
    parser.add_argument("--steps", type=int, help="[default: the model's]")
    parser.add_argument("--guidance", type=float, help="[default: the model's]")
    parser.add_argument("--sheet", type=Path, help="PNG of masked and filled pictures")
    arguments = parser.parse_args()
    torch.manual_seed(1234)
    raw, emoji = dataset.load(arguments.data, style="flat")
    place = {entry.name: number for number, entry in enumerate(emoji)}
    prompts = mixed_names(emoji, arguments.limit)
    settings = settings_of(arguments.pipeline, arguments.steps, arguments.guidance)
    pipeline = StableDiffusionInpaintPipeline.from_pretrained(arguments.pipeline)
    pipeline.set_progress_bar_config(disable=True)

    def picked(names: Sequence[str]) -> tuple[Tensor, Tensor]:
        chosen = torch.from_numpy(raw[[place[name] for name in names]]).permute(0, 3, 1, 2)
        pictures = moved(chosen)
        return pictures, partial_masks(len(names), pictures.shape[-1])

    pictures, mask = picked(prompts)
    wanted = pictures.float()
    kept = (reconstructed(pipeline.vae, pictures) + 1) * 127.5
    filled = as_tensor(fill(pipeline, prompts, pictures, mask, **settings)).float()
    pasted = torch.where(mask > 0.5, filled, wanted)
    for label, drawn in {
        "drawn": filled,
        "pasted into the picture": pasted,
        "the whole pictures, encoded and decoded": kept,
    }.items():
        inside, outside = (decibels(drawn - wanted, where) for where in (mask, 1 - mask))
        seam = seams(drawn, wanted, mask)
        print(
            f"{label}: inside {inside.mean():.1f} dB, outside {outside.mean():.1f} dB, "
            f"seam {seam.mean():.1f} dB"
        )
    if arguments.sheet:
        names = [name for name in SHEET_PROMPTS if name in place][:16]
        pictures, mask = picked(names)
        drawn_ones = fill(pipeline, names, pictures, mask, **settings)
        masked = pictures.float() * (1 - mask) + 127.0 * mask
        pairs = zip(as_images(masked.to(torch.uint8)), drawn_ones, strict=True)
        tile([each for pair in pairs for each in pair]).save(arguments.sheet, optimize=True)


if __name__ == "__main__":
    main()
