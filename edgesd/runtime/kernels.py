"""edgesd's own kernels for CPUs: where their library is, and whether it can be used here.

The library (C++, edgesd/kernels) is optional: bundles have a graph that needs it beside one of
ONNX Runtime's own operators. `edgesd kernels build` makes it (engines/kernels.py).
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import stat
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from edgesd.files import user_cache

_log = logging.getLogger(__name__)

SOURCES = Path(__file__).resolve().parent.parent / "kernels"
"""The library's source files; lib below it holds what a wheel includes."""

DISABLED = "none"
"""Value of EDGESD_KERNELS that leaves the library out."""

_GIVEN_BY = {
    "dotprod": "neon_dotprod",
    "avx512_vnni": "avx512_vnni",
    "avx_vnni": "avx_vnni",
    "avx2": "avx2",
}
"""Capability of a target -> the instruction set of edgesd's own kernels that it gives, best
first."""

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
    """The library for this machine: EDGESD_KERNELS, the package's, or the cache's; or None.

    A file that another user could have put into the cache isn't used: its code would run as this
    user.
    """
    given = os.environ.get("EDGESD_KERNELS")
    if given is not None:
        return None if given == DISABLED else Path(given)
    packaged, cached = (f / library_name(platform.machine()) for f in library_folders())
    if packaged.is_file():
        return packaged
    if not cached.is_file():
        return None
    if (place := writable_by_others(cached)) is not None:
        _log.warning("%s", why_not_loaded(cached, place))
        return None
    return cached


def why_not_loaded(path: Path, place: Path) -> str:
    """One line about a library that others could replace, `place` being theirs."""
    return (
        f"{path} isn't used: another user can write {place}, and so could change the library; "
        "remove it, or set XDG_CACHE_HOME to a folder of your own"
    )


def writable_by_others(path: Path) -> Path | None:
    """Of a file and the folders above it, as given and where links lead, the first that another
    user than root can change; None where only this user can. As sshd looks at its keys, but for
    groups: many systems give each user one of their own, which may write."""
    real = path.resolve()
    for place in dict.fromkeys([path, *path.absolute().parents, real, *real.parents]):
        found = place.stat()
        others = found.st_mode & stat.S_IWOTH and not (
            stat.S_ISDIR(found.st_mode) and found.st_mode & stat.S_ISVTX
        )
        if others or found.st_uid not in (0, os.geteuid()):
            return place
    return None


@cache
def _functions() -> ctypes.CDLL | None:
    """The functions of the library; None where it isn't there, or isn't edgesd's."""
    path = library()
    if path is None:
        return None
    try:
        found = ctypes.CDLL(str(path))
        found.edgesd_instruction_set.argtypes = []
        found.edgesd_instruction_set.restype = ctypes.c_char_p
        found.edgesd_keep_weights.argtypes = [ctypes.c_int64]
        found.edgesd_keep_weights.restype = None
    except (OSError, AttributeError):
        return None
    return found


@cache
def instruction_set() -> str:
    """The instruction set that the library uses here (avx512_vnni, neon_dotprod ...); "" where it
    can't be used, or isn't there."""
    functions = _functions()
    name: bytes | None = functions.edgesd_instruction_set() if functions else None
    return (name or b"").decode(errors="replace")


def forget() -> None:
    """Look for the library again: it was compiled, or EDGESD_KERNELS has changed."""
    library.cache_clear()
    _functions.cache_clear()
    instruction_set.cache_clear()


def usable(schemes: Iterable[str]) -> bool:
    """Whether a graph of layers of these schemes (w8a8 ...), which needs the library, runs here."""
    return computes(instruction_set(), schemes)


def instruction_set_of(capabilities: Collection[str]) -> str:
    """What the kernels compute with on a target of these capabilities; "" where they can't."""
    return next((isa for feature, isa in _GIVEN_BY.items() if feature in capabilities), "")


def computes(isa: str, schemes: Iterable[str]) -> bool:
    """Whether kernels of the instruction set `isa` ("": none) compute layers of these schemes."""
    eight_bits = any(name.startswith("w8a8") for name in schemes)
    return bool(isa) and not (eight_bits and isa in ONLY_4_BITS)


@contextmanager
def keeping_weights(count: int | None) -> Iterator[None]:
    """Let sessions that this thread makes meanwhile keep `count` bytes of weights mapped; None for
    all.

    What is beyond is let go after each use, and read again from the file that it is mapped from.
    """
    functions = _functions()
    if functions is None or count is None:
        yield
        return
    functions.edgesd_keep_weights(count)
    try:
        yield
    finally:
        functions.edgesd_keep_weights(-1)
