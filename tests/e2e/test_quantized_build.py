"""edgesd build with a quantization scheme: from the embedded pipeline to a measured bundle."""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from PIL import Image

from edgesd.errors import InputError, MissingDependencyError, QualityError, UsageError
from edgesd.export.families import ExportSpec
from edgesd.export.pipeline import export_spec
from edgesd.progress import Lines
from edgesd.recipes import DEMO, BuildOptions, LocalFolders, QuantOptions, build
from edgesd.recipes.sensitivity import Sensitivities
from edgesd.runtime.bundle import Bundle, open_bundle
from edgesd.spec.bundle import FileEntry
from edgesd.spec.quality import Gate
from tests.exports import KeptExports
from tests.marks import LPIPS_WEIGHTS, needs_lpips_weights
from tests.support import assert_refused, run_cli
from tests.tiny_pipelines import write_tiny

pytestmark = pytest.mark.usefixtures("kept_exports", "own_kernels")

CALIBRATION = ("red apple", "grinning cat")
PROMPTS = ("blue heart", "pizza", "green dinosaur")


def options(precision: str, **more: object) -> BuildOptions:
    quantization = QuantOptions(
        calibration_prompts=CALIBRATION,
        quality_prompts=PROMPTS,
        steps=4,
        **more,  # type: ignore[arg-type]
    )
    return BuildOptions("x86-64-cpu", precision, quantization=quantization)


def built(out: Path, work: Path, precision: str, **more: object) -> Bundle:
    return build(DEMO, options(precision, **more), out, LocalFolders(work)).bundle


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pipeline, for what doesn't depend on how good its images are."""
    return write_tiny("sd", tmp_path_factory.mktemp("model") / "sd")


def built_small(out: Path, small: Path, precision: str, rows: int = 1) -> Bundle:
    """A bundle of it for one size. Two with as many rows begin with the same graphs."""
    fixed = msgspec.structs.replace(options(precision, method="rtn"), size=(40, 24), batch=rows)
    return build(str(small), fixed, out, LocalFolders(small.parent / "work")).bundle


@pytest.fixture(scope="module")
def four_bits(
    kept_exports: object, own_kernels: object, work: Path, tmp_path_factory: pytest.TempPathFactory
) -> Bundle:
    return built(tmp_path_factory.mktemp("bundles") / "four", work, "w4a8-g64-lr8")


def test_the_bundle_says_how_it_was_quantized_and_how_good_it_is(
    four_bits: Bundle, work: Path
) -> None:
    manifest = four_bits.manifest
    recipe, measured = manifest.recipe, manifest.quality
    assert recipe is not None and measured is not None
    assert recipe.name == manifest.precision == "w4a8-g64-lr8" and not recipe.simulated
    assert recipe.calibration is not None and recipe.calibration.prompts == len(CALIBRATION)
    schemes = {layer.name: layer.scheme for layer in recipe.layers}
    assert schemes["conv_in"] == schemes["conv_out"] == "fp16"
    assert schemes["mid_block.resnets.0.conv1"] == "w4a8-g64-lr8"
    assert schemes["embeddings.token_embedding"] == "w8a16"
    assert all(0 <= layer.error < 0.2 for layer in recipe.layers)
    assert [image.prompt for image in measured.images] == list(PROMPTS)
    assert [image.seed for image in measured.images] == [0, 1, 2]
    assert "not LPIPS" in measured.metric and measured.gates == (Gate("psnr"),)
    assert measured.psnr_min <= measured.psnr_mean
    assert measured.psnr_min > 20  # two prompts calibrate little; machines differ by some dB
    source = open_bundle(next(work.glob("source-*")))
    assert four_bits.total_bytes() < 0.3 * source.total_bytes()


def test_the_figures_are_those_of_the_images(four_bits: Bundle, work: Path) -> None:
    from edgesd.evaluate.psnr import psnr
    from edgesd.runtime.pipeline import Pipeline
    from edgesd.runtime.requests import Request
    from edgesd.runtime.settings import Settings

    assert four_bits.manifest.quality is not None
    image = four_bits.manifest.quality.images[1]
    request = Request(image.prompt, image.seed, num_inference_steps=4)
    both = []
    for bundle in (open_bundle(next(work.glob("source-*"))), four_bits):
        with Pipeline(bundle, Settings(kernels=False)) as pipeline:
            both.append(pipeline.generate([request])[0])
    assert psnr(*both) == pytest.approx(image.psnr, abs=0.05)
    for name, again in zip((image.source, image.ours), both, strict=True):
        assert name is not None
        with Image.open(four_bits.path / name) as kept:
            assert psnr(kept.convert("RGB"), again) > 45


def test_images_by_our_own_kernels_are_as_near_the_source_s(four_bits: Bundle, work: Path) -> None:
    from edgesd.evaluate.psnr import psnr
    from edgesd.runtime.pipeline import Pipeline
    from edgesd.runtime.requests import Request

    if not four_bits.manifest.engines["unet"].kernels:
        pytest.skip("there was no compiler when it was built")
    assert four_bits.manifest.quality is not None
    found = []
    for image in four_bits.manifest.quality.images:
        assert image.source is not None and image.psnr is not None
        with Pipeline(four_bits) as pipeline, Image.open(four_bits.path / image.source) as kept:
            request = Request(image.prompt, image.seed, num_inference_steps=4)
            found.append(psnr(kept.convert("RGB"), pipeline.generate([request])[0]))
            assert not pipeline.fallbacks
    assert np.mean(found) > four_bits.manifest.quality.psnr_mean - 1


def test_streamed_weights_are_the_same(four_bits: Bundle) -> None:
    from edgesd.runtime.pipeline import Pipeline
    from edgesd.runtime.requests import Request
    from edgesd.runtime.settings import Settings

    generated = []
    for mode in ("fast", "stream", "fast"):
        with Pipeline(four_bits, Settings(memory=mode, guidance_mode="sequential")) as pipeline:
            request = Request("a rocket", 1, num_inference_steps=2)
            generated.append(np.asarray(pipeline.generate([request])[0]))
    assert np.array_equal(generated[0], generated[1]) and np.array_equal(generated[0], generated[2])


def test_generate_inspect_and_report_take_it(four_bits: Bundle, tmp_path: Path) -> None:
    out = tmp_path / "image.png"
    generated = run_cli("generate", four_bits.path, "-p", "a rocket", "--steps", "2", "-o", out)
    assert generated.code == 0, generated.err
    assert np.asarray(Image.open(out)).std() > 5
    said = run_cli("inspect", four_bits.path)
    assert said.code == 0
    (line,) = (line for line in said.out.splitlines() if line.startswith("unet "))
    second = four_bits.manifest.engines["unet"].kernels
    assert ("edgesd's own kernels" in line) == (second is not None)
    assert second is None or line.endswith(f"for edgesd's own kernels: {second}")
    page = tmp_path / "page.html"
    assert run_cli("report", four_bits.path, "-o", page).code == 0
    text = page.read_text()
    assert "mid_block.resnets.0.conv1" in text and "not LPIPS" in text
    for prompt in PROMPTS:
        assert prompt in text


@pytest.mark.slow
def test_two_builds_give_the_same_graphs(four_bits: Bundle, work: Path, tmp_path: Path) -> None:
    """Only the source bundle is shared: calibration and quantization are done again."""
    other = tmp_path / "work"
    shutil.copytree(next(work.glob("source-*")), other / next(work.glob("source-*")).name)
    out = tmp_path / "again"
    outcome = run_cli("build", "--like", four_bits.path, "-o", out, "--work", other)
    assert outcome.code == 0, outcome.err
    assert "byte for byte" in outcome.out
    again = open_bundle(out)
    assert again.manifest.build == four_bits.manifest.build
    graphs = [name for name in again.manifest.files if name.endswith((".onnx", ".bin"))]
    assert len(graphs) == (9 if again.manifest.engines["unet"].kernels else 6)
    for name in graphs:
        assert again.manifest.files[name] == four_bits.manifest.files[name], name


def test_what_comparing_lacks_is_said_before_calibration(
    four_bits: Bundle, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(folder: Path | None) -> None:
        raise MissingDependencyError("no weights to compare with")

    monkeypatch.setattr("edgesd.recipes.gates.find_lpips", missing)
    source = next(work.glob("source-*"))
    other = tmp_path / "work"
    shutil.copytree(source, other / source.name)
    with pytest.raises(MissingDependencyError, match="no weights"):
        built(tmp_path / "out", other, "w8a8")
    assert [path.name for path in other.iterdir()] == [source.name]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("precision", "more", "least"),
    [
        # Static ranges of two prompts and four steps don't hold what others need.
        pytest.param("w8a8", {"method": "rtn", "static": True}, 18, id="static"),
        pytest.param("w4a16-g32", {"method": "gptq"}, 25, id="gptq"),
        pytest.param("w8a16", {"method": "rtn"}, 25, id="rtn", marks=pytest.mark.slow),
    ],
)
def test_rtn_gptq_and_static_ranges(
    precision: str, more: dict[str, object], least: float, work: Path, tmp_path: Path
) -> None:
    bundle = built(tmp_path / "bundle", work, precision, **more)
    assert bundle.manifest.quality is not None
    assert bundle.manifest.quality.psnr_min > least


def test_four_bit_activations_are_called_a_simulation(small: Path, tmp_path: Path) -> None:
    bundle = built_small(tmp_path / "bundle", small, "w4a4-g32")
    recipe = bundle.manifest.recipe
    assert recipe is not None and recipe.simulated
    assert {la.component for la in recipe.layers if "a4" in la.scheme} == {"unet"}  # each step's
    page = tmp_path / "page.html"
    assert run_cli("report", bundle.path, "-o", page).code == 0
    assert "simulated" in page.read_text()


def errors_as_sensitivities(self: Sensitivities, probes: object) -> dict[object, float]:
    """Stands in for 200 drawings: a layer does to the image what it does to its output."""
    return {
        layer: 0.0 if choice is None else 100 * self.store.get(layer, choice).error ** 2
        for layer, choice in self.planned.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("allowed", [0.0, 99.0])
def test_attention_is_pooled_where_images_allow(
    allowed: float, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgesd.recipes.gates.POOLING_LOSS", allowed)
    made = build(
        DEMO,
        options("w8a8", method="rtn", pool_attention=True),
        tmp_path / "bundle",
        LocalFolders(work),
    )
    manifest = made.bundle.manifest
    assert manifest.recipe is not None and manifest.quality is not None and made.note is not None
    found = re.search(r"mean PSNR of ([\d.]+) dB \(worst .*\) with it, ([\d.]+) dB \(", made.note)
    assert found is not None
    pooled, plain = map(float, found.groups())
    assert 10 < pooled < plain
    kept = allowed > 0
    assert ("attention is pooled" in made.note) == kept == manifest.recipe.pooled_attention
    assert manifest.quality.psnr_mean == pytest.approx(pooled if kept else plain, abs=0.05)
    unet = manifest.engines["unet"]
    for path in filter(None, (unet.path, unet.kernels)):
        graph = onnx.load(made.bundle.path / path, load_external_data=False).graph
        means = [node for node in graph.node if node.op_type == "ReduceMean"]
        assert len(means) == (2 * 3 if kept else 0)
    said = run_cli("inspect", made.bundle.path).out
    assert ("pooled" in said) == kept


def test_attention_that_cannot_be_pooled_is_said_before_calibration(
    four_bits: Bundle, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "edgesd.recipes.quantized.can_pool", lambda graphs, component, wiring: False
    )
    source = next(work.glob("source-*"))
    other = tmp_path / "work"
    shutil.copytree(source, other / source.name)
    with pytest.raises(UsageError, match="has no self-attention whose height"):
        built(tmp_path / "out", other, "w8a8", pool_attention=True)
    assert [path.name for path in other.iterdir()] == [source.name]
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_floor_raises_layers(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Sensitivities, "measure", errors_as_sensitivities)
    plain = built(tmp_path / "plain", work, "w4a8-g64").manifest
    assert plain.quality is not None
    floor = plain.quality.psnr_min + 2
    raised = built(tmp_path / "raised", work, "w4a8-g64", min_psnr=floor).manifest
    assert raised.quality is not None and raised.recipe is not None
    assert raised.quality.psnr_min >= floor
    assert raised.quality.judged_by == (Gate("psnr", floor, "option"),)
    changed = [layer for layer in raised.recipe.layers if layer.planned_scheme]
    assert 0 < len(changed) < len(raised.recipe.layers)
    for layer in changed:
        assert layer.planned_scheme != layer.scheme and layer.reason and "dB" in layer.reason


@pytest.mark.slow
def test_a_limit_of_a_distance_raises_layers(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Sensitivities, "measure", errors_as_sensitivities)
    plain = built(tmp_path / "plain", work, "w4a8-g64").manifest
    assert plain.quality is not None
    limit = max(image.distance for image in plain.quality.images) / 2
    raised = built(tmp_path / "raised", work, "w4a8-g64", max_feature_distance=limit).manifest
    assert raised.quality is not None and raised.recipe is not None
    assert all(image.distance <= limit for image in raised.quality.images)
    assert raised.quality.gates == (Gate("psnr"), Gate("features", limit, "option"))
    changed = [layer for layer in raised.recipe.layers if layer.planned_scheme]
    assert 0 < len(changed) < len(raised.recipe.layers)
    assert all("at feature distance" in str(layer.reason) for layer in changed)


@pytest.mark.slow
@needs_lpips_weights
def test_lpips_judges_with_its_published_weights(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Sensitivities, "measure", errors_as_sensitivities)
    folders = LocalFolders(work, lpips=Path(LPIPS_WEIGHTS))
    asked = options("w8a8", method="rtn", max_lpips=0.2, max_feature_distance=1.0)
    made = build(DEMO, asked, tmp_path / "bundle", folders).bundle
    quality = made.manifest.quality
    assert quality is not None and quality.metric == "LPIPS (AlexNet, v0.1)"
    assert quality.gates[1:] == (Gate("lpips", 0.2, "option"), Gate("features", 1.0, "option"))
    for image in quality.images:
        assert image.features is not None and image.features != image.distance
        assert 0 < image.distance <= 0.2 and 0 < image.features <= 1
    page = tmp_path / "page.html"
    assert run_cli("report", made.path, "-o", page).code == 0
    assert "at most 0.2 was asked for: held" in page.read_text()


def test_a_feature_distance_judges_where_the_family_asks_for_lpips(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def of_lpips(*args: Any) -> ExportSpec:
        return replace(export_spec(*args), judged_by="lpips")

    monkeypatch.setattr("edgesd.export.pipeline.export_spec", of_lpips)
    monkeypatch.setattr(Sensitivities, "measure", errors_as_sensitivities)
    said: list[str] = []
    work = LocalFolders(small.parent / "work")
    asked = msgspec.structs.replace(options("w8a8", method="rtn"), size=(40, 24))
    made = build(str(small), asked, tmp_path / "bundle", work, Lines(said.append)).bundle
    quality = made.manifest.quality
    assert quality is not None and "not LPIPS" in quality.metric
    assert quality.gates == (Gate("features"),)
    assert any("LPIPS judges a model of this family" in line for line in said)
    assert any(line.startswith("quality: ") and "feature distance" in line for line in said)
    out = tmp_path / "out"
    lpips = options("w8a8", max_lpips=0.2)
    with pytest.raises(InputError, match="LPIPS' weights aren't here"):
        build(str(small), lpips, out, work)
    monkeypatch.setattr("edgesd.recipes.quantized._ROUNDS", 1)
    tight = options("w8a8", method="rtn", max_feature_distance=1e-9)
    tight = msgspec.structs.replace(tight, size=(40, 24))
    with pytest.raises(QualityError, match=r"reaches feature distance .* --max-feature-distance"):
        build(str(small), tight, out, work)
    assert not out.exists()


def test_a_floor_out_of_reach_fails_and_names_layers(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Sensitivities, "measure", errors_as_sensitivities)
    with pytest.raises(QualityError, match=r"w8a8 reaches .* not the 99 .*unet/") as caught:
        built(tmp_path / "out", work, "w8a8", method="rtn", min_psnr=99.0, max_size=0.29)
    assert caught.value.exit_code == 7
    with pytest.raises(UsageError, match=r"--max-time 0\.01: w8a8 takes at least 0\.\d\d of"):
        built(tmp_path / "out", work, "w8a8", method="rtn", max_time=0.01)
    with pytest.raises(UsageError, match=r"--max-size 0\.2 allows .* takes at least"):
        built(tmp_path / "out", work, "w8a8", method="rtn", max_size=0.2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_weights_that_stay_in_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept_exports: KeptExports
) -> None:
    monkeypatch.setattr("edgesd.export.source_graphs.REFER_BYTES", 0)
    # Not the graphs that another test has exported with their weights.
    monkeypatch.setattr("edgesd.export.pipeline.export_pipeline", kept_exports.export)
    bundle = built(tmp_path / "b", tmp_path / "work", "w8a8", method="rtn", min_psnr=42.0)
    assert bundle.manifest.quality is not None and bundle.manifest.recipe is not None
    assert bundle.manifest.quality.psnr_min >= 42
    assert any(layer.reason for layer in bundle.manifest.recipe.layers)
    source = open_bundle(next((tmp_path / "work").glob("source-*")))
    assert source.disk_bytes() < 0.3 * bundle.disk_bytes()  # graphs, tokenizers, small weights


@pytest.mark.slow
def test_a_size_spends_ranks_where_they_pay(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Sensitivities, "measure", errors_as_sensitivities)
    bundle = built(tmp_path / "small", work, "w4a16-g64-lr16", max_size=0.21)
    source = open_bundle(next(work.glob("source-*")))
    assert 0.17 * source.disk_bytes() < bundle.disk_bytes() <= 0.21 * source.disk_bytes()
    assert bundle.manifest.recipe is not None
    ranks = {layer.rank for layer in bundle.manifest.recipe.layers}
    assert 0 in ranks and len(ranks) > 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--precision", "w4a8"], "need a group"),
        (["--precision", "w5a8"], "unknown precision 'w5a8': did you mean"),
        (["--precision", "w8a8", "--no-quality", "--min-psnr", "30"], "--no-quality"),
        (["--precision", "w8a8", "--method", "magic"], "svdquant"),
        (["--precision", "w8a8", "--min-psnr", "nan"], "isn't a finite number"),
        (["--precision", "w8a8", "--max-time", "inf"], "isn't a finite number"),
        (["--max-lpips", "0.3"], "are for quantized bundles, and fp32 isn't one"),
        (["--precision", "fp16", "--max-feature-distance", "0.3"], "and fp16 isn't one"),
        (["--pool-attention"], "--pool-attention is for quantized bundles, and fp32"),
        (["--pool-attention", "--precision", "fp16"], "and fp16 isn't one"),
        (["--pool-attention", "--precision", "w8a8", "--no-quality"], "leave --no-quality out"),
        (
            ["--pool-attention", "--precision", "w8a8", "--target", "jetson-orin-nano-8gb"],
            "is for bundles of onnxruntime, and this one is for tensorrt",
        ),
    ],
)
def test_bad_requests_are_refused(tmp_path: Path, arguments: list[str], words: str) -> None:
    out = tmp_path / "out"
    outcome = run_cli("build", "demo", "--target", "x86-64-cpu", "-o", out, *arguments)
    assert outcome.code == 2
    assert_refused(outcome, words)
    assert not out.exists()


def test_a_recipe_survives_its_json(four_bits: Bundle) -> None:
    raw = (four_bits.path / "bundle.json").read_bytes()
    again = msgspec.json.decode(raw, type=type(four_bits.manifest))
    assert again == four_bits.manifest
    assert json.loads(raw)["recipe"]["layers"]


@pytest.mark.slow
def test_killed_twenty_times_the_bytes_are_the_same(work: Path, tmp_path: Path) -> None:
    """SIGKILL at random moments, then one run to the end: the graphs of an undisturbed run."""
    script = tmp_path / "run.py"
    script.write_text(
        "import sys\n"
        "from pathlib import Path\n"
        "from edgesd.recipes import BuildOptions, LocalFolders, QuantOptions, build\n"
        "from edgesd.export import calibrate\n"
        "calibrate.SAVE_SECONDS = 0\n"
        "work, out = map(Path, sys.argv[1:])\n"
        f"how = QuantOptions(calibration_prompts={CALIBRATION * 3!r}, "
        f"quality_prompts={PROMPTS!r}, steps=4)\n"
        "options = BuildOptions('x86-64-cpu', 'w4a8-g64-lr8', quantization=how)\n"
        "build('demo', options, out, LocalFolders(work))\n"
    )
    if not list(work.glob("source-*")):
        built(tmp_path / "first", work, "w8a16")
    source = next(work.glob("source-*"))
    folder, out = tmp_path / "work", tmp_path / "out"
    command = [sys.executable, str(script), str(folder), str(out)]

    def graphs() -> dict[str, FileEntry]:
        """Those of the bundle; what was kept is removed, so that the next run begins anew."""
        files = open_bundle(out).manifest.files
        shutil.rmtree(out)
        shutil.rmtree(folder)
        shutil.copytree(source, folder / source.name)
        return {name: entry for name, entry in files.items() if name.endswith((".onnx", ".bin"))}

    shutil.copytree(source, folder / source.name)
    start = time.monotonic()
    subprocess.run(command, check=True)
    whole = time.monotonic() - start
    wanted, rng, kills = graphs(), random.Random(0), 0
    while kills < 20:
        process = subprocess.Popen(command)
        try:
            process.wait(rng.uniform(0.1, 0.9) * whole)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
        else:
            assert process.returncode == 0
            assert graphs() == wanted
    subprocess.run(command, check=True)
    assert graphs() == wanted


@pytest.mark.parametrize("rows", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_a_fixed_size_is_calibrated_and_measured(rows: int, small: Path, tmp_path: Path) -> None:
    """One row: guidance one half after the other. Three: three images at a time."""
    bundle = built_small(tmp_path / "bundle", small, "w8a8", rows)
    assert bundle.manifest.pipeline.shape.batch == rows
    assert bundle.manifest.quality is not None
    assert len(bundle.manifest.quality.images) == len(PROMPTS)
    assert bundle.manifest.quality.psnr_min > 20


@pytest.mark.slow
def test_every_task_is_judged(work: Path, tmp_path: Path) -> None:
    asked = msgspec.structs.replace(options("w8a8"), tasks=("inpaint",))
    bundle = build(DEMO, asked, tmp_path / "b", LocalFolders(work)).bundle
    manifest = bundle.manifest
    assert manifest.quality is not None and manifest.recipe is not None
    images = manifest.quality.images
    assert [image.task for image in images] == ["text"] * 3 + ["image"] * 2 + ["inpaint"] * 2
    assert min(image.psnr or 100 for image in images) > 20
    encoder = manifest.pipeline.wiring.encoder
    assert encoder is not None
    layers = [each for each in manifest.recipe.layers if each.component == encoder.component]
    assert layers and {each.scheme for each in layers} & {"w8a8"}
    assert run_cli("report", bundle.path, "-o", tmp_path / "page.html")[0] == 0
    assert "inpainting" in (tmp_path / "page.html").read_text()
