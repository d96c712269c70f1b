"""Does LoftQ's start help a prompter's adapter? At 4, 3 and 2 bits, beside its random control.

    python -m benchmarks.prompter_starts BASE.gguf pairs.jsonl --work FOLDER

For each number of bits the base is rounded on a grid like Q4_0's: blocks of 32, one scale each. For
3 and 2 bits llama.cpp has none that fits rows of 576: they are computed, not deployed. Then
adapters are trained from three starts for equally many steps: nothing (beside the rounded base),
LoftQ, and the control, which has LoftQ's base and norms in random directions. The learning rate is
tuned for each alone, by factors of 10 ** 0.5, on a third of the held-out pairs; the loss is of the
others. Rows are added to FOLDER/starts.jsonl as they come; what is there isn't computed again.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgesd.export.prompter.base import load_base
from edgesd.export.prompter.gguf_files import Layout, Update, dequantize
from edgesd.export.prompter.loftq import loftq, random_like
from edgesd.export.prompter.pairs import read_pairs
from edgesd.export.prompter.starts import AdapterSettings, adapted_layers, set_adapter, with_adapter
from edgesd.export.prompter.train import Row, Training, fit, held_loss, row
from edgesd.runtime.arrays import Float

BITS = (4, 3, 2)
STARTS = ("default", "loftq", "control")
ROOT = 10**0.5
FIRST = 1e-3
BLOCK = 32


def grid(bits: int) -> Callable[[Float], Float]:
    """Rounding as Q4_0 does it, for any number of bits: the value of largest magnitude of each
    block of 32 becomes the grid's lowest, and the scale is kept in fp16."""

    def rounding(weight: Float) -> Float:
        blocks = weight.reshape(-1, BLOCK)
        lowest = -(2 ** (bits - 1))
        at = np.abs(blocks).argmax(axis=1, keepdims=True)
        scale = (np.take_along_axis(blocks, at, axis=1) / lowest).astype(np.float16)
        scale = scale.astype(np.float32)
        safe = np.where(scale == 0, 1, scale)
        codes = np.clip(np.rint(blocks / safe), lowest, -lowest - 1)
        found: Float = (codes * scale).astype(np.float32).reshape(weight.shape)
        return found

    return rounding


class Study:
    """One model, whose weights and adapter are set anew for each run."""

    def __init__(self, path: Path, pairs: Path, settings: AdapterSettings, training: Training):
        self.settings, self.training = settings, training
        self.layout = Layout(path)
        base = load_base(path)
        self.model = with_adapter(base, settings)
        self.layers = {
            self.layout.name(f"{name}.weight"): layer
            for name, layer in adapted_layers(self.model).items()
        }
        self.weights = {
            tensor.name: dequantize(tensor)
            for tensor in self.layout.reader.tensors
            if tensor.name in self.layers
        }
        found = read_pairs(pairs)
        self.rows = [row(base, pair) for pair in found.training]
        held = [row(base, pair) for pair in found.some_held(384)]
        self.tuning = held[::3]
        self.judged: Sequence[Row] = [one for at, one in enumerate(held) if at % 3]

    def prepare(self, bits: int) -> tuple[dict[str, Float], dict[str, Float], dict[str, Update]]:
        """Weights rounded to nearest; LoftQ's; and its updates."""
        rounding = grid(bits)
        plain = {name: rounding(weight) for name, weight in self.weights.items()}
        other, updates = {}, {}
        for name, weight in self.weights.items():
            other[name], updates[name] = loftq(
                weight, rounding, self.settings.rank, self.settings.iterations
            )
        return plain, other, updates

    def run(
        self, weights: dict[str, Float], updates: dict[str, Update], rate: float
    ) -> dict[str, float]:
        """Train from there; losses in nats per token."""
        with torch.no_grad():
            for name, layer in self.layers.items():
                weight = self.layout.to_torch(name, weights[name])
                layer.get_base_layer().weight.copy_(torch.from_numpy(weight))
        set_adapter(self.model, self.layout, updates, self.settings.alpha / self.settings.rank)
        before = held_loss(self.model, self.judged)
        training = Training(self.settings, "adamw", self.training.steps, self.training.batch, rate)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        begun = time.monotonic()
        fit(
            self.model,
            torch.optim.AdamW(trained, lr=rate, weight_decay=0.0),
            self.rows,
            training,
        )
        return {
            "before": before,
            "tuning": held_loss(self.model, self.tuning),
            "after": held_loss(self.model, self.judged),
            "seconds": time.monotonic() - begun,
        }


def zero(settings: AdapterSettings, weights: dict[str, Float]) -> dict[str, Update]:
    """Peft's default: A uniform (Kaiming), B = 0."""
    chance = np.random.default_rng(settings.seed)
    scale = np.sqrt(settings.alpha / settings.rank)  # which set_adapter divides by
    found = {}
    for name, weight in weights.items():
        bound = scale / np.sqrt(weight.shape[1])
        a = chance.uniform(-bound, bound, (settings.rank, weight.shape[1])).astype(np.float32)
        found[name] = Update(a, np.zeros((weight.shape[0], settings.rank), np.float32))
    return found


def tune(run: Callable[[float], dict[str, Any]]) -> dict[str, Any]:
    """The run of the best learning rate: from FIRST and the next, on towards the better one until
    it gets worse."""
    found = {0: run(FIRST), 1: run(FIRST * ROOT)}
    step = 1 if found[1]["tuning"] < found[0]["tuning"] else -1
    at = 1 if step == 1 else 0
    while True:
        found[at + step] = run(FIRST * ROOT ** (at + step))
        if not found[at + step]["tuning"] < found[at]["tuning"]:
            return found[at]
        at += step


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("base", type=Path)
    parser.add_argument("pairs", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--iterations", type=int, default=5)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    file = arguments.work / "starts.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    known = {(r["bits"], r["start"], r["rate"]): r for r in map(json.loads, lines)}
    settings = AdapterSettings(arguments.rank, 2 * arguments.rank, iterations=arguments.iterations)
    training = Training(settings, steps=arguments.steps, batch=arguments.batch)
    study = Study(arguments.base, arguments.pairs, settings, training)
    nothing = zero(settings, study.weights)
    best = []

    def recorded(
        bits: int, start: str, weights: dict[str, Float], updates: dict[str, Update]
    ) -> Callable[[float], dict[str, Any]]:
        def run(rate: float) -> dict[str, Any]:
            rate = float(f"{rate:.3g}")
            key = (bits, start, rate)
            if key not in known:
                known[key] = {"bits": bits, "start": start, "rate": rate}
                known[key] |= study.run(weights, updates, rate)
                with file.open("a") as out:
                    out.write(json.dumps(known[key]) + "\n")
            found: dict[str, Any] = known[key]
            return found

        return run

    for bits in BITS:
        plain, own, updates = study.prepare(bits)
        chance = np.random.default_rng(settings.seed)
        control = {name: random_like(update, chance) for name, update in updates.items()}
        for start, weights, first in (
            ("default", plain, nothing),
            ("loftq", own, updates),
            ("control", own, control),
        ):
            best.append(tune(recorded(bits, start, weights, first)))
            print(
                "{bits} bits, {start}: best rate {rate}, {before:.3f} -> {after:.4f}".format(
                    **best[-1]
                ),
                flush=True,
            )
    print("\n| bits | " + " | ".join(STARTS) + " |\n|" + "---|" * (len(STARTS) + 1))
    for bits in BITS:
        cells = [
            f"{r['before']:.2f} -> {r['after']:.3f} (rate {r['rate']:g})"
            for r in best
            if r["bits"] == bits
        ]
        print(f"| {bits} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
