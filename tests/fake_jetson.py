"""`edgesd` on a board for tests: the real one, on a GPU and TensorRT that are fakes.

The home folder says what kind of board it is (jetson.json), and is told what was built (built).
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from unittest import mock

import msgspec

from edgesd.cli import main
from edgesd.engines import plans
from edgesd.errors import EdgesdError
from edgesd.progress import SILENT
from edgesd.runtime.cuda import Gpu
from edgesd.spec.target import Machine
from tests import fake_tensorrt
from tests.boards import Builder


class State(msgspec.Struct):
    error: str | None
    gpu: bool
    machine: Machine


class LoggedBuilder(Builder):
    def __call__(self, graph, spec, plan, progress=SILENT, weights=None, *more):  # type: ignore[no-untyped-def]
        report = super().__call__(graph, spec, plan, progress, weights, *more)
        with (Path.home() / "built").open("a") as log:
            log.write(f"{spec.component}\n")
        return report


def run() -> None:
    state = msgspec.json.decode((Path.home() / "jetson.json").read_bytes(), type=State)
    builder = LoggedBuilder()
    builder.error = EdgesdError(state.error) if state.error else None
    fake_tensorrt.__version__ = "10.3.0"  # type: ignore[attr-defined]
    sys.modules["tensorrt"] = fake_tensorrt
    gpu = Gpu("Orin", "sm_87", 8 << 30) if state.gpu else "there is no NVIDIA driver"
    with (
        mock.patch.object(plans, "find_gpu", lambda: gpu),
        mock.patch.object(plans, "build_plan", builder),
        mock.patch("edgesd.device.detect.detect_machine", lambda: state.machine),
        mock.patch("edgesd.cli.common.LINE_SECONDS", math.inf),
    ):
        main()


if __name__ == "__main__":
    run()
