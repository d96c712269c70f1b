"""Jetson Orin modules: Cortex-A78AE cores, an Ampere GPU, memory shared between the two."""

from edgesd.device.capabilities import GB
from edgesd.spec.scheme import TENSORRT_PRECISIONS
from edgesd.spec.target import Target


def _module(series: str, gigabytes: int, cpu_count: int, module_ids: tuple[str, ...]) -> Target:
    title = f"Jetson {series}"
    name = title.lower().replace(" ", "-")
    return Target(
        name=f"{name}-{gigabytes}gb",
        title=f"{title} {gigabytes} GB",
        arch="aarch64",
        backends=("tensorrt", "onnxruntime"),
        precisions=TENSORRT_PRECISIONS,
        memory_bytes=gigabytes * GB,
        cpu_count=cpu_count,
        capabilities=("dotprod", "fp16_arithmetic", "sm_87"),
        families=(name, "jetson-orin"),
        models=(f"NVIDIA {title}",),
        module_ids=module_ids,
    )


TARGETS = (
    # Unconfirmed: -0000, the first developer kit's module (32 GB, 12 cores).
    _module("AGX Orin", 32, 8, ("p3701-0004", "p3701-0000")),
    # Unconfirmed: -0008, the industrial module.
    _module("AGX Orin", 64, 12, ("p3701-0005", "p3701-0008")),
    _module("Orin Nano", 4, 6, ("p3767-0004",)),
    _module("Orin Nano", 8, 6, ("p3767-0003", "p3767-0005")),  # -0005: the developer kit's
    _module("Orin NX", 8, 6, ("p3767-0001",)),
    _module("Orin NX", 16, 8, ("p3767-0000",)),
)
