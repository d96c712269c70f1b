"""A bundle for TensorRT, from `edgesd finalize` to the image: on fakes of the GPU and TensorRT,
and without either."""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
from PIL import Image

from edgesd.engines import plans
from edgesd.engines.bundle import pack_bundle, update_manifest
from edgesd.engines.tensorrt import PlanReport
from edgesd.errors import EdgesdError, ResourceError
from edgesd.runtime.bundle import Bundle
from edgesd.runtime.cuda import Gpu
from tests import fake_tensorrt
from tests.boards import JETSON as HERE
from tests.boards import Builder
from tests.support import assert_refused, run_cli, write_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    arm = platform.machine() in ("aarch64", "arm64")
    target, arch = ("raspberry-pi-4", "aarch64") if arm else ("x86-64-cpu", "x86_64")
    folder = tmp_path_factory.mktemp("bundles") / "for-tensorrt"
    return write_bundle(folder, target, arch, "tensorrt")


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


@pytest.fixture
def wanted(miniature: Bundle, tmp_path: Path) -> np.ndarray:
    """The image that ONNX Runtime generates of the same pipeline."""
    out = tmp_path / "wanted.png"
    run_cli("generate", miniature.path, "-p", "a red apple", "--seed", "3", "-o", out)
    return pixels(out)


Generate = Callable[..., tuple[str, np.ndarray]]


@pytest.fixture
def generate(tmp_path: Path) -> Generate:
    def generated(path: Path, *more: object) -> tuple[str, np.ndarray]:
        out = tmp_path / "image.png"
        outcome = run_cli("generate", path, "-p", "a red apple", "--seed", "3", "-o", out, *more)
        assert outcome.code == 0, outcome.err
        return outcome.err, pixels(out)

    return generated


def test_the_first_run_builds_plans_and_later_ones_find_them(
    bundle: Bundle, board: Builder, generate: Generate, wanted: np.ndarray
) -> None:
    said, image = generate(bundle.path)
    assert board.built == ["text_encoder", "unet", "vae_decoder"]
    assert "building the plan of unet for this machine, once" in said
    assert "on the CPU" not in said
    np.testing.assert_array_equal(image, wanted)
    said, image = generate(bundle.path)
    assert len(board.built) == 3 and "building" not in said
    np.testing.assert_array_equal(image, wanted)


def test_a_one_file_bundle_is_built_from_in_place(
    bundle: Bundle, board: Builder, generate: Generate, wanted: np.ndarray, tmp_path: Path
) -> None:
    path = tmp_path / "one.edgesd"
    pack_bundle(bundle, path)
    _, image = generate(path)
    np.testing.assert_array_equal(image, wanted)
    generate(bundle.path)
    assert len(board.built) == 3  # the same files, the same plans


def test_finalize_builds_them_ahead(bundle: Bundle, board: Builder, generate: Generate) -> None:
    outcome = run_cli("finalize", bundle.path)
    assert outcome.code == 0, outcome.err
    assert "unet" in outcome.out and "tensorrt 10.3.0, sm_87" in outcome.out
    assert len(board.built) == 3
    generate(bundle.path)
    assert len(board.built) == 3
    told = json.loads(run_cli("finalize", bundle.path, "--json").out)
    assert told["unet"]["plan"]["report"]["environment"]["sm"] == "sm_87"
    assert Path(told["unet"]["path"]).is_file()


def test_no_plan_is_built_for_what_generates_nothing(
    bundle: Bundle, board: Builder, tmp_path: Path
) -> None:
    root = shutil.copytree(bundle.path, tmp_path / "more")
    manifest = bundle.manifest
    pipeline = manifest.pipeline
    more = msgspec.structs.replace(pipeline.components["vae_decoder"], name="spare")
    engine = msgspec.structs.replace(manifest.engines["vae_decoder"], component="spare")
    pipeline = msgspec.structs.replace(pipeline, components={**pipeline.components, "spare": more})
    engines = {**manifest.engines, "spare": engine}
    update_manifest(root, msgspec.structs.replace(manifest, pipeline=pipeline, engines=engines))
    outcome = run_cli("finalize", root)
    assert outcome.code == 0, outcome.err
    assert board.built == ["text_encoder", "unet", "vae_decoder"]


@pytest.mark.parametrize("change", ["damaged", "cut", "no report", "other version"])
def test_a_plan_that_does_not_hold_is_built_anew(
    change: str, bundle: Bundle, board: Builder, generate: Generate, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_cli("finalize", bundle.path)
    told = json.loads(run_cli("finalize", bundle.path, "--json").out)
    path = Path(told["unet"]["path"])
    if change == "damaged":
        raw = bytearray(path.read_bytes())
        raw[100] ^= 1
        path.write_bytes(raw)
    elif change == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    elif change == "no report":
        path.with_suffix(".json").unlink()
    else:
        monkeypatch.setattr(fake_tensorrt, "__version__", "10.16.1")
    generate(bundle.path)
    expected = ["text_encoder", "unet", "vae_decoder"] if change == "other version" else ["unet"]
    assert board.built[3:] == expected
    assert not [p for p in path.parent.iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ResourceError("unet: tensorrt was killed"), "unet: tensorrt was killed"),
        (EdgesdError("unet: tensorrt refuses the graph: no"), "refuses the graph"),
    ],
)
def test_a_build_that_fails_falls_back_or_fails(
    error: EdgesdError,
    words: str,
    bundle: Bundle,
    board: Builder,
    generate: Generate,
    wanted: np.ndarray,
    tmp_path: Path,
) -> None:
    board.error = error
    said, image = generate(bundle.path)
    assert said.count("generating on the CPU instead, by ONNX Runtime") == 1 and words in said
    np.testing.assert_array_equal(image, wanted)
    out = tmp_path / "none.png"
    outcome = run_cli("generate", bundle.path, "-p", "a cat", "--no-fallback", "-o", out)
    assert outcome.code == error.exit_code
    begun, refused = outcome.err.splitlines()
    assert "building the plan of text_encoder" in begun and words in refused
    assert not out.exists()


def test_a_plan_that_does_not_load_falls_back(
    bundle: Bundle,
    board: Builder,
    generate: Generate,
    wanted: np.ndarray,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run_cli("finalize", bundle.path)
    monkeypatch.setattr(fake_tensorrt.Engine, "contexts", 0)
    said, image = generate(bundle.path)
    for component in ("text_encoder", "unet", "vae_decoder"):
        assert f"not enough GPU memory for {component}" in said
    np.testing.assert_array_equal(image, wanted)
    outcome = run_cli("generate", bundle.path, "-p", "a cat", "--no-fallback")
    assert_refused(outcome, "not enough GPU memory for text_encoder")


def test_bf16_needs_a_gpu_that_has_it(
    bundle: Bundle, board: Builder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    root = shutil.copytree(bundle.path, tmp_path / "bf16")
    engines = {
        name: msgspec.structs.replace(engine, precision="bf16")
        for name, engine in bundle.manifest.engines.items()
    }
    update_manifest(root, msgspec.structs.replace(bundle.manifest, engines=engines))
    monkeypatch.setattr(plans, "find_gpu", lambda: Gpu("Xavier", "sm_72", 8 << 30))
    refused = "computes in bf16, which GPUs have from sm_80 on, and Xavier is sm_72"
    assert_refused(run_cli("finalize", root), refused)
    assert board.built == []
    outcome = run_cli("generate", root, "-p", "a cat", "-o", tmp_path / "cat.png")
    assert outcome.code == 0 and refused in outcome.err and "on the CPU instead" in outcome.err


@pytest.mark.skipif(not isinstance(plans.find_gpu(), str), reason="this machine has an NVIDIA GPU")
def test_without_a_gpu(
    bundle: Bundle, generate: Generate, wanted: np.ndarray, tmp_path: Path
) -> None:
    said, image = generate(bundle.path)
    assert "driver" in said and "generating on the CPU instead" in said
    np.testing.assert_array_equal(image, wanted)
    outcome = run_cli("generate", bundle.path, "-p", "a cat", "--no-fallback")
    assert outcome.code == 5
    assert_refused(outcome, "driver")
    outcome = run_cli("finalize", bundle.path)
    assert outcome.code == 5
    assert_refused(outcome, "driver")


def test_a_bundle_that_needs_no_plans(miniature: Bundle) -> None:
    outcome = run_cli("finalize", miniature.path)
    assert outcome.code == 2
    assert_refused(outcome, "which needs no plans")


def test_an_altered_bundle_is_refused_and_not_generated_on_the_cpu(
    board: Builder, tmp_path: Path
) -> None:
    folder = write_bundle(tmp_path / "altered", backend="tensorrt").path
    weights = folder / "text_encoder" / "weights.bin"
    raw = bytearray(weights.read_bytes())
    raw[0] ^= 1
    weights.write_bytes(raw)
    outcome = run_cli("generate", folder, "-p", "a cat", "--any-machine")
    assert outcome.code == 4
    assert_refused(outcome, "text_encoder/weights.bin was altered")


def test_a_plans_report_survives_its_json() -> None:
    plan = plans.CachedPlan("unet", "0" * 64, PlanReport(HERE, 5, 1.0, 2, 1, ("w",)))
    assert msgspec.json.decode(msgspec.json.encode(plan), type=plans.CachedPlan) == plan
