"""Compiles edgesd's own kernels (edgesd/kernels) with an installed C++ compiler."""

from __future__ import annotations

import logging
import os
import platform
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from edgesd.errors import EdgesdError, InputError, MissingDependencyError, TargetError
from edgesd.files import atomic_path
from edgesd.processes import find_program
from edgesd.progress import SILENT, Progress
from edgesd.runtime import kernels as runtime_kernels
from edgesd.runtime.kernels import (
    SOURCES,
    library_folders,
    library_name,
    why_not_loaded,
    writable_by_others,
)

_log = logging.getLogger(__name__)

# GCC's own AVX-512 headers set off its warning of uninitialized values.
_FLAGS = (
    *("-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math"),
    *("-Wall", "-Wextra", "-Wno-psabi", "-Wno-uninitialized", "-Wno-maybe-uninitialized"),
)
_ALONE = ("-static-libstdc++", "-static-libgcc", "-s")
"""The library needs no other than the C library."""

_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni", *_AVX2)
_VARIANTS: dict[str, dict[str, tuple[str, ...]]] = {
    "x86_64": {"avx512_vnni": _AVX512, "avx_vnni": ("-mavxvnni", *_AVX2), "avx2": _AVX2},
    "aarch64": {"neon_dotprod": ("-march=armv8.2-a+dotprod",)},
}
"""Architecture -> instruction set -> the compiler's options."""


def find_compiler(arch: str) -> str | None:
    """A C++ compiler for `arch`, a cross compiler where this machine isn't one; None without."""
    names = [f"{arch}-linux-gnu-g++"]
    if platform.machine() == arch:
        names += ["g++", "clang++", "c++"]
    return next(filter(None, map(find_program, names)), None)


def ensure_library(progress: Progress = SILENT) -> Path | None:
    """The library for this machine, compiled if need be; None where it can't be, or shall not be.

    Failures are logged: builds go on without it.
    """
    if runtime_kernels.library() is None and os.environ.get("EDGESD_KERNELS") is None:
        try:
            build_library(platform.machine(), progress=progress)
        except EdgesdError as exc:
            _log.warning("no kernels of edgesd's own: %s", exc)
        runtime_kernels.forget()
    return runtime_kernels.library() if runtime_kernels.instruction_set() else None


def build_library(arch: str, folder: Path | None = None, progress: Progress = SILENT) -> Path:
    """Compile the library for `arch` (x86_64, aarch64) into `folder`, by default the user's cache;
    what is there already, of the same sources, is taken. Takes about a minute.

    Raises TargetError for another architecture, MissingDependencyError without a compiler,
    InputError where the library is there and another user can change it, and EdgesdError with the
    compiler's own words.
    """
    if arch not in _VARIANTS:
        raise TargetError(f"there are no kernels for {arch}: there are for {', '.join(_VARIANTS)}")
    out = (folder or library_folders()[1]) / library_name(arch)
    if out.is_file():
        if (place := writable_by_others(out)) is not None:
            raise InputError(why_not_loaded(out, place))
        return out
    compiler = find_compiler(arch)
    if compiler is None:
        package = "g++" if platform.machine() == arch else f"g++-{arch.replace('_', '-')}-linux-gnu"
        raise MissingDependencyError(
            f"there is no C++ compiler for {arch} here: apt install {package}, or leave the "
            "kernels out, and ONNX Runtime's own operators do the work"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(out) as path:
        compile_library(compiler, arch, path, progress)
    return out


def compile_library(
    compiler: str,
    arch: str,
    path: Path,
    progress: Progress = SILENT,
    flags: Sequence[str] = (),
) -> None:
    """Compile the library for `arch` into the file `path`. flags: beside those of _FLAGS, such as a
    sanitizer's, and for the linker, too.

    Raises EdgesdError with the compiler's own words.
    """
    with tempfile.TemporaryDirectory() as work:
        objects = []
        parts = [(name, own, "compute.cpp") for name, own in _VARIANTS[arch].items()]
        parts.append(("operators", (), "ops.cpp"))
        for number, (name, own, source) in enumerate(parts, 1):
            progress.line(
                f"compiling edgesd's kernels for {arch}: {name}, {number} of {len(parts)}, about a "
                "minute in all, once"
            )
            objects.append(Path(work) / f"{name}.o")
            _run(compiler, [*_FLAGS, *flags, *own, "-c", source, "-o", str(objects[-1])])
        linked = [*map(str, objects), "-shared", *(flags or _ALONE)]
        _run(compiler, [*linked, "-o", str(path)])


def _run(compiler: str, arguments: list[str]) -> None:
    done = subprocess.run(
        [compiler, *arguments],
        cwd=SOURCES,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or [""]
        raise EdgesdError(f"{compiler} can't compile the kernels: {lines[0].strip()[:300]}")
