"""One contract over all device memories; those of a GPU are skipped without one."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from edgesd.errors import ResourceError, TargetError
from edgesd.runtime.cuda import find_gpu
from edgesd.runtime.device_memory import (
    CudaBindingsMemory,
    DeviceMemory,
    NumpyMemory,
    PyCudaMemory,
    open_device_memory,
)

NO_GPU = find_gpu()
MEMORIES: dict[str, Callable[[], DeviceMemory]] = {
    "numpy": NumpyMemory,
    "numpy, shared": lambda: NumpyMemory(shared=True),
    "cuda-bindings": CudaBindingsMemory,
    "pycuda": PyCudaMemory,
}


@pytest.fixture(
    params=[
        pytest.param(name, marks=() if name.startswith("numpy") else pytest.mark.gpu)
        for name in MEMORIES
    ]
)
def memory(request: pytest.FixtureRequest) -> Iterator[DeviceMemory]:
    if not request.param.startswith("numpy"):
        if isinstance(NO_GPU, str):
            pytest.skip(NO_GPU)
        pytest.importorskip("cuda.bindings" if request.param == "cuda-bindings" else "pycuda")
    with MEMORIES[request.param]() as found:
        yield found


SHAPES = [(2, 4, 8, 8), (1,), (3, 0)]


@pytest.mark.parametrize("dtype", ["float32", "int64", "float16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_what_goes_up_comes_down(memory: DeviceMemory, shape: tuple[int, ...], dtype: str) -> None:
    buffer = memory.buffer(shape, dtype)
    assert buffer.host.shape == shape and buffer.host.dtype == dtype
    assert not buffer.host.any() and buffer.address
    values = np.arange(buffer.host.size).reshape(shape).astype(dtype)
    buffer.host[...] = values
    memory.upload(buffer)
    memory.synchronize()
    if not buffer.shared:
        buffer.host[...] = 0
    memory.download(buffer)
    memory.synchronize()
    np.testing.assert_array_equal(buffer.host, values)


def test_a_new_buffer_is_zero_on_the_gpu(memory: DeviceMemory) -> None:
    buffer = memory.buffer((64,), "float32")
    if not buffer.shared:
        buffer.host[...] = 5
    memory.download(buffer)
    memory.synchronize()
    assert not buffer.host.any()


def test_buffers_lie_apart(memory: DeviceMemory) -> None:
    buffers = [memory.buffer((100,), "float32") for _ in range(5)]
    addresses = sorted(buffer.address for buffer in buffers)
    assert all(b - a >= 400 for a, b in itertools.pairwise(addresses))
    for value, buffer in enumerate(buffers):
        buffer.host[...] = value
    assert [float(buffer.host[50]) for buffer in buffers] == [0, 1, 2, 3, 4]


def test_recorded_work_reads_what_is_there_when_it_is_repeated(memory: DeviceMemory) -> None:
    buffer = memory.buffer((16,), "float32")
    memory.upload(buffer)
    memory.synchronize()
    launch = memory.capture(lambda: memory.upload(buffer))
    if launch is None:
        pytest.skip(f"{memory.name} can't record")
    for value in (3, 4):
        buffer.host[...] = value
        launch()
        memory.synchronize()
        if not buffer.shared:
            buffer.host[...] = 0
        memory.download(buffer)
        memory.synchronize()
        assert (buffer.host == value).all()


def test_the_stream_has_a_handle_and_closing_twice_is_fine(memory: DeviceMemory) -> None:
    assert isinstance(memory.stream(), int)
    memory.close()
    if isinstance(memory, NumpyMemory | PyCudaMemory):
        memory.close()


def test_memory_that_runs_out_is_one_line() -> None:
    memory = NumpyMemory(limit_bytes=100)
    memory.buffer((20,), "float32")
    with pytest.raises(ResourceError, match=r"the GPU's memory is full .* use a smaller --size"):
        memory.buffer((20,), "float32")


def test_a_copy_that_was_forgotten_shows() -> None:
    memory = NumpyMemory()
    buffer = memory.buffer((4,), "float32")
    buffer.host[...] = 1
    memory.download(buffer)
    assert not buffer.host.any()


@pytest.mark.skipif(not isinstance(NO_GPU, str), reason="this machine has an NVIDIA GPU")
def test_without_a_driver_nothing_is_tried() -> None:
    with pytest.raises(TargetError, match="driver"):
        open_device_memory()
