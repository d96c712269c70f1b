"""Puts the wheels that a board needs into a folder: edgesd's, with its kernels, and what it needs.

python scripts/vendor_wheels.py FOLDER [--python 3.10] [--arch aarch64] [--extra NAME ...]

For `edgesd deploy --wheels FOLDER`, Dockerfile.jetson, and `pip install --no-index --find-links
FOLDER edgesd`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from edgesd.errors import EdgesdError
from edgesd.progress import Lines
from edgesd.remote.wheels import download_wheels, kernels_for

EXTRAS = ("cuda-bindings<13",)
"""For Jetsons, beside what every board gets."""


def say(text: str) -> None:
    """Show what takes long."""
    print(text, file=sys.stderr, flush=True)


def main() -> int:
    """Parse, fill, tell; the exit status."""
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    made.add_argument("folder", type=Path)
    made.add_argument("--python", default="3.10", help="the board's [default: 3.10, JetPack 6]")
    made.add_argument("--arch", default="aarch64")
    made.add_argument("--extra", action="append", default=[], help="a further package")
    given = made.parse_args()
    try:
        wheels = download_wheels(
            given.folder,
            given.python,
            given.arch,
            [*EXTRAS, *given.extra],
            library=kernels_for(given.arch, Lines(say)),
        )
    except EdgesdError as exc:
        print(f"vendor_wheels: {exc}", file=sys.stderr)
        return exc.exit_code
    size = sum(wheel.stat().st_size for wheel in wheels) / 1e6
    print(f"{len(wheels)} wheels, {size:.0f} MB, for Python {given.python} on {given.arch}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
