"""One way to build plans for TensorRT 10.3 to 11 and TensorRT-RTX.

Networks are strongly typed: every type stands in the graph, no precision flag and no calibrator is
set. A plan is built in a process of its own, without torch, one component at a time, so that its
peak memory is its own and an 8 GB board has a chance.
"""

from __future__ import annotations

import importlib.util
import logging
import shlex
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from edgesd.engines import onnxruntime
from edgesd.errors import EdgesdError, MissingDependencyError, ResourceError, TargetError
from edgesd.processes import module_command
from edgesd.progress import SILENT, Progress
from edgesd.spec.base import Spec
from edgesd.spec.bundle import Engine, Environment, Graph

BACKEND = "tensorrt"
MODULES = ("tensorrt", "tensorrt_rtx")
"""Python packages that build plans. tensorrt_rtx does so on a machine without a GPU, too."""

PLAN_SUFFIX = ".plan"
PLANS = "plans"
"""Folder of a bundle that holds plans which were built beforehand: plans/COMPONENT.plan."""

SCRIPT = "trtexec.sh"
"""File of a bundle: command lines of NVIDIA's tool that build the same plans."""

CHECK_SM = {"sm_87": "sm_86", "sm_110": "sm_120"}
"""A board's GPU -> the nearest one that TensorRT-RTX builds for: of one generation."""
CHECK_MODULE = "tensorrt_rtx"

_MIB = 1 << 20

_log = logging.getLogger(__name__)

"""Told of a phase of the build, steps done, and of how many."""


class Profile(Spec, frozen=True):
    """Shapes of one dynamic input: the smallest, the one to be fastest at, the largest."""

    name: str
    smallest: tuple[int, ...]
    best: tuple[int, ...]
    largest: tuple[int, ...]


class BuildSpec(Spec, frozen=True):
    """Everything that a plan depends on beside its graph, and nothing that happens on import.

    component: names the plan in messages. module: one of MODULES. sm: the GPU to build for, of a
    module that can build for another than this machine's ("sm_86"); None for this machine's.
    profiles: of inputs whose shape isn't fixed. workspace_bytes: memory that a layer may use while
    it runs, at most. optimization_level: 0 to 5, as TensorRT's builder has it.
    """

    component: str
    module: str = "tensorrt"
    sm: str | None = None
    profiles: tuple[Profile, ...] = ()
    workspace_bytes: int = 1 << 30
    optimization_level: int = 3

    def trtexec(self, graph: str, plan: str) -> str:
        """The command line of NVIDIA's tool that builds the same plan."""
        words = [
            "trtexec",
            f"--onnx={graph}",
            f"--saveEngine={plan}",
            "--stronglyTyped",
            f"--memPoolSize=workspace:{self.workspace_bytes // _MIB}M",
            f"--builderOptimizationLevel={self.optimization_level}",
            "--skipInference",
        ]
        for option, field in (
            ("--minShapes", "smallest"),
            ("--optShapes", "best"),
            ("--maxShapes", "largest"),
        ):
            if self.profiles:
                shapes = (
                    f"{p.name}:{'x'.join(map(str, getattr(p, field)))}" for p in self.profiles
                )
                words.append(f"{option}={','.join(shapes)}")
        return shlex.join(words)


class PlanReport(Spec, frozen=True):
    """What a build came to. seconds: of the build alone. peak_bytes: resident memory of its
    process at most. import_bytes: of the same before the graph was read. warnings: TensorRT's."""

    environment: Environment
    plan_bytes: int
    seconds: float
    peak_bytes: int
    import_bytes: int
    warnings: tuple[str, ...]


def engine_from_graph(graph: Graph) -> Engine:
    """The engine of one component: its graph, whose plan is built where it will run."""
    return msgspec.structs.replace(onnxruntime.engine_from_graph(graph), backend=BACKEND)


def plan_path(component: str) -> str:
    """Where in a bundle the plan of a component lies."""
    return f"{PLANS}/{component}{PLAN_SUFFIX}"


def trtexec_script(engines: Mapping[str, Engine]) -> str:
    """A shell script that builds all plans of a bundle by NVIDIA's tool, for its root folder."""
    lines = ["#!/bin/sh", "# The same plans by NVIDIA's tool, on the board.", "set -e"]
    lines += [
        BuildSpec(name).trtexec(engine.path, f"{name}{PLAN_SUFFIX}")
        for name, engine in engines.items()
    ]
    return "\n".join(lines) + "\n"


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
    found: PlanReport | Failure | None = None
    for raw in worker.stdout:
        line = msgspec.json.decode(raw, type=Line)
        if isinstance(line, PhaseStep):
            progress.update(f"{component}: {line.phase}", line.done, line.total)
        else:
            found = line if isinstance(line, Failure) else line.report
    return found


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
