"""The manifest of a bundle in the making: what is collected, and what is hashed."""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec
import pytest

from edgesd.device.targets import get_target
from edgesd.files import sha256_file
from edgesd.recipes import writer as module
from edgesd.recipes.writer import BundleWriter, Identity
from edgesd.runtime.bundle import Bundle
from edgesd.spec.build import BuildOptions, BuildRecord, ModelReference
from edgesd.spec.bundle import Graph, GraphSet, PrompterSpec

pytest.importorskip("onnx_ir")

RECORD = BuildRecord(ModelReference("demo", "demo", "0" * 64), BuildOptions("x86-64-cpu"))


@pytest.fixture
def writer(miniature: Bundle, tmp_path: Path) -> BundleWriter:
    """Of a folder with the files of the miniature pipeline."""
    root = tmp_path / "bundle"
    shutil.copytree(miniature.path, root)
    return BundleWriter(root, Identity("tiny", get_target("x86-64-cpu"), "onnxruntime"), RECORD)


def graphs(bundle: Bundle) -> GraphSet:
    manifest = bundle.manifest
    return GraphSet(
        root=str(bundle.path),
        pipeline=manifest.pipeline,
        precision="fp32",
        graphs={
            name: Graph(name, engine.path, "fp32", engine.parity)
            for name, engine in manifest.engines.items()
        },
        assets=(),
        licence=manifest.licence,
        tools={"torch": "2"},
    )


def test_what_is_put_in_is_written_with_the_files_that_are_there(
    writer: BundleWriter, miniature: Bundle, tmp_path: Path
) -> None:
    writer.put_graphs(graphs(miniature))
    name = next(iter(writer.engines))
    checked = msgspec.structs.replace(writer.engines[name], checked="passed")
    writer.put_engines({**writer.engines, name: checked})
    (tmp_path / "prompter").mkdir()
    (tmp_path / "prompter" / "base.gguf").write_bytes(b"weights")
    spec = PrompterSpec("base.gguf", None, "emoji", "{}", "MIT")
    writer.put_prompter(tmp_path / "prompter", spec)
    bundle = writer.write()
    bundle.verify()
    manifest = bundle.manifest
    assert manifest.files.keys() == miniature.manifest.files.keys() | {"prompter/base.gguf"}
    assert manifest.engines[name].checked == "passed" and manifest.build == RECORD
    assert manifest.prompter is not None and manifest.prompter.base == "prompter/base.gguf"
    assert manifest.name == "tiny" and manifest.tools["torch"] == "2"


def test_only_what_changed_is_hashed_again(
    writer: BundleWriter, miniature: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[str] = []

    def counted(path: Path) -> str:
        hashed.append(path.relative_to(writer.root).as_posix())
        return sha256_file(path)

    monkeypatch.setattr(module, "sha256_file", counted)
    writer.put_graphs(graphs(miniature))
    writer.write()
    assert sorted(hashed) == sorted(miniature.manifest.files)
    hashed.clear()
    (writer.root / "LICENSE").write_text("Changed.\n")
    (writer.root / "unet" / "more.bin").write_bytes(b"1")
    bundle = writer.write()
    bundle.verify()
    assert sorted(hashed) == ["LICENSE", "unet/more.bin"]
    (writer.root / "unet" / "more.bin").unlink()
    assert "unet/more.bin" not in writer.write().manifest.files


def test_a_bundle_without_graphs_is_none(writer: BundleWriter) -> None:
    with pytest.raises(ValueError, match="put_graphs"):
        writer.write()
