"""One model as a diffusers folder, a single file and a folder of ONNX graphs: one bundle."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

from edgesd.runtime.bundle import Bundle, open_bundle
from edgesd.runtime.pipeline import Pipeline
from edgesd.runtime.requests import Request
from tests.onnx_folders import write_onnx_folder
from tests.single_files import without_weights, write_single_file
from tests.support import assert_refused, run_cli
from tests.tiny_pipelines import tiny, write_tiny

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]
NAME = "sd"


def build(model: Path, *options: object) -> Bundle:
    out = model.parent / f"{model.stem}-bundle"
    made = run_cli("build", model, "--target", "x86-64-cpu", "-o", out, *options)
    assert made.code == 0, made.err
    return open_bundle(out)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("forms")


@pytest.fixture(scope="module")
def folder(root: Path) -> Bundle:
    return build(write_tiny(NAME, root / "folder"))


@pytest.fixture(scope="module")
def single_file(root: Path, folder: Bundle) -> Bundle:
    configs = without_weights(Path(shutil.copytree(root / "folder", root / "configs")))
    spec = {"modelspec.license": "CreativeML Open RAIL-M"}
    file = write_single_file(root / "folder", root / "single.safetensors", **spec)
    refused = run_cli("build", root / "folder", "--config", configs, "--target", "x86-64-cpu")
    assert_refused(refused, "is no single file")
    return build(file, "--config", configs)


def weights(bundle: Bundle) -> dict[str, str]:
    """File of graphs and weights -> its hash."""
    manifest = bundle.manifest
    return {
        name: entry.sha256
        for name, entry in manifest.files.items()
        if name.split("/", 1)[0] in manifest.engines
    }


def image(bundle: Bundle) -> np.ndarray:
    with Pipeline(bundle) as pipeline:
        request = Request("a red cat", 3, num_inference_steps=3)
        return np.asarray(pipeline.generate([request])[0], np.int16)


def test_a_single_file_makes_the_same_bundle(folder: Bundle, single_file: Bundle) -> None:
    assert weights(single_file) == weights(folder)
    assert np.array_equal(image(single_file), image(folder))
    manifest = single_file.manifest
    assert (manifest.pipeline.source, manifest.licence.name) == ("single", "CreativeML Open RAIL-M")
    assert manifest.build is not None
    assert (manifest.build.model.kind, manifest.build.model.name) == ("folder", "single")


def test_an_onnx_folder_makes_the_same_images(root: Path, folder: Bundle) -> None:
    given = build(write_onnx_folder(tiny(NAME), root / "graphs"))
    assert np.abs(image(given) - image(folder)).max() <= 1
