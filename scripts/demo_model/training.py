"""What all training stages share: the time budget, sampling weights, checkpoints."""

from __future__ import annotations

import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from .dataset import Emoji, Kind


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
