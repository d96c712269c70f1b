"""Train the autoencoder, in three stages that share one latent space.

    python -m scripts.demo_model.train_autoencoder STAGE --data DATA --work WORK [options]

teacher   a small factor-4 autoencoder at 64x64, saved as ``work/vae``: its encoder defines the
          latents
decoder   latents -> 128x128; learns from latents with noise on them and, with ``--denoiser``, from
          what the UNet makes of noised latents, so that it draws clean shapes from imperfect ones
encoder   128x128 -> the latents that the teacher gives for the picture at half the size

Run a stage again with the same ``--work`` to go on from its checkpoint, ``work/STAGE.pt``.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the field's habit
from diffusers import AutoencoderTiny
from torch import Tensor
from transformers import CLIPTokenizer

from . import dataset, model
from .captions import pick_caption
from .dataset import Emoji, Kind
from .train_unet import Denoiser
from .training import Net, averaged, fit, sampling_weights, to_unit_range

WEIGHTS: dict[Kind, float] = {"shown": 3.0, "core": 1.8, "tint": 1.0, "rest": 0.5}
GRADIENT_WEIGHT = 1.0
MAX_LATENT_NOISE = 0.25
POOL_SIZE = 1024
POOL_BATCH = 32
REFRESH_EVERY = 10


def gradient_loss(drawn: Tensor, wanted: Tensor) -> Tensor:
    """Mean absolute error of the horizontal and vertical pixel differences, a scalar."""
    across = F.l1_loss(drawn.diff(dim=3), wanted.diff(dim=3))
    down = F.l1_loss(drawn.diff(dim=2), wanted.diff(dim=2))
    return across + down


def picture_loss(drawn: Tensor, wanted: Tensor) -> Tensor:
    """Absolute error of the pixels and of their differences, at full and at half size."""
    halves = F.avg_pool2d(drawn, 2), F.avg_pool2d(wanted, 2)
    edges = gradient_loss(drawn, wanted) + gradient_loss(*halves)
    return F.l1_loss(drawn, wanted) + GRADIENT_WEIGHT * 0.5 * edges


def psnr(drawn: Tensor, wanted: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of pictures in -1 to 1."""
    error = ((drawn.clamp(-1, 1) - wanted) / 2).pow(2).mean()
    return float(-10 * torch.log10(error))


class RedrawnLatents:
    """Latents as the UNet draws them: noised to a random timestep, then denoised in a few steps.

    They carry the UNet's own mistakes while the right picture is still known. A ring of
    ``POOL_SIZE`` entries is refreshed a batch at a time.
    """

    def __init__(
        self, checkpoint: Path, tokenizer: CLIPTokenizer, latents: Tensor, emoji: list[Emoji]
    ) -> None:
        self.checkpoint = checkpoint
        self.tokenizer = tokenizer
        self.latents = latents
        self.emoji = emoji
        self.net = Denoiser(model.text_encoder(len(tokenizer)), model.unet()).eval()
        self.net.requires_grad_(False)
        self.alphas = model.scheduler().alphas_cumprod
        self.rng = random.Random(0)
        self.indices = torch.zeros(0, dtype=torch.long)
        self.drawn = torch.zeros(0, *latents.shape[1:])
        self._stamp = 0.0
        self._picks = 0

    def refresh(self, weights: Tensor) -> None:
        """Draw ``POOL_BATCH`` more; the oldest entries go."""
        stamp = self.checkpoint.stat().st_mtime
        if stamp != self._stamp:
            self.net.load_state_dict(torch.load(self.checkpoint)["average"])
            self._stamp = stamp
        chosen = torch.multinomial(weights, POOL_BATCH, replacement=True)
        drawn = self.redraw(chosen)
        self.indices = torch.cat([self.indices, chosen])[-POOL_SIZE:]
        self.drawn = torch.cat([self.drawn, drawn])[-POOL_SIZE:]

    @torch.no_grad()
    def redraw(self, chosen: Tensor) -> Tensor:
        """DDIM from one random timestep for the whole batch, [B, 4, 16, 16]."""
        picked = [self.emoji[index] for index in chosen.tolist()]
        captions = [pick_caption(entry.name, entry.tags, "flat", self.rng) for entry in picked]
        guidance = self.rng.choice([1.0, 3.0])
        if guidance != 1.0:
            captions += [""] * len(picked)
        hidden = self.net.text(model.token_ids(self.tokenizer, captions))[0]
        steps = self.rng.choice([2, 3, 4])
        first = self.rng.randint(150, 650)
        timesteps = [first * (steps - step) // steps for step in range(steps)]
        alpha = self.alphas[first]
        clean = self.latents[chosen]
        sample = alpha.sqrt() * clean + (1 - alpha).sqrt() * torch.randn_like(clean)
        for timestep, following in zip(timesteps, [*timesteps[1:], 0], strict=True):
            alpha = self.alphas[timestep]
            repeated = sample.repeat(len(captions) // len(picked), 1, 1, 1)
            velocity: Tensor = self.net.unet(repeated, timestep, hidden).sample
            if guidance != 1.0:
                conditional, unconditional = velocity.chunk(2)
                velocity = unconditional + guidance * (conditional - unconditional)
            clean = alpha.sqrt() * sample - (1 - alpha).sqrt() * velocity
            noise = alpha.sqrt() * velocity + (1 - alpha).sqrt() * sample
            alpha = self.alphas[following] if following else torch.tensor(1.0)
            sample = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
        redrawn: Tensor = sample
        return redrawn

    def pick(self, count: int, weights: Tensor) -> tuple[Tensor, Tensor]:
        """``count`` random entries: picture indices [B] and latents [B, 4, 16, 16].

        Every ``REFRESH_EVERY`` times there are new ones, of pictures by their weights [N].
        """
        if self._picks % REFRESH_EVERY == 0:
            self.refresh(weights)
        self._picks += 1
        entries = torch.randint(len(self.indices), (count,))
        return self.indices[entries], self.drawn[entries]


@dataclass(frozen=True)
class Options:
    """What a stage is run with."""

    data: Path
    work: Path
    teacher: Path | None
    denoiser: Path | None
    tokenizer: Path | None
    cpu_minutes: float
    batch: int
    lr: float


def run(
    name: str,
    net: Net,
    options: Options,
    loss_of: Callable[[random.Random], Tensor],
    score_of: Callable[[Any], str],
) -> Net:
    """``fit`` with what all stages here have in common; returns the averaged weights."""
    return fit(
        net,
        averaged(net),
        loss_of,
        options.work / f"{name}.pt",
        cpu_minutes=options.cpu_minutes,
        batch=options.batch,
        lr=options.lr,
        average_decay=0.998,
        weight_decay=1e-4,
        warmup=100,
        flat=0.3,
        score_of=score_of,
    )


def half_precision() -> torch.autocast:
    """bfloat16 convolutions: twice as fast on CPUs that have them, and the weights stay fp32."""
    return torch.autocast("cpu", torch.bfloat16)


def check_sets(emoji: list[Emoji]) -> dict[str, Tensor]:
    """Indices of the pictures that the score is measured on."""
    return {
        kind: torch.tensor([i for i, entry in enumerate(emoji) if entry.kind == kind][:48])
        for kind in ("shown", "held")
    }


def scores(emoji: list[Emoji], drawn_of: Callable[[Tensor], Tensor], pictures: Tensor) -> str:
    """PSNR of the shown and of the held-out pictures, for the log."""
    parts = []
    with torch.no_grad():
        for kind, indices in check_sets(emoji).items():
            value = psnr(drawn_of(indices), to_unit_range(pictures[indices]))
            parts.append(f"{kind} {value:.2f} dB")
    return " ".join(parts)


def train_teacher(options: Options) -> None:
    """Factor 4 at 64x64, on all styles; latents near mean 0 and deviation 1 in each channel."""
    array, emoji = dataset.load(options.data)
    full = torch.from_numpy(array).permute(0, 3, 1, 2)
    factor = full.shape[-1] // model.TEACHER_SIZE
    pictures = F.avg_pool2d(full.float(), factor).round().to(torch.uint8)
    weights = sampling_weights(emoji, WEIGHTS)
    for index, entry in enumerate(emoji):
        weights[index] *= 1.0 if entry.style == "flat" else 0.25
    net = model.teacher_autoencoder().to(memory_format=torch.channels_last)

    def loss_of(_rng: random.Random) -> Tensor:
        wanted = to_unit_range(pictures[torch.multinomial(weights, options.batch)])
        with half_precision():
            latents = net.encode(wanted.to(memory_format=torch.channels_last)).latents.float()
            noisy = latents + 0.05 * torch.randn_like(latents)
            drawn = net.decode(noisy).sample.float()
        spread = latents.std((0, 2, 3)).log().pow(2).mean() + latents.mean((0, 2, 3)).pow(2).mean()
        loss: Tensor = F.mse_loss(drawn, wanted) + picture_loss(drawn, wanted) + 0.02 * spread
        return loss

    def score_of(average: Any) -> str:
        def drawn_of(indices: Tensor) -> Tensor:
            latents = average.encode(to_unit_range(pictures[indices])).latents
            drawn: Tensor = average.decode(latents).sample
            return drawn

        return scores(emoji, drawn_of, pictures)

    average: AutoencoderTiny = run("teacher", net, options, loss_of, score_of)
    average.to(memory_format=torch.contiguous_format).save_pretrained(options.work / "vae")


def teacher_of(options: Options) -> AutoencoderTiny:
    """The autoencoder whose latents are learned."""
    if options.teacher is None:
        raise SystemExit("this stage needs --teacher, the folder of the autoencoder to learn from")
    return AutoencoderTiny.from_pretrained(options.teacher)


def flat_set(
    options: Options, teacher: AutoencoderTiny
) -> tuple[Tensor, list[Emoji], Tensor, Tensor]:
    """Flat pictures uint8 [N, 3, 128, 128], entries, latents [N, 4, 16, 16], weights [N]."""
    array, emoji = dataset.load(options.data, style="flat")
    pictures = torch.from_numpy(array).permute(0, 3, 1, 2).contiguous()
    latents = model.encode_pictures(teacher, pictures)
    return pictures, emoji, latents, sampling_weights(emoji, WEIGHTS)


def train_decoder(options: Options) -> None:
    """Latents -> 128x128: half of a batch from noisy latents, half from what the UNet redraws."""
    pictures, emoji, latents, weights = flat_set(options, teacher_of(options))
    redrawn: RedrawnLatents | None = None
    if options.denoiser is not None and options.tokenizer is not None:
        tokenizer = CLIPTokenizer.from_pretrained(options.tokenizer)
        redrawn = RedrawnLatents(options.denoiser, tokenizer, latents, emoji)
    decoder: Any = model.autoencoder().decoder.to(memory_format=torch.channels_last)

    def batch_of() -> tuple[Tensor, Tensor]:
        plain = options.batch if redrawn is None else options.batch // 2
        indices = torch.multinomial(weights, plain, replacement=True)
        strength = MAX_LATENT_NOISE * torch.rand(plain, 1, 1, 1)
        inputs = latents[indices] + strength * torch.randn_like(latents[indices])
        if redrawn is None:
            return indices, inputs
        more_indices, more = redrawn.pick(options.batch - plain, weights)
        return torch.cat([indices, more_indices]), torch.cat([inputs, more])

    def loss_of(_rng: random.Random) -> Tensor:
        indices, inputs = batch_of()
        with half_precision():
            drawn = decoder(inputs.to(memory_format=torch.channels_last)).float()
        return picture_loss(drawn, to_unit_range(pictures[indices]))

    def score_of(average: Any) -> str:
        def drawn_of(indices: Tensor) -> Tensor:
            drawn: Tensor = average(latents[indices])
            return drawn

        return scores(emoji, drawn_of, pictures)

    run("decoder", decoder, options, loss_of, score_of)


def train_encoder(options: Options) -> None:
    """128x128 -> the teacher's latents of the picture at half the size."""
    teacher = teacher_of(options)
    pictures, emoji, latents, weights = flat_set(options, teacher)
    encoder: Any = model.autoencoder().encoder.to(memory_format=torch.channels_last)
    # Behind the first two convolutions the teacher's layers are the same from its second on.
    for layer, source in zip(encoder.layers[2:], teacher.encoder.layers[1:], strict=True):
        layer.load_state_dict(source.state_dict())

    def loss_of(_rng: random.Random) -> Tensor:
        indices = torch.multinomial(weights, options.batch, replacement=True)
        given = to_unit_range(pictures[indices]).to(memory_format=torch.channels_last)
        with half_precision():
            made = encoder(given).float()
        return F.mse_loss(made, latents[indices]) + F.l1_loss(made, latents[indices])

    def score_of(average: Any) -> str:
        parts = []
        with torch.no_grad():
            for kind, indices in check_sets(emoji).items():
                made = average(to_unit_range(pictures[indices]))
                error = (made - latents[indices]).pow(2).mean().sqrt()
                parts.append(f"{kind} latent error {error:.3f}")
        return " ".join(parts)

    run("encoder", encoder, options, loss_of, score_of)


STAGES = {"teacher": train_teacher, "decoder": train_decoder, "encoder": train_encoder}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--data", type=Path, required=True, help="folder made by prepare_data")
    parser.add_argument("--work", type=Path, required=True, help="folder of the checkpoints")
    parser.add_argument("--teacher", type=Path, help="autoencoder folder that gives the latents")
    parser.add_argument("--denoiser", type=Path, help="unet.pt of train_unet, for stage decoder")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer folder, with --denoiser")
    parser.add_argument("--cpu-minutes", type=float, default=30.0)
    parser.add_argument("--batch", type=int, default=12)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    arguments = vars(parser.parse_args())
    stage = arguments.pop("stage")
    torch.set_num_threads(1)
    STAGES[stage](Options(**arguments))


if __name__ == "__main__":
    main()
