"""The report on a bundle: one HTML page that needs nothing but itself, and works without scripts.

All of it comes from the manifest and the images that the build kept. The same bundle gives the
same page, byte for byte.
"""

from __future__ import annotations

import io
import math
import struct
import warnings
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from edgesd.errors import BundleError, InputError
from edgesd.evaluate.perceptual import STAND_IN
from edgesd.evaluate.quality import (
    METRIC_NAMES,
    decibels,
    gate_words,
    limit_words,
    rank,
    shown,
    value_of,
    worst_first,
    worst_of,
)
from edgesd.files import atomic_write, check_writable
from edgesd.pages.page import (
    Cell,
    Column,
    Fact,
    Figure,
    Mark,
    Table,
    check_page_path,
    counted,
    data_uri,
    is_page,
    mb,
    megabytes,
    page_bytes,
    render,
)
from edgesd.runtime.bundle import SUFFIX, Bundle
from edgesd.spec.bundle import BundleManifest, LayerRecipe, QuantRecipe
from edgesd.spec.pipeline import Task
from edgesd.spec.quality import ImageQuality, Metric, Quality

SIMULATED = (
    "simulated: no engine computes in this format; the images are right, speed and memory are not"
)
POOLED = "the largest has a quarter of its keys and values, means of 2x2 latents"
FORMATS = {"PNG": "image/png", "WEBP": "image/webp"}
"""Formats that kept images may have, and their media types."""
MAX_AMPLIFICATION = 64
"""Largest factor of the difference maps: 64 makes a difference of 4 of 255 white."""

_PIXELATED_BELOW = 257
"""Images smaller than this, in pixels, are scaled up with their pixels kept sharp."""

_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 708, 10, 170
"""Axes of the histogram, in the units of its drawing."""
_MAX_DECADES = 8

Pixels = npt.NDArray[np.uint8]


class KeptImage(NamedTuple):
    """An image on the page. small: its pixels are kept sharp."""

    uri: str
    width: int
    height: int
    small: bool
    caption: str
    alt: str


class Card(NamedTuple):
    """One prompt. images: source, ours and their difference, by these names; None: not kept."""

    prompt: str
    images: tuple[tuple[str, KeptImage | None], ...]
    scores: str


class QualityPart(NamedTuple):
    """The page's part on the bundle's images. worst: what they are ordered by. amplification: of
    all difference maps."""

    about: tuple[Fact, ...]
    images: Table
    cards: tuple[Card, ...]
    worst: str
    amplification: int


class Promotion(NamedTuple):
    """Layers that got another scheme than was planned, all for one reason."""

    schemes: str
    reason: str
    layers: tuple[str, ...]


class Bar(NamedTuple):
    """One bar of a histogram, in its units."""

    x: float
    y: float
    width: float
    height: float
    title: str


class Histogram(NamedTuple):
    """Layers by their measured errors over a logarithmic axis. most: layers of the tallest bar."""

    label: str
    bars: tuple[Bar, ...]
    x_marks: tuple[Mark, ...]
    most: int
    unmeasured: int
    width: int = 720
    height: int = 220
    left: int = _LEFT
    right: int = _RIGHT
    top: int = _TOP
    bottom: int = _BOTTOM


class LayersPart(NamedTuple):
    """The page's part on the layers. errors: None where none was measured."""

    table: Table
    errors: Histogram | None
    promoted: tuple[Promotion, ...]


def default_report_path(bundle: Bundle) -> Path:
    """Where a report goes without -o: NAME-report.html beside the bundle's folder or file."""
    name = bundle.path.name.removesuffix(SUFFIX) if bundle.path.is_file() else bundle.path.name
    return bundle.path.with_name(f"{name}-report.html")


def write_report(bundle: Bundle, path: Path | None = None) -> Path:
    """Write the report on `bundle` to `path`, over an older file; returns `path`.

    path: None for `default_report_path`, where no page but edgesd's is replaced. Raises UsageError
    when `path` isn't named .html, InputError when it is a folder, lies in the bundle (which may
    hold no other files) or can't be written, ResourceError when the disk is full, and what
    `report_html` raises.
    """
    named = path is not None
    path = path or default_report_path(bundle)
    check_page_path(path)
    if not named and path.exists() and not is_page(path):
        raise InputError(f"{path} exists already, and is no page of edgesd's: choose a name by -o")
    if bundle.path in path.resolve().parents:
        raise InputError(
            f"-o {path} lies in the bundle, which may hold no other files: choose a name outside it"
        )
    check_writable(path)
    page = report_html(bundle)
    with atomic_write(path) as file:
        file.write(page_bytes(page))
    return path


def report_html(bundle: Bundle) -> str:
    """The report on `bundle` as an HTML page with its images, styles and script inside.

    Raises BundleError when an image is missing, altered, can't be decoded, or differs in size
    from the one that it is compared with, and ModuleNotFoundError without jinja2.
    """
    manifest, recipe, quality = bundle.manifest, bundle.manifest.recipe, bundle.manifest.quality
    return render(
        "report.html.j2",
        manifest=manifest,
        recipe=recipe,
        notices=[SIMULATED] if recipe and recipe.simulated else [],
        figures=_figures(bundle),
        about=_about(manifest),
        sizes=_sizes(bundle),
        quality=_quality(bundle, quality) if quality else None,
        layers=_layers(recipe.layers) if recipe and recipe.layers else None,
        calibration=_calibration(recipe),
    )


# --- the bundle -------------------------------------------------------------------------------


def _figures(bundle: Bundle) -> list[Figure]:
    recipe, quality = bundle.manifest.recipe, bundle.manifest.quality
    figures = [Figure("on disk", megabytes(bundle.disk_bytes()), "all files of the bundle")]
    if recipe and recipe.layers:
        figures.append(_against_fp32(recipe.layers))
    if quality:
        count = counted(len(quality.images), "image")
        figures.append(Figure("PSNR, mean", f"{quality.psnr_mean:.1f} dB", count))
        for gate in quality.judged_by:
            images, metric = quality.images, gate.metric
            worst = shown(metric, worst_of(images, metric)) if images else "none"
            figures.append(
                Figure(f"{METRIC_NAMES[metric]}, worst", worst, limit_words(quality, gate))
            )
    return figures


def _against_fp32(layers: Sequence[LayerRecipe]) -> Figure:
    """The layers' bytes beside 4 per weight."""
    now, full = sum(layer.bytes for layer in layers), _fp32_bytes(layers)
    return Figure(
        "weights of the layers",
        f"{now / full:.0%} of fp32" if full > 0 else megabytes(now),
        f"{megabytes(now)} instead of {megabytes(full)} (computed: 4 bytes per weight)",
    )


def _about(manifest: BundleManifest) -> list[Fact]:
    pipeline, shape, recipe = manifest.pipeline, manifest.pipeline.shape, manifest.recipe
    size = f"{shape.width}x{shape.height}"
    size += f", any multiple of {shape.multiple_of}" if shape.dynamic else " only"
    source = f"family {pipeline.family}, source sha256 {pipeline.source_sha256[:16]}"
    licence = manifest.licence
    return [
        ("Model", f"{manifest.name} ({source})"),
        ("Target", f"{manifest.target} ({manifest.arch})"),
        ("Backend", manifest.backend),
        ("Precision", manifest.precision),
        ("Simulated", (SIMULATED if recipe.simulated else "no") if recipe else None),
        ("Attention", POOLED if recipe and recipe.pooled_attention else None),
        ("Image size", size),
        ("Licence", f"{licence.name} ({', '.join(licence.files) or 'no file'})"),
        ("Tools", ", ".join(f"{name} {version}" for name, version in manifest.tools.items())),
    ]


def _sizes(bundle: Bundle) -> Table:
    manifest, total = bundle.manifest, bundle.disk_bytes()
    layers = manifest.recipe.layers if manifest.recipe else ()
    columns = [
        Column("component"),
        Column("precision"),
        Column("on disk, MB", numeric=True),
        Column("parity, RMS", numeric=True),
    ]
    if layers:
        columns += [
            Column("layers", numeric=True),
            Column("layers now, MB", numeric=True),
            Column("layers in fp32, MB (computed)", numeric=True),
        ]

    def layer_cells(of: Sequence[LayerRecipe]) -> list[Cell]:
        sizes = (sum(layer.bytes for layer in of), _fp32_bytes(of))
        cells = [Cell(str(len(of)), len(of)), *(Cell(mb(size), size) for size in sizes)]
        return cells if layers else []

    rows, left = [], total
    for name, engine in manifest.engines.items():
        weight = bundle.weight_bytes(name)
        left -= weight
        rows.append(
            [
                Cell(name),
                Cell(engine.precision),
                Cell(mb(weight), weight),
                Cell(f"{engine.parity.rel_rms:.1e}", engine.parity.rel_rms),
                *layer_cells([layer for layer in layers if layer.component == name]),
            ]
        )
    blank = Cell("")
    filler = [blank] * (len(columns) - 4)
    other = [Cell("other files"), blank, Cell(mb(left), left), blank, *filler]
    sums = [Cell("total"), blank, Cell(mb(total), total), blank, *layer_cells(layers)]
    return Table("Sizes", columns, [*rows, other, sums])


# --- quality ----------------------------------------------------------------------------------


def _quality(bundle: Bundle, quality: Quality) -> QualityPart:
    decibels = f"mean {quality.psnr_mean:.2f} dB, worst {quality.psnr_min:.2f} dB"
    loop = f"{counted(quality.num_inference_steps, 'step')} of {quality.scheduler}"
    judge = quality.judged_by[0].metric
    ordered = [quality.images[index] for index in worst_first(quality.images, judge)]
    kept = [image for image in ordered if image.source or image.ours]
    differences = [_difference(bundle, image) for image in kept]
    factor = _amplification(_difference_counts(differences))
    cards = (
        _card(bundle, image, difference, quality.metric, factor)
        for image, difference in zip(kept, differences, strict=True)
    )
    return QualityPart(
        about=(
            ("PSNR", f"{decibels} (equal images count as 100 dB)"),
            *_by_task(quality.images),
            ("SSIM", f"mean {quality.ssim_mean:.4f} (1 for equal images)"),
            (quality.metric, f"mean {quality.distance_mean:.4f} (0 for equal images)"),
            *_features(quality.images),
            *_gates(quality),
            ("Worst prompt", _worst(quality.images, judge)),
            ("Generated with", f"{loop}, guidance {quality.guidance_scale:g}"),
            ("Measured on", quality.measured_on),
        ),
        images=_image_table(ordered, quality.metric, judge),
        cards=tuple(cards),
        worst=METRIC_NAMES[judge],
        amplification=factor,
    )


_TASKS: Mapping[Task, str] = {
    "text": "text to image",
    "refine": "refined",
    "image": "image to image",
    "inpaint": "inpainting",
}


def _by_task(images: Sequence[ImageQuality]) -> list[Fact]:
    """The figures of each task, where there are others than text to image."""
    tasks = dict.fromkeys(image.task for image in images)
    if not {*tasks} - {"text"}:
        return []
    found: list[Fact] = []
    for task in tasks:
        values = [decibels(image) for image in images if image.task == task]
        count = counted(len(values), "image")
        figures = f"mean {np.mean(values):.2f} dB, worst {min(values):.2f} dB ({count})"
        found.append((f"PSNR, {_TASKS[task]}", figures))
    return found


def _features(images: Sequence[ImageQuality]) -> list[Fact]:
    """The feature distance, where it was measured beside LPIPS."""
    values = [image.features for image in images if image.features is not None]
    if not values:
        return []
    return [(STAND_IN, f"mean {np.mean(values):.4f} (0 for equal images)")]


def _image_table(images: Sequence[ImageQuality], metric: str, judge: Metric) -> Table:
    beside = any(image.features is not None for image in images)
    columns = (
        Column("prompt", prose=True),
        Column("task"),
        Column("seed", numeric=True),
        Column("PSNR, dB", numeric=True, sorted="ascending" if judge == "psnr" else ""),
        Column("SSIM", numeric=True),
        Column(metric, numeric=True, sorted="" if judge == "psnr" else "descending"),
        *([Column(STAND_IN, numeric=True)] if beside else []),
        Column("shown below"),
    )
    rows = [
        [
            Cell(_prompt(image)),
            Cell(_TASKS[image.task]),
            Cell(str(image.seed), image.seed),
            Cell(_psnr(image), rank(image)),
            Cell(f"{image.ssim:.4f}", image.ssim),
            Cell(f"{image.distance:.4f}", image.distance),
            *([_features_cell(image)] if beside else []),
            Cell("yes" if image.source or image.ours else "no"),
        ]
        for image in images
    ]
    return Table("All images, worst first", columns, rows)


def _features_cell(image: ImageQuality) -> Cell:
    if image.features is None:
        return Cell("not measured")
    return Cell(f"{image.features:.4f}", image.features)


def _gates(quality: Quality) -> list[Fact]:
    """What images were judged by: a line for each gate."""
    return [
        ("Judged by" if index == 0 else "And by", gate_words(quality, gate))
        for index, gate in enumerate(quality.judged_by)
    ]


def _worst(images: Sequence[ImageQuality], judge: Metric) -> str:
    if not images:
        return "no image was compared"
    worst = images[worst_first(images, judge)[0]]
    if worst.psnr is None:
        return "none: all images are equal to the source's"
    figure = shown(judge, value_of(worst, judge)) if judge != "psnr" else f"{_psnr(worst)} dB"
    return f"{_prompt(worst)} (seed {worst.seed}, {figure})"


def _card(
    bundle: Bundle, image: ImageQuality, difference: Pixels | None, metric: str, factor: int
) -> Card:
    prompt = _prompt(image)
    images: list[tuple[str, KeptImage | None]] = []
    for name, kind, by in (
        (image.source, "source", "the source"),
        (image.ours, "ours", "this bundle"),
    ):
        shown = None
        if name is not None:
            data = bundle.read(name)
            decoded = _decode(bundle, name, data)
            media_type = FORMATS[str(decoded.format)]
            alt = f"Generated by {by}: {prompt}"
            shown = _kept_image(data, media_type, decoded.size, kind, alt)
        images.append((kind, shown))
    if difference is not None:
        amplified = np.minimum(difference.astype(np.uint16) * factor, 255).astype(np.uint8)
        height, width = amplified.shape[:2]
        alt = f"Difference of the two, amplified {factor} times: {prompt}"
        caption = f"difference x{factor}"
        shown = _kept_image(_png(amplified), "image/png", (width, height), caption, alt)
        images.append(("difference", shown))
    scores = (
        f"{_TASKS[image.task]}, seed {image.seed}, PSNR {_psnr(image, ' dB')}, "
        f"SSIM {image.ssim:.4f}, {metric} {image.distance:.4f}"
    )
    return Card(prompt, tuple(images), scores)


def _kept_image(
    data: bytes, media_type: str, size: tuple[int, int], caption: str, alt: str
) -> KeptImage:
    small = max(size) < _PIXELATED_BELOW
    return KeptImage(data_uri(media_type, data), *size, small, caption, alt)


def _psnr(image: ImageQuality, unit: str = "") -> str:
    return "equal" if image.psnr is None else f"{image.psnr:.2f}{unit}"


def _prompt(image: ImageQuality) -> str:
    return image.prompt or "(empty prompt)"


# --- layers -----------------------------------------------------------------------------------


def _layers(layers: Sequence[LayerRecipe]) -> LayersPart:
    columns = (
        Column("component"),
        Column("layer"),
        Column("kind"),
        Column("shape"),
        Column("scheme"),
        Column("method"),
        Column("rank", numeric=True),
        Column("kB", numeric=True),
        Column("error", numeric=True, sorted="descending"),
    )
    rows = [
        [
            Cell(layer.component),
            Cell(layer.name),
            Cell(layer.kind),
            Cell("x".join(map(str, layer.shape)), math.prod(layer.shape)),
            Cell(layer.scheme),
            Cell(layer.method),
            Cell(str(layer.rank), layer.rank),
            Cell(f"{layer.bytes / 1e3:.1f}", layer.bytes),
            Cell(f"{layer.error:.3g}" if layer.error > 0 else "not measured", layer.error),
        ]
        for layer in sorted(layers, key=lambda layer: -layer.error)
    ]
    return LayersPart(
        Table("All layers, largest error first", columns, rows, row_header=1),
        _histogram([layer.error for layer in layers]),
        _promoted(layers),
    )


def _promoted(layers: Iterable[LayerRecipe]) -> tuple[Promotion, ...]:
    """What was promoted, and why: one entry for each (from, to, reason) with its layers."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for layer in layers:
        if layer.planned_scheme is not None or layer.reason is not None:
            key = (
                layer.planned_scheme or layer.scheme,
                layer.scheme,
                layer.reason or "no reason given",
            )
            groups.setdefault(key, []).append(f"{layer.component}/{layer.name}")
    return tuple(
        Promotion(
            f"{before} to {after}" if before != after else f"kept at {after}", reason, tuple(names)
        )
        for (before, after, reason), names in groups.items()
    )


def _calibration(recipe: QuantRecipe | None) -> list[Fact] | None:
    if not recipe or not recipe.calibration:
        return None
    calibration = recipe.calibration
    loop = f"{counted(calibration.num_inference_steps, 'step')} of {calibration.scheduler}"
    prompts = counted(calibration.prompts, "prompt")
    return [
        ("Recorded on", f"{prompts}, generated by the pipeline's own loop"),
        ("Prompts' sha256", calibration.prompts_sha256),
        ("Generated with", f"{loop}, guidance {calibration.guidance_scale:g}"),
        ("Image size", f"{calibration.width}x{calibration.height}"),
    ]


def _fp32_bytes(layers: Iterable[LayerRecipe]) -> int:
    return sum(4 * math.prod(layer.shape) for layer in layers)


def _histogram(errors: Sequence[float]) -> Histogram | None:
    """A histogram of the measured (positive) `errors`; None where there are none."""
    measured = [error for error in errors if error > 0]
    if not measured:
        return None
    last = math.floor(math.log10(max(measured))) + 1
    first = max(math.floor(math.log10(min(measured))), last - _MAX_DECADES)
    per_decade = 6 if last - first <= 4 else 3
    counts = [0] * ((last - first) * per_decade)
    for error in measured:
        at = int((math.log10(error) - first) * per_decade)
        counts[min(max(at, 0), len(counts) - 1)] += 1

    step = (_RIGHT - _LEFT) / len(counts)
    bars = []
    for index, count in enumerate(counts):
        if count:
            low, high = (10 ** min(first + at / per_decade, 308.0) for at in (index, index + 1))
            height = count * (_BOTTOM - _TOP) / max(counts)
            title = f"{counted(count, 'layer')}, {low:.2g} to {high:.2g}"
            x, y = round(_LEFT + index * step + 1, 1), round(_BOTTOM - height, 1)
            bars.append(Bar(x, y, round(step - 2, 1), round(height, 1), title))
    return Histogram(
        label=f"Histogram of the errors of {counted(len(measured), 'layer')}, "
        f"from {min(measured):.3g} to {max(measured):.3g}",
        bars=tuple(bars),
        x_marks=tuple(
            Mark(
                round(_LEFT + (decade - first) * per_decade * step, 1),
                f"{10.0**decade:g}" if -4 <= decade <= 4 else f"1e{decade}",
            )
            for decade in range(first, last + 1)
        ),
        most=max(counts),
        unmeasured=len(errors) - len(measured),
    )


# --- images -----------------------------------------------------------------------------------


def _decode(bundle: Bundle, name: str, data: bytes) -> Image.Image:
    """`data`, the file `name`, as a loaded image of whatever mode. Raises BundleError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=tuple(FORMATS))
            image.load()
    except (
        *(OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error),
        *(Image.DecompressionBombError, Image.DecompressionBombWarning),
    ) as exc:
        detail = "" if isinstance(exc, UnidentifiedImageError) else f" ({exc})"
        raise BundleError(
            f"{bundle.path}: {name} isn't a readable PNG or WebP image{detail}; "
            "build the bundle again"
        ) from exc
    return image


def _difference(bundle: Bundle, image: ImageQuality) -> Pixels | None:
    """|ours - source| [H, W, 3] of 8 bits; None where one isn't kept. Raises BundleError."""
    if image.source is None or image.ours is None:
        return None
    first, second = (
        np.asarray(_decode(bundle, name, bundle.read(name)).convert("RGB"))
        for name in (image.source, image.ours)
    )
    if first.shape != second.shape:
        sizes = " and ".join(f"{array.shape[1]}x{array.shape[0]}" for array in (first, second))
        raise BundleError(
            f"{bundle.path}: {image.source} and {image.ours} are of {sizes} pixels and can't "
            "be compared; build the bundle again"
        )
    difference: Pixels = np.maximum(first, second) - np.minimum(first, second)
    return difference


def _difference_counts(differences: Iterable[Pixels | None]) -> npt.NDArray[np.int64]:
    """How often each difference 0 to 255 occurs [256], over all channels of all images."""
    counts = np.zeros(256, np.int64)
    for difference in differences:
        if difference is not None:
            counts += np.bincount(difference.ravel(), minlength=256)
    return counts


def _amplification(counts: npt.NDArray[np.int64]) -> int:
    """The largest power of two, up to MAX_AMPLIFICATION, that clips at most 1 value in 1000.

    counts [256]: how often each difference occurs.
    """
    total = int(counts.sum())
    high = int(np.searchsorted(np.cumsum(counts), 0.999 * total)) if total else 0
    factor = 1
    while factor < MAX_AMPLIFICATION and 2 * factor * high <= 255:
        factor *= 2
    return factor


def _png(pixels: Pixels) -> bytes:
    """`pixels` [H, W, 3] as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", optimize=True)
    return file.getvalue()
