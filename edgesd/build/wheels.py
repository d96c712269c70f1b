"""Wheels that a board needs: edgesd's own, and those of its dependencies, for installing offline.

They are chosen by pip for the board's architecture, Python and C library; nothing of that
architecture is run here.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

import edgesd
from edgesd.engines.kernels import build_library
from edgesd.errors import EdgesdError, InputError, MissingDependencyError
from edgesd.files import atomic_dir, sha256_file, user_cache
from edgesd.processes import module_command
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
) -> list[Path]:
    """Fill `folder` with edgesd's wheel, BOARD_PACKAGES, `packages` and what they need; its wheels.

    python: the board's (3.11). Raises MissingDependencyError without pip, InputError with pip's own
    words when it finds one missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    root = _source()
    if root is not None:
        _pip(["wheel", "--no-deps", "--wheel-dir", str(folder), str(root)])
        (own,) = (str(path) for path in folder.glob("edgesd-*.whl"))
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
    python: str, arch: str, packages: Sequence[str] = (), glibc: int = _OLDEST_GLIBC
) -> list[Path]:
    """As `download_wheels`, in the user's cache: asked of the index once for each edgesd."""
    bring_kernels(arch)
    said = "\n".join([_fingerprint(), python, arch, str(glibc), *packages])
    key = hashlib.sha256(said.encode()).hexdigest()[:16]
    folder = user_cache() / "wheels" / f"{arch}-{python}-{key}"
    if not folder.is_dir():
        with atomic_dir(folder) as fresh:
            download_wheels(fresh, python, arch, packages, glibc)
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
    for path in sorted(folder.glob("*.whl")):
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


def bring_kernels(arch: str) -> None:
    """Compile edgesd's own kernels for `arch` into the checkout, whose wheel then has them; without
    a compiler it is logged what is missing. An installed edgesd has what its wheel brought."""
    if _source() is None:
        return
    folder, name = library_folders()[0], library_name(arch)
    try:
        build_library(arch, folder)
    except EdgesdError as exc:
        _log.warning("the board will do without edgesd's own kernels: %s", exc)
    for old in folder.glob(f"edgesd-kernels-{arch}-*.so"):
        if old.name != name:
            old.unlink()


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
            "wheels for the board are got by pip, which isn't installed here: give --wheels FOLDER"
        )
    command = module_command("pip", "--disable-pip-version-check", "--quiet", *arguments)
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise InputError(
            f"pip can't get the board's wheels ({lines[-1] if lines else done.stderr[-200:]}): is "
            "its index reachable? Else give --wheels FOLDER"
        )
