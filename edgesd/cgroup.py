"""What control groups leave this process: a container's limit counts like a board's RAM."""

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
    for folder, limit_file, usage_file in _folders(root):
        limit = _number(folder / limit_file)
        if limit is not None:
            used = (_number(folder / usage_file) or 0) - _page_cache(folder / "memory.stat")
            found.append(MemoryGroup(limit, max(0, used)))
    return found


def _folders(root: Path) -> Iterator[tuple[Path, str, str]]:
    for line in ["0::/", "0:memory:/", *_text(root / "proc/self/cgroup").splitlines()]:
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers == "":
            base, files = root / "sys/fs/cgroup", ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            base = root / "sys/fs/cgroup/memory"
            files = ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        steps = [step for step in path.split("/") if step not in ("", "..")]
        for depth in range(len(steps) + 1):
            yield base.joinpath(*steps[:depth]), *files


def _page_cache(stat: Path) -> int:
    values = dict(re.findall(r"^(\w+) (\d+)$", _text(stat), re.MULTILINE))
    return sum(int(values.get(name, 0)) for name in _RECLAIMABLE[:2]) or sum(
        int(values.get(name, 0)) for name in _RECLAIMABLE[2:]
    )


def _number(path: Path) -> int | None:
    text = _text(path).strip()
    return int(text) if text.isascii() and text.isdigit() else None  # else "max", or no such file


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
