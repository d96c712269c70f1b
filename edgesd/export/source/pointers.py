"""Files of models whose repository was cloned without Git LFS."""

from __future__ import annotations

from pathlib import Path

from edgesd.errors import InputError

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def check_no_pointer(path: Path) -> None:
    """Raise InputError where a file can't be read, or stands for one that Git LFS has yet to
    fetch."""
    try:
        with path.open("rb") as file:
            pointer = file.read(len(_LFS_POINTER)) == _LFS_POINTER
    except OSError as exc:
        raise InputError(f"cannot read {path}: {exc.strerror or exc}") from exc
    if pointer:
        raise InputError(
            f"{path} is a pointer of Git LFS, not the file itself: run `git lfs pull` in its "
            "repository, or download the model again"
        )
