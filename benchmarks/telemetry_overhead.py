"""What sampling the board's telemetry costs a step.

    python -m benchmarks.telemetry_overhead BUNDLE

Laps of the denoising loop with the sampler's process running and without it, in turn (A B A B), on
all cores, so that the sampler has to take its time from the network. Given are the ratio of the
pairs, and, undisturbed by what else the machine does, the share of one core that the sampler's
process used once it was up.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from typing import NamedTuple

from benchmarks.common import environment, paired_ratio, parser, run, spread, table, write_json
from benchmarks.loop_overhead import lap
from edgesd.device.telemetry import Sampler
from edgesd.runtime.backends.onnxruntime import OnnxRuntimeRunner
from edgesd.runtime.bundle import Bundle, open_bundle


class Pair(NamedTuple):
    """Seconds of a step with and without the sampler; percent of one core that it used."""

    sampled: float
    alone: float
    core_percent: float


def cpu_seconds(pid: int) -> float:
    """CPU time of a process's threads so far, to the nanosecond: schedstat, proc(5)."""
    threads = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(thread.read_text().split()[0]) for thread in threads) / 1e9


def measure(bundle: Bundle, steps: int, repeats: int, interval: float, threads: int) -> list[Pair]:
    """`repeats` pairs, after one of each that isn't counted."""
    spec = bundle.manifest.pipeline
    name = spec.scheduler.name
    pairs = []
    with OnnxRuntimeRunner(spec.components["unet"], bundle.graph_file("unet"), threads) as runner:
        lap(runner, spec, name, steps)
        for index in range(repeats):
            seconds = {}
            share = 0.0
            for sampled in (True, False) if index % 2 else (False, True):
                with Sampler(interval, os.getpid()) if sampled else contextlib.nullcontext() as on:
                    while on and not on.samples:  # it is up
                        time.sleep(0.01)
                    before, start = cpu_seconds(on.pid) if on else 0.0, time.perf_counter()
                    done = lap(runner, spec, name, steps)
                    if on:
                        used = cpu_seconds(on.pid) - before
                        share = 100 * used / (time.perf_counter() - start)
                seconds[sampled] = done.total / done.steps
            pairs.append(Pair(seconds[True], seconds[False], share))
    return pairs


def main() -> None:
    """Measure, print, and write."""
    arguments = parser(__doc__)
    arguments.add_argument("bundle", type=Path)
    arguments.add_argument("--steps", type=int, default=500, help="per lap (default: 500)")
    arguments.add_argument("--repeats", type=int, default=15, help="pairs (default: 15)")
    arguments.add_argument("--interval", type=float, default=0.5, help="seconds (default: 0.5)")
    arguments.add_argument("--threads", type=int, default=0, help="0 (default): all cores")
    given = arguments.parse_args()
    pairs = measure(
        open_bundle(given.bundle), given.steps, given.repeats, given.interval, given.threads
    )
    ratio = paired_ratio([pair.sampled for pair in pairs], [pair.alone for pair in pairs])
    step = spread(1e3 * pair.alone for pair in pairs)
    core = spread(pair.core_percent for pair in pairs)
    head = ("step ms, alone", "with telemetry / alone", "% of one core")
    print(table(head, [(step.text(), ratio.text(4), core.text(2))]))
    write_json(
        given.json,
        {
            "environment": environment(),
            "interval": given.interval,
            "step_ms": step._asdict(),
            "ratio": ratio._asdict(),
            "core_percent": core._asdict(),
        },
    )


if __name__ == "__main__":
    run(main)
