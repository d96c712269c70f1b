"""One UNet step of edgesd beside stable-diffusion.cpp, OpenVINO and torch.

    python -m benchmarks.peers --folder FOLDER --install
    python -m benchmarks.peers --folder FOLDER --contenders edgesd openvino torch

Stable Diffusion 1.5's UNet at its true size with random weights, 512x512 pixels, one image, no
guidance: the same weights and inputs for all, and outputs must agree (stable-diffusion.cpp doesn't
show them). --install gets the peers from PyPI into this environment; stable-diffusion.cpp is
compiled, with GGML_LLAMAFILE=ON. edgesd-PRECISION+stock runs without our own kernels, +stream lets
weights go after each layer. Each contender lives in a process of its own, so that its peak memory
is its own; all are kept loaded, and single steps alternate: A B C A B C. FOLDER (about 15 GB) is
filled on first use, which takes minutes and 8 GB of memory; measuring takes about 8 GB with the
default contenders.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import platform
import subprocess
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import environment, paired_ratio, parser, run, spread, table, write_json
from benchmarks.contenders import CONTENDERS, Answer, Array, Failed, Loaded, Stepped, serve
from benchmarks.peer_files import MODELS, Model, prepare
from edgesd.errors import EdgesdError, MissingDependencyError
from edgesd.processes import module_command

DEFAULT_CONTENDERS = (
    *("edgesd-w4a8-g64", "edgesd-w8a8", "edgesd-w4a8-g64+stream", "edgesd-w8a8+stock"),
    *("openvino-int8", "sdcpp-q8_0"),
)
AGREEMENT = 1e-3
"""The largest relative RMS difference between two contenders' outputs, in fp32."""
QUANTIZED_AGREEMENT = 0.3
"""The same where one of them is quantized: 4 bits by rounding are off by a fifth."""

PEERS = {
    "openvino": "openvino",
    "nncf": "nncf",
    "stable_diffusion_cpp": "stable-diffusion-cpp-python",
}
"""Module -> package."""
_SDCPP_X86 = "-DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON"
_SDCPP_BUILD = "-DGGML_LLAMAFILE=ON -DCMAKE_BUILD_TYPE=Release"
"""Its fastest build: on AVX-512 processors GCC's native one was 2.6 times slower."""

_SETTLE_SECONDS = 0.3  # threads that spin after a step have gone to sleep by then
_SAMPLE_SECONDS = 0.05


class Worker:
    """A contender in its process. peak_anonymous_bytes: as sampled; mapped files don't count."""

    def __init__(self, name: str, folder: Path, model: Model, threads: int) -> None:
        self.name = name
        self.steps: list[float] = []
        self.peak_anonymous_bytes = 0
        context = multiprocessing.get_context("spawn")
        self._connection: Connection[Any, Answer]
        self._connection, theirs = context.Pipe()
        self._process = context.Process(
            target=serve, args=(name, folder, model, threads, theirs), daemon=True
        )
        self._process.start()
        theirs.close()
        loaded = self._answer()
        assert isinstance(loaded, Loaded)
        self.load_seconds, self.note = loaded
        self.load_peak_bytes = self.peak_bytes

    @property
    def peak_bytes(self) -> int:
        """Largest resident set of the process so far, mapped files included (proc(5): VmHWM)."""
        return status_bytes(self._process.pid, "VmHWM")

    def step(self, output: bool = False) -> Array | None:
        """Run a step and keep its time; noise_pred if `output`."""
        self._connection.send(output)
        stepped = self._answer()
        assert isinstance(stepped, Stepped)
        self.steps.append(stepped.seconds)
        return stepped.output

    def _answer(self) -> Loaded | Stepped:
        while not self._connection.poll(_SAMPLE_SECONDS):
            now = status_bytes(self._process.pid, "RssAnon")
            self.peak_anonymous_bytes = max(self.peak_anonymous_bytes, now)
        try:
            answer = self._connection.recv()
        except EOFError:
            self._process.join()
            raise EdgesdError(
                f"{self.name} ended with status {self._process.exitcode}: it may have run out of "
                "memory; try fewer --contenders"
            ) from None
        if isinstance(answer, Failed):
            raise EdgesdError(f"{self.name} failed: {answer.message}")
        return answer

    def close(self) -> None:
        """End the process, and with it all it holds."""
        self._process.kill()
        self._process.join()


def install_peers() -> None:
    """pip install what is missing of the peers into this environment.

    Raises MissingDependencyError with pip's last words when that fails.
    """
    native = "-DGGML_NATIVE=ON" if platform.machine() != "x86_64" else _SDCPP_X86
    environment = {**os.environ, "CMAKE_ARGS": f"{native} {_SDCPP_BUILD}"}
    for module, package in PEERS.items():
        if importlib.util.find_spec(module) is None:
            print(f"installing {package}", flush=True)
            command = module_command("pip", "install", "--quiet", package)
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            if done.returncode:
                raise MissingDependencyError(f"{package}: {done.stderr.strip()[-300:]}")
    importlib.invalidate_caches()


def status_bytes(pid: int | None, key: str) -> int:
    """A size from /proc/PID/status; 0 when the process has gone."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def read_through(folder: Path) -> None:
    """Read all files below `folder` once, so that every contender loads from the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                while file.read(16 << 20):
                    pass


def relative_rms(found: Array, wanted: Array) -> float:
    """RMS of the difference over RMS of `wanted`."""
    difference = np.sqrt(np.mean((found.astype(np.float64) - wanted) ** 2))
    return float(difference / np.sqrt(np.mean(wanted.astype(np.float64) ** 2)))


def measure(
    names: Sequence[str], folder: Path, model: Model, threads: int, rounds: int
) -> list[dict[str, Any]]:
    """Load all contenders, let each do a first step, then `rounds` steps of each in turn.

    Ratios are the first contender's over each one's, of the steps of the same round. Raises
    EdgesdError when a contender fails, or its output isn't the first one's.
    """
    workers: list[Worker] = []
    try:
        for name in names:
            read_through(folder / name)
            print(f"loading {name}", flush=True)
            workers.append(Worker(name, folder, model, threads))
        outputs = [worker.step(output=True) for worker in workers]
        for _ in range(rounds):
            for worker in workers:
                time.sleep(_SETTLE_SECONDS)
                worker.step()
        first = workers[0]
        rows = []
        for worker, output in zip(workers, outputs, strict=True):
            assert output is not None and outputs[0] is not None
            apart = relative_rms(outputs[0], output) if output.size else 0.0
            agreement = AGREEMENT if "fp32" in first.name + worker.name else QUANTIZED_AGREEMENT
            if not apart <= agreement:
                raise EdgesdError(
                    f"{first.name} and {worker.name} disagree: relative RMS {apart:.1e}, more than "
                    f"{agreement:.0e}"
                )
            rows.append(
                {
                    "contender": worker.name,
                    "load_seconds": worker.load_seconds,
                    "first_step_seconds": worker.steps[0],
                    "step_seconds": spread(worker.steps[1:]),
                    "ratio": paired_ratio(first.steps[1:], worker.steps[1:]),
                    "peak_bytes": worker.peak_bytes,
                    "load_peak_bytes": worker.load_peak_bytes,
                    "peak_anonymous_bytes": worker.peak_anonymous_bytes,
                    "memory_ratio": first.peak_bytes / worker.peak_bytes,
                    "relative_rms": apart,
                    "note": worker.note,
                }
            )
        return rows
    finally:
        for worker in workers:
            worker.close()


def main() -> None:
    """Prepare, measure, print, and write."""
    arguments = parser(__doc__)
    arguments.add_argument("--folder", type=Path, required=True, help="for the models; kept")
    arguments.add_argument("--install", action="store_true", help="first pip install the peers")
    arguments.add_argument("--model", choices=MODELS, default="sd15", help="(default: sd15)")
    arguments.add_argument(
        "--contenders",
        nargs="+",
        choices=CONTENDERS,
        default=list(DEFAULT_CONTENDERS),
        help=f"ratios are of the first (default: {' '.join(DEFAULT_CONTENDERS)})",
    )
    arguments.add_argument("--rounds", type=int, default=9, help="steps of each (default: 9)")
    arguments.add_argument("--threads", type=int, default=2, help="of each (default: 2)")
    given = arguments.parse_args()
    names: list[str] = list(dict.fromkeys(given.contenders))
    if given.install:
        install_peers()
    for prefix, module in (
        ("openvino", "openvino"),
        ("openvino-int8", "nncf"),
        ("sdcpp", "stable_diffusion_cpp"),
    ):
        if any(n.startswith(prefix) for n in names) and not importlib.util.find_spec(module):
            raise MissingDependencyError(
                f"{PEERS[module]} isn't installed: give --install, or choose other --contenders"
            )
    model = MODELS[given.model]
    rows = measure(names, prepare(given.folder, model, names), model, given.threads, given.rounds)
    first = names[0]
    print(f"{model.name}, {given.threads} threads, medians of {given.rounds} steps (quartiles)")
    print(
        table(
            (
                "contender",
                "s/step",
                f"{first}'s s / its",
                "peak RSS MB",
                "peak anonymous MB",
                f"{first}'s peak / its",
                "load s",
                "differs by",
                "what",
            ),
            (
                (
                    row["contender"],
                    row["step_seconds"].text(),
                    row["ratio"].text(),
                    f"{row['peak_bytes'] / 1e6:.0f}",
                    f"{row['peak_anonymous_bytes'] / 1e6:.0f}",
                    row["memory_ratio"],
                    row["load_seconds"],
                    f"{row['relative_rms']:.0e}",
                    row["note"],
                )
                for row in rows
            ),
        )
    )
    write_json(
        given.json,
        {
            "environment": environment("openvino", "torch", "diffusers"),
            "model": model.name,
            "threads": given.threads,
            "contenders": [
                {key: v._asdict() if hasattr(v, "_asdict") else v for key, v in row.items()}
                for row in rows
            ],
        },
    )


if __name__ == "__main__":
    run(main)
