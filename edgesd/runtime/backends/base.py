"""Backends and their runners: one component, with inputs and outputs bound once.

Every loop (device, calibration, evaluation) talks to this protocol alone, so that a torch module,
an ONNX session, a TensorRT engine and a fake are interchangeable.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, ClassVar, NamedTuple, Protocol

import numpy as np

from edgesd.errors import BundleError, InputError, ResourceError
from edgesd.runtime.arrays import Array
from edgesd.runtime.closeable import Closeable
from edgesd.runtime.lora import fill_slots
from edgesd.runtime.memory import MEMORY_MODES, MemoryMode
from edgesd.spec.lora import LoraSlots
from edgesd.spec.pipeline import ComponentSpec
from edgesd.spec.scheme import CPU_PRECISIONS, Precision

if TYPE_CHECKING:
    from typing_extensions import Self

    from edgesd.runtime.bundle import Bundle
    from edgesd.spec.bundle import ComponentPart


class Runner(Protocol):
    """One loaded component.

    `bind` allocates `inputs`, host arrays that the caller fills in place before each `run`; `run`
    writes `outputs`, whose arrays stay the same from the second run on. `seconds` is the time spent
    inside the engine so far. A context manager: leaving it frees the engine.
    """

    spec: ComponentSpec
    inputs: dict[str, Array]
    outputs: dict[str, Array]
    seconds: float

    def bind(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Allocate zeroed inputs of these shapes. Raises InputError when the spec forbids one."""

    def adapt(self, factors: Mapping[str, Array]) -> None:
        """Run with a LoRA's factors from now on: an input of a slot (spec/lora.py) -> its array,
        which stays the runner's; slots that aren't named are empty. Raises InputError for a factor
        that no slot takes."""

    def run(self) -> None:
        """Run once on `inputs`. Raises ResourceError when memory runs out."""

    def close(self) -> None:
        """Free the engine and the buffers."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


def run_once(runner: Runner, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Run on copies of `inputs`. The outputs belong to the runner and are valid until its next
    run."""
    runner.bind({name: array.shape for name, array in inputs.items()})
    for name, array in inputs.items():
        runner.inputs[name][:] = array
    runner.run()
    return runner.outputs


class BoundRunner(Closeable):
    """What all runners share: checking shapes once, at the boundary, and the context manager.

    slots: for LoRAs. factors: what they are filled with: an array for each of their inputs.
    """

    def __init__(self, spec: ComponentSpec, slots: LoraSlots | None = None) -> None:
        self.spec, self.slots = spec, slots
        self.factors: dict[str, Array] = {} if slots is None else self._filled(slots, {})
        self.inputs: dict[str, Array] = {}
        self.outputs: dict[str, Array] = {}
        self.seconds = 0.0

    def bind(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """See Runner.bind. Keeps the arrays it has when the shapes are the same."""
        expected = {tensor.name for tensor in self.spec.inputs}
        if shapes.keys() != expected:
            raise InputError(
                f"{self.spec.name} takes the inputs {sorted(expected)}, not {sorted(shapes)}"
            )
        if {name: array.shape for name, array in self.inputs.items()} == dict(shapes):
            return
        sizes: dict[str, int] = {}
        for tensor in self.spec.inputs:
            shape = shapes[tensor.name]
            fits = len(shape) == len(tensor.shape) and all(
                size > 0 and (sizes.setdefault(dim, size) if isinstance(dim, str) else dim) == size
                for dim, size in zip(tensor.shape, shape, strict=True)
            )
            if not fits:
                raise InputError(
                    f"{self.spec.name}: {tensor.name} has the shape {list(shape)}, but this bundle "
                    f"takes {list(tensor.shape)}"
                )
        try:
            self.inputs = {
                tensor.name: np.zeros(shapes[tensor.name], tensor.dtype)
                for tensor in self.spec.inputs
            }
        except MemoryError as exc:
            raise ResourceError(
                f"not enough memory for the inputs of {self.spec.name}: use a smaller --size or "
                "--batch 1"
            ) from exc
        self.outputs = {}

    def adapt(self, factors: Mapping[str, Array]) -> None:
        """See Runner.adapt."""
        if self.slots is not None:
            self.factors = self._filled(self.slots, factors)
        elif factors:
            raise InputError(f"{self.spec.name} has no slots for LoRAs")

    def _filled(self, slots: LoraSlots, factors: Mapping[str, Array]) -> dict[str, Array]:
        try:
            return fill_slots(slots, factors)
        except MemoryError as exc:
            raise ResourceError(f"not enough memory for a LoRA of {self.spec.name}") from exc

    def check_outputs(self, values: Sequence[object]) -> None:
        """Raise BundleError unless `values` are arrays such as the spec says, in its order."""
        for tensor, value in zip(self.spec.outputs, values, strict=True):
            fits = (
                isinstance(value, np.ndarray)
                and value.dtype == tensor.dtype
                and len(value.shape) == len(tensor.shape)
                and all(
                    isinstance(dim, str) or dim == size
                    for dim, size in zip(tensor.shape, value.shape, strict=True)
                )
            )
            if not fits:
                raise BundleError(
                    f"{self.spec.name}: its graph doesn't make {tensor.name} as its manifest says "
                    f"({tensor.dtype} {list(tensor.shape)}): build the bundle again"
                )

    def close(self) -> None:
        self.inputs, self.outputs = {}, {}


class LoadedPlan(NamedTuple):
    """A compiled engine that fits this machine, mapped from its file, and the Python package that
    runs it."""

    data: memoryview
    module: str


@dataclass(frozen=True)
class RunnerOptions:
    """How a backend opens runners.

    threads: per operator, 0 for all cores. streamed: weights stay in their file, but for
    `kept_bytes` of them. kernels: whether edgesd's own may be used. plan_of: component -> its plan
    for this machine, built if need be (engines.plans); None without plans. fallback: whether
    another backend may stand in for one that can't run the component here. on_fallback: takes the
    reason where something slower runs than the bundle was built for.
    """

    threads: int = 0
    streamed: bool = False
    kept_bytes: int = 0
    kernels: bool = True
    plan_of: Callable[[str], LoadedPlan] | None = None
    fallback: bool = True
    on_fallback: Callable[[str], object] = lambda reason: None


class Backend(ABC):
    """What runs engines of one kind on this machine.

    name: as manifests and targets have it. precisions: the number formats that it has. needs_plans:
    its engines are compiled for the machine that runs them (engines.plans). memory_modes: those
    that differ for it, the fastest first. process_bytes: what it takes of a process for good,
    besides components and what `unimported_bytes` counts. board_packages: what must be installed
    on a board besides the runtime's own packages.
    """

    name: ClassVar[str]
    precisions: ClassVar[tuple[Precision, ...]] = CPU_PRECISIONS
    needs_plans: ClassVar[bool] = False
    memory_modes: ClassVar[tuple[MemoryMode, ...]] = MEMORY_MODES
    process_bytes: ClassVar[int] = 0
    board_packages: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def open_runner(
        self,
        bundle: Bundle,
        component: str,
        options: RunnerOptions,
        part: ComponentPart | None = None,
    ) -> Runner:
        """A runner of a component, or of one `part` of it; it is the caller's to close.

        Raises BundleError when the engine can't be loaded, ResourceError when memory runs out,
        MissingDependencyError or TargetError when this machine can't run it.
        """

    def own_kernels(self, bundle: Bundle, component: str) -> bool:
        """Whether `open_runner` takes the component's graph for edgesd's own kernels here, unless
        the options forbid them."""
        return False

    def unimported_bytes(self) -> int:
        """Memory that this process will take for the libraries of the backend; 0 once they are
        imported."""
        return 0
