"""Draw pictures with a pipeline, a few prompts at a time, each with its own seed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from PIL import Image

BATCH = 8


def open_pipeline(folder: Path) -> DiffusionPipeline:
    """The pipeline in a folder, of the class that it says, without progress bar."""
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def settings_of(folder: Path, steps: int | None, guidance: float | None) -> dict[str, float]:
    """Arguments of a pipeline's call: those given, and the folder's own in place of None."""
    own = json.loads((folder / "edgesd.json").read_text(encoding="utf-8"))
    given = {"num_inference_steps": steps, "guidance_scale": guidance}
    return {name: own[name] if value is None else value for name, value in given.items()}


def draw(
    pipeline: DiffusionPipeline, prompts: Sequence[str], *, seed: int = 0, **settings: object
) -> list[Image.Image]:
    """One picture for each prompt; prompt number ``i`` starts from noise of seed ``seed + i``."""
    pictures: list[Image.Image] = []
    for first in range(0, len(prompts), BATCH):
        batch = list(prompts[first : first + BATCH])
        generators = [
            torch.Generator().manual_seed(seed + first + place) for place in range(len(batch))
        ]
        pictures += pipeline(batch, generator=generators, **settings).images
    return pictures
