"""Jetson AGX Orin modules: eight or twelve Cortex-A78AE, an Ampere GPU, shared memory."""

from edgesd.device.capabilities import GB
from edgesd.spec.scheme import TENSORRT_PRECISIONS
from edgesd.spec.target import Target


def _member(gigabytes: int, cpu_count: int, module_ids: tuple[str, ...]) -> Target:
    return Target(
        name=f"jetson-agx-orin-{gigabytes}gb",
        title=f"Jetson AGX Orin {gigabytes} GB",
        arch="aarch64",
        backends=("tensorrt", "onnxruntime"),
        precisions=TENSORRT_PRECISIONS,
        memory_bytes=gigabytes * GB,
        cpu_count=cpu_count,
        capabilities=("dotprod", "fp16_arithmetic", "sm_87"),
        families=("jetson-agx-orin", "jetson-orin"),
        models=("NVIDIA Jetson AGX Orin",),
        module_ids=module_ids,
    )


TARGETS = (
    # Unconfirmed: -0000, the first developer kit's module (32 GB, 12 cores).
    _member(32, 8, ("p3701-0004", "p3701-0000")),
    # Unconfirmed: -0008, the industrial module.
    _member(64, 12, ("p3701-0005", "p3701-0008")),
)
