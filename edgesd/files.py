"""Writing files so that a crash, a full disk or Ctrl-C leaves no half-written one and never loses a
file.

The rules for everything that edgesd writes:

- It is made in a private folder, `.edgesd-*.part`, beside its place, and moved there when it is
  whole. A file system need not have modes, links, or folders that can be synchronized for that.
- A new file has the mode that the umask leaves; one that replaces an older file has that one's.
  Private keys are their owner's alone.
- A file that the user named is replaced. One whose name edgesd made up is not: it takes the next
  free name. A device or a pipe is written into, never replaced.
- Only what this run has written is removed, and private folders of this machine's that no living
  process holds: those were left by processes that were killed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import hashlib
import itertools
import math
import mmap
import os
import pwd
import re
import secrets
import shutil
import socket
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from edgesd.errors import InputError, ResourceError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_REFUSED = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.EBUSY, errno.EIO, errno.ESTALE),
    *(errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY, errno.ENOENT),
    *(errno.ENAMETOOLONG, errno.ELOOP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENODEV),
    errno.ENXIO,
)
_MISSING_HERE = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENOTTY)
"""What file systems answer to what they don't have: modes, links, synchronized folders."""

_NO_LINK = (*_MISSING_HERE, errno.EACCES, errno.EMLINK, errno.EXDEV)


class ExistsError(InputError):
    """There is something at a place that was to be new."""


class KeptError(InputError):
    """A file couldn't be moved to its place and is kept beside it: the message says where."""


def fsync_dir(path: Path) -> None:
    """Make renames inside `path` durable, where its file system can."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except PermissionError:  # a folder may be written into and not be read
        return
    _fsync(fd, (*_MISSING_HERE, errno.EACCES, errno.EBADF, errno.EISDIR))


def _fsync(fd: int, ignored: tuple[int, ...] = _MISSING_HERE) -> None:
    """Synchronize and close `fd`."""
    try:
        os.fsync(fd)
    except OSError as exc:
        if exc.errno not in ignored:
            raise
    finally:
        os.close(fd)


@contextmanager
def disk_errors(path: Path, output: bool = True) -> Iterator[None]:
    """Turn a full disk or a refused write below `path` into one clear error.

    output: `path` is what the user chose by -o. Else it is a folder of edgesd's own.
    """
    try:
        yield
    except OSError as exc:
        wanted = Path(*(part for part in path.parts if not _PART.fullmatch(part)))
        if exc.errno in _FULL:
            other = ", or choose another folder with -o" if output else ""
            raise ResourceError(f"no space left to write {wanted}: free some space{other}") from exc
        named = isinstance(exc.filename, str | bytes)
        ours = not named or _lies_in(os.fsdecode(exc.filename), path.parent)
        if ours and (exc.errno in _REFUSED or (named and exc.errno == errno.EINVAL)):
            advice = "choose another -o"
            if not output:
                wanted = Path(os.fsdecode(exc.filename)) if named else wanted
                advice = "repair its folder, or move what is there away"
            raise InputError(f"cannot write {wanted}: {exc.strerror}; {advice}") from exc
        raise


def _lies_in(name: str, folder: Path) -> bool:
    return Path(name).absolute().is_relative_to(folder.absolute())


@contextmanager
def atomic_path(path: Path, private: bool = False, new: bool = False) -> Iterator[Path]:
    """Give a temporary path to write to; on success move what is there to `path`.

    private: only the owner may read the file. new: `path` must not exist, not even in the last
    moment. Raises ResourceError when the disk is full, InputError when `path` can't be written,
    ExistsError when it had to be new, KeptError when the whole file couldn't be moved there. On any
    error, and on Ctrl-C, the temporary file is removed and an older `path` stays as it was.
    """
    path = Path(path)
    if is_special(path):
        with tempfile.TemporaryDirectory(prefix="edgesd-") as folder:
            made = Path(folder) / "file"
            made.touch()
            yield made
            with disk_errors(path), made.open("rb") as source, path.open("wb") as out:
                shutil.copyfileobj(source, out)
        return
    _check_no_folder(path)
    if new and _is_there(path):
        raise ExistsError(f"{path} exists already: remove it, or choose another name")
    with private_folder(path) as folder:
        made = folder / path.name
        mode = 0o600 if private else 0o666
        os.close(os.open(made, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode))
        yield made
        _fsync(os.open(made, os.O_RDONLY))
        if private:  # a library may have made the file anew
            _chmod(made, mode)
        with _kept(made, path):
            _move_new(made, path) if new else _replace(made, path)
        fsync_dir(path.parent)


@contextmanager
def atomic_write(path: Path, private: bool = False, new: bool = False) -> Iterator[BinaryIO]:
    """As `atomic_path`, with the temporary file open for writing."""
    with atomic_path(path, private, new) as made, made.open("wb") as file:
        yield file


def save(path: Path, content: bytes, new: bool = False) -> None:
    """Write the result of long work. If that fails, it is kept elsewhere.

    new: as `atomic_path`. Raises what `atomic_path` raises; the message says where `content` is.
    """
    try:
        with atomic_write(path, new=new) as file:
            file.write(content)
    except (ExistsError, KeptError):
        raise
    except (InputError, ResourceError) as exc:
        kept = keep(path.name, content)
        if kept is None:
            raise
        raise type(exc)(f"{exc}; the result is kept as {kept}") from exc


def keep(name: str, content: bytes) -> Path | None:
    """Write `content` to the user's cache, or a new temporary folder; None where neither can be."""
    for folder in (_kept_folder, lambda: Path(tempfile.mkdtemp(prefix="edgesd-kept-"))):
        try:
            return write_free(folder() / name, content)
        except (OSError, InputError, ResourceError):
            continue
    return None


def _kept_folder() -> Path:
    return user_cache() / "kept"


def write_free(path: Path, content: bytes) -> Path:
    """Write to `path`, or where it is taken to the next free name (`free_names`); which it was.

    Raises what `atomic_path` raises.
    """
    for name in free_names(path):
        try:
            with atomic_write(name, new=True) as file:
                file.write(content)
        except ExistsError:
            continue
        return name
    raise AssertionError("names are endless")


def free_names(path: Path) -> Iterator[Path]:
    """`path`, then NAME-2, NAME-3 and so on before its suffix, without those that exist."""
    numbered = (path.with_name(f"{path.stem}-{n}{path.suffix}") for n in itertools.count(2))
    return (name for name in itertools.chain([path], numbered) if not _is_there(name))


def _absolute(path: Path) -> Path:
    """`path` with a name at its end, where it is "." or ".." as well."""
    return path.resolve() if path.name in ("", "..") else path.absolute()


def _is_there(path: Path) -> bool:
    """Whether there is something, if only a link that leads nowhere."""
    return os.path.lexists(path)


def is_special(path: Path) -> bool:
    """Whether `path` is a device, a pipe or a socket, or stands for one of this process's files."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    real = Path(os.path.realpath(path.parent))
    stands_in = path.is_symlink() and real.parts[1:2] in (("dev",), ("proc",))
    return not stat.S_ISDIR(mode) and (stands_in or not stat.S_ISREG(mode))


def _check_no_folder(path: Path) -> None:
    if path.is_dir():
        raise InputError(f"{path} is a folder: choose another -o, the name of a file")


def _chmod(path: Path, mode: int) -> None:
    """Set the mode, where the file system has modes."""
    with contextlib.suppress(OSError):
        path.chmod(mode)


def _replace(made: Path, path: Path) -> None:
    """Move `made` to `path`; it takes the mode and, if possible, the owner of an older one."""
    try:
        older = path.stat()
    except OSError:
        older = None
    if older is not None:
        ours = made.stat()
        if (older.st_uid, older.st_gid) != (ours.st_uid, ours.st_gid):
            with contextlib.suppress(OSError):
                os.chown(made, older.st_uid, older.st_gid)
        if stat.S_IMODE(older.st_mode) != stat.S_IMODE(ours.st_mode):
            _chmod(made, stat.S_IMODE(older.st_mode) & 0o777)
    made.replace(path)


def _move_new(made: Path, path: Path) -> None:
    """Move the file `made` to `path`. Raises ExistsError when something is there."""
    try:
        try:
            os.link(made, path)
        except OSError as exc:
            if exc.errno not in _NO_LINK:
                raise
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
            try:
                made.replace(path)
            except BaseException:
                path.unlink(missing_ok=True)
                raise
        else:
            made.unlink()
    except FileExistsError as exc:
        raise ExistsError(f"{path} exists already: remove it, or choose another name") from exc


@contextmanager
def _kept(made: Path, path: Path) -> Iterator[None]:
    """Keep `made` beside `path`, under a name of its own, when it can't be moved there."""
    try:
        yield
    except OSError as exc:
        kept = path.parent / f"edgesd-kept-{secrets.token_hex(4)}{path.suffix}"
        try:
            made.rename(kept)
        except OSError:
            raise exc from None
        raise KeptError(
            f"cannot write {path}: {exc.strerror}; the result is kept as {kept}"
        ) from exc


def link_or_copy(path: Path, new: Path) -> None:
    """Make `new`, a hard link to the file `path`, or a copy where there are no such links.

    Raises OSError as these do.
    """
    try:
        os.link(path, new)
    except OSError as exc:
        if exc.errno not in _NO_LINK:
            raise
        shutil.copyfile(path, new)


def user_home() -> Path | None:
    """The user's home folder: HOME where it is an absolute path, else the user database's."""
    given = Path(os.environ.get("HOME", ""))
    if not given.is_absolute():
        try:
            given = Path(pwd.getpwuid(os.getuid()).pw_dir)
        except KeyError:  # a container's or service's user need not be in it
            return None
    return given if given.is_absolute() else None


def expanded(name: str) -> Path:
    """The path `name`, ~ at its beginning replaced by the home folder where there is one."""
    try:
        return Path(name).expanduser()
    except RuntimeError:
        return Path(name)


def named_path(given: str) -> tuple[str, str]:
    """The path in PATH or PATH:NAME, and the name; "" where there is none.

    What exists is a path as a whole, whatever colons it has; else the last colon divides.
    """
    if ":" not in given or expanded(given).exists():
        return given, ""
    path, _, name = given.rpartition(":")
    return path, name


def scaled_path(given: str) -> tuple[Path, float]:
    """The path in PATH or PATH:SCALE, divided as by `named_path`, and the scale: 1 where there is
    none, NaN for what is no number."""
    path, text = named_path(given)
    if path == given:
        return expanded(path), 1.0
    try:
        return expanded(path), float(text)
    except ValueError:
        return expanded(path), math.nan


def environment_folder(name: str) -> Path | None:
    """The folder that the environment variable `name` gives; None where it is unset or empty.

    Raises InputError when there is a file instead.
    """
    given = os.environ.get(name)
    if not given:
        return None
    path = expanded(given)
    if _is_there(path) and not path.is_dir():
        raise InputError(f"{name} is {given}, which is no folder: set it to one, or unset it")
    return path


def user_cache() -> Path:
    """Folder for what can be made anew: edgesd in XDG_CACHE_HOME, or in ~/.cache.

    Without a home folder that can be used it is a private one below the temporary folder. Raises
    InputError where there is none of these.
    """
    folder = _xdg_folder("XDG_CACHE_HOME", ".cache")
    if folder is None:
        return _temporary_cache()
    path = folder / "edgesd"
    asked = Path(os.environ.get("XDG_CACHE_HOME", "")).is_absolute()
    return path if asked or path.is_dir() or _can_be_made(path) else _temporary_cache()


def user_config() -> Path | None:
    """Folder of the user's settings: edgesd in XDG_CONFIG_HOME, or in ~/.config; None without a
    home folder."""
    folder = _xdg_folder("XDG_CONFIG_HOME", ".config")
    return folder and folder / "edgesd"


def _xdg_folder(name: str, default: str) -> Path | None:
    """As the XDG Base Directory Specification says: a relative path counts as none."""
    given = Path(os.environ.get(name, ""))
    if given.is_absolute():
        return given
    home = user_home()
    return home and home / default


def _can_be_made(path: Path) -> bool:
    above = next(folder for folder in path.parents if _is_there(folder))
    return above.is_dir() and os.access(above, os.W_OK | os.X_OK)


def _temporary_cache() -> Path:
    """A folder that is this user's alone: programs in it are run."""
    try:
        path = Path(tempfile.gettempdir()) / f"edgesd-cache-{os.getuid()}"
        with contextlib.suppress(FileExistsError):
            path.mkdir(mode=0o700)
        found = path.lstat()
    except OSError as exc:
        raise InputError(
            f"there is no home folder, and no temporary one ({exc.strerror or exc}): set "
            "XDG_CACHE_HOME to a folder that can be written"
        ) from exc
    mine = stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()
    if not mine or found.st_mode & 0o022:
        raise InputError(
            f"there is no home folder, and {path} may be changed by others: set XDG_CACHE_HOME"
        )
    return path


def check_new(path: Path) -> None:
    """Raise InputError when there is something at `path` already, or where a link there leads."""
    if _is_there(path) or path.resolve().exists():
        raise InputError(f"{path} exists already: remove it, or choose another -o")


def check_writable(path: Path, needed_bytes: int = 0) -> None:
    """Try to write at `path`, before long work is done in vain. Nothing is left there.

    needed_bytes: what will be written, if known. Raises InputError when a file or
    folder of that name can't be made, ResourceError when the disk is too full.
    """
    if is_special(path):
        if path.is_socket() or not os.access(path, os.W_OK):
            raise InputError(f"{path} can't be written into: choose another -o")
        return
    _check_replaceable(path)
    missing = [folder for folder in _absolute(path).parents if not _is_there(folder)]
    try:
        free_bytes = _try_to_write(path)
    finally:
        for folder in missing:
            with contextlib.suppress(OSError):
                folder.rmdir()
    if free_bytes is not None and free_bytes < needed_bytes:
        raise ResourceError(
            f"{path} takes about {needed_bytes / 1e6:.0f} MB, and {free_bytes / 1e6:.0f} MB of "
            "disk are free there: free some space, or choose another folder with -o"
        )


def _check_replaceable(path: Path) -> None:
    """Raise InputError for another user's file in a folder like /tmp, where only owners replace."""
    try:
        folder, older = _absolute(path).parent.stat(), path.lstat()
    except OSError:
        return
    user = os.geteuid()
    if folder.st_mode & stat.S_ISVTX and user not in (0, folder.st_uid, older.st_uid):
        raise InputError(f"{path} is another user's, and can't be replaced: choose another -o")


def _try_to_write(path: Path) -> int | None:
    """Bytes that are free there; None where the file system doesn't say."""
    with private_folder(path) as folder:
        with (folder / _absolute(path).name).open("xb") as file:
            file.write(b"edgesd")
        disk = shutil.disk_usage(folder)
        return disk.free if disk.total else None


def check_file_place(path: Path, *used: Path) -> None:
    """`check_writable` for a file. Raises InputError, too, when `path` is a folder, or one of the
    files that are `used`."""
    _check_no_folder(path)
    for other in used:
        if path.absolute() == other.absolute() or (
            path.exists() and other.exists() and path.samefile(other)
        ):
            raise InputError(f"{path} is needed for something else here: choose another name")
    check_writable(path)


_MOST_ATTEMPTS = 100
"""To make a private folder, while other processes remove the one that it is to be in."""

_PART = re.compile(r"\.edgesd-([0-9a-f]{8})-[0-9a-f]{16}\.part")


@contextmanager
def private_folder(beside: Path) -> Iterator[Path]:
    """A temporary folder on the same disk as `beside`, removed at the end whatever happens.

    It is locked meanwhile: what is left of a process that was killed is known by its open lock.
    """
    with disk_errors(beside):
        parent = _absolute(beside).parent
        lock: int | None = None
        folder: Path | None = None
        try:
            for attempt in itertools.count(1):
                _make_folders(parent)
                _sweep(parent)
                # Named before it is made: a signal that comes while it is made finds it, too.
                folder = parent / f".edgesd-{_machine()}-{secrets.token_hex(8)}.part"
                # Another process may have removed an empty `parent` that it had made. Some
                # folders, such as /proc, have room for nothing and say so in the same way.
                try:
                    folder.mkdir(mode=0o700)
                    _chmod(folder, 0o700)  # whatever the umask is: it couldn't be removed
                    lock = _locked(folder, needed=False)
                except FileNotFoundError:
                    if attempt == _MOST_ATTEMPTS:
                        raise
                if lock is not None:
                    break
            assert folder is not None
            yield folder
        finally:
            try:
                if folder is not None:
                    shutil.rmtree(folder, ignore_errors=True)
            finally:  # again, for a signal that came meanwhile
                if folder is not None:
                    shutil.rmtree(folder, ignore_errors=True)
                if lock is not None:
                    os.close(lock)


def _make_folders(folder: Path) -> None:
    """Make `folder` and those above it. Raises InputError where a file or a dead link is one."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as exc:
        taken = next(path for path in (folder, *folder.parents) if _is_there(path))
        what = "a link that leads nowhere" if not taken.exists() else "no folder"
        raise InputError(f"cannot write into {taken}: it is {what}; choose another -o") from exc


def _locked(folder: Path, needed: bool) -> int | None:
    """A descriptor of `folder` that holds its lock; None when another process has it, or has
    removed the folder. Not needed: a file system without locks will do."""
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        gone = not _is_there(folder)
    except OSError as exc:
        gone = needed or isinstance(exc, BlockingIOError)
    if gone:
        os.close(fd)
        return None
    return fd


@functools.cache
def _machine() -> str:
    """Eight digits for this machine: on a network's disk the locks of others may not be seen."""
    try:
        identity = Path("/etc/machine-id").read_bytes()
    except OSError:
        identity = b""
    return hashlib.sha256(identity + socket.gethostname().encode()).hexdigest()[:8]


_swept: set[Path] = set()
"""Folders that were swept by this process: once is enough."""


def _sweep(folder: Path) -> None:
    """Remove the private folders in `folder` that this user's killed processes left."""
    if folder in _swept:
        return
    _swept.add(folder)
    try:
        found = [path for path in folder.iterdir() if path.suffix == ".part"]
    except OSError:
        return
    for left in found:
        match = _PART.fullmatch(left.name)
        if match is None or match[1] != _machine():
            continue
        with contextlib.suppress(OSError):
            if left.lstat().st_uid != os.geteuid():
                continue
            lock = _locked(left, needed=True)
            if lock is not None:
                shutil.rmtree(left, ignore_errors=True)
                os.close(lock)


@contextmanager
def atomic_dir(path: Path) -> Iterator[Path]:
    """Fill a temporary folder beside `path`; on success move it to `path`, which must not exist
    or be an empty folder.

    Raises InputError when `path` exists and isn't empty, KeptError when the whole folder couldn't
    be moved there. On any other error the folder is removed.
    """
    if _is_there(path) and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"{path} exists already: remove it, or choose another -o")
    path = path.resolve() if path.is_dir() else _absolute(path)  # an empty folder may be a link
    with private_folder(path) as folder:
        made = folder / path.name
        made.mkdir()
        yield made
        fsync_tree(made)
        if path.is_dir():
            _chmod(made, stat.S_IMODE(path.stat().st_mode))
        with _kept(made, path):
            made.replace(path)
        fsync_dir(path.parent)


def fsync_tree(root: Path) -> None:
    """Make everything below `root` durable."""
    for path in root.rglob("*"):
        if path.is_file():
            _fsync(os.open(path, os.O_RDONLY))
    for path in [*root.rglob("*"), root]:
        if path.is_dir():
            fsync_dir(path)


def mapped(fd: int, offset: int, size: int) -> memoryview:
    """`size` bytes of an open file from `offset` on, which are read when they are used, and which
    the system may drop again. The descriptor may be closed."""
    if not size:
        return memoryview(b"")
    start = offset - offset % mmap.ALLOCATIONGRANULARITY
    pages = mmap.mmap(fd, offset - start + size, access=mmap.ACCESS_READ, offset=start)
    return memoryview(pages)[offset - start :]


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of the file at `path`, read in pieces of 4 MiB."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(4 << 20):
            digest.update(chunk)
    return digest.hexdigest()
