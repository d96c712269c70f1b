"""One way to build plans for TensorRT 10.3 to 11 and TensorRT-RTX.

Networks are strongly typed: every type stands in the graph, no precision flag and no calibrator is
set. A plan is built in a process of its own, without torch, one component at a time, so that its
peak memory is its own and an 8 GB board has a chance.
"""

from __future__ import annotations

import importlib.util
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import msgspec

from edgesd.errors import EdgesdError, MissingDependencyError, ResourceError, TargetError
from edgesd.processes import module_command
from edgesd.progress import SILENT, Progress
from edgesd.spec.base import Spec
from edgesd.spec.bundle import Environment

MODULES = ("tensorrt", "tensorrt_rtx")
"""Python packages that build plans. tensorrt_rtx does so on a machine without a GPU, too."""

PLAN_SUFFIX = ".plan"
PLANS = "plans"
"""Folder of a bundle that holds plans which were built beforehand: plans/COMPONENT.plan."""


class BuildSpec(Spec, frozen=True):
    """Everything that a plan depends on beside its graph, and nothing that happens on import.

    component: names the plan in messages. module: one of MODULES. sm: the GPU to build for, of a
    module that can build for another than this machine's ("sm_86"); None for this machine's.
    workspace_bytes: memory that a layer may use while it runs, at most. optimization_level: 0 to
    5, as TensorRT's builder has it.
    """

    component: str
    module: str = "tensorrt"
    sm: str | None = None
    workspace_bytes: int = 1 << 30
    optimization_level: int = 3


class PlanReport(Spec, frozen=True):
    """The report of a build. seconds: of the build alone. peak_bytes: resident memory of its
    process at most. import_bytes: of the same before the graph was read. warnings: TensorRT's.
    weight_bytes, activation_bytes: GPU memory that the plan will take, as TensorRT says; None where
    it doesn't."""

    environment: Environment
    plan_bytes: int
    seconds: float
    peak_bytes: int
    import_bytes: int
    warnings: tuple[str, ...]
    weight_bytes: int | None = None
    activation_bytes: int | None = None


def plan_path(component: str) -> str:
    """Where in a bundle the plan of a component lies."""
    return f"{PLANS}/{component}{PLAN_SUFFIX}"


def build_plan(
    graph: Path,
    spec: BuildSpec,
    plan: Path,
    progress: Progress = SILENT,
    weights: Path | None = None,
    opened: Sequence[int] = (),
) -> PlanReport:
    """Build `plan` from the ONNX file `graph`, in a process of its own.

    weights: the folder of the graph's external data; None for the graph's own. opened: descriptors
    that the graph refers to, which the process inherits. `plan` is written whole or not at all.
    Raises MissingDependencyError without the module, TargetError without its GPU, ResourceError
    when the process is killed or memory runs out, EdgesdError, with TensorRT's own words and the
    node's name, when it refuses the graph.
    """
    if importlib.util.find_spec(spec.module) is None:
        raise MissingDependencyError(
            f"building plans needs {spec.module}, which isn't installed: "
            + (
                "pip install tensorrt-rtx"
                if spec.module == "tensorrt_rtx"
                else "it comes with JetPack (a virtual environment needs --system-site-packages)"
            )
        )
    folder = weights or graph.parent
    command = module_command("edgesd.engines.tensorrt_worker", str(graph), str(folder), str(plan))
    with (
        tempfile.TemporaryFile() as noise,  # a pipe would fill up while nobody reads it
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=noise, pass_fds=opened
        ) as worker,
    ):
        assert worker.stdin and worker.stdout
        try:
            worker.stdin.write(msgspec.json.encode(spec))
            worker.stdin.close()
            last = _follow(worker, progress, spec.component)
            worker.wait()
        except BaseException:
            worker.kill()
            raise
        noise.seek(0)
        said = noise.read().decode(errors="replace")
    if isinstance(last, PlanReport):
        return last
    raise _failure(spec, worker.returncode, last, said)


class PhaseStep(Spec, frozen=True, tag="step"):
    phase: str
    done: int
    total: int


class Failure(Spec, frozen=True, tag="failure"):
    """Why a worker gave up. kind: graph, memory, target or fault."""

    kind: str
    message: str


class Result(Spec, frozen=True, tag="result"):
    report: PlanReport


Line = PhaseStep | Failure | Result
"""What a worker prints, a JSON object per line."""


def _follow(
    worker: subprocess.Popen[bytes], progress: Progress, component: str
) -> PlanReport | Failure | None:
    assert worker.stdout
    last: PlanReport | Failure | None = None
    for raw in worker.stdout:
        line = msgspec.json.decode(raw, type=Line)
        if isinstance(line, PhaseStep):
            progress.update(f"{component}: {line.phase}", line.done, line.total)
        else:
            last = line if isinstance(line, Failure) else line.report
    return last


def _failure(spec: BuildSpec, status: int, failure: Failure | None, said: str) -> EdgesdError:
    what = f"{spec.component}: {spec.module}"
    if failure is None:
        if status == -signal.SIGKILL:
            return ResourceError(
                f"{what} was killed while it built the plan, most likely for lack of memory: end "
                "other programs, add swap, build a smaller --size, or build on a larger board with "
                "the same GPU"
            )
        how = f"crashed ({signal.Signals(-status).name})" if status < 0 else f"ended with {status}"
        tail = " ".join(said.split())[-300:] or "it said nothing"
        return EdgesdError(f"{what} {how} while it built the plan: {tail}")
    if failure.kind == "memory":
        return ResourceError(f"{what} ran out of memory: {failure.message}: build a smaller --size")
    if failure.kind == "target":
        return TargetError(f"{what} can't build here: {failure.message}")
    return EdgesdError(f"{what} refuses the graph: {failure.message}")
