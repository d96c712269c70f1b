"""Raspberry Pi 4, 400 and Compute Module 4: four Cortex-A72 without int8 dot product."""

from edgesd.device.capabilities import GB
from edgesd.spec.target import Target

TARGETS = (
    Target(
        name="raspberry-pi-4",
        title="Raspberry Pi 4",
        arch="aarch64",
        backends=("onnxruntime",),
        memory_bytes=1 * GB,
        memory_options=(2 * GB, 4 * GB, 8 * GB),
        cpu_count=4,
        models=("Raspberry Pi 4", "Raspberry Pi Compute Module 4"),
    ),
)
