"""Images by TensorRT on this machine's GPU: likeness to ONNX Runtime's, speed, memory.

    python -m benchmarks.tensorrt_images --work FOLDER [--models demo sd15 sdxl]
        [--precisions fp16 w8a8 w4a16-g64-lr32] [--minutes 10] [--json FILE]

Each model is built in each precision for TensorRT and for ONNX Runtime (by rounding, which takes
minutes less than the default method), and both generate one image from one seed. Beside what was
measured stands what `edgesd plan` says of the bundle. sd15 and sdxl are pipelines of true size with
random weights (benchmarks/random_pipeline.py). Rows are printed and written as they come; a row
that wouldn't begin before --minutes are over is named and left out. Needs a GPU with its driver,
TensorRT or TensorRT-RTX, and `pip install -e '.[build]' cuda-bindings`.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import environment, parser, run, spread, table, write_json
from edgesd.engines.plans import Plans, plan_environment, prepare_plans, read_plan
from edgesd.errors import EdgesdError, TargetError
from edgesd.evaluate.psnr import ImageLike, psnr
from edgesd.recipes import DEMO, BuildOptions, LocalFolders, QuantOptions, build
from edgesd.recipes.estimate import PlanRequest
from edgesd.recipes.planner import estimate_build
from edgesd.runtime.bundle import Bundle, open_bundle
from edgesd.runtime.cuda import find_gpu
from edgesd.runtime.pipeline import Pipeline
from edgesd.runtime.requests import Request
from edgesd.runtime.settings import Settings

TARGETS = {"tensorrt": "jetson-agx-orin-64gb", "onnxruntime": "x86-64-cpu"}
"""Backend -> the board that its bundle is built for; a GPU of another kind may run it, too."""
PRECISIONS = ("fp16", "w8a8", "w4a16-g64-lr32")
MODELS = (DEMO, "sd15", "sdxl")
_PROMPT, _SEED = "a red apple", 3
_SAMPLE_SECONDS = 0.01

Free = Callable[[], int]
"""Free bytes of the GPU's memory."""


@dataclass(frozen=True)
class Row:
    """One model in one precision. psnr_db: between the two images. step_ms: median of the second
    image's. gpu_bytes: what the GPU's memory lost at most while it was loaded and generated.
    planned_bytes: what `edgesd plan` says of --memory fast."""

    model: str
    precision: str
    psnr_db: float
    step_ms: float
    cpu_step_ms: float
    plan_bytes: int
    plan_seconds: float
    gpu_bytes: int
    planned_bytes: int
    build_seconds: float


def gpu_free() -> int:
    """Free bytes of the GPU's memory. Raises TargetError when it can't be asked."""
    from cuda.bindings import runtime

    status, free, _ = runtime.cudaMemGetInfo()
    if int(status):
        raise TargetError(f"the GPU's free memory can't be asked (error {int(status)})")
    return int(free)


class _Least:
    """Samples free memory on a thread, and keeps the least."""

    def __init__(self, free: Free) -> None:
        self._free = free
        self.before = self.least = free()

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Sample while the block runs."""
        done = threading.Event()

        def sample() -> None:
            while not done.wait(_SAMPLE_SECONDS):
                self.least = min(self.least, self._free())

        thread = threading.Thread(target=sample, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            self.least = min(self.least, self._free())


def image_by(bundle: Bundle, settings: Settings, steps: int | None) -> tuple[ImageLike, float]:
    """The second of two equal images, and the median of its steps in ms."""
    request = Request(_PROMPT, _SEED, num_inference_steps=steps)
    with Pipeline(bundle, settings) as pipeline:
        pipeline.generate([request])
        before = len(pipeline.timings.steps)
        image = pipeline.generate([request])[0]
        return image, spread(pipeline.timings.steps[before:]).median * 1e3


def measured(
    model: str,
    ours: Bundle,
    reference: Bundle,
    plans: Path,
    steps: int | None,
    free: Free,
    build_seconds: float,
    planned_bytes: int,
) -> Row:
    """The row of one bundle for TensorRT, beside the same pipeline for ONNX Runtime. Raises
    EdgesdError when plans can't be built or run."""
    began = time.perf_counter()
    paths = prepare_plans(ours, plans)
    plan_seconds = time.perf_counter() - began
    least = _Least(free)
    with least.watched():
        settings = Settings(memory="fast", plan_of=Plans(ours, plans), fallback=False)
        found, step_ms = image_by(ours, settings, steps)
    wanted, cpu_step_ms = image_by(reference, Settings(made_here=True), steps)
    return Row(
        model,
        ours.manifest.precision,
        psnr(found, wanted),
        step_ms,
        cpu_step_ms,
        sum(read_plan(path).report.plan_bytes for path in paths.values() if path),
        plan_seconds,
        least.before - least.least,
        planned_bytes,
        build_seconds,
    )


def _folder(model: str, work: Path) -> str:
    """What `build` takes for a model's name; written first where it has true size."""
    if model == DEMO:
        return DEMO
    folder = work / model
    if not folder.exists():
        from benchmarks.random_pipeline import write_pipeline

        write_pipeline(folder, model)
    return str(folder)


def _built(model: str, precision: str, backend: str, work: Path) -> Bundle:
    out = work / f"bundle-{backend}"
    shutil.rmtree(out, ignore_errors=True)
    how = QuantOptions(method="rtn", calibration_prompts=(_PROMPT,), steps=2, quality_prompts=())
    options = BuildOptions(TARGETS[backend], precision, backend, quantization=how)
    build(model, options, out, LocalFolders(work / "cache"))
    return open_bundle(out)


def one_row(model: str, precision: str, work: Path, steps: int | None, free: Free) -> Row:
    """Build both bundles and measure. Raises EdgesdError."""
    folder = _folder(model, work)
    began = time.perf_counter()
    reference, ours = (
        _built(folder, precision, name, work) for name in ("onnxruntime", "tensorrt")
    )
    seconds = time.perf_counter() - began
    planned = estimate_build(folder, TARGETS["tensorrt"], PlanRequest(precision), "tensorrt")
    with_plans = work / "plans"
    made = measured(
        model, ours, reference, with_plans, steps, free, seconds, planned.memory["fast"]
    )
    shutil.rmtree(with_plans, ignore_errors=True)
    return made


def rows(
    models: Sequence[str],
    precisions: Sequence[str],
    work: Path,
    minutes: float,
    steps: int,
    free: Free,
) -> Iterator[Row | str]:
    """A row, or a line that says why there is none, for each model and precision."""
    end = time.monotonic() + 60 * minutes
    for model in models:
        for precision in precisions:
            name = f"{model} {precision}"
            if time.monotonic() > end:
                yield f"{name}: not begun, {minutes:g} minutes are over"
                continue
            try:
                yield one_row(model, precision, work, None if model == DEMO else steps, free)
            except EdgesdError as exc:
                yield f"{name}: {exc}"


def main() -> None:
    """Measure, print, and write."""
    arguments = parser(__doc__)
    arguments.add_argument("--work", type=Path, required=True)
    arguments.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    arguments.add_argument("--precisions", nargs="+", default=list(PRECISIONS))
    arguments.add_argument("--minutes", type=float, default=10.0, help="(default: 10)")
    arguments.add_argument("--steps", type=int, default=4, help="of sd15 and sdxl (default: 4)")
    given = arguments.parse_args()
    gpu = find_gpu()
    if isinstance(gpu, str):
        raise TargetError(gpu)
    where = {"gpu": gpu.name, "sm": gpu.sm, "tensorrt": plan_environment(gpu).version}
    figures: dict[str, Any] = {"environment": environment() | where, "rows": [], "without": []}
    found: list[Row] = []
    for made in rows(
        given.models, given.precisions, given.work, given.minutes, given.steps, gpu_free
    ):
        print(made, flush=True)
        if isinstance(made, Row):
            found.append(made)
            figures["rows"].append(asdict(made))
        else:
            figures["without"].append(made)
        write_json(given.json, figures)
    print(where)
    print(table(list(Row.__dataclass_fields__), (list(asdict(row).values()) for row in found)))


if __name__ == "__main__":
    run(main)
