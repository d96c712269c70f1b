"""LoRA on the dequantized weights of the model that is deployed (Hu et al. 2021, arXiv 2106.09685).

Training and deployment see the same weights: what the adapter learns to correct is what it will
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
from typing import TYPE_CHECKING, Any

import msgspec
import torch
from torch import Tensor
from torch.nn import functional as F

from edgesd.errors import InputError, MissingDependencyError
from edgesd.export.prompter.base import Base, load_base
from edgesd.export.prompter.pairs import Pair, PairSet
from edgesd.export.quiet import first_line
from edgesd.files import atomic_path, atomic_write, sha256_file
from edgesd.runtime.memory import peak_bytes
from edgesd.runtime.prompter import FRAME
from edgesd.spec import Spec

if TYPE_CHECKING:
    from peft import PeftModel

REPORT = "training.json"
STATE = "state.pt"
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

HELD_PAIRS = 256
"""Held-out pairs that the loss is measured on, at most."""

_SAVE_SECONDS = 60.0

Progress = Callable[[str, int, int, float], None]
"""Told of a phase, steps done, of how many, and the loss."""


@dataclass(frozen=True)
class Training:
    """How to train. learning_rate: of the first step after warm-up; it falls to 0 as a cosine.
    alpha: of the adapter, whose update is alpha / rank times its product."""

    steps: int = 400
    batch: int = 16
    rank: int = 8
    alpha: int = 16
    learning_rate: float = 1e-3
    warm_up: int = 10
    seed: int = 0


class TrainingReport(Spec, frozen=True):
    """training.json. Losses in nats per token over the same held-out pairs; seconds: of the steps;
    peak_bytes: of the process."""

    base: str
    base_sha256: str
    pairs_sha256: str
    domain: str
    form: str
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
    seconds: float
    peak_bytes: int
    trained_parameters: int


def train(
    base: Path,
    pairs: PairSet,
    pairs_sha256: str,
    out: Path,
    training: Training,
    progress: Progress | None = None,
) -> TrainingReport:
    """Train an adapter for `base` and write it to the folder `out`, as peft does, with REPORT.

    A run that was interrupted goes on from its last state in `out`, to the same end. Raises
    InputError for a base that can't be read, or when `out` holds a run of other settings.
    """
    loaded = load_base(base)
    torch.manual_seed(training.seed)
    model = _with_adapter(loaded, training)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=training.learning_rate, weight_decay=0.0)
    rows = [row(loaded, pair) for pair in pairs.training]
    held = [row(loaded, pair) for pair in pairs.some_held(HELD_PAIRS)]
    base_sha256 = sha256_file(base) if base.is_file() else ""
    settings = f"{base_sha256 or base}:{pairs_sha256}:{training}"
    out.mkdir(parents=True, exist_ok=True)
    state = _load_state(out / STATE, settings)
    if state is None:
        before, start, spent = held_loss(model, held), 0, 0.0
    else:
        before, start, spent = state["before"], state["step"], state["seconds"]
        _restore(model, optimizer, state)
    begun = saved = time.monotonic()
    for step in range(start, training.steps):
        for group in optimizer.param_groups:
            group["lr"] = training.learning_rate * _factor(step, training)
        loss = _loss(model, [rows[i] for i in _chosen(step, len(rows), training)])
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        if progress:
            progress("train", step + 1, training.steps, float(loss.detach()))
        now = time.monotonic()
        if now - saved >= _SAVE_SECONDS and step + 1 < training.steps:
            saved = now
            _save_state(
                out / STATE, settings, model, optimizer, step + 1, before, spent + now - begun
            )
    seconds = spent + time.monotonic() - begun
    after = held_loss(model, held)
    if not after < float("inf"):
        raise InputError(
            f"the loss after {training.steps} steps is {after}: use a smaller --learning-rate"
        )
    model.save_pretrained(str(out))
    report = TrainingReport(
        base=base.name,
        base_sha256=base_sha256,
        pairs_sha256=pairs_sha256,
        domain=pairs.domain,
        form=pairs.form,
        steps=training.steps,
        batch=training.batch,
        rank=training.rank,
        alpha=training.alpha,
        learning_rate=training.learning_rate,
        seed=training.seed,
        training_pairs=len(rows),
        held_pairs=len(held),
        loss_before=before,
        loss_after=after,
        seconds=seconds,
        peak_bytes=peak_bytes(),
        trained_parameters=sum(p.numel() for p in weights),
    )
    with atomic_write(out / REPORT) as file:
        file.write(msgspec.json.format(msgspec.json.encode(report), indent=1))
    (out / STATE).unlink(missing_ok=True)
    return report


Row = tuple[list[int], list[int]]
"""Token ids of the frame with the wish, and of the line to learn with its end."""


def row(base: Base, pair: Pair) -> Row:
    """What is learned of one pair. Its set's form isn't: code adds it."""
    answer = [*base.encode(f" {pair.prompt}\n"), base.eos]
    return base.encode(FRAME.format(pair.wish)), answer


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
    decoder = model.get_base_model()
    hidden = decoder.model(input_ids=ids, attention_mask=mask).last_hidden_state
    chosen = hidden.reshape(-1, hidden.shape[-1])[torch.tensor(places)]
    return F.cross_entropy(decoder.lm_head(chosen), torch.tensor(wanted))


def _with_adapter(base: Base, training: Training) -> PeftModel:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as exc:
        raise MissingDependencyError(
            f"training needs peft ({exc}): pip install 'edgesd[build]'"
        ) from exc
    config = LoraConfig(
        r=training.rank,
        lora_alpha=training.alpha,
        target_modules=list(MODULES),
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
    )
    return get_peft_model(base.model, config)


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
    path: Path,
    settings: str,
    model: Any,
    optimizer: torch.optim.Optimizer,
    step: int,
    before: float,
    seconds: float,
) -> None:
    state = {
        "settings": settings,
        "step": step,
        "before": before,
        "seconds": seconds,
        "weights": _trained(model),
        "optimizer": optimizer.state_dict(),
    }
    with atomic_path(path) as temporary:
        torch.save(state, temporary)


def _load_state(path: Path, settings: str) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        state: dict[str, Any] = torch.load(path, weights_only=True)
        same = state["settings"] == settings
    except (OSError, RuntimeError, ValueError, KeyError, EOFError, UnpicklingError) as exc:
        raise InputError(f"{path} is damaged ({first_line(exc)}): remove it to begin anew") from exc
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
    optimizer.load_state_dict(state["optimizer"])
