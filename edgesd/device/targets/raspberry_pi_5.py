"""Raspberry Pi 5, 500 and Compute Module 5: four Cortex-A76, no GPU that inference can use."""

from edgesd.device.capabilities import GB
from edgesd.spec.target import Target

TARGETS = (
    Target(
        name="raspberry-pi-5",
        title="Raspberry Pi 5",
        arch="aarch64",
        backends=("onnxruntime",),
        memory_bytes=2 * GB,
        # The 1 GB board is unconfirmed; should it be the rule one day, make it memory_bytes.
        memory_options=(1 * GB, 4 * GB, 8 * GB, 16 * GB),
        cpu_count=4,
        capabilities=("dotprod", "fp16_arithmetic"),  # no i8mm, no bf16
        models=("Raspberry Pi 5", "Raspberry Pi Compute Module 5"),
    ),
)
