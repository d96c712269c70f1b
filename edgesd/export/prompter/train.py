"""LoRA on the dequantized weights of the model that is deployed (Hu et al. 2021, arXiv 2106.09685),
or training of all its weights.

Training and deployment see the same weights: what an adapter learns to correct is what it will
stand beside. The loss is the mean negative log-likelihood, in nats per token, of the prompt's line
alone, its end included.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import msgspec
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from edgesd.errors import InputError, UsageError
from edgesd.export.prompter.base import Base, load_base
from edgesd.export.prompter.gguf_files import WEIGHTS, Layout
from edgesd.export.prompter.optimizers import load_state, optimizer_of, state_bytes, state_classes
from edgesd.export.prompter.pairs import Pair, PairSet
from edgesd.export.prompter.starts import (
    AdapterSettings,
    Started,
    begin,
    save_adapter,
    set_adapter,
)
from edgesd.files import atomic_path, atomic_write, check_writable, sha256_file
from edgesd.progress import SILENT, Progress
from edgesd.runtime.memory import peak_bytes
from edgesd.runtime.prompter import FRAME
from edgesd.spec.base import Spec
from edgesd.text import first_sentence

REPORT = "training.json"
STATE = "state.pt"
HELD_PAIRS = 256
"""Held-out pairs that the loss is measured on, at most."""

_SAVE_SECONDS = 60.0

Row = tuple[list[int], list[int]]
"""Token ids of the frame with the short prompt, and of the line to learn with its end."""


LEARNING_RATES = {"lora": 1e-3, "adamw": 1e-4, "galore": 1e-3, "galore8bit": 1e-3, "apollo": 3e-4}
"""Defaults: of an adapter, and of all weights by optimizer."""


@dataclass(frozen=True)
class Training:
    """How to train. adapter: None to train all weights. optimizer: of options.OPTIMIZERS; adapters
    take adamw. learning_rate: of the first step after warm-up; it falls to 0 as a cosine."""

    adapter: AdapterSettings | None
    optimizer: str = "adamw"
    steps: int = 300
    batch: int = 16
    learning_rate: float = 1e-3
    warm_up: int = 10
    seed: int = 0


class TrainingReport(Spec, frozen=True):
    """training.json. Losses in nats per token over the same held-out pairs; seconds: of the steps;
    peak_bytes: of the process; state_bytes: of the optimizer, weights and gradients aside.

    base: of a run that has its own (LoftQ), that one. rank, alpha: of the adapter as written;
    both 0 without one. starts: held-out loss before training, by what the adapter could begin as:
    LoftQ's beside nothing and the control.
    """

    base: str
    base_sha256: str
    pairs_sha256: str
    domain: str
    form: str
    start: str
    optimizer: str
    steps: int
    batch: int
    rank: int
    alpha: int
    learning_rate: float
    seed: int
    training_pairs: int
    held_pairs: int
    loss_before: float
    loss_after: float
    starts: dict[str, float]
    seconds: float
    peak_bytes: int
    state_bytes: int
    trained_parameters: int


def train(
    base: Path,
    pairs: PairSet,
    pairs_sha256: str,
    out: Path,
    training: Training,
    progress: Progress = SILENT,
) -> TrainingReport:
    """Train an adapter for `base`, or all its weights, and write them to the folder `out` with
    REPORT: an adapter as peft does, all weights as safetensors. By CUDA where there is a GPU.

    A run that was interrupted goes on from its last state in `out`, to the same end. Raises
    InputError for a base that can't be read, or when `out` holds a run of other settings;
    UsageError for an adapter by another optimizer than adamw.
    """
    if training.adapter and training.optimizer != "adamw":
        raise UsageError(f"{training.optimizer} is for the training of all weights: add --full")
    there = {path.name for path in out.iterdir()} if out.is_dir() else set()
    if there and not there & {STATE, REPORT}:
        raise InputError(f"{out} holds other files than a run's: choose another -o, a new folder")
    check_writable(out / REPORT)
    torch.manual_seed(training.seed)
    settings = f"{sha256_file(base) if base.is_file() else base}:{pairs_sha256}:{training}"
    state = _load_state(out / STATE, settings, training.optimizer)
    out.mkdir(parents=True, exist_ok=True)
    started = _started(base, out, training, progress)
    loaded, model, file = started.base, started.model, started.file
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    rows = [row(loaded, pair) for pair in pairs.training]
    held = [row(loaded, pair) for pair in pairs.some_held(HELD_PAIRS)]
    optimizer = optimizer_of(training.optimizer, model, training.learning_rate)
    if state is None:
        starts = _losses_of_starts(started, training, held)
        before, start, spent = held_loss(model, held), 0, 0.0
    else:
        starts = state["starts"]
        before, start, spent = state["before"], state["step"], state["seconds"]
        _restore(model, optimizer, state)
    begun = saved = time.monotonic()

    def on_step(step: int, loss: float) -> None:
        nonlocal saved
        progress.update("train", step, training.steps, f"loss {loss:.3f}")
        now = time.monotonic()
        if now - saved >= _SAVE_SECONDS and step < training.steps:
            saved = now
            kept = {"settings": settings, "step": step, "before": before, "starts": starts}
            kept["seconds"] = spent + now - begun
            _save_state(out / STATE, model, optimizer, kept)

    fit(model, optimizer, rows, training, start, on_step)
    seconds = spent + time.monotonic() - begun
    after = held_loss(model, held)
    if not after < float("inf"):
        raise InputError(
            f"the loss after {training.steps} steps is {after}: use a smaller --learning-rate"
        )
    written = AdapterSettings(0, 0, "full")
    if training.adapter:
        written = save_adapter(model, out, training.adapter)
        (out / WEIGHTS).unlink(missing_ok=True)  # of a run of the other kind before
    else:
        with atomic_path(out / WEIGHTS) as temporary:
            save_file({name: p.cpu() for name, p in _trained(model).items()}, temporary)
    report = TrainingReport(
        base=file.name,
        base_sha256=sha256_file(file) if file.is_file() else "",
        pairs_sha256=pairs_sha256,
        domain=pairs.domain,
        form=pairs.form,
        start=written.start,
        optimizer=training.optimizer,
        steps=training.steps,
        batch=training.batch,
        rank=written.rank,
        alpha=written.alpha,
        learning_rate=training.learning_rate,
        seed=training.seed,
        training_pairs=len(rows),
        held_pairs=len(held),
        loss_before=before,
        loss_after=after,
        starts=starts,
        seconds=seconds,
        peak_bytes=peak_bytes(),
        state_bytes=state_bytes(optimizer),
        trained_parameters=sum(p.numel() for p in _trained(model).values()),
    )
    with atomic_write(out / REPORT) as target:
        target.write(msgspec.json.format(msgspec.json.encode(report), indent=1))
    (out / STATE).unlink(missing_ok=True)
    return report


def fit(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    rows: Sequence[Row],
    training: Training,
    start: int = 0,
    on_step: Callable[[int, float], None] | None = None,
) -> None:
    """The steps from `start` on; `on_step` of each: steps done, and its loss in nats per token."""
    weights = [p for p in model.parameters() if p.requires_grad]
    for step in range(start, training.steps):
        for group in optimizer.param_groups:
            group["lr"] = training.learning_rate * _factor(step, training)
        loss = _loss(model, [rows[i] for i in _chosen(step, len(rows), training)])
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        if on_step:
            on_step(step + 1, float(loss.detach()))


def _started(base: Path, out: Path, training: Training, progress: Progress) -> Started:
    if training.adapter is None:
        loaded = load_base(base)
        return Started(loaded, loaded.model, base, {})
    return begin(base, out, training.adapter, progress)


def _losses_of_starts(
    started: Started, training: Training, held: Sequence[Row]
) -> dict[str, float]:
    """Held-out loss of each of the starts. Leaves the adapter as its own."""
    found: dict[str, float] = {}
    if not started.starts or training.adapter is None:
        return found
    layout, adapter = Layout(started.file), training.adapter
    for name, updates in started.starts.items():
        set_adapter(started.model, layout, updates, adapter.alpha / adapter.rank)
        found[name] = held_loss(started.model, held)
    set_adapter(started.model, layout, started.starts[adapter.start], adapter.alpha / adapter.rank)
    return found


def row(base: Base, pair: Pair) -> Row:
    """The tokens of one pair. Its set's form isn't learned: code adds it."""
    answer = [*base.encode(f" {pair.prompt}\n"), base.eos]
    return base.encode(FRAME.format(pair.user_prompt)), answer


@torch.inference_mode()
def held_loss(model: Any, rows: Sequence[Row], batch: int = 16) -> float:
    """Mean loss in nats per token over `rows`."""
    total, count = 0.0, 0
    for at in range(0, len(rows), batch):
        part = rows[at : at + batch]
        tokens = sum(len(answer) for _, answer in part)
        total += float(_loss(model, part)) * tokens
        count += tokens
    return total / count


def _loss(model: Any, rows: Sequence[Row]) -> Tensor:
    """Mean cross entropy of the answers' tokens. Only their logits are computed: the vocabulary is
    a third of a small model's work."""
    length = max(len(frame) + len(answer) for frame, answer in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    mask = torch.zeros(len(rows), length, dtype=torch.long)
    places, wanted = [], []
    for index, (frame, answer) in enumerate(rows):
        both = [*frame, *answer]
        ids[index, : len(both)] = torch.tensor(both)
        mask[index, : len(both)] = 1
        places += [index * length + at - 1 for at in range(len(frame), len(both))]
        wanted += answer
    decoder = model.get_base_model() if hasattr(model, "get_base_model") else model
    device = decoder.lm_head.weight.device
    hidden = decoder.model(
        input_ids=ids.to(device), attention_mask=mask.to(device)
    ).last_hidden_state
    chosen = hidden.reshape(-1, hidden.shape[-1])[torch.tensor(places, device=device)]
    return F.cross_entropy(decoder.lm_head(chosen), torch.tensor(wanted, device=device))


def _factor(step: int, training: Training) -> float:
    """Part of the learning rate: linear warm-up, then a cosine down to 0 (Loshchilov and Hutter
    2017, arXiv 1608.03983, eq. 5, one period)."""
    if step < training.warm_up:
        return (step + 1) / training.warm_up
    part = (step - training.warm_up) / max(1, training.steps - training.warm_up)
    return float(0.5 * (1 + torch.cos(torch.tensor(part * torch.pi))))


def _chosen(step: int, count: int, training: Training) -> list[int]:
    """Rows of one step: each epoch goes through all of them in an order of its own."""
    found = []
    for place in range(step * training.batch, (step + 1) * training.batch):
        epoch, at = divmod(place, count)
        found.append(_order(epoch, count, training.seed)[at])
    return found


@lru_cache(maxsize=2)  # a step may end one epoch and begin the next
def _order(epoch: int, count: int, seed: int) -> list[int]:
    order = list(range(count))
    random.Random(f"{seed}:{epoch}").shuffle(order)
    return order


def _trained(model: Any) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def _save_state(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, kept: dict[str, Any]
) -> None:
    state = {**kept, "weights": _trained(model), "optimizer": optimizer.state_dict()}
    with atomic_path(path) as temporary:
        torch.save(state, temporary)


def _load_state(path: Path, settings: str, optimizer: str) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        with torch.serialization.safe_globals(state_classes(optimizer)):
            state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
        same = state["settings"] == settings
    except (OSError, RuntimeError, ValueError, KeyError, EOFError, UnpicklingError) as exc:
        raise InputError(
            f"{path} is damaged ({first_sentence(exc)}): remove it to begin anew"
        ) from exc
    if not same:
        raise InputError(
            f"{path.parent} holds a run of another base, data or settings: choose another -o, or "
            "remove it"
        )
    return state


def _restore(model: Any, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    with torch.no_grad():
        for name, weight in _trained(model).items():
            weight.copy_(state["weights"][name])
    load_state(optimizer, state["optimizer"])
