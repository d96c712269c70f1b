"""edgesd's own kernels for CPUs: where their library is, and whether it can be used here.

The library (C++, edgesd/kernels) is optional: bundles bring a graph that needs it beside one of
ONNX Runtime's own operators. `edgesd kernels build` makes it (engines/kernels.py).
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from edgesd.files import user_cache

SOURCES = Path(__file__).resolve().parent.parent / "kernels"
"""The library's source files; lib below it holds what a wheel brings."""

DISABLED = "none"
"""Value of EDGESD_KERNELS that leaves the library out."""

ONLY_4_BITS = ("avx2",)
"""Instruction sets whose products of 8-bit weights could saturate."""


@cache
def library_name(arch: str) -> str:
    """File name of the library made from these sources for an architecture (x86_64, aarch64)."""
    digest = hashlib.sha256()
    for path in source_files():
        digest.update(path.read_bytes())
    return f"edgesd-kernels-{arch}-{digest.hexdigest()[:12]}.so"


def source_files() -> list[Path]:
    """All files that the library is made of."""
    return sorted([*SOURCES.glob("*.cpp"), *SOURCES.glob("*.h")])


def library_folders() -> tuple[Path, Path]:
    """Where the library may lie: in the package, and in the user's cache."""
    return SOURCES / "lib", user_cache() / "kernels"


@cache
def library() -> Path | None:
    """The library for this machine: EDGESD_KERNELS, the package's, or the cache's; or None."""
    given = os.environ.get("EDGESD_KERNELS")
    if given is not None:
        return None if given == DISABLED else Path(given)
    name = library_name(platform.machine())
    return next((f / name for f in library_folders() if (f / name).is_file()), None)


@cache
def instruction_set() -> str:
    """What the library computes with here (avx512_vnni, neon_dotprod ...); "" where it can't be
    used, or isn't there."""
    path = library()
    if path is None:
        return ""
    try:
        found = ctypes.CDLL(str(path)).edgesd_instruction_set
    except (OSError, AttributeError):
        return ""
    found.restype = ctypes.c_char_p
    name: bytes = found()
    return name.decode()


def usable(schemes: Iterable[str]) -> bool:
    """Whether a graph of layers of these schemes (w8a8 ...), which needs the library, runs here."""
    return computes(instruction_set(), schemes)


def computes(isa: str, schemes: Iterable[str]) -> bool:
    """Whether kernels of the instruction set `isa` ("": none) compute layers of these schemes."""
    eight_bits = any(name.startswith("w8a8") for name in schemes)
    return bool(isa) and not (eight_bits and isa in ONLY_4_BITS)


@contextmanager
def keeping_weights(count: int | None) -> Iterator[None]:
    """Let sessions that this thread makes meanwhile keep `count` bytes of weights mapped; None for
    all.

    What is beyond is let go after each use, and read again from the file. Only for graphs whose
    weights are mapped from files, as those of bundles are: others would lose them.
    """
    path = library()
    if path is None or count is None:
        yield
        return
    keep = ctypes.CDLL(str(path)).edgesd_keep_weights
    keep.argtypes = [ctypes.c_int64]
    keep(count)
    try:
        yield
    finally:
        keep(-1)
