"""A runner without an engine: outputs are computed by a plain function. For tests and planning."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from edgesd.runtime.arrays import Array
from edgesd.runtime.backends.base import BoundRunner
from edgesd.spec.pipeline import ComponentSpec

Function = Callable[[Mapping[str, Array]], Mapping[str, Array]]


class FakeRunner(BoundRunner):
    """Runs `function(inputs) -> outputs`; counts its runs."""

    def __init__(self, spec: ComponentSpec, function: Function) -> None:
        super().__init__(spec)
        self.function = function
        self.runs = 0

    def run(self) -> None:
        start = time.perf_counter()
        self.outputs = dict(self.function(self.inputs))
        self.runs += 1
        self.seconds += time.perf_counter() - start
