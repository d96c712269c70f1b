"""Puts the wheels that a board needs into a folder: edgesd's own, and those of its dependencies.

python scripts/vendor_wheels.py FOLDER [--python 3.10] [--arch aarch64] [--extra NAME ...]

For installing without a network: `pip install --no-index --find-links FOLDER edgesd`. Needs pip and
its index; nothing of the board's architecture is run.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GLIBC = (17, 24, 26, 27, 28, 31, 34, 35)
"""Minor versions of glibc 2 whose wheels run on JetPack 6 and later and on Debian 12."""
EXTRAS = ("cuda-bindings<13", "pip")


def platforms(arch: str) -> list[str]:
    """pip's names of the platforms, newest first."""
    return [f"manylinux_2_{minor}_{arch}" for minor in reversed(GLIBC)] + [f"manylinux2014_{arch}"]


def vendor(folder: Path, python: str, arch: str, extras: list[str]) -> list[Path]:
    """Fill `folder`; its wheels. Raises CalledProcessError when pip finds one missing."""
    folder.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", str(folder), str(ROOT)], check=True)
    (own,) = folder.glob("edgesd-*.whl")
    chosen = [option for name in platforms(arch) for option in ("--platform", name)]
    subprocess.run(
        [
            *(*pip, "download", "--only-binary=:all:", "--dest", str(folder)),
            *("--python-version", python, "--implementation", "cp", *chosen),
            *(str(own), *EXTRAS, *extras),
        ],
        check=True,
    )
    return sorted(folder.glob("*.whl"))


def main() -> int:
    """Parse, fill, tell; the exit status."""
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    made.add_argument("folder", type=Path)
    made.add_argument("--python", default="3.10", help="the board's [default: 3.10, JetPack 6]")
    made.add_argument("--arch", default="aarch64")
    made.add_argument("--extra", action="append", default=[], help="a further package")
    given = made.parse_args()
    try:
        wheels = vendor(given.folder, given.python, given.arch, given.extra)
    except subprocess.CalledProcessError as exc:
        print(f"vendor_wheels: pip ended with status {exc.returncode}: see above", file=sys.stderr)
        return 1
    size = sum(wheel.stat().st_size for wheel in wheels) / 1e6
    print(f"{len(wheels)} wheels, {size:.0f} MB, for Python {given.python} on {given.arch}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
