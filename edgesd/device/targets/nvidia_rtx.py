"""A PC with an NVIDIA RTX GPU: TensorRT-RTX builds its plans on any x86-64 machine.

memory_bytes is what a build may assume of the GPU's own memory, not the size of a certain card.
"""

from edgesd.device.capabilities import GB
from edgesd.spec.scheme import TENSORRT_PRECISIONS
from edgesd.spec.target import Target


def _series(number: int, generation: str, sm: str) -> Target:
    return Target(
        name=f"rtx-{number}",
        title=f"PC with a GeForce RTX {number} or another {generation} GPU",
        arch="x86_64",
        backends=("tensorrt", "onnxruntime"),
        precisions=TENSORRT_PRECISIONS,
        memory_bytes=8 * GB,
        memory_options=(6 * GB, 12 * GB, 16 * GB, 24 * GB, 32 * GB),
        cpu_count=4,
        capabilities=("avx2", "fma", sm),
    )


TARGETS = (
    _series(30, "Ampere", "sm_86"),
    _series(40, "Ada", "sm_89"),
    _series(50, "Blackwell", "sm_120"),
)
