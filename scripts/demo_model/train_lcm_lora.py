"""Distil the demo model's few steps into a low-rank adapter (LCM-LoRA).

    python -m scripts.demo_model.train_lcm_lora --data DATA --work WORK --start models/emoji

As ``train_lcm``, but of the student only an adapter learns, and one guidance scale, which becomes
part of it (Luo et al., LCM-LoRA, arXiv 2311.05556): draw with a scale of 1. Run again with the same
``--work`` to go on from the checkpoint.
"""

from __future__ import annotations

import random

from torch import Tensor

from . import stage
from .train_lcm import EMPTY_CAPTION_SHARE, TARGET_DECAY, Solver, distillation_loss
from .train_lora import ATTENTION, CONVOLUTIONS, WARMUP, adapted
from .training import Options, averaged, stage_parser

RANK = 32
ALPHA = 32
GUIDANCE_SCALE = 3.0
TARGETS = [*ATTENTION, *CONVOLUTIONS, "ff.net.0.proj", "ff.net.2", "time_emb_proj"]
TARGETS += ["downsamplers.0.conv", "upsamplers.0.conv"]


def train(options: Options) -> None:
    """Train for the CPU time given; the checkpoint is ``work/lcm-lora.pt``."""
    begun = stage.begin(options)
    latents = begun.latents(begun.pictures)
    text, teacher = begun.text(), begun.unet()
    student = adapted(begun.unet(), TARGETS, RANK, ALPHA).train()
    target = averaged(student)
    solver = Solver()
    empty = text(begun.ids([""]))[0].expand(begun.batch, -1, -1)

    def loss_of(rng: random.Random) -> Tensor:
        chosen, captions = begun.pick(rng, EMPTY_CAPTION_SHARE)
        hidden = text(begun.ids(captions))[0]
        return distillation_loss(
            student, target, teacher, solver, latents[chosen], hidden, empty, GUIDANCE_SCALE
        )

    begun.fit("lcm-lora", student, target, loss_of, TARGET_DECAY, WARMUP)


def main() -> None:
    train(Options(**vars(stage_parser(__doc__, lr=1e-3, cpu_minutes=3).parse_args())))


if __name__ == "__main__":
    main()
