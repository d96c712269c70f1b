"""Writes bundles: the folder form, and the one-file form from it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import msgspec

from edgesd.files import atomic_write, sha256_file
from edgesd.runtime.bundle import (
    CHECKSUM,
    MANIFEST,
    SIGNATURE,
    Bundle,
    OnBytes,
    archive_header,
    archive_order,
    checksum_line,
)
from edgesd.spec.bundle import SCHEMA_VERSION, BundleManifest, Engine, FileEntry, Graph


def engine_from_graph(graph: Graph, backend: str) -> Engine:
    """The engine of one component for a backend: its graph, which is compiled, if need be, where it
    runs."""
    return Engine(
        component=graph.component,
        path=graph.path,
        backend=backend,
        precision=graph.precision,
        parity=graph.parity,
        kernels=graph.kernels,
        split=graph.split,
        slots=graph.slots,
    )


def write_manifest(root: Path, manifest: BundleManifest) -> None:
    """Write bundle.json and its checksum into `root`, which holds the manifest's files already."""
    raw = msgspec.json.format(msgspec.json.encode(manifest, order="deterministic"), indent=1)
    for name, content in ((MANIFEST, raw), (CHECKSUM, checksum_line(raw))):
        with atomic_write(root / name) as file:
            file.write(content)


def update_manifest(root: Path, manifest: BundleManifest, changed: Iterable[str] = ()) -> None:
    """Write `manifest` anew into `root`, where the files `changed` are new or have changed."""
    entries = {}
    for name in changed:
        path = root / name
        entries[name] = FileEntry(path.stat().st_size, sha256_file(path))
    files = dict(sorted({**manifest.files, **entries}.items()))
    newest = msgspec.structs.replace(manifest, schema_version=SCHEMA_VERSION, files=files)
    write_manifest(root, newest)


def pack_bundle(
    bundle: Bundle,
    path: Path,
    on_bytes: OnBytes | None = None,
    signature: bytes | None = None,
) -> None:
    """Write `bundle` in its one-file form to `path`: an uncompressed tar that is mapped in place.

    signature: instead of the one that it has, if any; only with it an older `path` is replaced.
    Verifies every byte on the way, in one
    reading. Raises BundleError when the bundle is damaged, ResourceError when the disk is full;
    `path` is then left as it was.
    """
    frame = bundle.frame if signature is None else (CHECKSUM, SIGNATURE, MANIFEST)
    with atomic_write(path, new=signature is None) as out:
        for name in archive_order(frame, bundle.manifest.files):
            if name == SIGNATURE and signature is not None:
                chunks: Iterable[bytes] = (signature,)
                size = len(signature)
            else:
                listed = name in bundle.manifest.files
                chunks = bundle.verified_chunks(name) if listed else bundle.chunks(name)
                size = bundle.size(name)
            out.write(archive_header(name, size))
            for chunk in chunks:
                out.write(chunk)
                if on_bytes:
                    on_bytes(len(chunk))
            out.write(bytes(-size % 512))
        out.write(bytes(2 * 512))


def sign_bundle(bundle: Bundle, signature: bytes, on_bytes: OnBytes | None = None) -> None:
    """Put `signature` (runtime.signature.sign) into `bundle`, once every byte of it is verified.

    A one-file bundle is written anew. Raises BundleError when the bundle is damaged.
    """
    if bundle.path.is_dir():
        bundle.verify(on_bytes=on_bytes)
        with atomic_write(bundle.path / SIGNATURE) as file:
            file.write(signature)
    else:
        pack_bundle(bundle, bundle.path, on_bytes, signature)
