"""The process that builds a plan: python -m edgesd.engines.tensorrt_worker GRAPH FOLDER PLAN

Standard input is the spec, FOLDER the place of the graph's external data.

Prints JSON lines (tensorrt.Line). No torch and no onnx in here: on a board every byte counts.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
import time
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from edgesd.device.detect import detect_machine
from edgesd.engines.tensorrt import BuildSpec, Failure, PhaseStep, PlanReport, Result
from edgesd.files import atomic_write
from edgesd.runtime.cuda import find_gpu
from edgesd.runtime.memory import peak_bytes
from edgesd.spec.bundle import Environment

_EVERY_SECONDS = 0.5
_MEMORY = re.compile(r"out ?of ?memory|bad_alloc|OutOfMemory|cudaErrorMemoryAllocation", re.I)
_TOTAL = re.compile(r"Total (Weights|Activation) Memory: ([0-9]{1,18}) bytes")
"""A line of TensorRT's log; the Python API tells it of a loaded engine only, on its GPU."""
_MOST = 20


class BuildError(Exception):
    """A plan can't be built; kind as in tensorrt.Failure."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def main() -> int:
    """Build the plan that standard input describes. Exit status 0, or 1 after a failure line."""
    lines = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # libraries may print
    spec = msgspec.json.decode(sys.stdin.buffer.read(), type=BuildSpec)
    try:
        graph, weights, plan = map(Path, sys.argv[1:])
        report = build(graph, weights, spec, plan, lines)
    except BuildError as exc:
        _print(lines, Failure(exc.kind, str(exc)))
        return 1
    except MemoryError:
        _print(lines, Failure("memory", "Python's heap is full"))
        return 1
    _print(lines, Result(report))
    return 0


def _print(lines: BinaryIO, line: object) -> None:
    lines.write(msgspec.json.encode(line) + b"\n")


def build(graph: Path, weights: Path, spec: BuildSpec, plan: Path, lines: BinaryIO) -> PlanReport:
    """Parse, configure, build, write. Raises BuildError."""
    here = find_gpu()
    if spec.sm is None and isinstance(here, str):
        raise BuildError("target", here)
    trt = importlib.import_module(spec.module)
    log = _logger(trt)
    imported = peak_bytes()
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse(graph.read_bytes(), str(weights / graph.name)):
        errors = [_parser_error(parser.get_error(i)) for i in range(parser.num_errors)]
        raise BuildError("graph", "; ".join(errors[:3]) or "; ".join(log.errors[:3]))
    config = _config(trt, builder, network, spec)
    if hasattr(config, "progress_monitor"):
        config.progress_monitor = _monitor(trt, lines)
    start = time.perf_counter()
    serialized = builder.build_serialized_network(network, config)
    seconds = time.perf_counter() - start
    if serialized is None:
        words = "; ".join(log.errors[:3]) or "it gives no reason"
        raise BuildError("memory" if _MEMORY.search(words) else "graph", words)
    size = serialized.nbytes
    with atomic_write(plan) as file:
        file.write(memoryview(serialized))
    environment = Environment(
        module=spec.module,
        version=trt.__version__,
        sm=spec.sm or (here if isinstance(here, str) else here.sm),
        l4t=None if spec.sm else detect_machine().l4t,
    )
    return PlanReport(
        environment=environment,
        plan_bytes=size,
        seconds=seconds,
        peak_bytes=peak_bytes(),
        import_bytes=imported,
        warnings=tuple(dict.fromkeys(log.warnings))[:_MOST],
        weight_bytes=log.memory.get("Weights"),
        activation_bytes=log.memory.get("Activation"),
    )


def _config(trt: Any, builder: Any, network: Any, spec: BuildSpec) -> Any:
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, spec.workspace_bytes)
    config.builder_optimization_level = spec.optimization_level
    if spec.sm is not None:
        capability = getattr(trt, "ComputeCapability", None)
        known = {} if capability is None else capability.__members__
        name = spec.sm.replace("_", "").upper()
        if name not in known:
            raise BuildError(
                "target",
                f"it builds for {', '.join(n for n in known if n.startswith('SM')) or 'no other'} "
                f"beside this machine's GPU, not for {spec.sm}",
            )
        config.num_compute_capabilities = 1
        config.set_compute_capability(known[name], 0)
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        if any(size < 0 for size in tensor.shape):
            raise BuildError("graph", f"{tensor.name} has no fixed shape")
    return config


def _parser_error(error: Any) -> str:
    """The parser's words, and the node they are about."""
    name, operator = error.node_name(), error.node_operator()
    words = " ".join(str(error.desc()).split())
    return f"{name} ({operator}): {words}" if name else words


def _logger(trt: Any) -> Any:
    class Log(trt.ILogger):  # type: ignore[misc]
        """Keeps TensorRT's messages. One per process."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.warnings: list[str] = []
            self.memory: dict[str, int] = {}

        def log(self, severity: Any, message: str) -> None:
            words = " ".join(message.split())
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(words)
            elif severity == trt.ILogger.Severity.WARNING:
                self.warnings.append(words)
            elif found := _TOTAL.fullmatch(words):
                self.memory[found[1]] = int(found[2])

    return Log()


def _monitor(trt: Any, lines: BinaryIO) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Passes the outermost phase on, twice a second at most."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.totals: dict[str, int] = {}
            self.shown = 0.0

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            if parent is None:
                self.totals[phase] = steps

        def step_complete(self, phase: str, step: int) -> bool:
            now = time.monotonic()
            if phase in self.totals and now - self.shown >= _EVERY_SECONDS:
                self.shown = now
                _print(lines, PhaseStep(phase, step + 1, self.totals[phase]))
            return True

        def phase_finish(self, phase: str) -> None:
            self.totals.pop(phase, None)

    return Monitor()


if __name__ == "__main__":
    sys.exit(main())
