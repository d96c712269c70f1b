"""A step beside other work, with threads that wait as edgesd lets them, and as the libraries do.

    python -m benchmarks.beside_others BUNDLE

Steps of the bundle's denoiser, and, where torch is there, of a small network of convolutions in
torch (what calibration and parity checks run), each in a process of its own: alone; beside one
process that keeps a core busy; and two of the same kind at once, of which the slower counts. The
settings take turns, and ratios are of neighbouring measurements. On two cores sharing them fairly
takes half as long again beside one busy process, and twice as long for two at once.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from importlib import util
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.common import environment, paired_ratio, parser, run, spread, table, write_json
from edgesd.cores import SPIN_MICROSECONDS, library_settings
from edgesd.processes import module_command
from edgesd.runtime.bundle import open_bundle

OURS, THEIRS = "edgesd's", "the library's"
SITUATIONS = ("alone", "beside one busy process", "two at once")
OPENMP = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS")


def onnxruntime_step(path: Path, theirs: bool) -> Any:
    """A function that runs the denoiser once."""
    import numpy as np
    import onnxruntime

    from edgesd.runtime import kernels
    from edgesd.runtime.backends import onnxruntime as runner

    bundle = open_bundle(path)
    spec = bundle.manifest.pipeline.components["unet"]
    engine = bundle.manifest.engines["unet"]
    # No duration that ONNX Runtime knows: it takes its own.
    with mock.patch.object(runner, "SPIN_MICROSECONDS", -1 if theirs else SPIN_MICROSECONDS):
        options = runner.session_options(0, kernels.library())
    if theirs:
        options.intra_op_num_threads = 0
    graph = path / (engine.kernels if engine.kernels and kernels.library() else engine.path)
    session = onnxruntime.InferenceSession(str(graph), options, ["CPUExecutionProvider"])
    shape = bundle.manifest.pipeline.shape
    size = {"batch": 1, "height": shape.height // 8, "width": shape.width // 8}
    rng = np.random.default_rng(0)
    feed = {
        tensor.name: rng.normal(
            size=[d if isinstance(d, int) else size[d] for d in tensor.shape]
        ).astype(tensor.dtype)
        for tensor in spec.inputs
    }
    return lambda: session.run(None, feed)


def torch_step() -> Any:
    """A function that runs twelve convolutions of 64 channels and what is between them."""
    import torch

    layers = [
        torch.nn.Sequential(
            torch.nn.Conv2d(64, 64, 3, padding=1), torch.nn.GroupNorm(8, 64), torch.nn.SiLU()
        )
        for _ in range(12)
    ]
    network, x = torch.nn.Sequential(*layers), torch.randn(2, 64, 16, 16)

    def step() -> None:
        with torch.no_grad():
            network(x)

    return step


def child(what: str, path: str, theirs: str) -> None:
    """For each line with a number read: run as many steps, and print the seconds of one."""
    step = torch_step() if what == "torch" else onnxruntime_step(Path(path), theirs == THEIRS)
    step()
    print("ready", flush=True)
    for line in sys.stdin:
        start = time.perf_counter()
        for _ in range(int(line)):
            step()
        print((time.perf_counter() - start) / int(line), flush=True)


class Stepper:
    """A process that runs steps when it is told."""

    def __init__(self, what: str, path: Path, setting: str) -> None:
        variables = {key: value for key, value in os.environ.items() if key not in OPENMP}
        if setting == OURS:
            variables |= library_settings(variables)
        self.process = subprocess.Popen(
            module_command("benchmarks.beside_others", "--child", what, str(path), setting),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=variables,
        )
        if self._line() != "ready":
            raise SystemExit(f"benchmark: the process that runs {what} ended")

    def start(self, steps: int) -> None:
        """Begin to run steps."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()

    def seconds(self) -> float:
        """Wait for them: seconds of one step."""
        return float(self._line())

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def end(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.communicate()


def measure(what: str, path: Path, steps: int, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Situation -> setting -> seconds of a step, one value each round."""
    pairs = {
        name: (Stepper(what, path, name), Stepper(what, path, name)) for name in (OURS, THEIRS)
    }
    found: dict[str, dict[str, list[float]]] = {s: {n: [] for n in pairs} for s in SITUATIONS}
    for index in range(rounds):
        turns = list(pairs) if index % 2 else list(pairs)[::-1]
        for situation in SITUATIONS:
            busy = None
            if situation == SITUATIONS[1]:
                busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
                time.sleep(0.3)
            for name in turns:
                running = pairs[name] if situation == SITUATIONS[2] else pairs[name][:1]
                for stepper in running:
                    stepper.start(steps)
                found[situation][name].append(max(stepper.seconds() for stepper in running))
            if busy:
                busy.kill()
                busy.wait()
    for pair in pairs.values():
        for stepper in pair:
            stepper.end()
    return found


def main() -> None:
    """Measure, print, and write."""
    if sys.argv[1:2] == ["--child"]:
        return child(*sys.argv[2:5])
    arguments = parser(__doc__)
    arguments.add_argument("bundle", type=Path, help="a folder")
    arguments.add_argument("--steps", type=int, default=40, help="per measurement (default: 40)")
    arguments.add_argument("--rounds", type=int, default=11, help="of all settings (default: 11)")
    there = ["onnxruntime", *(["torch"] if util.find_spec("torch") else [])]
    arguments.add_argument("--libraries", nargs="+", choices=there, default=there)
    given = arguments.parse_args()
    rows, figures = [], []
    for what in given.libraries:
        found = measure(what, given.bundle, given.steps, given.rounds)
        for situation, seconds in found.items():
            ratio = paired_ratio(seconds[OURS], seconds[THEIRS])
            step = {name: spread(1e3 * s for s in values) for name, values in seconds.items()}
            of_alone = {
                name: statistics.median(values) / statistics.median(found[SITUATIONS[0]][name])
                for name, values in seconds.items()
            }
            rows.append(
                (
                    *(what, situation, step[OURS].text(2), step[THEIRS].text(2), ratio.text(2)),
                    *(f"{of_alone[name]:.2f}" for name in (OURS, THEIRS)),
                )
            )
            figures.append(
                {
                    "library": what,
                    "situation": situation,
                    "step_ms": {name: value._asdict() for name, value in step.items()},
                    "ratio": ratio._asdict(),
                    "of_alone": of_alone,
                }
            )
    head = ("", "", f"ms, {OURS}", f"ms, {THEIRS}", "ratio", "of alone", "of alone, theirs")
    print(table(head, rows))
    write_json(given.json, {"environment": environment(), "rows": figures})
    return None


if __name__ == "__main__":
    run(main)
