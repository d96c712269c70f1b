"""What control groups leave this process: a container's limits count like a board's size."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_RECLAIMABLE = ("inactive_file", "active_file", "total_inactive_file", "total_active_file")


class MemoryGroup(NamedTuple):
    """A control group with a memory limit, in bytes. used_bytes leaves out the page cache."""

    limit_bytes: int
    used_bytes: int


def memory_groups(root: Path = Path("/")) -> list[MemoryGroup]:
    """The limited groups of this process and those above it (cgroups(7), v1 and v2)."""
    found = []
    for folder, unified in _folders(root, "memory"):
        files = ("max", "current") if unified else ("limit_in_bytes", "usage_in_bytes")
        limit, used = (_number(folder / f"memory.{name}") for name in files)
        if limit is not None:
            cached = _page_cache(folder / "memory.stat")
            found.append(MemoryGroup(limit, max(0, (used or 0) - cached)))
    return found


def cpu_quota(root: Path = Path("/")) -> float | None:
    """Seconds of processor time a second that the groups of this process leave it: 1.5 are one and
    a half cores. None without a limit."""
    quotas = []
    for folder, unified in _folders(root, "cpu"):
        if unified:
            quota, period = [*_text(folder / "cpu.max").split(), "", ""][:2]
        else:
            quota, period = (_text(folder / f"cpu.cfs_{k}_us").strip() for k in ("quota", "period"))
        if _is_number(quota) and _is_number(period) and int(period):
            quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


def _folders(root: Path, controller: str) -> Iterator[tuple[Path, bool]]:
    """Folders of this process's groups and those above them; whether they are of version 2."""
    for line in ["0::/", f"0:{controller}:/", *_text(root / "proc/self/cgroup").splitlines()]:
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers and controller not in controllers.split(","):
            continue
        base = root / "sys/fs/cgroup" / (controller if controllers else "")
        steps = [step for step in path.split("/") if step not in ("", "..")]
        for depth in range(len(steps) + 1):
            yield base.joinpath(*steps[:depth]), not controllers


def _page_cache(stat: Path) -> int:
    values = dict(re.findall(r"^(\w+) (\d+)$", _text(stat), re.MULTILINE))
    return sum(int(values.get(name, 0)) for name in _RECLAIMABLE[:2]) or sum(
        int(values.get(name, 0)) for name in _RECLAIMABLE[2:]
    )


def _number(path: Path) -> int | None:
    text = _text(path).strip()
    return int(text) if _is_number(text) else None


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit()  # else "max", -1, or there is no such file


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
