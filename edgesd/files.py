"""Writing files so that a crash, a full disk or Ctrl-C never leaves a half-written one."""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from edgesd.errors import InputError, ResourceError

_REFUSED = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.EBUSY),
    *(errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOENT),
)


def fsync_dir(path: Path) -> None:
    """Make renames inside `path` durable."""
    _fsync(path, os.O_DIRECTORY)


def _fsync(path: Path, flags: int = 0) -> None:
    fd = os.open(path, os.O_RDONLY | flags)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a full disk or a refused write below `path` into one clear error."""
    try:
        yield
    except OSError as exc:
        if exc.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise ResourceError(
                f"no space left to write {path}: free some space, or choose another folder with -o"
            ) from exc
        ours = exc.filename is None or str(exc.filename).startswith(str(path.parent))
        if exc.errno in _REFUSED and ours:
            raise InputError(f"cannot write {path}: {exc.strerror}; choose another -o") from exc
        raise


@contextmanager
def atomic_path(path: Path, mode: int = 0o644) -> Iterator[Path]:
    """Give a temporary name beside `path` to write to; on success fsync it and rename it to `path`.

    mode: of the file, when it is whole; until then only its owner reads it. Raises ResourceError
    when the disk is full, InputError when `path` can't be written. On any error, and on Ctrl-C, the
    temporary file is removed and an older `path` stays as it was.
    """
    path = Path(path)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        # Named before it is made: a signal that comes while it is made finds it, too.
        tmp = path.parent / f".{path.name}.{secrets.token_hex(4)}.part"
        try:
            os.close(os.open(tmp, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
            yield tmp
            _fsync(tmp)
            tmp.chmod(mode)
            tmp.replace(path)
            fsync_dir(path.parent)
        except BaseException:
            tmp.unlink(missing_ok=True)
            raise


@contextmanager
def atomic_write(path: Path, mode: int = 0o644) -> Iterator[BinaryIO]:
    """As `atomic_path`, with the temporary file open for writing."""
    with atomic_path(path, mode) as tmp, tmp.open("wb") as file:
        yield file


def user_cache() -> Path:
    """Folder for what can be made anew: edgesd in XDG_CACHE_HOME, or in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgesd"


def check_new(path: Path) -> None:
    """Raise InputError when there is something at `path` already, or where a link there leads."""
    if path.exists() or path.resolve().exists():
        raise InputError(f"{path} exists already: remove it, or choose another -o")


def check_writable(path: Path) -> None:
    """Make the folder of `path` and try to write there, before long work is done in vain.

    Raises InputError or ResourceError when `path` can't be written.
    """
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()


@contextmanager
def private_folder(beside: Path) -> Iterator[Path]:
    """A temporary folder on the same disk as `beside`, removed at the end whatever happens."""
    beside = Path(beside)
    with disk_errors(beside):
        beside.parent.mkdir(parents=True, exist_ok=True)
        prefix = f".{beside.name}."
        tmp = Path(tempfile.mkdtemp(prefix=prefix, suffix=".part", dir=beside.parent))
        try:
            yield tmp
        finally:
            shutil.rmtree(tmp, ignore_errors=True)


@contextmanager
def atomic_dir(path: Path) -> Iterator[Path]:
    """Fill a temporary folder beside `path`; on success rename it to `path`, which must not exist
    or be an empty folder.

    Raises InputError when `path` exists and isn't empty. On any error the folder is removed.
    """
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"{path} exists already: remove it, or choose another -o")
    with private_folder(path) as tmp:
        yield tmp
        fsync_tree(tmp)
        tmp.chmod(0o755)
        tmp.replace(path)
        fsync_dir(path.parent)


def fsync_tree(root: Path) -> None:
    """Make everything below `root` durable."""
    for path in [*root.rglob("*"), root]:
        _fsync(path)


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of the file at `path`, read in pieces of 4 MiB."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(4 << 20):
            digest.update(chunk)
    return digest.hexdigest()
