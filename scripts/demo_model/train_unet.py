"""Train the text encoder and the UNet, together, on the latents of the flat emoji.

    python -m scripts.demo_model.train_unet --data DATA --work WORK --start PIPELINE

``--start`` is a pipeline folder: its tokenizer and its autoencoder's latents are used, and its
text encoder and UNet unless ``--fresh``. Run again with the same ``--work`` to go on from the
checkpoint.
"""

from __future__ import annotations

import argparse
import copy
import random
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderTiny, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from . import dataset, model
from .captions import pick_caption
from .dataset import Emoji, Kind
from .training import (
    Budget,
    StopSignal,
    learning_rate,
    sampling_weights,
    save_checkpoint,
    set_learning_rate,
    update_average,
)
from .vocabulary import SHOWN_TINTED

WEIGHTS: dict[Kind, float] = {"shown": 2.0, "core": 1.5, "tint": 1.0, "rest": 0.6}
SHOWN_TINT_FACTOR = 2.0
EMPTY_CAPTION_SHARE = 0.1  # for classifier-free guidance
MIN_SNR_GAMMA = 5.0
TIMESTEPS = 1000
AVERAGE_DECAY = 0.999


class Denoiser(nn.Module):
    """The text encoder and the UNet as one module: they train together."""

    def __init__(self, text: CLIPTextModel, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.text = text
        self.unet = unet

    def forward(self, noisy: Tensor, timesteps: Tensor, ids: Tensor) -> Tensor:
        """v [B, 4, 16, 16] from noisy latents [B, 4, 16, 16], timesteps [B], token ids [B, 77]."""
        hidden = self.text(ids)[0]
        prediction: Tensor = self.unet(noisy, timesteps, hidden).sample
        return prediction


def stratified_timesteps(batch: int) -> Tensor:
    """One timestep from each of ``batch`` equal parts of the range, in random order, [B]."""
    places = (torch.arange(batch) + torch.rand(batch)) / batch
    return (places[torch.randperm(batch)] * TIMESTEPS).long()


def diffusion_loss(net: Denoiser, alphas: Tensor, latents: Tensor, ids: Tensor) -> Tensor:
    """Min-SNR weighted error of the v-prediction, a scalar."""
    timesteps = stratified_timesteps(len(latents))
    alpha = alphas[timesteps][:, None, None, None]
    noise = torch.randn_like(latents)
    noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
    wanted = alpha.sqrt() * noise - (1 - alpha).sqrt() * latents
    snr = alpha / (1 - alpha)
    weight = 2.0 * snr.clamp(max=MIN_SNR_GAMMA) / (snr + 1)
    prediction = net(noisy.to(memory_format=torch.channels_last), timesteps, ids).float()
    loss: Tensor = (weight * (prediction - wanted).pow(2)).mean()
    return loss


def weights_of(emoji: list[Emoji]) -> Tensor:
    """Sampling weight of each picture, [N]."""
    weights = sampling_weights(emoji, WEIGHTS)
    for index, entry in enumerate(emoji):
        if entry.kind == "tint" and entry.name.split(maxsplit=1)[1] in SHOWN_TINTED:
            weights[index] *= SHOWN_TINT_FACTOR
    return weights


def train(
    data: Path, work: Path, start: Path, *, fresh: bool, cpu_minutes: float, batch: int, lr: float
) -> None:
    """Train for ``cpu_minutes`` of CPU time; the checkpoint is ``work/unet.pt``."""
    torch.set_num_threads(1)
    pictures, emoji = dataset.load(data, style="flat")
    vae = AutoencoderTiny.from_pretrained(start / "vae")
    latents = model.encode_pictures(vae, torch.from_numpy(pictures).permute(0, 3, 1, 2))
    weights = weights_of(emoji)
    tokenizer = CLIPTokenizer.from_pretrained(start / "tokenizer")
    if fresh:
        net = Denoiser(model.text_encoder(len(tokenizer)), model.unet())
    else:
        net = Denoiser(
            CLIPTextModel.from_pretrained(start / "text_encoder", dtype=torch.float32),
            UNet2DConditionModel.from_pretrained(start / "unet"),
        )
    net.to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    average = copy.deepcopy(net).requires_grad_(False).eval()
    parameters = list(net.parameters())
    optimizer = torch.optim.AdamW(
        parameters, lr=lr, betas=(0.9, 0.99), weight_decay=1e-3, fused=True
    )
    step, spent_s, samples = 0, 0.0, 0
    checkpoint = work / "unet.pt"
    if checkpoint.exists():
        state: dict[str, Any] = torch.load(checkpoint)
        net.load_state_dict(state["net"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        step, spent_s, samples = state["step"], state["spent_s"], state["samples"]
    torch.manual_seed(step + 1)
    rng = random.Random(step + 1)
    alphas = model.scheduler().alphas_cumprod
    budget = Budget(cpu_minutes, spent_s)

    def save() -> None:
        save_checkpoint(
            checkpoint,
            {
                "net": net.state_dict(),
                "average": average.state_dict(),
                "optimizer": optimizer.state_dict(),
                "step": step,
                "spent_s": budget.spent_s,
                "samples": samples,
            },
        )

    stop = StopSignal()
    running = float("nan")
    saved_s = budget.spent_s
    while budget.progress < 1 and not stop.asked:
        rate = learning_rate(lr, step, budget.progress, warmup=200, flat=0.4)
        set_learning_rate(optimizer, rate)
        chosen = torch.multinomial(weights, batch, replacement=True)
        captions = [
            ""
            if rng.random() < EMPTY_CAPTION_SHARE
            else pick_caption(emoji[index].name, emoji[index].tags, "flat", rng)
            for index in chosen.tolist()
        ]
        loss = diffusion_loss(net, alphas, latents[chosen], model.token_ids(tokenizer, captions))
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        samples += batch
        update_average(average, net, step, AVERAGE_DECAY)
        running = (
            loss.item()
            if step == 1 or running != running
            else (0.99 * running + 0.01 * loss.item())
        )
        if step % 100 == 0:
            print(
                f"step {step} samples {samples} loss {running:.4f} lr {rate:.1e} "
                f"cpu {budget.spent_s / 60:.1f} min",
                flush=True,
            )
        if budget.spent_s - saved_s > 120:
            save()
            saved_s = budget.spent_s
    save()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, required=True, help="folder made by prepare_data")
    parser.add_argument("--work", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--start", type=Path, required=True, help="pipeline folder to start from")
    parser.add_argument("--fresh", action="store_true", help="start from random weights")
    parser.add_argument("--cpu-minutes", type=float, default=60.0)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=8e-4)
    arguments = parser.parse_args()
    train(
        arguments.data,
        arguments.work,
        arguments.start,
        fresh=arguments.fresh,
        cpu_minutes=arguments.cpu_minutes,
        batch=arguments.batch,
        lr=arguments.lr,
    )


if __name__ == "__main__":
    main()
