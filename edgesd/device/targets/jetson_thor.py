"""Jetson AGX Thor: fourteen Neoverse V3AE, a Blackwell GPU, shared memory.

Unconfirmed until a board has been read: the CPU's capabilities and the model's exact wording.
"""

from edgesd.device.capabilities import GB
from edgesd.spec.scheme import TENSORRT_PRECISIONS
from edgesd.spec.target import Target

TARGETS = (
    Target(
        name="jetson-thor",
        title="Jetson AGX Thor 128 GB",
        arch="aarch64",
        backends=("tensorrt", "onnxruntime"),
        precisions=TENSORRT_PRECISIONS,
        memory_bytes=128 * GB,
        cpu_count=14,
        capabilities=("bf16", "dotprod", "fp16_arithmetic", "i8mm", "sm_110"),
        models=("NVIDIA Jetson AGX Thor",),
        module_ids=("p3834-0008",),
    ),
)
