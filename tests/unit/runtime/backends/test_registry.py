"""Backends are found by their names, and by nothing else."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from edgesd.engines.bundle import update_manifest
from edgesd.errors import TargetError
from edgesd.runtime.backends import backend_names, get_backend
from edgesd.runtime.bundle import Bundle, open_bundle
from edgesd.runtime.pipeline import Pipeline
from tests.support import write_bundle


@pytest.mark.parametrize("name", backend_names())
def test_a_backend_is_called_as_its_file(name: str) -> None:
    backend = get_backend(name)
    assert backend.name == name
    assert backend.memory_modes[0] == "fast"


@pytest.mark.parametrize(
    "name", ["", "base", "fake", "os", "..", ".onnxruntime", "onnxruntime.sys", "ONNXRUNTIME"]
)
def test_other_names_import_nothing(name: str) -> None:
    with pytest.raises(TargetError, match="it runs onnxruntime, tensorrt"):
        get_backend(name)


def test_each_backend_has_its_lowering() -> None:
    lowerings = pytest.importorskip("edgesd.export.backends")
    assert [lowering.name for lowering in lowerings.all_lowerings()] == backend_names()


def test_a_bundle_of_a_backend_that_is_not_there(tmp_path: Path) -> None:
    bundle: Bundle = write_bundle(tmp_path / "bundle")
    manifest = bundle.manifest
    engines = {
        name: msgspec.structs.replace(engine, backend="newer")
        for name, engine in manifest.engines.items()
    }
    update_manifest(bundle.path, msgspec.structs.replace(manifest, engines=engines))
    with pytest.raises(TargetError, match="this version has no backend 'newer'"):
        Pipeline(open_bundle(bundle.path))
