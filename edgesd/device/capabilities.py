"""The one vocabulary of CPU and GPU features, shared by targets and machines.

A name here is what `Target.capabilities` and `Machine.capabilities` hold. What every CPU of an
architecture has (NEON on aarch64, SSE2 on x86_64) isn't a capability. Also here: names of
architectures and of memory sizes.
"""

from __future__ import annotations

GB = 2**30
"""Bytes in one GB of RAM, as boards are sold."""

CAPABILITIES: dict[str, str] = {
    # aarch64
    "dotprod": "int8 dot product, SDOT/UDOT (ARMv8.2)",
    "i8mm": "int8 matrix multiplication, SMMLA/UMMLA (ARMv8.6)",
    "bf16": "bfloat16 dot product and matrix multiplication (ARMv8.6)",
    "fp16_arithmetic": "half-precision vector arithmetic (ARMv8.2)",
    "sve": "scalable vectors",
    "sve2": "scalable vectors, second version (ARMv9)",
    # x86_64
    "avx2": "256-bit integer vectors",
    "fma": "fused multiply-add",
    "f16c": "conversion between half and single precision",
    "avx512f": "512-bit vectors",
    "avx512_vnni": "int8 dot product on 512-bit vectors",
    "avx512_bf16": "bfloat16 dot product on 512-bit vectors",
    "avx512_fp16": "half-precision arithmetic on 512-bit vectors",
    "avx_vnni": "int8 dot product on 256-bit vectors",
    "amx_int8": "int8 matrix tiles",
    "amx_bf16": "bfloat16 matrix tiles",
    # NVIDIA GPUs: the compute capability that an engine is built for, no more and no less
    "sm_86": "GeForce RTX 30 and RTX A GPUs",
    "sm_89": "GeForce RTX 40 and RTX Ada GPUs",
    "sm_120": "GeForce RTX 50 and RTX PRO Blackwell GPUs",
    "sm_87": "Jetson Orin's GPU",
    "sm_110": "Jetson Thor's GPU",
}
"""Capability -> what it means."""

_ARM_FLAGS = {
    "asimddp": "dotprod",
    "i8mm": "i8mm",
    "bf16": "bf16",
    "asimdhp": "fp16_arithmetic",
    "sve": "sve",
    "sve2": "sve2",
}
_X86_FLAGS = {
    flag: flag
    for flag in CAPABILITIES
    if flag in ("fma", "f16c") or flag.startswith(("avx", "amx"))
}
# How the Linux kernel spells capabilities in /proc/cpuinfo, by architecture.
CPU_FLAGS: dict[str, dict[str, str]] = {"aarch64": _ARM_FLAGS, "x86_64": _X86_FLAGS}

_ARCHES = {"amd64": "x86_64", "x86-64": "x86_64", "x64": "x86_64", "arm64": "aarch64"}


def normal_arch(name: str) -> str:
    """One name per architecture, `uname -m`'s: amd64 -> x86_64, arm64 -> aarch64."""
    name = name.strip().lower()
    return _ARCHES.get(name, name)


def in_gb(size_bytes: int) -> str:
    """A memory size for people: 536870912 -> "0.5 GB"."""
    return f"{size_bytes / GB:.2f}".rstrip("0").rstrip(".") + " GB"
