r"""Measure how well a ControlNet makes the demo model follow sketches.

    python -m scripts.demo_model.judge_sketch --control models/emoji-sketch \
        --pipeline models/emoji --data DATA

The sketches are the edges of the prompts' own pictures, moved as no picture of training was, so
that the prompt alone doesn't tell where they lie. The figure is F1 of the drawn picture's edges and
the sketch's: the mean of how many of each lie within 2 pixels of the other, harmonic.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import ControlNetModel, DiffusionPipeline, StableDiffusionControlNetPipeline
from PIL import Image
from torch import Tensor
from torch.nn import functional

from . import dataset, sketch
from .contact_sheet import tile
from .judge import mixed_names, reconstructed
from .moved import moved
from .sampling import draw, open_pipeline, settings_of
from .vocabulary import SHEET_PROMPTS

NEAR = 2  # pixels
LEVEL = 2  # of sketch.edge_levels: neither faint edges nor strong ones alone


def edges(pictures: Tensor) -> Tensor:
    """bool [N, S, S] of uint8 pictures [N, 3, S, S]."""
    return sketch.edge_levels(pictures) >= LEVEL


def agreement(drawn: Tensor, wanted: Tensor) -> Tensor:
    """F1 [N] of edges bool [N, S, S] and [N, S, S], each within ``NEAR`` pixels of the other."""

    def found(those: Tensor, among: Tensor) -> Tensor:
        size = 2 * NEAR + 1
        near = functional.max_pool2d(among[:, None].float(), size, stride=1, padding=NEAR)[:, 0]
        return (those * near).sum(dim=(1, 2)) / those.sum(dim=(1, 2)).clamp(min=1)

    precision, recall = found(drawn, wanted), found(wanted, drawn)
    return 2 * precision * recall / (precision + recall).clamp(min=1e-6)


def with_control(pipeline: DiffusionPipeline, folder: Path) -> StableDiffusionControlNetPipeline:
    """The pipeline with the ControlNet in ``folder`` beside it."""
    control = ControlNetModel.from_pretrained(folder)
    made = StableDiffusionControlNetPipeline(
        **pipeline.components, controlnet=control, requires_safety_checker=False
    )
    made.set_progress_bar_config(disable=True)
    return made


def as_tensor(pictures: Sequence[Image.Image]) -> Tensor:
    """uint8 [N, 3, S, S]."""
    return torch.from_numpy(np.stack([np.asarray(each) for each in pictures])).permute(0, 3, 1, 2)


def as_images(pictures: Tensor) -> list[Image.Image]:
    """Images of uint8 [N, 3, S, S]."""
    return [Image.fromarray(each.permute(1, 2, 0).numpy()) for each in pictures]


def draw_sketches(
    pipeline: StableDiffusionControlNetPipeline,
    prompts: Sequence[str],
    hints: Tensor,
    scale: float,
    **settings: float,
) -> list[Image.Image]:
    """One picture for each prompt and hint of [N, 3, S, S]; prompt ``i`` from noise of seed i."""
    scales = {"controlnet_conditioning_scale": scale}
    return draw(pipeline, prompts, {"image": hints}, seed=0, **scales, **settings)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--control", type=Path, required=True, help="folder of the ControlNet")
    parser.add_argument("--pipeline", type=Path, required=True, help="pipeline folder")
    parser.add_argument("--data", type=Path, required=True, help="folder made by prepare_data")
    parser.add_argument("--limit", type=int, default=60, help="prompts")
    parser.add_argument("--scale", type=float, default=1.0, help="of the ControlNet")
    parser.add_argument("--steps", type=int, help="[default: the model's]")
    parser.add_argument("--guidance", type=float, help="[default: the model's]")
    parser.add_argument("--sheet", type=Path, help="PNG of sketches and pictures")
    arguments = parser.parse_args()
    torch.manual_seed(1234)
    pictures, emoji = dataset.load(arguments.data, style="flat")
    place = {entry.name: number for number, entry in enumerate(emoji)}
    prompts = mixed_names(emoji, arguments.limit)
    shown = moved(torch.from_numpy(pictures[[place[p] for p in prompts]]).permute(0, 3, 1, 2))
    lines = edges(shown)
    settings = settings_of(arguments.pipeline, arguments.steps, arguments.guidance)
    pipeline = open_pipeline(arguments.pipeline)
    controlled = with_control(pipeline, arguments.control)
    hints = sketch.hints(lines)
    kept = reconstructed(pipeline.vae, shown)
    followed = draw_sketches(controlled, prompts, hints, arguments.scale, **settings)
    for label, drawn in {
        "with the ControlNet": as_tensor(followed),
        "without": as_tensor(draw(pipeline, prompts, seed=0, **settings)),
        "the sketched pictures, encoded and decoded": ((kept + 1) * 127.5).round().to(torch.uint8),
    }.items():
        scores = agreement(edges(drawn), lines)
        print(f"{label}: edges F1 {scores.mean():.2f}, worst {scores.min():.2f}")
    if arguments.sheet:
        shown_names = [name for name in SHEET_PROMPTS if name in place][:16]
        chosen = torch.from_numpy(pictures[[place[name] for name in shown_names]])
        lines = edges(moved(chosen.permute(0, 3, 1, 2)))
        hints = sketch.hints(lines)
        drawn_ones = draw_sketches(controlled, shown_names, hints, arguments.scale, **settings)
        sketches = as_images((255 - hints * 255).to(torch.uint8))
        pairs = [each for pair in zip(sketches, drawn_ones, strict=True) for each in pair]
        tile(pairs).save(arguments.sheet, optimize=True)


if __name__ == "__main__":
    main()
