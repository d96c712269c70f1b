"""How far `edgesd plan` is off: what it predicts, beside what `edgesd generate` takes.

    python -m benchmarks.planner --rates FILE --pair MODEL BUNDLE [--pair ...] [--sizes 256 512]

Each BUNDLE was built from the folder MODEL (benchmarks/random_pipeline.py makes some). Every
configuration of bundle, size and memory mode generates images, each in a process of its own, and
its median counts; with --stock once more without edgesd's own kernels. FILE is edgesd profile's,
of this machine.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.common import environment, parser, run, table, write_json
from edgesd.errors import EdgesdError
from edgesd.processes import module_command
from edgesd.recipes.estimate import PlanRequest
from edgesd.recipes.planner import estimate_build
from edgesd.runtime.bundle import Bundle, open_bundle
from edgesd.runtime.memory import MEMORY_MODES
from edgesd.runtime.rates import Rates, read_rates


def generate(bundle: Path, mode: str, size: int, steps: int, kernels: bool) -> tuple[int, float]:
    """Peak resident bytes and seconds, without loading, of one image in a new process."""
    with tempfile.TemporaryDirectory() as folder:
        command = module_command("edgesd", "generate", str(bundle), "-p", "a red apple")
        command += ["--seed", "1", "--memory", mode, "--size", str(size), "--steps", str(steps)]
        command += ["--guidance", "1", "--json", "-o", f"{folder}/out.png"]
        environ = {**os.environ, **({} if kernels else {"EDGESD_KERNELS": "none"})}
        done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    if done.returncode:
        raise EdgesdError(f"{bundle}: {done.stderr.strip()}")
    told = json.loads(done.stdout)
    return int(told["peak_memory_bytes"]), float(sum(told["run_seconds"].values()))


def rows(
    pairs: Sequence[tuple[str, Bundle]],
    sizes: Sequence[int],
    steps: int,
    rates: Rates,
    stock: bool,
    repeats: int,
) -> list[dict[str, Any]]:
    """Predicted and measured figures of every configuration."""
    found = []
    for model, bundle in pairs:
        manifest = bundle.manifest
        layers = manifest.recipe.layers if manifest.recipe else ()
        method = (
            "svdquant" if any(layer.method.startswith("svdquant") for layer in layers) else "rtn"
        )
        for kernels in (True, False) if stock else (True,):
            isa = rates.instruction_set if kernels else None
            here = msgspec.structs.replace(rates, instruction_set=isa)
            for size in sizes:
                request = PlanRequest(
                    manifest.precision, (size, size), steps, 1.0, None, method, here
                )
                plan = estimate_build(model, manifest.target, request, "onnxruntime")
                assert plan.seconds is not None
                for mode in MEMORY_MODES:
                    generated = [
                        generate(bundle.path, mode, size, steps, kernels) for _ in range(repeats)
                    ]
                    peak, seconds = (
                        statistics.median(values) for values in zip(*generated, strict=True)
                    )
                    found.append(
                        {
                            "model": Path(model).name,
                            "precision": manifest.precision,
                            "kernels": "own" if plan.kernels else "stock",
                            "size": size,
                            "mode": mode,
                            "planned_bytes": plan.memory[mode],
                            "bytes": peak,
                            "planned_seconds": plan.seconds[mode],
                            "seconds": seconds,
                        }
                    )
                    print(".", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return found


def main() -> None:
    """Measure, print, and write."""
    arguments = parser(__doc__)
    arguments.add_argument("--rates", type=Path, required=True, help="of edgesd profile")
    arguments.add_argument("--pair", nargs=2, action="append", required=True, metavar="PATH")
    arguments.add_argument("--sizes", type=int, nargs="+", default=[256, 512], help="in pixels")
    arguments.add_argument("--steps", type=int, default=4, help="denoising steps (default: 4)")
    arguments.add_argument("--stock", action="store_true", help="also without our own kernels")
    arguments.add_argument("--repeats", type=int, default=3, help="images of each (default: 3)")
    given = arguments.parse_args()
    pairs = [(model, open_bundle(Path(bundle))) for model, bundle in given.pair]
    rates = read_rates(given.rates)
    lines = rows(pairs, given.sizes, given.steps, rates, given.stock, given.repeats)
    head = ["model", "precision", "kernels", "size", "mode"]
    print(
        table(
            [*head, "MB planned", "MB", "off", "s planned", "s", "off"],
            (
                [
                    *(line[name] for name in head),
                    f"{line['planned_bytes'] / 1e6:.0f}",
                    f"{line['bytes'] / 1e6:.0f}",
                    f"{line['planned_bytes'] / line['bytes'] - 1:+.0%}",
                    f"{line['planned_seconds']:.2f}",
                    f"{line['seconds']:.2f}",
                    f"{line['planned_seconds'] / line['seconds'] - 1:+.0%}",
                ]
                for line in lines
            ),
        )
    )
    write_json(given.json, {"environment": environment(), "lines": lines})


if __name__ == "__main__":
    run(main)
