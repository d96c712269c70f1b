"""Opens and verifies bundles: a folder, or the same files in one uncompressed tar (`.edgesd`).

A bundle is `bundle.json` (the manifest, edgesd.spec.BundleManifest), `bundle.sha256` (the
manifest's checksum, as `sha256sum -c` reads it), perhaps `bundle.sig` (runtime/signature.py) and
exactly the files that the manifest lists.
Opening checks the manifest's checksum and schema, and every file's presence and size; the bytes of
a file are hashed before it is first used, or all at once by `verify`.

The one-file form has one canonical byte sequence for given files (POSIX ustar headers with fixed
owner, mode and time, in the manifest's order), so that no byte of it is unchecked, and its members
lie 512-byte aligned, so that weights are memory-mapped in place.
"""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple, Protocol

import msgspec

from edgesd.errors import BundleError
from edgesd.runtime.onnx_wire import relocate_external_data
from edgesd.spec import SCHEMA_VERSION, BundleManifest, Engine, Half

MANIFEST = "bundle.json"
CHECKSUM = "bundle.sha256"
SIGNATURE = "bundle.sig"
SUFFIX = ".edgesd"
"""File name suffix of the one-file form."""

_MAX_MANIFEST_BYTES = 16 << 20
_CHUNK_BYTES = 4 << 20
_BLOCK = tarfile.BLOCKSIZE

Progress = Callable[[str, int], None]
"""Called with a file's name and the bytes just hashed."""


class Location(NamedTuple):
    """Where a file's bytes lie: in the file `path`, from `offset` on."""

    path: Path
    offset: int


class _Storage(Protocol):
    def sizes(self) -> dict[str, int]:
        """Name -> bytes of every file that is there."""

    def location(self, name: str) -> Location: ...


class _Folder:
    def __init__(self, path: Path) -> None:
        self.path = path

    def sizes(self) -> dict[str, int]:
        if not (self.path / MANIFEST).is_file():
            return {}  # whatever it is, don't walk it
        found = {}
        for entry in sorted(self.path.rglob("*")):
            name = entry.relative_to(self.path).as_posix()
            if entry.is_symlink() or not (entry.is_file() or entry.is_dir()):
                raise BundleError(f"{self.path}: {name} isn't a regular file; copy the bundle anew")
            if entry.is_file():
                found[name] = entry.stat().st_size
        return found

    def location(self, name: str) -> Location:
        return Location(self.path / name, 0)


class _Archive:
    """The one-file form. Reads headers only, and refuses any that isn't the canonical one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._members: dict[str, tuple[int, int]] = {}
        end = path.stat().st_size
        with path.open("rb") as file:
            at = 0
            while (header := _read_at(file, at, _BLOCK)) != bytes(_BLOCK):
                name, size = self._parse(header)
                data = at + _BLOCK
                at = data + -(-size // _BLOCK) * _BLOCK
                if at + 2 * _BLOCK > end:
                    raise BundleError(f"{path} is truncated within {name}; copy the bundle anew")
                if any(_read_at(file, data + size, at - data - size)):
                    raise BundleError(f"{path} was altered behind {name}; copy the bundle anew")
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
        return Location(self.path, self._members[name][0])


def archive_header(name: str, size: int) -> bytes:
    """The one ustar header [512 bytes] that a member of a one-file bundle may have."""
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tarfile.USTAR_FORMAT if size < 8 << 30 else tarfile.GNU_FORMAT)


def _read_at(file: BinaryIO, at: int, count: int) -> bytes:
    file.seek(at)
    data = file.read(count)
    if len(data) != count:
        raise BundleError(f"{file.name} is truncated; copy the bundle anew")
    return data


class GraphFile(NamedTuple):
    """A graph ready for a session: the model's bytes, and the folder of its external data."""

    model: bytes
    folder: Path


class Bundle:
    """An opened bundle. Nothing in it is ever written. Made by `open_bundle`."""

    def __init__(
        self, path: Path, storage: _Storage, sizes: dict[str, int], manifest: BundleManifest
    ) -> None:
        self.path = path
        self.manifest = manifest
        self._storage = storage
        self._sizes = sizes
        self._verified: set[str] = set()

    def location(self, name: str) -> Location:
        """Where the bytes of the file `name` lie. KeyError if the bundle has no such file."""
        return self._storage.location(name)

    @property
    def manifest_sha256(self) -> str:
        """Of bundle.json: it stands for the whole bundle."""
        return hashlib.sha256(b"".join(self.chunks(MANIFEST))).hexdigest()

    @property
    def signed(self) -> bool:
        """Whether there is a signature, right or wrong."""
        return SIGNATURE in self._sizes

    @property
    def frame(self) -> tuple[str, ...]:
        """Names of the files that the manifest doesn't list: what it is found by."""
        return tuple(name for name in (CHECKSUM, SIGNATURE, MANIFEST) if name in self._sizes)

    def size(self, name: str) -> int:
        """Bytes of the file `name`, manifest and checksum included."""
        return self._sizes[name]

    def chunks(self, name: str) -> Iterator[bytes]:
        """The bytes of the file `name`, in pieces of at most 4 MiB, not verified."""
        where = self.location(name)
        left = self.size(name)
        with where.path.open("rb") as file:
            file.seek(where.offset)
            while left and (chunk := file.read(min(left, _CHUNK_BYTES))):
                left -= len(chunk)
                yield chunk

    def verified_chunks(self, name: str) -> Iterator[bytes]:
        """`chunks` of a file that the manifest lists, hashed as they are read.

        Raises BundleError behind the last one when the bytes differ from the manifest.
        """
        digest = hashlib.sha256()
        for chunk in self.chunks(name):
            digest.update(chunk)
            yield chunk
        if digest.hexdigest() != self.manifest.files[name].sha256:
            raise BundleError(
                f"{self.path}: {name} was altered or damaged (its sha256 differs from the "
                "manifest's); copy the bundle anew or build it again"
            )
        self._verified.add(name)

    def verify(self, names: Iterable[str] | None = None, progress: Progress | None = None) -> None:
        """Hash `names` (all files by default); those that were hashed before are skipped.

        Raises BundleError naming the first file whose bytes differ from the manifest.
        """
        for name in self.manifest.files if names is None else names:
            if name not in self._verified:
                for chunk in self.verified_chunks(name):
                    if progress:
                        progress(name, len(chunk))

    def read(self, name: str) -> bytes:
        """The verified bytes of the file `name`. Raises BundleError if it was altered."""
        if name not in self.manifest.files:
            raise BundleError(f"{self.path}: the manifest lists no {name}; build the bundle again")
        return b"".join(self.verified_chunks(name))

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
        self, component: str, kernels: bool = False, half: Half | None = None
    ) -> GraphFile:
        """Verify one component's files and return what an ONNX session loads.

        kernels: its graph for edgesd's own kernels, where the engine has one. half: of its halves,
        the graph of this one.

        In the one-file form the references to the weights are moved into that file, so that they
        are memory-mapped there. Raises BundleError if a file was altered.
        """
        engine = self.manifest.engines[component]
        graphs = half or engine
        path = graphs.kernels if kernels and graphs.kernels else graphs.path
        model = self.read(path)
        self.verify(self.engine_files(engine))
        folder = PurePosixPath(path).parent
        graph_path = self.location(path).path
        if isinstance(self._storage, _Folder):
            return GraphFile(model, graph_path.parent)

        try:
            graph_path.name.encode()
        except UnicodeEncodeError as exc:
            raise BundleError(f"{self.path!a} has a name that isn't UTF-8: rename it") from exc

        def into_archive(location: str, offset: int) -> tuple[str, int]:
            name = str(folder / location)
            if name not in self.manifest.files:
                raise BundleError(f"{self.path}: {path} refers to {name}, which is missing")
            return graph_path.name, self.location(name).offset + offset

        return GraphFile(relocate_external_data(model, into_archive), graph_path.parent)


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

    def content(name: str) -> bytes:
        where = storage.location(name)
        with where.path.open("rb") as file:
            return _read_at(file, where.offset, sizes[name])

    raw = content(MANIFEST)
    if content(CHECKSUM) != checksum_line(raw):
        raise BundleError(f"{path}: {MANIFEST} doesn't match {CHECKSUM}; one of them was altered")
    manifest = _decode(path, raw)

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
    bundle = Bundle(path, storage, sizes, manifest)
    if isinstance(storage, _Archive) and list(sizes) != archive_order(bundle.frame, manifest.files):
        raise BundleError(f"{path}: its files are not in the manifest's order; it was altered")
    return bundle


def checksum_line(manifest: bytes) -> bytes:
    """Content of bundle.sha256 for the bytes of bundle.json, as `sha256sum` prints it."""
    return f"{hashlib.sha256(manifest).hexdigest()}  {MANIFEST}\n".encode()


def archive_order(frame: Iterable[str], names: Iterable[str]) -> list[str]:
    """Order of the members of the one-file form: the manifest can be read before any weights."""
    return [*frame, *sorted(names)]


def _decode(path: Path, raw: bytes) -> BundleManifest:
    class Header(msgspec.Struct):
        schema_version: int

    try:
        version = msgspec.json.decode(raw, type=Header).schema_version
        if version > SCHEMA_VERSION:
            raise BundleError(
                f"{path} has schema version {version}; this edgesd reads up to {SCHEMA_VERSION}: "
                "upgrade edgesd on this machine"
            )
        manifest = msgspec.json.decode(raw, type=BundleManifest)
    except msgspec.MsgspecError as exc:
        raise BundleError(f"{path}: {MANIFEST} isn't valid: {exc}") from exc
    if manifest.engines.keys() != manifest.pipeline.components.keys():
        raise BundleError(f"{path}: {MANIFEST} has not one engine for each component")
    for name in [*manifest.files, *(engine.path for engine in manifest.engines.values())]:
        pure = PurePosixPath(name)
        if pure.is_absolute() or ".." in pure.parts or str(pure) != name:
            raise BundleError(f"{path}: {MANIFEST} lists the unsafe path {name!r}")
    for file in manifest.prompter.files if manifest.prompter else ():
        if file not in manifest.files:
            raise BundleError(f"{path}: {MANIFEST} doesn't list {file}")
    for engine in manifest.engines.values():
        if engine.path not in manifest.files or "/" not in engine.path:
            raise BundleError(f"{path}: {MANIFEST} doesn't list {engine.path}")
        halves = (engine.halves.head, engine.halves.tail) if engine.halves else ()
        for beside in (
            engine.kernels,
            *(name for half in halves for name in (half.path, half.kernels)),
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
