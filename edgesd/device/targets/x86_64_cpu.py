"""Any x86-64 computer of the last ten years, on its CPU: for trials and small edge boxes.

memory_bytes and cpu_count are what a build may assume, not the size of a certain machine.
"""

from edgesd.device.capabilities import GB
from edgesd.spec.target import Target

TARGETS = (
    Target(
        name="x86-64-cpu",
        title="x86-64 computer",
        arch="x86_64",
        backends=("onnxruntime",),
        memory_bytes=8 * GB,
        memory_options=(4 * GB, 16 * GB, 32 * GB, 64 * GB, 128 * GB),
        cpu_count=4,
        capabilities=("avx2", "fma"),
    ),
)
