"""Raspberry Pi Zero 2 W: four Cortex-A53 and half a GB."""

from edgesd.device.capabilities import GB
from edgesd.spec.target import Target

TARGETS = (
    Target(
        name="raspberry-pi-zero-2w",
        title="Raspberry Pi Zero 2 W",
        arch="aarch64",
        backends=("onnxruntime",),
        memory_bytes=GB // 2,
        cpu_count=4,
        models=("Raspberry Pi Zero 2 W",),
    ),
)
