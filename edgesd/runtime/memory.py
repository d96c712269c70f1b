"""How much memory this process used at most, and how much the machine can still give."""

from __future__ import annotations

import resource
from pathlib import Path


def peak_bytes() -> int:
    """Largest resident set of this process so far (getrusage(2): ru_maxrss, in KiB on Linux)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def available_bytes(root: Path = Path("/")) -> int | None:
    """Memory that can still be taken without swapping; None where it can't be read.

    The smaller of MemAvailable (proc(5)) and what the control group leaves (cgroup v2 memory.max
    minus memory.current), so that a container's limit counts.
    """
    found = []
    try:
        for line in (root / "proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                found.append(int(line.split()[1]) * 1024)
    except (OSError, ValueError, IndexError):
        return None
    group = root / "sys/fs/cgroup"
    try:
        limit = int((group / "memory.max").read_text())
        found.append(max(0, limit - int((group / "memory.current").read_text())))
    except (OSError, ValueError):
        pass  # no cgroup v2, or no limit ("max")
    return min(found, default=None)
