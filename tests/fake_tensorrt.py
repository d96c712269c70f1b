"""TensorRT's Python API as the runner uses it, over ONNX Runtime: plans are self-contained graphs.

Inputs are read from, and outputs written to, the addresses that were set: with
`device_memory.NumpyMemory` these are the fake GPU's side, never the host's.
"""

from __future__ import annotations

import ctypes
import math
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime

from edgesd.runtime.backends.onnxruntime import session_options


class Logger:
    ERROR = 1

    def __init__(self, severity: int) -> None:
        self.severity = severity


class DataType:
    def __init__(self, itemsize: int) -> None:
        self.itemsize = itemsize


class Runtime:
    def __init__(self, logger: Logger) -> None:
        self.logger = logger

    def deserialize_cuda_engine(self, plan: bytes | memoryview) -> Engine | None:
        return Engine(bytes(plan)) if plan[:1] == b"\x08" else None  # a model's first field


_TYPES = {"tensor(float)": np.float32, "tensor(int64)": np.int64, "tensor(float16)": np.float16}


class Engine:
    """contexts: how many may be made before memory runs out."""

    contexts = 1 << 30

    def __init__(self, model: bytes) -> None:
        self.session = onnxruntime.InferenceSession(model, session_options(1))
        self.outputs = [tensor.name for tensor in self.session.get_outputs()]
        tensors = (*self.session.get_inputs(), *self.session.get_outputs())
        self.types = {tensor.name: np.dtype(_TYPES[tensor.type]) for tensor in tensors}
        self.shapes = {tensor.name: tensor.shape for tensor in tensors}

    @property
    def num_io_tensors(self) -> int:
        return len(self.types)

    def get_tensor_name(self, index: int) -> str:
        return list(self.types)[index]

    def get_tensor_dtype(self, name: str) -> DataType:
        return DataType(self.types[name].itemsize)

    def create_execution_context(self) -> Context | None:
        return Context(self) if Engine.contexts else None


class Context:
    """fails: whether runs fail from now on. runs: how many were."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.fails = False
        self.runs = 0

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        wanted = self.engine.shapes[name]
        fits = len(wanted) == len(shape) and all(
            isinstance(dim, str) or dim == size for dim, size in zip(wanted, shape, strict=True)
        )
        self.shapes[name] = tuple(shape)
        return fits

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        if name in self.shapes:
            return self.shapes[name]
        feed = {
            known: np.zeros(shape, self.engine.types[known]) for known, shape in self.shapes.items()
        }
        found = self.engine.session.run([name], feed)[0]
        return tuple(found.shape)

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        self.runs += 1
        if self.fails:
            return False
        feed = {name: self._array(name) for name in self.shapes}
        for name, value in zip(
            self.engine.outputs, self.engine.session.run(None, feed), strict=True
        ):
            self._array(name)[...] = value
        return True

    def _array(self, name: str) -> npt.NDArray[Any]:
        shape, dtype = self.get_tensor_shape(name), self.engine.types[name]
        size = math.prod(shape) * dtype.itemsize
        raw = (ctypes.c_uint8 * size).from_address(self.addresses[name])
        return np.ctypeslib.as_array(raw).view(dtype).reshape(shape)
