"""Distil the demo model to one that draws in four steps (latent consistency distillation).

    python -m scripts.demo_model.train_lcm --data DATA --work WORK --start models/emoji

The student begins as the UNet of ``--start`` and learns to give, from any point of the teacher's
guided DDIM trajectory, the point where it ends; the guidance scale becomes one of its inputs (Luo
et al., Latent Consistency Models, arXiv 2310.04378). Text encoder and autoencoder stay as they
are. Run again with the same ``--work`` to go on from the checkpoint.
"""

from __future__ import annotations

import random

import torch
from diffusers import LCMScheduler, UNet2DConditionModel
from torch import Tensor

from . import model, stage
from .training import TIMESTEPS, Options, averaged, stage_parser, stratified

GUIDANCE_WIDTH = 64
GUIDANCE_SCALES = (2.0, 6.0)
SOLVER_STEPS = 50  # LCMScheduler's original_inference_steps: it samples at these timesteps only
TARGET_DECAY = 0.95
HUBER = 1e-3
EMPTY_CAPTION_SHARE = 0.05


def scheduler() -> LCMScheduler:
    """Latent consistency sampling on the noise schedule of the demo model."""
    return LCMScheduler.from_config(
        model.scheduler().config, original_inference_steps=SOLVER_STEPS, timestep_spacing="leading"
    )


def student_of(teacher: UNet2DConditionModel) -> UNet2DConditionModel:
    """The teacher with an input for the guidance scale, which adds nothing yet."""
    config = {name: value for name, value in teacher.config.items() if name[0] != "_"}
    student = UNet2DConditionModel.from_config(config, time_cond_proj_dim=GUIDANCE_WIDTH)
    missing, unexpected = student.load_state_dict(teacher.state_dict(), strict=False)
    if missing != ["time_embedding.cond_proj.weight"] or unexpected:
        raise ValueError(f"the UNets differ in more than cond_proj: {missing}, {unexpected}")
    torch.nn.init.zeros_(student.time_embedding.cond_proj.weight)
    return student


def guidance_embedding(guidance: Tensor) -> Tensor:
    """[B, 64] of guidance scales [B], as ``LatentConsistencyModelPipeline`` makes them."""
    half = GUIDANCE_WIDTH // 2
    rates = torch.exp(torch.arange(half) * -(torch.log(torch.tensor(10000.0)) / (half - 1)))
    angles = (guidance[:, None] - 1.0) * 1000.0 * rates[None]
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class Solver:
    """The teacher's noise schedule, at the timesteps that the student is sampled at."""

    def __init__(self) -> None:
        self.alphas = model.scheduler().alphas_cumprod
        self.skip = TIMESTEPS // SOLVER_STEPS
        sampling = scheduler()
        scaled = torch.arange(TIMESTEPS).float() * sampling.config.timestep_scaling
        variance = 0.5**2  # LCMScheduler's sigma_data
        self.keep = variance / (scaled**2 + variance)
        self.change = scaled / (scaled**2 + variance).sqrt()

    def start_timesteps(self, batch: int) -> Tensor:
        """One of the timesteps of the sampler for each picture, [B], spread over all of them."""
        return (stratified(batch, SOLVER_STEPS) + 1) * self.skip - 1

    def alpha(self, timesteps: Tensor) -> Tensor:
        """Share of the picture in the variance at timesteps [B], as [B, 1, 1, 1]."""
        share: Tensor = self.alphas[timesteps][:, None, None, None]
        return share

    def split(self, noisy: Tensor, timesteps: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The picture and the noise that a v-prediction says ``noisy`` [B, 4, h, w] is made of."""
        alpha = self.alpha(timesteps)
        picture = alpha.sqrt() * noisy - (1 - alpha).sqrt() * v
        noise = alpha.sqrt() * v + (1 - alpha).sqrt() * noisy
        return picture, noise

    def join(self, picture: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """A picture with as much of the noise as belongs to timesteps [B]."""
        alpha = self.alpha(timesteps)
        noisy: Tensor = alpha.sqrt() * picture + (1 - alpha).sqrt() * noise
        return noisy

    def consistent(self, noisy: Tensor, timesteps: Tensor, v: Tensor) -> Tensor:
        """The consistency function: ``noisy`` itself at timestep 0, the prediction far from it."""
        picture, _ = self.split(noisy, timesteps, v)
        keep = self.keep[timesteps][:, None, None, None]
        change = self.change[timesteps][:, None, None, None]
        there: Tensor = keep * noisy + change * picture
        return there


def distillation_loss(
    student: UNet2DConditionModel,
    target: UNet2DConditionModel,
    teacher: UNet2DConditionModel,
    solver: Solver,
    latents: Tensor,
    hidden: Tensor,
    empty: Tensor,
    guidance_scale: float | None = None,
) -> Tensor:
    """Pseudo-Huber distance of the student from the target one solver step further, a scalar.

    latents [B, 4, 16, 16]; hidden and empty (of the empty prompt) [B, 77, 128]. With a guidance
    scale the student learns that one, and isn't told; otherwise any, which it is told.
    """
    batch = len(latents)
    if guidance_scale is None:
        low, high = GUIDANCE_SCALES
        guidance = low + (high - low) * torch.rand(batch)
        condition = guidance_embedding(guidance)
    else:
        guidance, condition = torch.full((batch,), guidance_scale), None
    timesteps = solver.start_timesteps(batch)
    before = (timesteps - solver.skip).clamp(min=0)
    noisy = solver.join(latents, torch.randn_like(latents), timesteps)
    noisy = noisy.to(memory_format=torch.channels_last)
    with torch.no_grad():
        both = teacher(
            torch.cat([noisy, noisy]), torch.cat([timesteps] * 2), torch.cat([hidden, empty])
        ).sample
        with_text, without = both.chunk(2)
        v = without + guidance[:, None, None, None] * (with_text - without)
        earlier = solver.join(*solver.split(noisy, timesteps, v), before)
        wanted = target(earlier, before, hidden, timestep_cond=condition).sample
        wanted = solver.consistent(earlier, before, wanted)
    given = student(noisy, timesteps, hidden, timestep_cond=condition).sample
    given = solver.consistent(noisy, timesteps, given)
    return ((given - wanted).pow(2) + HUBER**2).sqrt().mean() - HUBER


def train(options: Options) -> None:
    """Train for the CPU time given; the checkpoint is ``work/lcm.pt``."""
    begun = stage.begin(options)
    latents = begun.latents(begun.pictures)
    text, teacher = begun.text(), begun.unet()
    student = student_of(teacher).to(memory_format=torch.channels_last).train()
    target = averaged(student)
    solver = Solver()
    empty = text(begun.ids([""]))[0].expand(begun.batch, -1, -1)

    def loss_of(rng: random.Random) -> Tensor:
        chosen, captions = begun.pick(rng, EMPTY_CAPTION_SHARE)
        hidden = text(begun.ids(captions))[0]
        return distillation_loss(student, target, teacher, solver, latents[chosen], hidden, empty)

    begun.fit("lcm", student, target, loss_of, TARGET_DECAY)


def main() -> None:
    train(Options(**vars(stage_parser(__doc__, lr=3e-4).parse_args())))


if __name__ == "__main__":
    main()
