"""The NVIDIA driver, asked before anything that needs it: without one TensorRT doesn't fail, it
crashes (`tensorrt-lean`'s Runtime wraps a null pointer). ctypes alone: nothing to install."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

_LIBRARY = "libcuda.so.1"
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_{MAJOR,MINOR} of cuda.h


class Gpu(NamedTuple):
    """The first GPU. sm: its compute capability (sm_87). memory_bytes: shared with the CPU on a
    Jetson."""

    name: str
    sm: str
    memory_bytes: int


def find_gpu(library: str = _LIBRARY) -> Gpu | str:
    """The first GPU that the driver shows, or one line that says why there is none."""
    try:
        cuda = ctypes.CDLL(library)
    except OSError:
        return f"no NVIDIA driver: {library} can't be loaded"
    status = cuda.cuInit(0)
    if status:
        return f"the NVIDIA driver doesn't start (cuInit: error {status})"
    count, device = ctypes.c_int(), ctypes.c_int()
    if cuda.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
        return "the NVIDIA driver shows no GPU"
    name, memory = ctypes.create_string_buffer(256), ctypes.c_size_t()
    numbers = [ctypes.c_int(), ctypes.c_int()]
    status = (
        cuda.cuDeviceGet(ctypes.byref(device), 0)
        or cuda.cuDeviceGetName(name, len(name), device)
        or cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
    )
    for number, attribute in zip(numbers, (_MAJOR, _MINOR), strict=True):
        status = status or cuda.cuDeviceGetAttribute(ctypes.byref(number), attribute, device)
    if status:
        return f"the NVIDIA driver can't describe its GPU (error {status})"
    major, minor = (number.value for number in numbers)
    return Gpu(name.value.decode(errors="replace"), f"sm_{major}{minor}", memory.value)
