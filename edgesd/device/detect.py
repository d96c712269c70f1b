"""Detects this machine from Linux's own files, and checks whether a bundle may run on it.

Nothing here fails on a file that is missing, unreadable or odd: a container hides some, a kernel
lacks others. What can't be read isn't guessed: it stays out of the answer.
"""

from __future__ import annotations

import os
import platform
import re
import sys
from pathlib import Path

import msgspec

from edgesd.cgroup import memory_groups
from edgesd.device.capabilities import CPU_FLAGS, in_gb, normal_arch
from edgesd.device.targets import all_targets, list_targets, usable_bytes
from edgesd.errors import TargetError
from edgesd.spec.target import Machine, Target

_ROOT = Path("/")
_MODULE_ID = re.compile(r"p\d{4}-\d{4}")
_L4T = re.compile(r"R(\d+) \(release\), REVISION: ([\d.]+)")
_SOC_GPUS = {"nvidia,tegra234": "sm_87", "nvidia,tegra264": "sm_110"}
# CPU part on a Jetson -> its GPU, where a container hides the device tree.
_JETSON_CPU_GPUS = {"0xd42": "sm_87", "0xd83": "sm_110"}
# Names of PC GPUs, as their driver reports them. Unlisted ones are no capability of a target.
_PC_GPUS = (
    (re.compile(r"RTX (30\d\d|A[2-6]\d00)\b"), "sm_86"),
    (re.compile(r"RTX (40\d\d\b|\d000 Ada)"), "sm_89"),
    (re.compile(r"RTX (50\d\d\b|PRO \d000 Blackwell)"), "sm_120"),
)


def detect_machine(root: Path = _ROOT, arch: str | None = None) -> Machine:
    """Read what the machine is from the files below `root`.

    arch: for a tree that isn't this machine's and lacks proc/sys/kernel/arch. memory_bytes is the
    RAM, or the control group's limit where that is lower; 0 when neither can be read.
    """
    cpus = _cpus(_read(root, "proc/cpuinfo"))
    compatible = _read(root, "proc/device-tree/compatible").split("\0")
    release = _L4T.search(_read(root, "etc/nv_tegra_release"))
    arch = normal_arch(arch or _arch(root, cpus))
    ram = _ram_bytes(root)
    groups = [group.limit_bytes for group in memory_groups(root)]
    limits = [limit for limit in (ram, *groups) if limit > 0]
    unnamed = Machine(
        arch=arch,
        model=_model(root, cpus),
        target=None,
        memory_bytes=min(limits, default=0),
        cpu_count=_cpu_count(root, cpus),
        capabilities=_capabilities(arch, cpus, compatible, release is not None, _pc_gpus(root)),
        l4t=f"{release[1]}.{release[2]}" if release else None,
    )
    target = _recognise(unnamed, set(_MODULE_ID.findall(" ".join(compatible))))
    return msgspec.structs.replace(unnamed, target=target.name if target else None)


def emulated(root: Path = _ROOT) -> bool:
    """Whether this process runs on a CPU that software imitates: then its speed says nothing.

    So it is when the kernel is of another architecture than the program (Linux 6.1 and later report
    it).
    """
    kernel, here = normal_arch(_read(root, "proc/sys/kernel/arch")), platform.machine()
    return bool(kernel) and kernel != normal_arch(here)


def describe_machine(machine: Machine) -> str:
    """One line for people: what the machine is, and which bundle to build for it."""
    memory = in_gb(machine.memory_bytes) if machine.memory_bytes else "memory unknown"
    features = ", ".join(machine.capabilities) or "no optional CPU features"
    is_a = f"{machine.model} ({machine.arch}, {machine.cpu_count} CPUs, {memory}; {features})"
    if machine.target:
        return f"{machine.target}: {is_a}"
    return f"not a board that edgesd knows: {is_a}: {_advice(machine)}"


def runnable_targets(machine: Machine) -> tuple[Target, ...]:
    """The targets whose bundles run on `machine`: same architecture, no capability or RAM more."""
    return tuple(
        target
        for target in all_targets()
        if target.arch == machine.arch
        and not _missing(target.capabilities, machine)
        and not _too_big(target, machine)
    )


def check_machine(
    manifest_target: str, arch: str, machine: Machine, capabilities: tuple[str, ...] = ()
) -> None:
    """Refuse a bundle that can't run on `machine`; the message names both and what to build.

    A bundle runs on any machine of its architecture with as much RAM as its target may use: one for
    a Raspberry Pi 4 runs on a Pi 5. edgesd's own kernels and plans for TensorRT are taken where
    they can be used, so that no bundle requires them. capabilities: what must be there besides.
    Raises TargetError. RAM isn't compared when either side's is unknown: a target of a newer
    edgesd, a hidden meminfo.
    """
    arch = normal_arch(arch)
    missing = _missing(capabilities, machine)
    target = next((known for known in all_targets() if known.name == manifest_target), None)
    if arch != machine.arch:
        problem = ""
    elif missing:
        problem = f" without {', '.join(missing)}, which is required"
    elif target and _too_big(target, machine):
        problem = (
            f" with {in_gb(machine.memory_bytes)} of memory, the bundle may use "
            f"{in_gb(usable_bytes(target))}"
        )
    else:
        return
    here = machine.target or machine.model
    raise TargetError(
        f"bundle is for {manifest_target} ({arch}); this machine is {here} ({machine.arch})"
        f"{problem}: {_advice(machine)}"
    )


def _advice(machine: Machine) -> str:
    """How to get a bundle that runs on `machine`: its own target's, or else the most demanding."""
    able = runnable_targets(machine)
    if not able:
        arches = sorted({target.arch for target in list_targets()})
        if machine.arch not in arches:
            return f"edgesd runs on 64-bit systems only ({', '.join(arches)})"
        return "every target needs more than it has"
    own = next((target for target in able if target.name == machine.target), None)
    best = own or max(able, key=lambda target: (len(target.capabilities), target.memory_bytes))
    return f"build it with --target {best.name}"


def _missing(required: tuple[str, ...], machine: Machine) -> list[str]:
    return sorted(set(required) - set(machine.capabilities))


def _too_big(target: Target, machine: Machine) -> bool:
    return not _is_generic(target) and 0 < machine.memory_bytes < usable_bytes(target)


def _is_generic(target: Target) -> bool:
    """Any machine of an architecture: its RAM is an assumption, unless named (-16gb)."""
    return not target.models and target in list_targets()


def _recognise(machine: Machine, module_ids: set[str]) -> Target | None:
    """The target that `machine` is: by module id, else by model and RAM, else by architecture."""
    able = [
        target
        for target in all_targets()
        if target.arch == machine.arch and not _missing(target.capabilities, machine)
    ]
    for target in able:
        if module_ids & set(target.module_ids):
            return target
    same = [target for target in able if machine.model.startswith(target.models)]
    if not same:  # a generic target's RAM is for its user to choose
        return next((target for target in able if _is_generic(target)), None)
    same.sort(key=lambda target: target.memory_bytes)
    # A board shows at least four fifths of its RAM; the next smaller one has half or less.
    fits = [target for target in same if target.memory_bytes * 4 // 5 <= machine.memory_bytes]
    return fits[-1] if fits else same[0]


def _read(root: Path, path: str) -> str:
    """The text of a file below `root`, without trailing NULs and blanks; "" if unreadable."""
    try:
        return (root / path).read_text("utf-8", errors="replace").strip("\0 \t\r\n")
    except OSError:
        return ""


def _cpus(cpuinfo: str) -> list[dict[str, str]]:
    """Blocks of /proc/cpuinfo; on a Raspberry Pi the last one describes the board."""
    blocks = []
    for block in cpuinfo.split("\n\n"):
        pairs = (line.split(":", 1) for line in block.splitlines() if ":" in line)
        blocks.append({key.strip(): value.strip() for key, value in pairs})
    return blocks


def _arch(root: Path, cpus: list[dict[str, str]]) -> str:
    if root == _ROOT:
        machine = platform.machine()
        if sys.maxsize < 2**32:  # a 32-bit system on a 64-bit kernel, as on many Raspberry Pis
            return {"aarch64": "armv7l", "x86_64": "i686"}.get(machine, machine)
        return machine
    if arch := _read(root, "proc/sys/kernel/arch"):
        return arch
    if any(cpu.get("CPU architecture") == "8" for cpu in cpus):
        return "aarch64"
    return "x86_64" if any("lm" in cpu.get("flags", "").split() for cpu in cpus) else "unknown"


def _model(root: Path, cpus: list[dict[str, str]]) -> str:
    """The machine's own name; the later sources are for containers, PCs and servers."""
    named = [cpu[key] for key in ("Model", "model name") for cpu in cpus if key in cpu]
    return (
        _read(root, "proc/device-tree/model")
        or _read(root, "sys/devices/soc0/machine")
        or next((name for name in named if not name.startswith("ARMv8 ")), "")
        or _read(root, "sys/class/dmi/id/product_name")
        or "unknown machine"
    )


def _cpu_count(root: Path, cpus: list[dict[str, str]]) -> int:
    """CPUs that this process may use; of a foreign tree, those it lists. At least 1."""
    if root == _ROOT and hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return max(1, sum("processor" in cpu for cpu in cpus))


def _capabilities(
    arch: str, cpus: list[dict[str, str]], compatible: list[str], jetson: bool, gpus: set[str]
) -> tuple[str, ...]:
    """Features of every CPU (big and little cores may differ), and of the GPU. Sorted."""
    key = "Features" if arch == "aarch64" else "flags"
    flags = [set(cpu[key].split()) for cpu in cpus if key in cpu]
    common = set.intersection(*flags) if flags else set()
    found = {name for flag, name in CPU_FLAGS.get(arch, {}).items() if flag in common}
    found |= {gpu for soc, gpu in _SOC_GPUS.items() if soc in compatible}
    if jetson:
        parts = {cpu.get("CPU part", "") for cpu in cpus}
        found |= {gpu for part, gpu in _JETSON_CPU_GPUS.items() if part in parts}
    return tuple(sorted(found | gpus))


def _pc_gpus(root: Path) -> set[str]:
    """The driver's GPUs: /proc/driver/nvidia/gpus/BUS/information, without CUDA."""
    folder = root / "proc/driver/nvidia/gpus"
    try:
        buses = sorted(entry.name for entry in folder.iterdir())
    except OSError:
        return set()
    reported = "\n".join(_read(root, f"proc/driver/nvidia/gpus/{bus}/information") for bus in buses)
    return {sm for name, sm in _PC_GPUS if name.search(reported)}


def _ram_bytes(root: Path) -> int:
    total = re.search(r"^MemTotal:\s*(\d+) kB", _read(root, "proc/meminfo"), re.MULTILINE)
    return int(total[1]) * 1024 if total else 0
