"""What the benchmarks share: medians with their spread, one table, one JSON file."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from edgesd.errors import EdgesdError
from edgesd.files import atomic_write


class Spread(NamedTuple):
    """Median of `runs` values, and the quartiles between which the middle half of them lies."""

    median: float
    low: float
    high: float
    runs: int

    def text(self, digits: int = 3) -> str:
        """The median and, in brackets, the quartiles."""
        return f"{self.median:.{digits}f} ({self.low:.{digits}f} to {self.high:.{digits}f})"


def spread(values: Iterable[float]) -> Spread:
    """Median and quartiles (inclusive: the extremes are quantiles 0 and 1). At least one value."""
    values = sorted(values)
    if len(values) == 1:
        return Spread(values[0], values[0], values[0], 1)
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, low, high, len(values))


def paired_ratio(ours: Sequence[float], theirs: Sequence[float]) -> Spread:
    """Spread of ours[k] / theirs[k], which were measured one right after the other."""
    return spread(a / b for a, b in zip(ours, theirs, strict=True))


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Rows of text under a head, in columns of equal width; floats to three digits."""
    cells = [list(head), *([_cell(value) for value in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def _cell(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def environment(*packages: str) -> dict[str, str | int]:
    """What the figures depend on: processor, cores this process may use, Python, packages."""
    found: dict[str, str | int] = {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
    }
    for package in ("edgesd", "numpy", "onnxruntime", *packages):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.machine()


def parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser that shows the script's docstring and takes --json FILE."""
    made = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--json", type=Path, metavar="FILE", help="also write the figures as JSON")
    return made


def write_json(path: Path | None, figures: dict[str, Any]) -> None:
    """Write `figures` to `path`, if there is one."""
    if path:
        with atomic_write(path) as file:
            file.write((json.dumps(figures, indent=2, allow_nan=False) + "\n").encode())


def run(main: Callable[[], int | None]) -> NoReturn:
    """Call `main` and exit; an error that the user can cure is one line."""
    try:
        sys.exit(main())
    except EdgesdError as exc:
        print(f"benchmark: {exc}", file=sys.stderr)
        sys.exit(exc.exit_code)
