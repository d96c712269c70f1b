"""Wheels that a board needs: edgesd's own, and those of its dependencies, for installing offline.

They are chosen by pip for the board's architecture, Python and C library; nothing of that
architecture is run here.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import logging
import subprocess
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from textwrap import shorten

import edgesd
from edgesd.engines.kernels import build_library
from edgesd.errors import EdgesdError, InputError, MissingDependencyError
from edgesd.files import atomic_dir, atomic_path, sha256_file, user_cache
from edgesd.processes import module_command
from edgesd.progress import SILENT, Progress
from edgesd.runtime.kernels import library_folders, library_name

_log = logging.getLogger(__name__)

_GLIBC = (17, 24, 26, 27, 28, 31, 34, 35, 39)
"""Minor versions of glibc 2 that wheels are made for."""
_OLDEST_GLIBC = 35
"""Of the boards that edgesd is for: JetPack 6. Debian 12 has 36."""
BOARD_PACKAGES = ("edgesd", "pip", "cryptography")
"""What every board gets: pip to install with, cryptography for signatures."""


def platform_tags(arch: str, glibc: int = _OLDEST_GLIBC) -> list[str]:
    """pip's names of the platforms of a board with glibc 2.`glibc`, newest first."""
    minors = [minor for minor in reversed(_GLIBC) if minor <= glibc]
    return [*(f"manylinux_2_{minor}_{arch}" for minor in minors), f"manylinux2014_{arch}"]


def download_wheels(
    folder: Path,
    python: str,
    arch: str,
    packages: Iterable[str] = (),
    glibc: int = _OLDEST_GLIBC,
    library: Path | None = None,
) -> list[Path]:
    """Fill `folder` with edgesd's wheel, BOARD_PACKAGES, `packages` and what they need; its wheels.

    python: the board's (3.11). library: of edgesd's own kernels, for its wheel, where it is made
    from a checkout. Raises MissingDependencyError without pip, InputError with pip's own
    words when it finds one missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    root = _source()
    if root is not None:
        _pip(["wheel", "--no-deps", "--wheel-dir", str(folder), str(root)])
        (own,) = (str(path) for path in folder.glob("edgesd-*.whl"))
        _put_library(Path(own), library)
    else:
        own = f"edgesd=={edgesd.__version__}"
    chosen = [option for name in platform_tags(arch, glibc) for option in ("--platform", name)]
    _pip(
        [
            *("download", "--only-binary=:all:", "--dest", str(folder)),
            *("--python-version", python, "--implementation", "cp", *chosen),
            *(own, *BOARD_PACKAGES[1:], *packages),
        ]
    )
    return sorted(folder.glob("*.whl"))


def cached_wheels(
    python: str,
    arch: str,
    packages: Sequence[str] = (),
    glibc: int = _OLDEST_GLIBC,
    kernels: bool = True,
    progress: Progress = SILENT,
) -> list[Path]:
    """As `download_wheels`, in the user's cache: asked of the index once for each edgesd.

    kernels: whether edgesd's own kernels are needed there, and compiled if need be; those that are
    compiled already are in its wheel in any case.
    """
    library = kernels_for(arch, progress, kernels)
    asked = [python, arch, str(glibc), library.name if library else "", *packages]
    key = hashlib.sha256("\n".join([_fingerprint(), *asked]).encode()).hexdigest()[:16]
    folder = user_cache() / "wheels" / f"{arch}-{python}-{key}"
    if not folder.is_dir():
        progress.line(f"fetching wheels for Python {python} on {arch} by pip: some 60 MB, once")
        with atomic_dir(folder) as fresh:
            download_wheels(fresh, python, arch, packages, glibc, library)
    return sorted(folder.glob("*.whl"))


def fitting_wheels(folder: Path, python: str, arch: str, glibc: int) -> list[Path]:
    """Those wheels of `folder` that a board can install. Raises InputError without edgesd's.

    Compatibility tags: packaging.python.org/specifications/platform-compatibility-tags.
    """
    try:
        from packaging.tags import compatible_tags, cpython_tags
        from packaging.utils import InvalidWheelFilename, parse_wheel_filename
    except ImportError as exc:
        raise MissingDependencyError(
            "wheels are chosen by packaging, which isn't installed: pip install 'edgesd[deploy]'"
        ) from exc
    major, minor = (int(part) for part in python.split("."))
    platforms = platform_tags(arch, glibc)
    fits = {
        *cpython_tags((major, minor), platforms=platforms),
        *compatible_tags((major, minor), f"cp{major}{minor}", platforms),
    }
    found = {}
    for path in filter(Path.is_file, sorted(folder.glob("*.whl"))):
        try:
            name, _version, _build, tags = parse_wheel_filename(path.name)
        except InvalidWheelFilename:
            continue
        if tags & fits:
            found[path] = name
    for needed in BOARD_PACKAGES[:2]:
        if needed not in found.values():
            raise InputError(
                f"{folder} has no wheel of {needed} for Python {python} on {arch}: fill it by "
                f"python scripts/vendor_wheels.py {folder} --python {python} --arch {arch}"
            )
    return list(found)


def _source() -> Path | None:
    """The checkout that this edgesd runs from, or None for an installed one."""
    root = Path(edgesd.__file__).resolve().parent.parent
    return root if (root / "pyproject.toml").is_file() else None


def kernels_for(arch: str, progress: Progress = SILENT, compiling: bool = True) -> Path | None:
    """The library of edgesd's own kernels for `arch`, which edgesd's wheel is to include; None for
    an installed edgesd, whose wheel included it.

    compiling: into the user's cache, if it isn't there; without a compiler it is logged what is
    missing.
    """
    if _source() is None:
        return None
    found = library_folders()[1] / library_name(arch)
    if not compiling and not found.is_file():
        return None
    try:
        return build_library(arch, progress=progress)
    except EdgesdError as exc:
        _log.warning("the board will run without edgesd's own kernels: %s", exc)
        return None


def _put_library(wheel: Path, library: Path | None) -> None:
    """Add `library` to edgesd's `wheel`, and no other that lay in the checkout.

    Layout and RECORD: packaging.python.org/specifications/binary-distribution-format.
    """
    folder = "edgesd/kernels/lib/"
    with zipfile.ZipFile(wheel) as file:
        members = {
            info.filename: (info, file.read(info))
            for info in file.infolist()
            if not info.filename.startswith(folder)
        }
    record = next(name for name in members if name.endswith(".dist-info/RECORD"))
    info, listed = members.pop(record)
    rows = [row for row in listed.decode().splitlines() if not row.startswith(folder)]
    if library is not None:
        data, name = library.read_bytes(), folder + library.name
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        rows.append(f"{name},sha256={digest},{len(data)}")
        members[name] = (zipfile.ZipInfo(name, info.date_time), data)
    members[record] = (info, ("\n".join(rows) + "\n").encode())
    with atomic_path(wheel) as path, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for entry, data in members.values():
            file.writestr(entry, data, zipfile.ZIP_DEFLATED)


def _fingerprint() -> str:
    """Of this edgesd: its version, or for a checkout all of its sources."""
    root = _source()
    if root is None:
        return edgesd.__version__
    files = [root / "pyproject.toml", *sorted((root / "edgesd").rglob("*"))]
    sums = [
        f"{path}{sha256_file(path)}"
        for path in files
        if path.is_file() and "__pycache__" not in path.parts
    ]
    return hashlib.sha256("\n".join(sums).encode()).hexdigest()


def _pip(arguments: list[str]) -> None:
    if importlib.util.find_spec("pip") is None:
        raise MissingDependencyError(
            "wheels for the board are downloaded by pip, which isn't installed here: give --wheels "
            "FOLDER"
        )
    command = module_command("pip", "--disable-pip-version-check", "--quiet", *arguments)
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        # "ERROR: Exception:" stands before a traceback, whose last line says what it was.
        lines = [line for line in said if line.startswith("ERROR") and line[-1] != ":"]
        words = shorten((lines or said or ["it said nothing"])[-1], 300)
        raise InputError(
            f"pip can't get the board's wheels ({words}): is "
            "its index reachable? Else give --wheels FOLDER"
        )
