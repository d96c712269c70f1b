"""Opens and verifies bundles: a folder, or the same files in one uncompressed tar (`.edgesd`).

A bundle is `bundle.json` (the manifest, edgesd.spec.bundle.BundleManifest), `bundle.sha256` (the
manifest's checksum, as `sha256sum -c` reads it), perhaps `bundle.sig` (runtime/signature.py) and
exactly the files that the manifest lists.
Opening checks the manifest's checksum and schema, and every file's presence and size; the bytes of
a file are hashed before it is first used, or all at once by `verify`.

The one-file form has one canonical byte sequence for given files (POSIX ustar headers with fixed
owner, mode and time, in the manifest's order), so that no byte of it is unchecked, and its members
lie 512-byte aligned, so that weights are memory-mapped in place.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import tarfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple, Protocol

import msgspec

from edgesd.errors import BundleError, InputError
from edgesd.files import mapped
from edgesd.runtime.onnx_wire import relocate_external_data
from edgesd.spec.base import decode_json, is_relative_path
from edgesd.spec.bundle import SCHEMA_VERSION, BundleManifest, ComponentPart, Engine
from edgesd.spec.pipeline import ComponentSpec, wiring_before_schema_8

MANIFEST = "bundle.json"
CHECKSUM = "bundle.sha256"
SIGNATURE = "bundle.sig"
SUFFIX = ".edgesd"
"""File name suffix of the one-file form."""

_MAX_MANIFEST_BYTES = 16 << 20
_FIRST_WITH_WIRING = 8
"""The first schema version whose manifests say how components are joined."""

_CHUNK_BYTES = 4 << 20
_BLOCK = tarfile.BLOCKSIZE

OnBytes = Callable[[int], None]
"""Called with a file's name and the bytes just hashed."""


class OpenFile:
    """A regular file, open for reading as long as this object is referenced.

    What was hashed is what is read and mapped later, wherever the file's name leads by then.
    """

    def __init__(self, path: Path, name: str | None = None, folder: int | None = None) -> None:
        """path: for messages, and what is opened unless `name` is given, relative to the open
        `folder`. Raises OSError, also for what isn't a regular file, and for a symbolic link."""
        self._fd = -1
        self.path = path
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK  # of a FIFO: don't wait
        self._fd = os.open(path if name is None else name, flags, dir_fd=folder)
        if not stat.S_ISREG(os.fstat(self._fd).st_mode):
            raise OSError(errno.EINVAL, "it isn't a regular file")

    def __del__(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)

    def fileno(self) -> int:
        """The file descriptor."""
        return self._fd

    @property
    def size(self) -> int:
        """Size in bytes."""
        return os.fstat(self._fd).st_size

    @property
    def identity(self) -> tuple[int, ...]:
        """Equal as long as it is the same file and, by its times, unchanged."""
        found = os.fstat(self._fd)
        times = (found.st_mtime_ns, found.st_ctime_ns)
        return (found.st_dev, found.st_ino, found.st_size, *times)

    def read(self, at: int, count: int) -> bytes:
        """`count` bytes from the offset `at` on, fewer where the file ends."""
        pieces = []
        while count and (piece := os.pread(self._fd, count, at)):
            pieces.append(piece)
            at, count = at + len(piece), count - len(piece)
        return b"".join(pieces)


class Location(NamedTuple):
    """Where a file's bytes lie: in an open file, from `offset` on."""

    file: OpenFile
    offset: int


class _Storage(Protocol):
    def sizes(self) -> dict[str, int]:
        """Name -> bytes of every file that is there."""

    def location(self, name: str) -> Location:
        """Raises OSError when the file can't be opened, KeyError when there is none."""


class _Folder:
    """The folder form. Files are opened from the folder that was opened first, without following
    links, whatever is renamed meanwhile."""

    def __init__(self, path: Path) -> None:
        self._fd = -1
        self.path = path
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY)

    def __del__(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)

    def sizes(self) -> dict[str, int]:
        try:
            self.location(MANIFEST)
        except OSError:
            return {}  # whatever it is, don't walk it
        found = {}

        def refuse(error: OSError) -> None:
            raise error

        for place, folders, names, fd in os.fwalk(".", dir_fd=self._fd, onerror=refuse):
            for name in [*folders, *names]:
                inside = PurePosixPath(place, name).as_posix()
                status = os.stat(name, dir_fd=fd, follow_symlinks=False)
                if stat.S_ISREG(status.st_mode):
                    found[inside] = status.st_size
                elif not stat.S_ISDIR(status.st_mode):
                    raise BundleError(
                        f"{self.path}: {inside} isn't a regular file; copy the bundle anew"
                    )
        return found

    def location(self, name: str) -> Location:
        *folders, last = PurePosixPath(name).parts
        at = os.dup(self._fd)
        try:
            for folder in folders:
                flags = os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY | os.O_NOFOLLOW
                inner = os.open(folder, flags, dir_fd=at)
                os.close(at)
                at = inner
            return Location(OpenFile(self.path / name, last, at), 0)
        finally:
            os.close(at)


class _Archive:
    """The one-file form. Reads headers only, and refuses any that isn't the canonical one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = file = OpenFile(path)
        self._members: dict[str, tuple[int, int]] = {}
        end, at = file.size, 0
        while (header := _read_at(file, at, _BLOCK)) != bytes(_BLOCK):
            name, size = self._parse(header)
            data = at + _BLOCK
            at = data + -(-size // _BLOCK) * _BLOCK
            if at + 2 * _BLOCK > end:
                raise BundleError(f"{path} is truncated within {name}; copy the bundle anew")
            if any(_read_at(file, data + size, at - data - size)):
                raise BundleError(f"{path} was altered after {name}; copy the bundle anew")
            self._members[name] = (data, size)
        tail = _read_at(file, at, end - at) if end - at == 2 * _BLOCK else None
        if tail != bytes(2 * _BLOCK):
            raise BundleError(f"{path} has bytes missing or added at its end; copy it anew")

    def _parse(self, header: bytes) -> tuple[str, int]:
        try:
            info = tarfile.TarInfo.frombuf(header, "utf-8", "strict")
            canonical = archive_header(info.name, info.size)
        except (tarfile.HeaderError, UnicodeError, ValueError) as exc:
            raise BundleError(f"{self.path} isn't a bundle, or was altered ({exc})") from exc
        if header != canonical or info.name in self._members:
            raise BundleError(f"{self.path}: the header of {info.name!r} was altered; copy it anew")
        return info.name, info.size

    def sizes(self) -> dict[str, int]:
        return {name: size for name, (_, size) in self._members.items()}

    def location(self, name: str) -> Location:
        return Location(self._file, self._members[name][0])


def archive_header(name: str, size: int) -> bytes:
    """The one ustar header [512 bytes] that a member of a one-file bundle may have."""
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tarfile.USTAR_FORMAT if size < 8 << 30 else tarfile.GNU_FORMAT)


def _read_at(file: OpenFile, at: int, count: int) -> bytes:
    data = file.read(at, count)
    if len(data) != count:
        raise BundleError(f"{file.path} is truncated; copy the bundle anew")
    return data


class GraphFile(NamedTuple):
    """A graph ready for a session: the model's bytes, and the folder of its external data.

    files: that data, open: a bundle's graph refers to it by descriptor ("proc/self/fd/N" in the
    folder "/"), so that what was verified is what is mapped. They are closed with this.
    """

    model: bytes
    folder: Path
    files: tuple[OpenFile, ...] = ()


class Bundle:
    """An opened bundle. Nothing in it is ever written. Made by `open_bundle`."""

    def __init__(
        self,
        path: Path,
        storage: _Storage,
        sizes: dict[str, int],
        manifest: BundleManifest,
        frame: dict[str, bytes],
    ) -> None:
        self.path = path
        self.manifest = manifest
        self._storage = storage
        self._sizes = sizes
        self._frame = frame
        # Name -> identity of the file that was hashed and found right.
        self._verified: dict[str, tuple[int, ...]] = {}

    def location(self, name: str) -> Location:
        """Where the bytes of a file that the manifest lists lie, verified before or not.

        Raises BundleError when it can't be opened.
        """
        try:
            return self._storage.location(name)
        except OSError as exc:
            raise self._unreadable(name, exc) from exc

    @property
    def in_one_file(self) -> bool:
        """Whether it is the one-file form."""
        return isinstance(self._storage, _Archive)

    @property
    def manifest_sha256(self) -> str:
        """SHA-256 of bundle.json, which identifies the whole bundle."""
        return hashlib.sha256(self._frame[MANIFEST]).hexdigest()

    @property
    def signed(self) -> bool:
        """Whether there is a signature, right or wrong."""
        return SIGNATURE in self._frame

    @property
    def frame(self) -> tuple[str, ...]:
        """Names of the files that the manifest doesn't list: itself, its checksum and signature."""
        return tuple(name for name in (CHECKSUM, SIGNATURE, MANIFEST) if name in self._frame)

    def framed(self, name: str) -> bytes:
        """The bytes of one file of `frame`, as they were when the bundle was opened: those that the
        manifest in use was read from."""
        return self._frame[name]

    def size(self, name: str) -> int:
        """Bytes of the file `name`, manifest and checksum included."""
        return self._sizes[name]

    def chunks(self, name: str) -> Iterator[bytes]:
        """The bytes of the file `name`, in pieces of at most 4 MiB, not verified; those of `frame`
        as `framed` has them. Raises BundleError when they can't be read."""
        if name in self._frame:
            yield self._frame[name]
        else:
            yield from self._chunks(name, self.location(name))

    def _chunks(self, name: str, where: Location) -> Iterator[bytes]:
        at, end = where.offset, where.offset + self.size(name)
        try:
            while at < end and (chunk := where.file.read(at, min(end - at, _CHUNK_BYTES))):
                at += len(chunk)
                yield chunk
        except OSError as exc:
            raise self._unreadable(name, exc) from exc

    def verified_chunks(self, name: str) -> Iterator[bytes]:
        """`chunks` of a file that the manifest lists, hashed as they are read.

        Raises BundleError after the last one when the bytes differ from the manifest.
        """
        yield from self._verified_chunks(name, self.location(name))

    def _verified_chunks(self, name: str, where: Location) -> Iterator[bytes]:
        digest = hashlib.sha256()
        identity = where.file.identity
        for chunk in self._chunks(name, where):
            digest.update(chunk)
            yield chunk
        if digest.hexdigest() != self.manifest.files[name].sha256:
            raise BundleError(
                f"{self.path}: {name} was altered or damaged (its sha256 differs from the "
                "manifest's); copy the bundle anew or build it again"
            )
        self._verified[name] = identity

    def verify(self, names: Iterable[str] | None = None, on_bytes: OnBytes | None = None) -> None:
        """Hash `names` (all files by default); those that were hashed before are skipped, unless
        they were replaced or written to since then.

        Raises BundleError naming the first file whose bytes differ from the manifest.
        """
        for name in self.manifest.files if names is None else names:
            self.verified_location(name, on_bytes)

    def verified_location(self, name: str, on_bytes: OnBytes | None = None) -> Location:
        """`location` of a file that the manifest lists, hashed from the very file that is open
        there, unless that was done before. Raises BundleError as `verify`."""
        where = self.location(name)
        if self._verified.get(name) != where.file.identity:
            for chunk in self._verified_chunks(name, where):
                if on_bytes:
                    on_bytes(len(chunk))
        return where

    def _unreadable(self, name: str, error: OSError) -> BundleError:
        why = error.strerror or str(error)
        return BundleError(f"{self.path}: {name} can't be read ({why}); copy the bundle anew")

    def read(self, name: str) -> bytes:
        """The verified bytes of the file `name`. Raises BundleError if it was altered."""
        self._check_listed(name)
        return b"".join(self.verified_chunks(name))

    def map(self, name: str) -> memoryview:
        """The same, mapped: for files whose copy would take more memory than there may be."""
        self._check_listed(name)
        where = self.verified_location(name)
        return mapped(where.file.fileno(), where.offset, self.size(name))

    def _check_listed(self, name: str) -> None:
        if name not in self.manifest.files:
            raise BundleError(f"{self.path}: the manifest lists no {name}; build the bundle again")

    def total_bytes(self) -> int:
        """Bytes of all files that the manifest lists: what `verify` and `pack_bundle` count."""
        return sum(entry.bytes for entry in self.manifest.files.values())

    def disk_bytes(self) -> int:
        """Bytes of all files, manifest and checksum included."""
        return sum(self._sizes.values())

    def engine_files(self, engine: Engine) -> list[str]:
        """Names of the files of one engine: its graph, and the weights beside it."""
        folder = f"{PurePosixPath(engine.path).parent}/"
        return [name for name in self.manifest.files if name.startswith(folder)]

    def weight_bytes(self, component: str) -> int:
        """Bytes on disk of one component's engine."""
        files = self.engine_files(self.manifest.engines[component])
        return sum(self.manifest.files[name].bytes for name in files)

    def graph_file(
        self, component: str, kernels: bool = False, part: ComponentPart | None = None
    ) -> GraphFile:
        """Verify one component's files and return what an ONNX session loads.

        kernels: its graph for edgesd's own kernels, where the engine has one. part: head or tail
        of a decoder, instead of all of it.

        References to the weights are moved to the files that were hashed, which are memory-mapped.
        Raises BundleError if a file was altered, or the graph refers to anything but files that lie
        beside it.
        """
        engine = self.manifest.engines[component]
        graphs = part or engine
        path = graphs.kernels if kernels and graphs.kernels else graphs.path
        model = self.read(path)
        self.verify(self.engine_files(engine))
        folder = PurePosixPath(path).parent
        opened: dict[str, Location] = {}

        def into_open_file(location: str, offset: int, length: int) -> tuple[str, int]:
            name = str(folder / location)
            if name not in self.manifest.files or PurePosixPath(name).parent != folder:
                raise BundleError(f"{self.path}: {path} refers to {name!r}, which isn't beside it")
            if offset + length > self.size(name):
                raise BundleError(f"{self.path}: {path} refers to bytes after the end of {name}")
            where = opened.get(name) or self.verified_location(name)
            opened[name] = where
            return f"proc/self/fd/{where.file.fileno()}", where.offset + offset

        moved = relocate_external_data(model, into_open_file)
        return GraphFile(moved, Path("/"), tuple(where.file for where in opened.values()))


def open_bundle(path: Path) -> Bundle:
    """Open the bundle folder or one-file bundle at `path`, read-only.

    Raises BundleError when it isn't a bundle, when its manifest was altered or has a newer schema,
    and when a file is missing, extra, or of the wrong size. File contents are hashed on first use.
    """
    path = Path(path)
    if not path.exists():
        raise BundleError(f"no bundle at {path}: give a folder or {SUFFIX} file of `edgesd build`")
    try:
        return _open(path.resolve())
    except OSError as exc:
        raise BundleError(f"cannot read the bundle {path}: {exc.strerror or exc}") from exc
    except RecursionError as exc:
        raise BundleError(f"{path} isn't a bundle: its folders are nested too deeply") from exc


def _open(path: Path) -> Bundle:
    storage: _Storage = _Folder(path) if path.is_dir() else _Archive(path)
    sizes = storage.sizes()
    for name in (MANIFEST, CHECKSUM):
        if name not in sizes:
            raise BundleError(f"{path} has no {name}: it isn't a bundle, or it was copied in part")
    if (
        sizes[MANIFEST] > _MAX_MANIFEST_BYTES
        or max(sizes[CHECKSUM], sizes.get(SIGNATURE, 0)) > _BLOCK
    ):
        raise BundleError(
            f"{path}: {MANIFEST}, {CHECKSUM} or {SIGNATURE} is too large to be genuine"
        )

    frame = {}
    for name in (MANIFEST, CHECKSUM, SIGNATURE):
        if name in sizes:
            where = storage.location(name)
            frame[name] = _read_at(where.file, where.offset, sizes[name])
    raw = frame[MANIFEST]
    if frame[CHECKSUM] != checksum_line(raw):
        raise BundleError(f"{path}: {MANIFEST} doesn't match {CHECKSUM}; one of them was altered")
    manifest = read_manifest(path, raw)

    for name in manifest.files:
        if name not in sizes:
            raise BundleError(f"{path}: {name} is missing; copy the bundle anew")
        if sizes[name] != manifest.files[name].bytes:
            raise BundleError(
                f"{path}: {name} has {sizes[name]} bytes, not {manifest.files[name].bytes}; "
                "copy the bundle anew"
            )
    extra = sorted(sizes.keys() - manifest.files.keys() - {MANIFEST, CHECKSUM, SIGNATURE})
    if extra:
        raise BundleError(f"{path}: {extra[0]} isn't in the manifest; remove it")
    bundle = Bundle(path, storage, sizes, manifest, frame)
    if isinstance(storage, _Archive) and list(sizes) != archive_order(bundle.frame, manifest.files):
        raise BundleError(f"{path}: its files are not in the manifest's order; it was altered")
    return bundle


def checksum_line(manifest: bytes) -> bytes:
    """Content of bundle.sha256 for the bytes of bundle.json, as `sha256sum` prints it."""
    return f"{hashlib.sha256(manifest).hexdigest()}  {MANIFEST}\n".encode()


def archive_order(frame: Iterable[str], names: Iterable[str]) -> list[str]:
    """Order of the members of the one-file form: the manifest can be read before any weights."""
    return [*frame, *sorted(names)]


def _as_schema_8(raw: bytes) -> bytes:
    """A manifest of a schema before 8 with the wiring that it doesn't say, and without what is no
    longer there. Raises InputError."""
    fields = decode_json(raw, dict[str, msgspec.Raw])
    fields.pop("required_capabilities", None)  # of which no build ever wrote a value
    pipeline = decode_json(fields.get("pipeline", b"{}"), dict[str, msgspec.Raw])
    components = decode_json(pipeline.get("components", b"{}"), dict[str, ComponentSpec])
    tokens = decode_json(pipeline.pop("max_tokens", b"{}"), int)
    wiring = wiring_before_schema_8(components, tokens)
    pipeline["wiring"] = msgspec.Raw(msgspec.json.encode(wiring))
    fields["pipeline"] = msgspec.Raw(msgspec.json.encode(pipeline))
    return msgspec.json.encode(fields)


def read_manifest(path: Path, raw: bytes) -> BundleManifest:
    """What bundle.json says. path: of the bundle, for messages.

    Raises BundleError when it isn't valid, contradicts itself, or has a newer schema.
    """

    class Header(msgspec.Struct):
        schema_version: int

    try:
        version = decode_json(raw, Header).schema_version
        if version > SCHEMA_VERSION:
            raise BundleError(
                f"{path} has schema version {str(version)[:20]}; this edgesd reads up to "
                f"{SCHEMA_VERSION}: upgrade edgesd on this machine"
            )
        if version < _FIRST_WITH_WIRING:
            raw = _as_schema_8(raw)
        manifest = decode_json(raw, BundleManifest)
    except InputError as exc:
        raise BundleError(f"{path}: {MANIFEST} isn't valid: {exc}") from exc
    if manifest.engines.keys() != manifest.pipeline.components.keys():
        raise BundleError(f"{path}: {MANIFEST} doesn't have one engine for each component")
    for name in manifest.files:
        if not is_relative_path(name):
            raise BundleError(f"{path}: {MANIFEST} lists the unsafe path {name[:200]!r}")
        folders = {str(parent) for parent in PurePosixPath(name).parents}
        if name in (MANIFEST, CHECKSUM, SIGNATURE) or folders & manifest.files.keys():
            raise BundleError(f"{path}: {MANIFEST} lists {name!r}, where there is another file")
    for file in manifest.prompter.files if manifest.prompter else ():
        if file not in manifest.files:
            raise BundleError(f"{path}: {MANIFEST} doesn't list {file}")
    for engine in manifest.engines.values():
        if engine.path not in manifest.files or "/" not in engine.path:
            raise BundleError(f"{path}: {MANIFEST} doesn't list {engine.path}")
        parts = engine.split.parts if engine.split else ()
        for beside in (
            engine.kernels,
            *(name for part in parts for name in (part.path, part.kernels)),
        ):
            if beside is not None and (
                beside not in manifest.files
                or PurePosixPath(beside).parent != PurePosixPath(engine.path).parent
            ):
                raise BundleError(f"{path}: {MANIFEST} doesn't list {beside}")
        if (engine.plan is None) != (engine.built_for is None):
            raise BundleError(f"{path}: {MANIFEST} doesn't say what {engine.plan} was built for")
        if engine.plan is not None and engine.plan not in manifest.files:
            raise BundleError(f"{path}: {MANIFEST} doesn't list {engine.plan}")
    return manifest
