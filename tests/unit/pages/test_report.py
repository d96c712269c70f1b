"""The report: complete, escaped, self-contained, well-formed, and one line when it can't be."""

from __future__ import annotations

import hashlib
import io
import shutil
from pathlib import Path

import msgspec
import numpy as np
import pytest
from PIL import Image

from edgesd.engines.bundle import pack_bundle, write_manifest
from edgesd.errors import BundleError, InputError, UsageError
from edgesd.evaluate.perceptual import STAND_IN
from edgesd.pages.report import SIMULATED, report_html, write_report
from edgesd.runtime.bundle import CHECKSUM, MANIFEST, Bundle, open_bundle
from edgesd.spec.bundle import CalibrationSpec, FileEntry, LayerRecipe, QuantRecipe
from edgesd.spec.quality import Gate, ImageQuality, Quality
from tests.support import assert_refused, file_entries, run_cli
from tests.unit.pages.outline import HOSTILE, Outline, assert_stands_alone

METRIC = "multi-scale gradient distance (stands in for LPIPS)"
LAYERS = (
    LayerRecipe("conv_in", "unet", "conv", (4, 4, 3, 3), "fp16", "rtn", 0, 288, 0.0,
                "w4a8-g64-lr32", "3 < group: too few <inputs>"),
    LayerRecipe("proj", "unet", "linear", (8, 4), "w4a8-g64-lr32", "svdquant", 32, 96, 0.034),
    LayerRecipe("conv_out", "vae_decoder", "conv", (3, 4, 1, 1), "w8a8", "gptq", 0, 24, 2e-4,
                "w4a8-g64-lr32", "error 0.2 above 0.1"),
    LayerRecipe("table", "text_encoder", "embedding", (8, 8), "w8a16", "minmax", 0, 80, 0.0012),
)  # fmt: skip
RECIPE = QuantRecipe(
    "w4a8-g64-lr32", True, LAYERS, CalibrationSpec(48, "c" * 64, 20, 5.0, "dpmpp-2m", 24, 32)
)
IMAGES = (
    ImageQuality("a good cat", 1, 33.25, 0.98, 0.01, "quality/0-source.png", "quality/0.png"),
    ImageQuality("<script>alert('x')</script> & \"co\"\0", 2, 21.5, 0.8, 0.2,
                   "quality/1-source.png", "quality/1.webp"),
    ImageQuality("an equal cat", 3, None, 1.0, 0.0),
)  # fmt: skip
QUALITY = Quality(
    IMAGES, 4, 3.0, "ddim", 51.6, 21.5, 0.93, 0.07, METRIC, "ONNX Runtime, fp32", 20.0
)


def reforge(folder: Path, **changes: object) -> Bundle:
    """Change fields of the manifest in `folder`; its files are listed anew."""
    manifest = open_bundle(folder).manifest
    for name in (MANIFEST, CHECKSUM):
        (folder / name).unlink()
    changes = {"files": file_entries(folder)} | changes
    write_manifest(folder, msgspec.structs.replace(manifest, **changes))
    return open_bundle(folder)


@pytest.fixture
def folder(miniature: Bundle, tmp_path: Path) -> Path:
    """A quantized bundle with the images of two prompts, 12x10 pixels."""
    folder = Path(shutil.copytree(miniature.path, tmp_path / "forged-w4a8"))
    manifest = msgspec.structs.replace(
        miniature.manifest, precision="w4a8-g64-lr32", recipe=RECIPE, quality=QUALITY
    )
    rng = np.random.default_rng(0)
    (folder / "quality").mkdir()
    for image in IMAGES[:2]:
        pixels = rng.integers(40, 200, (10, 12, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / str(image.source))
        pixels[2:5] += 20
        Image.fromarray(pixels).save(folder / str(image.ours), lossless=True)
    for name in (MANIFEST, CHECKSUM):
        (folder / name).unlink()
    write_manifest(folder, msgspec.structs.replace(manifest, files=file_entries(folder)))
    return folder


def test_the_page_is_well_formed_and_needs_nothing_else(folder: Path) -> None:
    page = report_html(open_bundle(folder))
    assert_stands_alone(page)
    assert all(attrs["alt"] for tag, attrs in Outline(page).tags if tag == "img")
    assert page == report_html(open_bundle(folder))


def test_everything_of_the_bundle_is_on_the_page(folder: Path) -> None:
    page = report_html(open_bundle(folder))
    text = Outline(page).text
    for layer in LAYERS:
        for value in (layer.name, layer.component, layer.kind, layer.scheme, layer.method):
            assert value in text
        assert not layer.reason or layer.reason in text
    for image in IMAGES:
        assert image.prompt.replace("\0", "\ufffd") in text
    assert METRIC in text and "LPIPS (alex)" not in text
    assert SIMULATED in text
    assert "at least 20 dB was asked for: held" in text
    assert "unet/conv_in" in text and "w4a8-g64-lr32 to fp16" in text
    assert "ONNX Runtime, fp32" in text and "CC0-1.0" in text
    assert "48 prompts" in text and "32x24" in text and "20 steps of dpmpp-2m" in text
    weights = 4 * 4 * 9 + 8 * 4 + 3 * 4 + 8 * 8
    assert f"{4 * weights / 1e6:.3g} MB (computed: 4 bytes per weight)" in text
    assert page.count("<rect") == 3 and "1 not measured" in text


def with_text(folder: Path, text: str) -> Bundle:
    """The bundle in `folder` with `text` wherever a manifest holds any that may be anything."""
    manifest = open_bundle(folder).manifest
    images = tuple(msgspec.structs.replace(image, prompt=text) for image in IMAGES)
    layer = LayerRecipe(text, text, text, (1,), text, text, 0, 0, 1.0, f"{text}.", text)
    return reforge(
        folder,
        name=text,
        precision=text,
        tools={text: text},
        licence=msgspec.structs.replace(manifest.licence, name=text),
        recipe=msgspec.structs.replace(RECIPE, name=text, layers=(layer,)),
        quality=msgspec.structs.replace(QUALITY, images=images, metric=text, measured_on=text),
    )


def test_text_of_the_bundle_stays_text(folder: Path, tmp_path: Path) -> None:
    plain = with_text(Path(shutil.copytree(folder, tmp_path / "plain")), "plain")
    page = report_html(with_text(folder, HOSTILE))
    outline = Outline(page)
    assert outline.structure() == Outline(report_html(plain)).structure()
    assert HOSTILE.replace("\u202e", "\ufffd") in outline.text
    assert "\u202e" not in page
    assert_stands_alone(page)


def test_images_come_worst_first_with_one_amplification(folder: Path) -> None:
    bundle = open_bundle(folder)
    outline = Outline(report_html(bundle))
    worst_source, worst_ours, worst_difference, source, _, difference = outline.images()
    for name, pixels in (
        ("quality/1-source.png", worst_source),
        ("quality/1.webp", worst_ours),
        ("quality/0-source.png", source),
    ):
        stored = Image.open(io.BytesIO(bundle.read(name))).convert("RGB")
        assert np.array_equal(pixels, np.asarray(stored))
    for amplified in (worst_difference, difference):  # 20 x 8 is below 255, 20 x 16 is above
        assert set(amplified[2:5].ravel()) == {20 * 8}
        assert not amplified[5:].any() and not amplified[:2].any()
    assert "amplified 8 times" in outline.text


def test_layers_come_by_error(folder: Path) -> None:
    page = report_html(open_bundle(folder))
    table = page[page.index("All layers") :]
    places = [table.index(f">{name}</th>") for name in ("proj", "table", "conv_out", "conv_in")]
    assert places == sorted(places)


def test_each_task_has_its_figures(folder: Path) -> None:
    plain = Outline(report_html(open_bundle(folder))).text
    assert "PSNR, text to image" not in plain and "inpainting" not in plain
    first, second, equal = IMAGES
    images = (
        first,
        msgspec.structs.replace(second, task="image"),
        msgspec.structs.replace(second, task="inpaint", psnr=30.0),
        msgspec.structs.replace(equal, task="inpaint"),
    )
    bundle = reforge(folder, quality=msgspec.structs.replace(QUALITY, images=images))
    text = " ".join(Outline(report_html(bundle)).text.split())
    assert "PSNR, text to imagemean 33.25 dB, worst 33.25 dB (1 image)" in text
    assert "PSNR, image to imagemean 21.50 dB, worst 21.50 dB (1 image)" in text
    assert "PSNR, inpaintingmean 65.00 dB, worst 30.00 dB (2 images)" in text
    assert "inpainting, seed 2, PSNR 30.00 dB" in text


def test_a_floor_that_did_not_hold_is_said(folder: Path) -> None:
    bundle = reforge(folder, quality=msgspec.structs.replace(QUALITY, min_psnr=30.0))
    assert "at least 30 dB was asked for: not held" in Outline(report_html(bundle)).text
    bundle = reforge(folder, quality=msgspec.structs.replace(QUALITY, min_psnr=None))
    text = " ".join(Outline(report_html(bundle)).text.split())
    assert "PSNR, as for all models of the family; no limit was asked for" in text


def test_each_gate_is_said_and_the_first_orders_images(folder: Path) -> None:
    first, second, equal = IMAGES
    images = (
        msgspec.structs.replace(first, distance=0.3, features=0.6),
        msgspec.structs.replace(second, features=0.2),
        msgspec.structs.replace(equal, features=0.0),
    )
    gates = (
        Gate("lpips", 0.25, "option"),
        Gate("psnr", 18.0, "option"),
        Gate("features", 0.5, "option"),
    )
    quality = msgspec.structs.replace(
        QUALITY, images=images, metric="LPIPS (AlexNet, v0.1)", min_psnr=None, gates=gates
    )
    bundle = reforge(folder, quality=quality)
    page = report_html(bundle)
    text = " ".join(Outline(page).text.split())
    assert "Judged byLPIPS, as an option asks; at most 0.25 was asked for: not held" in text
    assert "And byPSNR, as an option asks; at least 18 dB was asked for: held" in text
    assert "And byfeature distance, as an option asks; at most 0.5 was asked for: not held" in text
    assert "LPIPS, worst" in text and "LPIPS 0.3000" in text and "feature distance 0.6000" in text
    assert f"{STAND_IN}mean 0.2667 (0 for equal images)" in text
    assert "Worst LPIPS first." in text
    assert "a good cat (seed 1, LPIPS 0.3000)" in text
    table = page[page.index("All images") : page.index("Worst LPIPS first.")]
    places = [table.index(word) for word in ("a good cat", "alert(", "an equal cat")]
    assert places == sorted(places)
    assert table.count("aria-sort") == 1 and 'aria-sort="descending">LPIPS (AlexNet' in table


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"recipe": None}, "Nothing was quantized"),
        ({"quality": None}, "Nothing was measured"),
        (
            {"recipe": msgspec.structs.replace(RECIPE, layers=(), calibration=None)},
            "lists no layer",
        ),
        ({"recipe": msgspec.structs.replace(RECIPE, simulated=False)}, "conv_in"),
        ({"quality": msgspec.structs.replace(QUALITY, images=())}, "no image was compared"),
        ({"quality": msgspec.structs.replace(QUALITY, images=IMAGES[2:])}, "all images are"),
        (
            {
                "quality": msgspec.structs.replace(
                    QUALITY, images=(msgspec.structs.replace(IMAGES[0], ours=None),)
                )
            },
            "ours: not kept",
        ),
    ],
)
def test_what_is_missing_is_said(folder: Path, changes: dict[str, object], words: str) -> None:
    text = Outline(report_html(reforge(folder, **changes))).text
    assert words in text
    simulated = changes.get("recipe", RECIPE)
    assert (SIMULATED in text) == bool(simulated and simulated.simulated)  # type: ignore[attr-defined]


@pytest.mark.parametrize("error", [5e-324, 1e-9, 1.0, 1e308])
def test_any_error_fits_the_chart(folder: Path, error: float) -> None:
    layers = (msgspec.structs.replace(LAYERS[1], error=error), *LAYERS)
    page = report_html(reforge(folder, recipe=msgspec.structs.replace(RECIPE, layers=layers)))
    assert "<rect" in page and "nan" not in page and '="inf' not in page
    Outline(page)


def test_an_unquantized_bundle_has_a_report(miniature: Bundle) -> None:
    text = Outline(report_html(miniature)).text
    assert "Nothing was quantized: the weights are fp32" in text
    assert "Nothing was measured" in text
    assert f"edgesd build MODEL --target {miniature.manifest.target} --precision" in text
    assert SIMULATED not in text


@pytest.mark.parametrize("one_file", [False, True])
def test_the_command_writes_beside_the_bundle(folder: Path, one_file: bool) -> None:
    bundle = folder
    if one_file:
        bundle = folder.with_name("forged-w4a8.edgesd")
        pack_bundle(open_bundle(folder), bundle)
    page = folder.with_name("forged-w4a8-report.html")
    page.write_text("somebody's own")
    assert_refused(run_cli("report", bundle), "is no page of edgesd's: choose a name by -o")
    assert page.read_text() == "somebody's own"
    write_report(open_bundle(bundle), page)
    outcome = run_cli("report", bundle)
    assert (outcome.code, outcome.err) == (0, "")
    assert str(page) in outcome.out
    assert page.read_text(encoding="utf-8") == report_html(open_bundle(folder))
    assert run_cli("inspect", bundle).code == 0


def test_the_output_is_a_page_outside_the_bundle(folder: Path, tmp_path: Path) -> None:
    bundle = open_bundle(folder)
    write_report(bundle, tmp_path / "new" / "a.HTML")
    with pytest.raises(UsageError, match=r"ending in \.html"):
        write_report(bundle, folder / "bundle.json")
    with pytest.raises(InputError, match="lies in the bundle"):
        write_report(bundle, folder / "report.html")
    (tmp_path / "b.html").mkdir()
    with pytest.raises(InputError, match="is a folder"):
        write_report(bundle, tmp_path / "b.html")
    assert_refused(
        run_cli("report", folder, "-o", folder / "unet" / "a.html"), "lies in the bundle"
    )
    assert_refused(run_cli("report", tmp_path / "missing"), "no bundle at")
    assert open_bundle(folder).manifest == bundle.manifest


def _encoded(width: int, height: int, kind: str = "PNG") -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"not an image", "quality/1.webp isn't a readable"),
        (_encoded(12, 10)[:200], "quality/1.webp isn't a readable"),
        (_encoded(12, 10, "WEBP")[:200], "quality/1.webp isn't a readable"),
        (_encoded(12, 10, "GIF"), "quality/1.webp isn't a readable"),
        (_encoded(10, 12), "12x10 and 10x12 pixels"),
    ],
    ids=["text", "half a PNG", "half a WebP", "GIF", "another size"],
)
def test_a_image_that_cannot_be_shown_is_one_line(folder: Path, content: bytes, words: str) -> None:
    manifest = open_bundle(folder).manifest
    (folder / "quality" / "1.webp").write_bytes(content)
    damaged = FileEntry(len(content), hashlib.sha256(content).hexdigest())
    files = manifest.files | {"quality/1.webp": damaged}
    write_manifest(folder, msgspec.structs.replace(manifest, files=files))
    outcome = run_cli("report", folder)
    assert outcome.code == BundleError.exit_code
    assert_refused(outcome, words, "build the bundle again")
    assert not folder.with_name("forged-w4a8-report.html").exists()


def test_an_altered_or_unlisted_image_is_refused(folder: Path) -> None:
    path = folder / "quality" / "0.png"
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(data)
    assert_refused(run_cli("report", folder), "quality/0.png was altered")
    lost = msgspec.structs.replace(IMAGES[0], source="quality/lost.png")
    quality = msgspec.structs.replace(QUALITY, images=(lost,))
    with pytest.raises(BundleError, match=r"lists no quality/lost\.png"):
        report_html(reforge(folder, quality=quality))
