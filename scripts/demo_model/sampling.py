"""Draw pictures with a pipeline, a few prompts at a time, each with its own seed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

BATCH = 8


def draw(
    pipeline: StableDiffusionPipeline,
    prompts: Sequence[str],
    *,
    seed: int = 0,
    num_inference_steps: int = 20,
    guidance_scale: float = 3.0,
) -> list[Image.Image]:
    """One picture for each prompt; prompt number ``i`` starts from noise of seed ``seed + i``."""
    pictures: list[Image.Image] = []
    for first in range(0, len(prompts), BATCH):
        batch = list(prompts[first : first + BATCH])
        generators = [
            torch.Generator().manual_seed(seed + first + place) for place in range(len(batch))
        ]
        pictures += pipeline(
            batch,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            generator=generators,
        ).images
    return pictures
