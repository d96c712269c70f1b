"""Threads: on which cores, how many, and how they wait, so that other work has its share."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from edgesd.cgroup import cpu_quota

SPIN_MICROSECONDS = 50
"""How long a thread of a network waits in a loop for the next operator before it sleeps. Alone a
step takes as long as with ONNX Runtime's own choice, which is longer; beside another process a
thread that loops keeps the core from the one that it waits for (benchmarks/beside_others.py)."""

OPENMP_SPINS = 2000
"""The same of torch's threads (libgomp), in turns of its loop; of itself it takes 300,000."""


def fast_cores(root: Path = Path("/")) -> list[int]:
    """Of the processor's cores that this process may use, those that clock as high as the highest,
    within a fifth: all of them, but on boards of large and small cores. By cpufreq of sysfs."""
    clocks = {}
    for core in sorted(os.sched_getaffinity(0)):
        path = root / f"sys/devices/system/cpu/cpu{core}/cpufreq/cpuinfo_max_freq"
        try:
            clocks[core] = int(path.read_text())
        except (OSError, ValueError):
            clocks[core] = 0  # unknown: they count as equal
    highest = max(clocks.values())
    return [core for core, clock in clocks.items() if clock >= 0.8 * highest]


def physical_cores(cores: list[int], root: Path = Path("/")) -> list[int]:
    """One of the hardware threads of each core, the first: they share its multipliers."""
    found: dict[str, int] = {}
    for core in cores:
        path = root / f"sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list"
        try:
            siblings = path.read_text().strip() or str(core)
        except OSError:
            siblings = str(core)
        found.setdefault(siblings, core)
    return list(found.values())


def thread_cores(root: Path = Path("/")) -> list[int]:
    """Cores for the threads of one operator: the fast ones that this process may use, no more than
    its control groups' quota of processor time keeps busy, and at least one."""
    return _kept_busy(physical_cores(fast_cores(root), root), root)


def _kept_busy(cores: list[int], root: Path) -> list[int]:
    """As many of `cores` as the quota keeps busy."""
    quota = cpu_quota(root)
    return cores if quota is None else cores[: max(1, int(quota))]


def library_settings(environ: Mapping[str, str], root: Path = Path("/")) -> dict[str, str]:
    """Environment variables for libraries that read them as they are loaded, and know no other way:
    how long OpenMP's threads wait in a loop, and how many there are where a quota leaves fewer than
    there are cores. What the user has set stays."""
    settings = {}
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & set(environ):
        settings["GOMP_SPINCOUNT"] = str(OPENMP_SPINS)
    if "OMP_NUM_THREADS" not in environ:
        cores = physical_cores(fast_cores(root), root)
        threads = len(_kept_busy(cores, root))
        if threads < len(cores):
            settings["OMP_NUM_THREADS"] = str(threads)
    return settings
