"""Training all of a prompter's weights: memory and loss by optimizer, after equally many steps.

    python -m benchmarks.prompter_optimizers BASE.gguf pairs.jsonl --work FOLDER

Each run is a process of its own, `edgesd prompter train --full`: its peak is what is measured. An
optimizer's learning rate is tuned by factors of 10 ** 0.5 on the held-out loss that is reported:
differences of memory are exact, those of loss favour none.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from edgesd.export.prompter.options import OPTIMIZERS

from .common import table

_EDGESD = "from edgesd.cli import main; main()"

RATES = {
    "adamw": (1e-4, 3e-4),
    "galore": (1e-3, 3e-3),
    "galore8bit": (1e-3, 3e-3),
    "apollo": (3e-4, 1e-3),
}


def run(
    base: Path, pairs: Path, kind: str, rate: float, steps: int, batch: int, work: Path
) -> dict[str, Any] | str:
    """The training's report, or what the command said."""
    kept = work / f"{kind}-{rate:g}.json"
    if kept.exists():
        found: dict[str, Any] = json.loads(kept.read_text())
        return found
    out = work / "run"
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-c", _EDGESD, "prompter", "train", str(pairs)]
    command += ["--base", str(base), "--full", "--optim", kind, "--learning-rate", str(rate)]
    command += ["--steps", str(steps), "--batch", str(batch), "-o", str(out), "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    shutil.rmtree(out, ignore_errors=True)
    if done.returncode:
        return done.stderr.strip().splitlines()[-1]
    kept.write_text(done.stdout)
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("base", type=Path)
    parser.add_argument("pairs", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=8)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    rows = []
    for kind in OPTIMIZERS:
        found = []
        for rate in RATES[kind]:
            report = run(
                arguments.base,
                arguments.pairs,
                kind,
                rate,
                arguments.steps,
                arguments.batch,
                arguments.work,
            )
            print(kind, rate, report, flush=True)
            if isinstance(report, str):
                break  # what one rate lacks all lack
            found.append(report)
        if not found:
            continue
        best = min(found, key=lambda report: report["loss_after"])
        rows.append(
            (
                kind,
                f"{max(r['peak_bytes'] for r in found) / 1e6:.0f}",
                f"{best['state_bytes'] / 1e6:.0f}",
                f"{best['loss_before']:.3f}",
                f"{best['loss_after']:.4f}",
                f"{best['learning_rate']:g}",
                f"{best['seconds']:.0f}",
            )
        )
    head = ("optimizer", "peak MB", "state MB", "before", "loss", "rate", "seconds")
    print(table(head, rows))


if __name__ == "__main__":
    main()
