"""Jetson Orin NX modules: six or eight Cortex-A78AE, an Ampere GPU, shared memory."""

from edgesd.device.capabilities import GB
from edgesd.spec.scheme import TENSORRT_PRECISIONS
from edgesd.spec.target import Target


def _member(gigabytes: int, cpu_count: int, module_ids: tuple[str, ...]) -> Target:
    return Target(
        name=f"jetson-orin-nx-{gigabytes}gb",
        title=f"Jetson Orin NX {gigabytes} GB",
        arch="aarch64",
        backends=("tensorrt", "onnxruntime"),
        precisions=TENSORRT_PRECISIONS,
        memory_bytes=gigabytes * GB,
        cpu_count=cpu_count,
        capabilities=("dotprod", "fp16_arithmetic", "sm_87"),
        families=("jetson-orin-nx", "jetson-orin"),
        models=("NVIDIA Jetson Orin NX",),
        module_ids=module_ids,
    )


TARGETS = (
    _member(8, 6, ("p3767-0001",)),
    _member(16, 8, ("p3767-0000",)),
)
