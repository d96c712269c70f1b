"""Runs every test that needs an NVIDIA GPU, and prints a table of what passed.

python scripts/gpu_tests.py

Needs a GPU with its driver, TensorRT or TensorRT-RTX, and `pip install -e '.[build,dev]'
cuda-bindings`. Exit status 0 when at least one test ran and none failed.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path

from edgesd.processes import module_command
from edgesd.runtime.cuda import find_gpu

ROOT = Path(__file__).resolve().parent.parent


def outcome(case: ET.Element) -> str:
    """passed, failed or skipped, with the reason."""
    for kind, word in (("failure", "failed"), ("error", "failed"), ("skipped", "skipped")):
        found = case.find(kind)
        if found is not None:
            return f"{word}: {' '.join((found.get('message') or '').split())[:100]}"
    return "passed"


def main() -> int:
    """Run them; the exit status."""
    print(find_gpu())
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        subprocess.run(
            module_command("pytest", "-m", "gpu", f"--junit-xml={report}", "tests"),
            cwd=ROOT,
            check=False,
            stdout=subprocess.DEVNULL,
        )
        cases = list(ET.parse(report).iter("testcase"))
    counts: Counter[str] = Counter()
    for case in cases:
        found = outcome(case)
        counts[found.partition(":")[0]] += 1
        name = f"{(case.get('classname') or '').rpartition('.')[2]}::{case.get('name')}"
        print(f"{name:90} {float(case.get('time') or 0):8.1f} s  {found}")
    print(", ".join(f"{count} {word}" for word, count in sorted(counts.items())) or "no test")
    return 0 if counts["passed"] and not counts["failed"] else 1


if __name__ == "__main__":
    sys.exit(main())
