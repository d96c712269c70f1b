"""What all training stages share: the loop, the time budget, sampling, checkpoints."""

from __future__ import annotations

import argparse
import copy
import random
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .captions import pick_caption
from .dataset import Emoji, Kind
from .vocabulary import SHOWN_TINTED

# How often diffusion training samples a picture of each kind; the held-out pairs never.
WEIGHTS: dict[Kind, float] = {"shown": 2.0, "core": 1.5, "tint": 1.0, "rest": 0.6}
SHOWN_TINT_FACTOR = 2.0
TIMESTEPS = 1000
AVERAGE_DECAY = 0.999
FLAT = 0.4  # share of the time at the full learning rate
SAVE_EVERY_S = 120.0
PRINT_EVERY_STEPS = 100

Net = TypeVar("Net", bound=nn.Module)


class Budget:
    """CPU time given to a stage; time spent before a restart counts.

    CPU time, not the clock, so that a process that waits for others keeps its learning rate.
    """

    def __init__(self, cpu_minutes: float, spent_s: float = 0.0) -> None:
        self.total_s = cpu_minutes * 60.0
        self._before_s = spent_s
        self._start_s = time.process_time()

    @property
    def spent_s(self) -> float:
        return self._before_s + time.process_time() - self._start_s

    @property
    def progress(self) -> float:
        """From 0 at the start to 1 when the budget is used up."""
        return min(1.0, self.spent_s / self.total_s)


class StopSignal:
    """From now on SIGTERM asks the stage to save and end, instead of ending it."""

    def __init__(self) -> None:
        self.asked = False
        signal.signal(signal.SIGTERM, self._ask)

    def _ask(self, _number: int, _frame: FrameType | None) -> None:
        self.asked = True


def learning_rate(peak: float, step: int, progress: float, *, warmup: int, flat: float) -> float:
    """Linear warm-up over ``warmup`` steps, then flat until ``flat`` of the budget, then decay."""
    decay = max(0.02, (1.0 - progress) / (1.0 - flat)) if progress > flat else 1.0
    return peak * min(1.0, (step + 1) / warmup) * decay


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = value


def sampling_weights(emoji: Sequence[Emoji], by_kind: Mapping[Kind, float]) -> Tensor:
    """Weight of each picture, [N]; kinds that are not named are never sampled."""
    return torch.tensor([by_kind.get(entry.kind, 0.0) for entry in emoji])


@dataclass(frozen=True)
class Options:
    """What every stage of diffusion training is run with."""

    data: Path
    work: Path
    start: Path
    cpu_minutes: float
    batch: int
    lr: float


def stage_parser(doc: str | None, lr: float, cpu_minutes: float = 60.0) -> argparse.ArgumentParser:
    """Reads ``Options``. doc: of the stage's module."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0] if doc else None)
    parser.add_argument("--data", type=Path, required=True, help="folder made by prepare_data")
    parser.add_argument("--work", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--start", type=Path, required=True, help="pipeline folder to start from")
    parser.add_argument("--cpu-minutes", type=float, default=cpu_minutes)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=lr)
    return parser


def weights_of(emoji: Sequence[Emoji]) -> Tensor:
    """Sampling weight of each picture in diffusion training, [N]."""
    weights = sampling_weights(emoji, WEIGHTS)
    for index, entry in enumerate(emoji):
        if entry.kind == "tint" and entry.name.split(maxsplit=1)[1] in SHOWN_TINTED:
            weights[index] *= SHOWN_TINT_FACTOR
    return weights


def pick(
    emoji: Sequence[Emoji], weights: Tensor, batch: int, rng: random.Random, empty_share: float
) -> tuple[Tensor, list[str]]:
    """Indices [batch] of pictures and a caption for each, a share of them empty."""
    chosen = torch.multinomial(weights, batch, replacement=True)
    captions = [
        ""
        if rng.random() < empty_share
        else pick_caption(emoji[index].name, emoji[index].tags, "flat", rng)
        for index in chosen.tolist()
    ]
    return chosen, captions


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, step: int, decay: float) -> None:
    """Move the exponential moving average of the weights; it is short while training is young."""
    decay = min(decay, (1 + step) / (20 + step))
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1.0 - decay)


def save_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Write next to ``path`` first, so that a stop in the middle leaves the last good file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    torch.save(dict(state), partial)
    partial.replace(path)


def to_unit_range(pictures: Tensor) -> Tensor:
    """uint8 pictures, 0 to 255 -> float, -1 to 1."""
    return pictures.float() / 127.5 - 1.0


def averaged(net: Net) -> Net:
    """A copy of ``net`` for ``fit`` to keep the average of its weights in."""
    return copy.deepcopy(net).requires_grad_(False).eval()


def spread(batch: int) -> Tensor:
    """A number from 0 to 1 out of each of ``batch`` equal shares, in random order, [B]."""
    places = (torch.arange(batch) + torch.rand(batch)) / batch
    order = torch.randperm(batch)
    return places[order]


def stratified(batch: int, parts: int) -> Tensor:
    """A whole number below ``parts`` from each of ``batch`` equal shares, in random order, [B]."""
    return (spread(batch) * parts).long()


def fit(
    net: Net,
    average: Net,
    loss_of: Callable[[random.Random], Tensor],
    checkpoint: Path,
    *,
    cpu_minutes: float,
    batch: int,
    lr: float,
    average_decay: float = AVERAGE_DECAY,
    weight_decay: float = 1e-3,
    warmup: int = 200,
    flat: float = FLAT,
    score_of: Callable[[Net], str] | None = None,
) -> Net:
    """Train ``net`` for ``cpu_minutes`` of CPU time, ``average`` following it; returns that.

    ``loss_of`` draws a batch and returns its loss, a scalar; parameters that need no gradient
    stay. ``score_of`` says how good the average is. Goes on from ``checkpoint`` where there is
    one, and writes it every two minutes and at the end. warmup, flat: see ``learning_rate``.
    """
    parameters = [parameter for parameter in net.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=lr, betas=(0.9, 0.99), weight_decay=weight_decay, fused=True
    )
    name = checkpoint.stem
    step, spent_s, samples = 0, 0.0, 0
    if checkpoint.exists():
        state: dict[str, Any] = torch.load(checkpoint)
        net.load_state_dict(state["net"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        step, spent_s, samples = state["step"], state["spent_s"], state["samples"]
    torch.manual_seed(step + 1)
    rng = random.Random(step + 1)
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
        if score_of is not None:
            print(f"{name} step {step} {score_of(average)}", flush=True)

    stop = StopSignal()
    running = float("nan")
    saved_s = budget.spent_s
    while budget.progress < 1 and not stop.asked:
        rate = learning_rate(lr, step, budget.progress, warmup=warmup, flat=flat)
        set_learning_rate(optimizer, rate)
        loss = loss_of(rng)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        samples += batch
        update_average(average, net, step, average_decay)
        running = loss.item() if running != running else 0.99 * running + 0.01 * loss.item()
        if step % PRINT_EVERY_STEPS == 0:
            print(
                f"{name} step {step} samples {samples} loss {running:.4f} lr {rate:.1e} "
                f"cpu {budget.spent_s / 60:.1f} min",
                flush=True,
            )
        if budget.spent_s - saved_s > SAVE_EVERY_S:
            save()
            saved_s = budget.spent_s
    save()
    return average
