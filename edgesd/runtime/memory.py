"""How much memory this process used at most, and how much the machine can still give."""

from __future__ import annotations

import ctypes
import re
import resource
from pathlib import Path
from typing import Literal

from edgesd.cgroup import memory_groups

MemoryMode = Literal["fast", "balanced", "stream"]
"""fast: all networks stay loaded. balanced: each is released after its use. stream: besides,
weights stay in their file; those of edgesd's own kernels are mapped while their layer runs."""

MEMORY_MODES: tuple[MemoryMode, ...] = ("fast", "balanced", "stream")


def resident_bytes() -> int:
    """Resident set of this process now, mapped files included (VmRSS of proc(5)); 0 where that
    can't be read."""
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:
        text = ""
    match = re.search(r"^VmRSS:\s*(\d+) kB", text, re.MULTILINE)
    return int(match[1]) * 1024 if match else 0


def give_back() -> None:
    """Let the C library return what was freed to the system, where it is one that keeps it (glibc:
    malloc_trim(3))."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def peak_bytes(root: Path = Path("/")) -> int:
    """Largest resident set of this process so far: VmHWM of proc(5).

    Where that can't be read, ru_maxrss of getrusage(2), which counts what the process was before
    it called execve(2), too: a fork of a large one.
    """
    try:
        text = (root / "proc/self/status").read_text()
    except OSError:
        text = ""
    if match := re.search(r"^VmHWM:\s*(\d+) kB", text, re.MULTILINE):
        return int(match[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def available_bytes(root: Path = Path("/")) -> int | None:
    """Memory that can still be taken without swapping; None where it can't be read.

    The smallest of MemAvailable (proc(5)) and what each control group leaves.
    """
    found = [group.limit_bytes - group.used_bytes for group in memory_groups(root)]
    try:
        text = (root / "proc/meminfo").read_text()
    except OSError:
        text = ""
    if match := re.search(r"^MemAvailable:\s*(\d+) kB", text, re.MULTILINE):
        found.append(int(match[1]) * 1024)
    return max(0, min(found)) if found else None
