"""Jetson Orin Nano modules: six Cortex-A78AE, an Ampere GPU, memory shared between the two."""

from edgesd.device.capabilities import GB
from edgesd.spec.scheme import TENSORRT_PRECISIONS
from edgesd.spec.target import Target


def _member(gigabytes: int, module_ids: tuple[str, ...]) -> Target:
    return Target(
        name=f"jetson-orin-nano-{gigabytes}gb",
        title=f"Jetson Orin Nano {gigabytes} GB",
        arch="aarch64",
        backends=("tensorrt", "onnxruntime"),
        precisions=TENSORRT_PRECISIONS,
        memory_bytes=gigabytes * GB,
        cpu_count=6,
        capabilities=("dotprod", "fp16_arithmetic", "sm_87"),
        families=("jetson-orin-nano", "jetson-orin"),
        models=("NVIDIA Jetson Orin Nano",),
        module_ids=module_ids,
    )


TARGETS = (
    _member(4, ("p3767-0004",)),
    _member(8, ("p3767-0003", "p3767-0005")),  # -0005: the developer kit's
)
