"""Memory that a GPU computes in, with one protocol: cuda-bindings, pycuda, and a fake of numpy.

A `Buffer` has a host side, which loops read and write, and an address for the GPU. On a Jetson both
are the same memory: nothing is copied. Elsewhere the host side is pinned, and `upload` and
`download` copy in the order of the memory's one stream.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from edgesd.errors import MissingDependencyError, ResourceError, TargetError
from edgesd.runtime.arrays import Array
from edgesd.runtime.closeable import Closeable
from edgesd.runtime.cuda import find_gpu

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass
class Buffer:
    """host: an array that stays where it is. address: of the same values for the GPU. shared: both
    are one memory."""

    host: Array
    address: int
    shared: bool


class DeviceMemory(Protocol):
    """One GPU's memory and one stream of work on it. A context manager: leaving it frees all.

    name: for messages. Raises ResourceError when memory runs out, TargetError when the GPU fails.
    """

    name: str

    def buffer(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Buffer:
        """A zeroed buffer. It lives until `close`."""

    def upload(self, buffer: Buffer) -> None:
        """Copy `buffer.host` to the GPU, before the work that follows on the stream."""

    def download(self, buffer: Buffer) -> None:
        """Copy the buffer to its host side, after the work on the stream so far."""

    def stream(self) -> int:
        """The handle that `execute_async_v3` takes."""

    def synchronize(self) -> None:
        """Wait until all work on the stream is done. Raises TargetError when some of it failed."""

    def capture(self, work: Callable[[], None]) -> Callable[[], None] | None:
        """Record what `work` puts on the stream; a function that repeats it. None if that can't be
        done here, with this library or this work: `work` must be called each time then."""

    def close(self) -> None:
        """Free everything. Buffers are of no use afterwards."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


def open_device_memory() -> DeviceMemory:
    """The GPU's memory by the first library that is installed: cuda-bindings, which can capture
    graphs, or pycuda.

    Raises TargetError without a driver or a GPU, MissingDependencyError without a library.
    """
    gpu = find_gpu()
    if isinstance(gpu, str):
        raise TargetError(gpu)
    for kind in (CudaBindingsMemory, PyCudaMemory):
        try:
            return kind()
        except ImportError:
            continue
    raise MissingDependencyError(
        "running plans needs cuda-bindings or pycuda: pip install cuda-bindings (on a Jetson the "
        "version of its CUDA: 12.6 with JetPack 6)"
    )


class CudaBindingsMemory(Closeable):
    """By NVIDIA's cuda-bindings: the CUDA runtime's own functions."""

    name = "cuda-bindings"

    def __init__(self) -> None:
        from cuda.bindings import runtime

        self._rt: Any = runtime
        self._check(runtime.cudaSetDevice(0))
        integrated = runtime.cudaDeviceAttr.cudaDevAttrIntegrated
        (shared,) = self._check(runtime.cudaDeviceGetAttribute(integrated, 0))
        self.shared = bool(shared)
        (self._stream,) = self._check(runtime.cudaStreamCreate())
        self._host: list[int] = []
        self._device: list[int] = []
        self._graphs: list[Any] = []

    def buffer(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Buffer:
        size = max(1, math.prod(shape) * np.dtype(dtype).itemsize)
        flags = self._rt.cudaHostAllocMapped if self.shared else self._rt.cudaHostAllocDefault
        (pointer,) = self._check(self._rt.cudaHostAlloc(size, flags))
        self._host.append(int(pointer))
        host = _view(int(pointer), shape, dtype)
        host[...] = 0
        if self.shared:
            (address,) = self._check(self._rt.cudaHostGetDevicePointer(pointer, 0))
            return Buffer(host, int(address), True)
        (address,) = self._check(self._rt.cudaMalloc(size))
        self._device.append(int(address))
        self._check(self._rt.cudaMemsetAsync(address, 0, size, self._stream))
        return Buffer(host, int(address), False)

    def upload(self, buffer: Buffer) -> None:
        self._copy(buffer, buffer.address, buffer.host.ctypes.data, "cudaMemcpyHostToDevice")

    def download(self, buffer: Buffer) -> None:
        self._copy(buffer, buffer.host.ctypes.data, buffer.address, "cudaMemcpyDeviceToHost")

    def _copy(self, buffer: Buffer, target: int, source: int, way: str) -> None:
        if not buffer.shared:
            kind = getattr(self._rt.cudaMemcpyKind, way)
            size = buffer.host.nbytes
            self._check(self._rt.cudaMemcpyAsync(target, source, size, kind, self._stream))

    def stream(self) -> int:
        return int(self._stream)

    def synchronize(self) -> None:
        self._check(self._rt.cudaStreamSynchronize(self._stream))

    def capture(self, work: Callable[[], None]) -> Callable[[], None] | None:
        mode = self._rt.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._check(self._rt.cudaStreamBeginCapture(self._stream, mode))
        try:
            work()
        finally:
            status, graph = self._rt.cudaStreamEndCapture(self._stream)
        if int(status):  # some work can't be recorded: a plan may synchronize inside
            self._rt.cudaGetLastError()
            return None
        try:
            (executable,) = self._check(self._rt.cudaGraphInstantiate(graph, 0))
        finally:
            self._rt.cudaGraphDestroy(graph)
        self._graphs.append(executable)

        def launch() -> None:
            self._check(self._rt.cudaGraphLaunch(executable, self._stream))

        return launch

    def close(self) -> None:
        self._rt.cudaStreamSynchronize(self._stream)
        for graph in self._graphs:
            self._rt.cudaGraphExecDestroy(graph)
        for address in self._device:
            self._rt.cudaFree(address)
        for pointer in self._host:
            self._rt.cudaFreeHost(pointer)
        if self._stream is not None:
            self._rt.cudaStreamDestroy(self._stream)
        self._graphs, self._device, self._host, self._stream = [], [], [], None

    def _check(self, result: tuple[Any, ...]) -> tuple[Any, ...]:
        """The results of a call, without its status. Raises ResourceError or TargetError."""
        status, *values = result
        if int(status):
            _, words = self._rt.cudaGetErrorString(status)
            text = words.decode() if isinstance(words, bytes) else str(words)
            full = int(status) == int(self._rt.cudaError_t.cudaErrorMemoryAllocation)
            raise _error(full, text)
        return tuple(values)


class PyCudaMemory(Closeable):
    """By pycuda, which has no capture of graphs."""

    name = "pycuda"

    def __init__(self) -> None:
        import pycuda.driver as driver

        self._cuda: Any = driver
        driver.init()
        device = driver.Device(0)
        self.shared = bool(device.get_attribute(driver.device_attribute.INTEGRATED))
        self._context = device.retain_primary_context()  # the one that TensorRT works in
        self._context.push()
        self._stream = driver.Stream()
        self._kept: list[Any] = []

    def buffer(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Buffer:
        flags = self._cuda.host_alloc_flags.DEVICEMAP if self.shared else 0
        try:
            host = self._cuda.pagelocked_zeros(shape, dtype, mem_flags=flags)
            if self.shared:
                self._kept.append(host)
                return Buffer(host, int(host.base.get_device_pointer()), True)
            device = self._cuda.mem_alloc(max(1, host.nbytes))
        except self._cuda.MemoryError as exc:
            raise _error(True, str(exc)) from exc
        self._cuda.memset_d8_async(device, 0, max(1, host.nbytes), self._stream)
        self._kept += [host, device]
        return Buffer(host, int(device), False)

    def upload(self, buffer: Buffer) -> None:
        if not buffer.shared:
            self._cuda.memcpy_htod_async(buffer.address, buffer.host, self._stream)

    def download(self, buffer: Buffer) -> None:
        if not buffer.shared:
            self._cuda.memcpy_dtoh_async(buffer.host, buffer.address, self._stream)

    def stream(self) -> int:
        return int(self._stream.handle)

    def synchronize(self) -> None:
        try:
            self._stream.synchronize()
        except self._cuda.Error as exc:
            raise _error(False, str(exc)) from exc

    def capture(self, work: Callable[[], None]) -> Callable[[], None] | None:
        """See DeviceMemory: pycuda can't."""
        return None

    def close(self) -> None:
        if self._context is not None:
            self._stream.synchronize()
            self._kept.clear()
            self._stream = None
            self._context.pop()
            self._context = None


@dataclass
class NumpyMemory(Closeable):
    """A fake: the GPU's side is another array, so that a copy that was forgotten shows.

    shared: as on a Jetson. captures: whether work can be recorded. limit_bytes: what there is. log:
    what was called, in order.
    """

    shared: bool = False
    captures: bool = True
    limit_bytes: int = 1 << 40
    name: str = "numpy"
    log: list[str] = field(default_factory=list)
    _device: dict[int, Array] = field(default_factory=dict)

    def buffer(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Buffer:
        host = np.zeros(shape, dtype)
        used = sum(array.nbytes for array in self._device.values())
        if used + host.nbytes > self.limit_bytes:
            raise _error(True, "out of memory")
        device = host if self.shared else np.zeros(shape, dtype)
        self._device[device.ctypes.data] = device
        return Buffer(host, device.ctypes.data, self.shared)

    def upload(self, buffer: Buffer) -> None:
        self.log.append("upload")
        self._device[buffer.address][...] = buffer.host

    def download(self, buffer: Buffer) -> None:
        self.log.append("download")
        buffer.host[...] = self._device[buffer.address]

    def stream(self) -> int:
        return id(self)

    def synchronize(self) -> None:
        self.log.append("synchronize")

    def capture(self, work: Callable[[], None]) -> Callable[[], None] | None:
        if not self.captures:
            return None
        self.log.append("capture")

        def launch() -> None:
            self.log.append("launch")
            work()

        return launch

    def close(self) -> None:
        self._device.clear()


def _view(pointer: int, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
    """The memory at `pointer` as an array, which doesn't own it."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(pointer))
    view: Array = raw.view(dtype).reshape(shape)
    return view


def _error(memory: bool, words: str) -> ResourceError | TargetError:
    if memory:
        return ResourceError(
            f"the GPU's memory is full ({words}): end other programs, or use a smaller --size"
        )
    return TargetError(f"the GPU failed: {words}")
