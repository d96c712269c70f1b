"""Components on TensorRT: a plan, persistent buffers, one stream, a run as one CUDA graph."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from edgesd.errors import (
    BundleError,
    EdgesdError,
    MissingDependencyError,
    ResourceError,
    TargetError,
)
from edgesd.runtime import device_memory
from edgesd.runtime.arrays import Array
from edgesd.runtime.backends import onnxruntime
from edgesd.runtime.backends.base import Backend, BoundRunner, Runner, RunnerOptions
from edgesd.runtime.bundle import Bundle
from edgesd.runtime.device_memory import Buffer, DeviceMemory
from edgesd.spec.bundle import ComponentPart
from edgesd.spec.lora import LoraSlots
from edgesd.spec.pipeline import ComponentSpec, TensorSpec
from edgesd.spec.scheme import TENSORRT_PRECISIONS


class TensorRtRunner(BoundRunner):
    """A plan whose inputs and outputs live in buffers that are bound once.

    plan: the bytes of a plan that was built for this machine (engines.plans). memory: becomes the
    runner's, which closes it. module: TensorRT's Python package, or its name. slots: for LoRAs,
    whose factors are uploaded once. Raises
    MissingDependencyError without it, TargetError when the plan doesn't fit this machine or the
    GPU fails, BundleError when the plan hasn't the component's inputs and outputs, ResourceError
    when memory runs out.
    """

    def __init__(
        self,
        spec: ComponentSpec,
        plan: bytes | memoryview,
        memory: DeviceMemory,
        module: Any = "tensorrt",
        slots: LoraSlots | None = None,
    ) -> None:
        super().__init__(spec, slots)
        self._memory = memory
        self._engine: Any = None
        self._context: Any = None
        self._launch: Callable[[], None] | None = None
        self._buffers: dict[str, Buffer] = {}
        self._slot_buffers: dict[str, Buffer] = {}
        self._runs = 0
        try:
            self._load(plan, _import(module) if isinstance(module, str) else module)
        except BaseException:
            self.close()
            raise

    def _load(self, plan: bytes | memoryview, trt: Any) -> None:
        spec = self.spec
        self._log = trt.Logger(trt.Logger.ERROR)
        runtime = trt.Runtime(self._log)
        self._engine = runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise TargetError(
                f"the plan of {spec.name} can't be loaded: it is damaged, or was built for another "
                "GPU or TensorRT: build it here"
            )
        self._check_tensors()
        self._context = self._engine.create_execution_context()
        if self._context is None:
            raise ResourceError(
                f"not enough GPU memory for {spec.name}: end other programs, or use --memory "
                "balanced"
            )
        for name, array in self.factors.items():
            buffer = self._slot_buffers[name] = self._memory.buffer(array.shape, array.dtype)
            if not self._context.set_input_shape(name, array.shape):
                raise BundleError(
                    f"{spec.name}: its plan doesn't take {name} of the shape {list(array.shape)}: "
                    "build the bundle again"
                )
            self._context.set_tensor_address(name, buffer.address)
            self.factors[name] = buffer.host
        self._fill_slots()

    def adapt(self, factors: Mapping[str, Array]) -> None:
        super().adapt(factors)
        for name, array in self.factors.items():
            self._slot_buffers[name].host[...] = array
            self.factors[name] = self._slot_buffers[name].host
        self._fill_slots()

    def _fill_slots(self) -> None:
        """Upload the factors: outside of what is repeated for each run."""
        for buffer in self._slot_buffers.values():
            self._memory.upload(buffer)

    def bind(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """See Runner.bind. Buffers of other shapes are new; the old ones are freed by `close`."""
        before = self.inputs
        super().bind(shapes)
        if self.inputs is before:
            return
        self._launch, self._runs = None, 0
        self._buffers = {}
        for tensor in self.spec.inputs:
            shape = shapes[tensor.name]
            self._buffers[tensor.name] = self._memory.buffer(shape, tensor.dtype)
            if not self._context.set_input_shape(tensor.name, shape):
                raise BundleError(
                    f"{self.spec.name}: its plan doesn't take {tensor.name} of the shape "
                    f"{list(shape)}: build the bundle for that --size"
                )
        for tensor in self.spec.outputs:
            shape = tuple(self._context.get_tensor_shape(tensor.name))
            self._buffers[tensor.name] = self._memory.buffer(shape, tensor.dtype)
        for name, buffer in self._buffers.items():
            self._context.set_tensor_address(name, buffer.address)
        self.inputs = {t.name: self._buffers[t.name].host for t in self.spec.inputs}

    def run(self) -> None:
        """See Runner.run. The second run is recorded as a CUDA graph, where that can be done, and
        all later ones repeat it: the first may still allocate."""
        start = time.perf_counter()
        if self._runs == 1:
            self._launch = self._memory.capture(self._enqueue)
        (self._launch or self._enqueue)()
        self._memory.synchronize()
        self._runs += 1
        if not self.outputs:
            self.outputs = {t.name: self._buffers[t.name].host for t in self.spec.outputs}
        self.seconds += time.perf_counter() - start

    def close(self) -> None:
        super().close()
        self._launch = self._context = self._engine = None
        self._buffers = {}
        self._slot_buffers = {}
        self._memory.close()

    def _enqueue(self) -> None:
        for tensor in self.spec.inputs:
            self._memory.upload(self._buffers[tensor.name])
        if not self._context.execute_async_v3(self._memory.stream()):
            raise TargetError(f"{self.spec.name} failed while running in TensorRT")
        for tensor in self.spec.outputs:
            self._memory.download(self._buffers[tensor.name])

    def _check_tensors(self) -> None:
        """The plan has the component's tensors, of the component's types."""
        engine = self._engine
        names = {engine.get_tensor_name(i) for i in range(engine.num_io_tensors)}
        factors = (TensorSpec(name, "float32", a.shape) for name, a in self.factors.items())
        wanted = {t.name: t for t in (*self.spec.inputs, *self.spec.outputs, *factors)}
        if names != wanted.keys():
            raise BundleError(
                f"the plan of {self.spec.name} has the tensors {sorted(names)}, not "
                f"{sorted(wanted)}: build it again"
            )
        for name, tensor in wanted.items():
            size = engine.get_tensor_dtype(name).itemsize
            if size != np.dtype(tensor.dtype).itemsize:
                raise BundleError(
                    f"the plan of {self.spec.name} has {name} in {size} bytes a value, not in "
                    f"{tensor.dtype}: build it again"
                )


class TensorRt(Backend):
    """Runs plans. If that fails, ONNX Runtime runs the graphs, which have standard operators
    only."""

    name = "tensorrt"
    precisions = TENSORRT_PRECISIONS
    needs_plans = True
    memory_modes = ("fast", "balanced")
    process_bytes = 400 << 20  # of CUDA and TensorRT; assumed: no board was measured
    board_packages = ("cuda-bindings<13",)

    def open_runner(
        self,
        bundle: Bundle,
        component: str,
        options: RunnerOptions,
        part: ComponentPart | None = None,
    ) -> Runner:
        if part is not None:  # plans are of whole components
            return onnxruntime.BACKEND.open_runner(bundle, component, options, part)
        try:
            return self._run_plan(bundle, component, options)
        except EdgesdError as exc:
            if not options.fallback or isinstance(exc, BundleError):
                raise
            options.on_fallback(f"{exc}; generating on the CPU instead, by ONNX Runtime")
        return onnxruntime.BACKEND.open_runner(bundle, component, options)

    def unimported_bytes(self) -> int:
        """See Backend. Includes ONNX Runtime's, which is the fallback."""
        return onnxruntime.BACKEND.unimported_bytes()

    def _run_plan(self, bundle: Bundle, component: str, options: RunnerOptions) -> TensorRtRunner:
        if options.plan_of is None:
            raise TargetError("there are no plans for TensorRT")
        plan = options.plan_of(component)
        spec = bundle.manifest.pipeline.components[component]
        memory, slots = device_memory.open_device_memory(), bundle.manifest.engines[component].slots
        return TensorRtRunner(spec, plan.data, memory, plan.module, slots)


BACKEND = TensorRt()


def _import(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as exc:
        raise MissingDependencyError(
            f"{module} can't be imported ({exc}): it comes with JetPack (a virtual environment "
            "needs --system-site-packages)"
        ) from exc
