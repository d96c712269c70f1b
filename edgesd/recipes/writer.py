"""Collects the contents of a bundle's manifest, and writes it."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

import edgesd
from edgesd.engines.bundle import engine_from_graph, write_manifest
from edgesd.files import atomic_write, sha256_file
from edgesd.runtime.bundle import CHECKSUM, MANIFEST, Bundle, open_bundle
from edgesd.spec.build import BuildRecord
from edgesd.spec.bundle import (
    SCHEMA_VERSION,
    BundleManifest,
    Engine,
    FileEntry,
    GraphSet,
    PrompterSpec,
)
from edgesd.spec.quality import Quality
from edgesd.spec.target import Target

PROMPTER = "prompter"
"""Folder of a bundle that holds its prompter."""


@dataclass(frozen=True)
class Identity:
    """What a bundle is called, and for which target and backend it is."""

    name: str
    target: Target
    backend: str


class BundleWriter:
    """The manifest of the bundle folder `root`, which isn't visible to others yet.

    Facts are added as they become known; `write` writes a manifest of them and of the files in
    `root`. engines: by component.
    """

    def __init__(self, root: Path, identity: Identity, build: BuildRecord | None = None) -> None:
        self.root, self.identity = root, identity
        self._build = build
        self._graphs: GraphSet | None = None
        self.engines: dict[str, Engine] = {}
        self._quality: Quality | None = None
        self._prompter: PrompterSpec | None = None
        self._entries: dict[str, tuple[tuple[int, ...], FileEntry]] = {}

    def put_graphs(self, graphs: GraphSet, quality: Quality | None = None) -> None:
        """The bundle's graphs, each of which becomes an engine, and what images say of them."""
        from edgesd.export.backends import get_lowering

        self._graphs, self._quality = graphs, quality
        backend = self.identity.backend
        self.engines = {
            name: engine_from_graph(graph, backend) for name, graph in graphs.graphs.items()
        }
        for name, content in get_lowering(backend).files(self.engines).items():
            with atomic_write(self.root / name) as file:
                file.write(content)

    def put_engines(self, engines: Mapping[str, Engine]) -> None:
        """Replace the engines by the same with more facts."""
        self.engines = dict(engines)

    def put_prompter(self, folder: Path, spec: PrompterSpec) -> None:
        """Copy an exported prompter into the bundle."""
        names = {name: f"{PROMPTER}/{name}" for name in spec.files}
        (self.root / PROMPTER).mkdir()
        for name, inside in names.items():
            shutil.copyfile(folder / name, self.root / inside)
        self._prompter = msgspec.structs.replace(
            spec,
            base=names[spec.base],
            adapter=names.get(spec.adapter or ""),
            grammar=names.get(spec.grammar or ""),
        )

    def manifest(self) -> BundleManifest:
        """The manifest of the folder's present content."""
        if self._graphs is None:
            raise ValueError("a bundle has graphs: put_graphs comes first")
        graphs, identity = self._graphs, self.identity
        return BundleManifest(
            schema_version=SCHEMA_VERSION,
            name=identity.name,
            target=identity.target.name,
            arch=identity.target.arch,
            backend=identity.backend,
            precision=graphs.precision,
            pipeline=graphs.pipeline,
            engines=dict(self.engines),
            licence=graphs.licence,
            tools={
                "edgesd": edgesd.__version__,
                "python": platform.python_version(),
                **graphs.tools,
            },
            files=self._files(),
            recipe=graphs.recipe,
            quality=self._quality,
            prompter=self._prompter,
            build=self._build,
        )

    def write(self) -> Bundle:
        """Write the manifest of what is in the folder now, and open the bundle."""
        write_manifest(self.root, self.manifest())
        return open_bundle(self.root)

    def _files(self) -> dict[str, FileEntry]:
        """Every file but the manifest, sorted; those that haven't changed aren't hashed again."""
        files: dict[str, FileEntry] = {}
        for path in sorted(self.root.rglob("*")):
            name = path.relative_to(self.root).as_posix()
            if not path.is_file() or name in (MANIFEST, CHECKSUM):
                continue
            status = path.stat()
            identity = (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
            if name not in self._entries or self._entries[name][0] != identity:
                self._entries[name] = identity, FileEntry(status.st_size, sha256_file(path))
            files[name] = self._entries[name][1]
        return files
