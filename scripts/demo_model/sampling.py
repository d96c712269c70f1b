"""Draw pictures with a pipeline, a few prompts at a time, each with its own seed."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor

from .flux import TOKENS
from .train_lcm import scheduler

BATCH = 8


def add_drawing_options(parser: argparse.ArgumentParser) -> None:
    """What ``open_pipeline`` and ``settings_of`` are called with."""
    parser.add_argument("--pipeline", type=Path, required=True, help="pipeline folder")
    parser.add_argument("--adapter", type=Path, help="folder of a low-rank adapter")
    parser.add_argument("--lcm", action="store_true", help="draw as a model of few steps")
    parser.add_argument("--steps", type=int, help="[default: the model's]")
    parser.add_argument("--guidance", type=float, help="[default: the model's]")


def open_pipeline(
    folder: Path, adapter: Path | None = None, lcm: bool = False
) -> DiffusionPipeline:
    """The pipeline in a folder, of the class that it says, without progress bar.

    adapter: folder of the adapter that is added to it; lcm: with the scheduler of few steps.
    """
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    if adapter is not None:
        pipeline.load_lora_weights(adapter)
        pipeline.fuse_lora()
    if lcm:
        pipeline.scheduler = scheduler()
    return pipeline


def settings_of(folder: Path, steps: int | None, guidance: float | None) -> dict[str, float]:
    """Arguments of a pipeline's call: those given, and the folder's own in place of None."""
    own = json.loads((folder / "edgesd.json").read_text(encoding="utf-8"))
    given = {"num_inference_steps": steps, "guidance_scale": guidance}
    settings = {name: own[name] if value is None else value for name, value in given.items()}
    if (folder / "transformer").is_dir():
        # FluxPipeline draws 1024x1024 and reads 512 tokens unless it is told.
        settings |= {"height": own["height"], "width": own["width"], "max_sequence_length": TOKENS}
    return settings


def draw(
    pipeline: DiffusionPipeline,
    prompts: Sequence[str],
    each: Mapping[str, Tensor] | None = None,
    /,
    *,
    seed: int = 0,
    **settings: object,
) -> list[Image.Image]:
    """One picture for each prompt; prompt number ``i`` starts from noise of seed ``seed + i``.

    each: arguments of which prompt number ``i`` gets row ``i``.
    """
    pictures: list[Image.Image] = []
    for first in range(0, len(prompts), BATCH):
        part = slice(first, first + BATCH)
        batch = list(prompts[part])
        rows = {name: values[part] for name, values in (each or {}).items()}
        generators = [
            torch.Generator().manual_seed(seed + first + place) for place in range(len(batch))
        ]
        pictures += pipeline(batch, generator=generators, **rows, **settings).images
    return pictures
