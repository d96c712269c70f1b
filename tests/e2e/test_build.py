"""edgesd build and demo on the embedded pipeline; the image against diffusers' own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import msgspec
import numpy as np
import pytest
from PIL import Image

from edgesd.evaluate.psnr import psnr
from edgesd.runtime.bundle import open_bundle
from edgesd.runtime.pipeline import Pipeline
from edgesd.runtime.settings import Settings
from tests.support import assert_refused, run_cli

pytestmark = pytest.mark.usefixtures("kept_exports")

MODEL = Path(__file__).resolve().parents[2] / "models" / "emoji"


@pytest.fixture(scope="module")
def demo(kept_exports: object, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output folder of `edgesd demo`."""
    out = tmp_path_factory.mktemp("demo") / "out"
    outcome = run_cli("demo", "-o", out)
    assert outcome.code == 0, outcome.err
    assert "next: edgesd generate" in outcome.out
    return out


def bundle_of(demo: Path) -> Path:
    (bundle,) = demo.glob("bundle-*")
    return bundle


def test_demo_generates_eight_images_on_a_sheet(demo: Path) -> None:
    images = sorted((demo / "images").iterdir())
    assert len(images) == 8
    side = Image.open(images[0]).width
    assert Image.open(demo / "images.png").width > 4 * side
    for path in images:
        assert np.asarray(Image.open(path)).std() > 20  # not one flat colour


def test_demo_uses_its_bundle_again(demo: Path, tmp_path: Path) -> None:
    again = Path(shutil.copytree(demo, tmp_path / "out"))
    before = (bundle_of(again) / "bundle.json").stat().st_mtime_ns
    outcome = run_cli("demo", "-o", again)
    assert outcome.code == 0
    assert "using the bundle" in outcome.err
    assert (bundle_of(again) / "bundle.json").stat().st_mtime_ns == before
    assert len(list((again / "images").iterdir())) == 16  # those of before stay


def test_the_bundle_says_what_it_is(demo: Path) -> None:
    outcome = run_cli("inspect", bundle_of(demo), "--json")
    manifest = json.loads(outcome.out)["manifest"]
    assert manifest["licence"]["name"] == "apache-2.0"
    assert {"torch", "diffusers", "onnxruntime", "edgesd"} <= manifest["tools"].keys()
    engines = manifest["engines"]
    assert engines.keys() == {"text_encoder", "unet", "vae_decoder"}
    for engine in engines.values():
        assert 0 < engine["parity"]["rel_rms"] <= engine["parity"]["tolerance"] <= 1e-4


@pytest.mark.parametrize(
    ("ours", "theirs", "steps"),
    [("ddim", None, 20), ("dpmpp-2m", "DPMSolverMultistepScheduler", 8)],
)
def test_same_seed_same_image_as_diffusers(
    demo: Path, tmp_path: Path, ours: str, theirs: str | None, steps: int
) -> None:
    import diffusers
    import torch

    pipe = diffusers.StableDiffusionPipeline.from_pretrained(str(MODEL))
    pipe.set_progress_bar_config(disable=True)
    if theirs:
        pipe.scheduler = getattr(diffusers, theirs).from_config(pipe.scheduler.config)
    prompts = ["a red apple", "a green dinosaur"]
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 3)]
    expected = pipe(
        prompts, num_inference_steps=steps, guidance_scale=4.0, generator=generators
    ).images
    outcome = run_cli(
        "generate", bundle_of(demo), "-p", prompts[0], "-p", prompts[1], "--seed", 3,
        "--steps", steps, "--guidance", 4, "--scheduler", ours, "-o", tmp_path,
    )  # fmt: skip
    assert outcome.code == 0
    for image, path in zip(expected, sorted(tmp_path.glob("*.png")), strict=True):
        assert psnr(np.asarray(image), np.asarray(Image.open(path))) >= 45


@pytest.mark.parametrize("precision", ["fp16", pytest.param("bf16", marks=pytest.mark.slow)])
def test_build_for_a_board_in_one_file(precision: str, tmp_path: Path) -> None:
    out = tmp_path / "demo.edgesd"
    outcome = run_cli(
        "build", "demo", "--target", "jetson-orin", "--precision", precision, "--size", "64x64",
        "-o", out,
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    assert "plans are built where they run" in outcome.out
    bundle = open_bundle(out)
    assert bundle.manifest.backend == "tensorrt"
    for name, engine in bundle.manifest.engines.items():
        assert engine.checked and engine.checked.startswith(("passed", "built for sm_86 by")), name
    assert b"--onnx=unet/model.onnx" in bundle.read("trtexec.sh")
    assert bundle.manifest.target == "jetson-orin-nano-4gb"
    assert bundle.manifest.precision == precision
    assert not bundle.manifest.pipeline.shape.dynamic
    parameters = sum(path.stat().st_size for path in MODEL.rglob("*.safetensors"))
    assert out.stat().st_size < 1.5 * parameters  # the checkpoint is fp16, too
    assert list(tmp_path.iterdir()) == [out]
    again = run_cli("build", "demo", "--target", "x86-64-cpu", "-o", out)
    assert_refused(again, "exists already")
    png = tmp_path / "a.png"
    options = ("-p", "a cat", "--any-machine", "--steps", 2, "-o", png)
    assert run_cli("generate", out, *options).code == 0
    assert Image.open(png).size == (64, 64)
    assert_refused(run_cli("generate", out, *options, "--size", "128x128"), "64x64 pixels only")


def test_a_bundle_is_built_again_like_another(demo: Path, tmp_path: Path) -> None:
    first, out = bundle_of(demo), tmp_path / "again"
    outcome = run_cli("build", "--like", first, "-o", out)
    assert outcome.code == 0, outcome.err
    assert f"graphs and weights are those of {first}, byte for byte" in outcome.out
    ours, theirs = (open_bundle(path).manifest for path in (out, first))
    assert ours.build == theirs.build and ours.engines == theirs.engines
    assert str(MODEL.parent) not in (out / "bundle.json").read_text().split('"build"')[1]
    small = tmp_path / "small.edgesd"
    outcome = run_cli(
        "build", "demo", "--like", first, "--size", "64x64", "--batch", 2, "-o", small, "--json"
    )
    assert outcome.code == 0, outcome.err
    assert "unet/model.onnx" in json.loads(outcome.out)["differing"]
    record = open_bundle(small).manifest.build
    assert record is not None and record.options.size == (64, 64)


def test_static_rows_hold_both_halves_of_guidance_or_images(demo: Path, tmp_path: Path) -> None:
    out = tmp_path / "static"
    outcome = run_cli(
        "build", "demo", "--target", "x86-64-cpu", "--size", "64x64", "--batch", 2, "-o", out
    )
    assert outcome.code == 0, outcome.err
    base = ("-p", "a cat", "--seed", 4, "--steps", 4, "--size", "64x64", "--any-machine")
    for name, bundle, options in (
        ("guided", out, ()),
        ("two", out, ("-n", 2, "--batch", 2)),
        ("dynamic", bundle_of(demo), ("-n", 2)),
    ):
        assert run_cli("generate", bundle, *base, *options, "-o", tmp_path / name).code == 0
    expected = sorted((tmp_path / "dynamic").iterdir())
    for name, count in (("guided", 1), ("two", 2)):
        found = sorted((tmp_path / name).iterdir())
        assert len(found) == count
        for ours, other in zip(found, expected, strict=False):
            assert psnr(np.asarray(Image.open(ours)), np.asarray(Image.open(other))) >= 60
    refused = run_cli(
        "generate", out, *base, "-n", 3, "--batch", 2, "--guidance-mode", "sequential"
    )
    assert_refused(refused, "a batch of exactly 2; 1 at a time need")


def test_without_the_build_extra_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    outcome = run_cli("build", "demo", "--target", "x86-64-cpu", "-o", tmp_path / "b")
    assert_refused(outcome, "pip install 'edgesd[build]'")


def test_a_model_too_large_for_the_board_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgesd.recipes.planner.PROCESS_BYTES", 400 << 20)
    monkeypatch.chdir(tmp_path)
    outcome = run_cli("build", "demo", "--target", "raspberry-pi-zero-2w")
    assert outcome.code == 5
    assert_refused(outcome, "demo in fp32 at 128x128 needs 4", "raspberry-pi-zero-2w has 336 MB")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["demo", "--target", "raspbery-pi-5"], "did you mean 'raspberry-pi-5'"),
        (["./missing", "--target", "x86-64-cpu"], "missing"),
        (["demo", "--target", "x86-64-cpu", "--precision", "int3"], "int3"),
        (["demo", "--target", "x86-64-cpu", "--size", "100x100"], "100"),
        (["demo"], "--target"),
        (["demo", "--target", "x86-64-cpu", "--batch", "2"], "give --size"),
        (["demo", "--target", "x86-64-cpu", "--prompt-chunks", "2"], "prompts of any length"),
        (["./checkpoint.safetensors", "--target", "x86-64-cpu"], "checkpoint.safetensors"),
    ],
)
def test_bad_requests_are_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert_refused(run_cli("build", *arguments), words)
    assert not list(tmp_path.iterdir())


def test_tiles_make_the_same_image(demo: Path) -> None:
    """The tiny autoencoder sees no further than its halo; no margin shows."""
    bundle = open_bundle(bundle_of(demo))
    halo, scale = bundle.manifest.pipeline.latent.halo, bundle.manifest.pipeline.latent.scale_factor
    assert halo is not None
    latents = np.random.default_rng(0).standard_normal((1, 4, 70, 44), dtype=np.float32)
    with Pipeline(bundle) as pipeline:
        whole = np.asarray(pipeline.decode(latents)[0]).astype(int)
    assert whole.shape == (70 * scale, 44 * scale, 3)
    with Pipeline(bundle, Settings(memory="stream")) as pipeline:
        tiled = np.asarray(pipeline.decode(latents)[0]).astype(int)
        assert np.abs(tiled - whole).max() <= 1
    spec = bundle.manifest.pipeline
    without = msgspec.structs.replace(spec, latent=msgspec.structs.replace(spec.latent, halo=0))
    bundle.manifest = msgspec.structs.replace(bundle.manifest, pipeline=without)
    with Pipeline(bundle, Settings(memory="stream")) as pipeline:
        assert np.abs(np.asarray(pipeline.decode(latents)[0]).astype(int) - whole).max() > 1
