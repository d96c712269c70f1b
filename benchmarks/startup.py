"""How long edgesd takes to be there: importing the device side, and `edgesd --help`.

    python -m benchmarks.startup

Wall times include starting Python, which is measured in turn with them. The cumulative import time
is what `python -X importtime` reports. Also says which heavy libraries each of them has loaded.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time

from benchmarks.common import environment, parser, run, spread, table, write_json
from edgesd.errors import EdgesdError

MODULE = "edgesd.runtime.pipeline"
IMPORT = f"import {MODULE}"
HELP = "import sys; sys.argv = ['edgesd', '--help']; from edgesd.cli import main; main()"
COMMANDS = {"python": "pass", IMPORT: IMPORT, "edgesd --help": HELP}
"""What is timed, by the name it is reported under."""

HEAVY = ("torch", "diffusers", "transformers", "onnx", "onnxruntime", "numpy")
_LOADED = "import sys, json; print(json.dumps([m for m in {heavy!r} if m in sys.modules]))"


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run this interpreter. Raises EdgesdError with the last line it wrote when it fails."""
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        raise EdgesdError(f"python {' '.join(arguments)} failed: {last}")
    return done


def wall_seconds(code: str) -> float:
    """Wall time of a fresh interpreter that runs `code`."""
    start = time.perf_counter()
    python("-c", code)
    return time.perf_counter() - start


def import_us(report: str, module: str) -> int:
    """Cumulative microseconds of `module` in what -X importtime wrote."""
    for line in report.splitlines():
        own, _, rest = line.partition("|")
        cumulative, _, name = rest.partition("|")
        if own.startswith("import time:") and name.strip() == module:
            return int(cumulative)
    raise EdgesdError(f"-X importtime doesn't report {module}")


def heavy_modules(code: str) -> list[str]:
    """Those of HEAVY that are loaded once `code` has run, also when it ends in SystemExit."""
    wrapped = (
        "import contextlib, io\n"
        "with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):\n"
        f"    exec({code!r})\n" + _LOADED.format(heavy=HEAVY)
    )
    found: list[str] = json.loads(python("-c", wrapped).stdout)
    return found


def main() -> None:
    """Measure, print, and write."""
    arguments = parser(__doc__)
    arguments.add_argument("--runs", type=int, default=15, help="of each (default: 15)")
    given = arguments.parse_args()
    walls: dict[str, list[float]] = {name: [] for name in COMMANDS}
    imports: list[int] = []
    for counted in [False] + [True] * given.runs:
        for name, code in COMMANDS.items():
            seconds = wall_seconds(code)
            if counted:
                walls[name].append(seconds * 1e3)
        report = python("-X", "importtime", "-c", IMPORT).stderr
        if counted:
            imports.append(import_us(report, MODULE))
    loaded = {name: heavy_modules(code) for name, code in COMMANDS.items()}
    print(f"medians of {given.runs} runs (quartiles)")
    print(
        table(
            ("what", "wall ms", "heavy modules loaded"),
            (
                (name, spread(values).text(0), ", ".join(loaded[name]) or "none")
                for name, values in walls.items()
            ),
        )
    )
    cumulative = spread(imports)
    print(f"cumulative import time of {MODULE}: {cumulative.text(0)} us")
    write_json(
        given.json,
        {
            "environment": environment(),
            "runs": given.runs,
            "wall_ms": {name: spread(values)._asdict() for name, values in walls.items()},
            "import_us": cumulative._asdict(),
            "heavy_modules": loaded,
        },
    )


if __name__ == "__main__":
    run(main)
