"""The report on a bundle: one HTML page that needs nothing but itself, and works without scripts.

All of it comes from the manifest and the images that the build kept. The same bundle gives the
same page, byte for byte.
"""

from __future__ import annotations

import base64
import io
import math
import struct
import warnings
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from edgesd.errors import BundleError, InputError
from edgesd.evaluate.quality import rank, worst_first
from edgesd.files import atomic_write, check_writable
from edgesd.pages.page import (
    Cell,
    Column,
    check_page_path,
    counted,
    escaped,
    fact_list,
    html_page,
    is_page,
    mb,
    megabytes,
    section_of,
    table_of,
)
from edgesd.runtime.bundle import SUFFIX, Bundle
from edgesd.spec.bundle import BundleManifest, LayerRecipe, QuantRecipe
from edgesd.spec.quality import ImageQuality, Quality

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

Pixels = npt.NDArray[np.uint8]


def default_report_path(bundle: Bundle) -> Path:
    """Where a report goes without -o: NAME-report.html beside the bundle's folder or file."""
    name = bundle.path.name.removesuffix(SUFFIX) if bundle.path.is_file() else bundle.path.name
    return bundle.path.with_name(f"{name}-report.html")


def write_report(bundle: Bundle, path: Path | None = None) -> Path:
    """Write the report on `bundle` to `path`, over an older file; returns `path`.

    path: None for `default_report_path`, where no page but edgesd's is replaced. Raises UsageError
    when `path` isn't named .html, InputError when it is a folder, lies in the bundle (which may
    hold no other files) or can't be written, ResourceError when the disk is full, and BundleError
    as `report_html`.
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
        file.write(page.encode("utf-8", "replace"))
    return path


def report_html(bundle: Bundle) -> str:
    """The report on `bundle` as an HTML page with its images, styles and script inside.

    Raises BundleError when an image is missing, altered, can't be decoded, or differs in size
    from the one that it is compared with.
    """
    manifest = bundle.manifest
    title = f"{manifest.name}, {manifest.precision}"
    sections = (
        _head(bundle),
        _quality(manifest),
        _images(bundle),
        _layers(manifest),
        _calibration(manifest.recipe),
    )
    return html_page(f"{title}: edgesd report", sections, _SCRIPT)


# --- sections ---------------------------------------------------------------------------------


def _head(bundle: Bundle) -> str:
    manifest, recipe, quality = bundle.manifest, bundle.manifest.recipe, bundle.manifest.quality
    pipeline, shape = manifest.pipeline, manifest.pipeline.shape
    size = f"{shape.width}x{shape.height}"
    total = bundle.disk_bytes()
    figures = [("on disk", megabytes(total), "all files of the bundle")]
    if recipe and recipe.layers:
        figures.append(_against_fp32(recipe.layers))
    if quality:
        figures += [
            (
                "PSNR, mean",
                f"{quality.psnr_mean:.1f} dB",
                counted(len(quality.images), "image"),
            ),
            ("PSNR, worst", f"{quality.psnr_min:.1f} dB", _floor(quality)),
        ]
    size += f", any multiple of {shape.multiple_of}" if shape.dynamic else " only"
    source = f"family {pipeline.family}, source sha256 {pipeline.source_sha256[:16]}"
    licence = manifest.licence
    facts = (
        ("Model", f"{manifest.name} ({source})"),
        ("Target", f"{manifest.target} ({manifest.arch})"),
        ("Backend", manifest.backend),
        ("Precision", manifest.precision),
        ("Simulated", (SIMULATED if recipe.simulated else "no") if recipe else None),
        ("Attention", POOLED if recipe and recipe.pooled_attention else None),
        ("Image size", size),
        ("Licence", f"{licence.name} ({', '.join(licence.files) or 'no file'})"),
        ("Tools", ", ".join(f"{name} {version}" for name, version in manifest.tools.items())),
    )
    notice = ""
    if recipe and recipe.simulated:
        notice = f'<p class="notice" role="note">{escaped(SIMULATED)}</p>\n'
    tiles = "".join(
        f"<div><dt>{escaped(name)}</dt><dd><strong>{escaped(value)}</strong> "
        f"<span>{escaped(note)}</span></dd></div>"
        for name, value, note in figures
    )
    return (
        f'<header>\n<p class="kicker">edgesd report</p>\n'
        f'<h1 dir="auto">{escaped(manifest.name)}</h1>\n'
        f'<p class="lead">{escaped(f"{manifest.precision} for {manifest.target}")}</p>\n{notice}'
        f'<dl class="figures">{tiles}</dl>\n</header>\n'
        + section_of("The bundle", fact_list(facts) + _sizes(bundle, total))
    )


def _against_fp32(layers: Sequence[LayerRecipe]) -> tuple[str, str, str]:
    """The figure that sets the layers' bytes against 4 per weight: name, value, note."""
    now, full = sum(layer.bytes for layer in layers), _fp32_bytes(layers)
    return (
        "weights of the layers",
        f"{now / full:.0%} of fp32" if full > 0 else megabytes(now),
        f"{megabytes(now)} instead of {megabytes(full)} (computed: 4 bytes per weight)",
    )


def _sizes(bundle: Bundle, total: int) -> str:
    manifest = bundle.manifest
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
    note = ""
    if layers:
        note = (
            '<p class="note">"In fp32" is no file: it is computed from the shapes of the layers, '
            "4 bytes per weight, without biases and norms.</p>\n"
        )
    return table_of("Sizes", columns, [*rows, other, sums]) + note


def _quality(manifest: BundleManifest) -> str:
    quality = manifest.quality
    if not quality:
        return section_of(
            "Quality",
            "<p>Nothing was measured: this bundle says nothing of how far its images are from "
            f"those of its source. {_how_to(manifest)}</p>\n",
        )
    decibels = f"mean {quality.psnr_mean:.2f} dB, worst {quality.psnr_min:.2f} dB"
    steps = counted(quality.num_inference_steps, "step")
    facts = (
        ("PSNR", f"{decibels} (equal images count as 100 dB)"),
        ("SSIM", f"mean {quality.ssim_mean:.4f} (1 for equal images)"),
        (quality.metric, f"mean {quality.distance_mean:.4f} (0 for equal images)"),
        ("Floor", _floor(quality)),
        ("Worst prompt", _worst(quality.images)),
        ("Drawn with", f"{steps} of {quality.scheduler}, guidance {quality.guidance_scale:g}"),
        ("Measured on", quality.measured_on),
    )
    columns = (
        Column("prompt", prose=True),
        Column("seed", numeric=True),
        Column("PSNR, dB", numeric=True, sorted="ascending"),
        Column("SSIM", numeric=True),
        Column(quality.metric, numeric=True),
        Column("shown below"),
    )
    rows = [
        [
            Cell(_prompt(image)),
            Cell(str(image.seed), image.seed),
            Cell(_psnr(image), rank(image)),
            Cell(f"{image.ssim:.4f}", image.ssim),
            Cell(f"{image.distance:.4f}", image.distance),
            Cell("yes" if image.source or image.ours else "no"),
        ]
        for image in (quality.images[index] for index in worst_first(quality.images))
    ]
    return section_of(
        "Quality", fact_list(facts) + table_of("All images, worst first", columns, rows)
    )


def _floor(quality: Quality) -> str:
    if quality.min_psnr is None:
        return "no floor was asked for"
    held = "held" if quality.psnr_min >= quality.min_psnr else "not held"
    return f"at least {quality.min_psnr:g} dB was asked for: {held}"


def _worst(images: Sequence[ImageQuality]) -> str:
    if not images:
        return "no image was compared"
    worst = images[worst_first(images)[0]]
    if worst.psnr is None:
        return "none: all images are equal to the source's"
    return f"{_prompt(worst)} (seed {worst.seed}, {_psnr(worst)} dB)"


def _images(bundle: Bundle) -> str:
    quality = bundle.manifest.quality
    if not quality:
        return ""
    ordered = [quality.images[index] for index in worst_first(quality.images)]
    kept = [image for image in ordered if image.source or image.ours]
    if not kept:
        text = "<p>The bundle keeps no images: there are only their figures above.</p>\n"
        return section_of("Images", text)
    differences = [_difference(bundle, image) for image in kept]
    factor = _amplification(_difference_counts(differences))
    intro = (
        f"<p>Worst PSNR first. The difference is |ours - source| per channel, amplified {factor} "
        "times in all maps of this page (white where that is above 255), so that they compare."
        "</p>\n"
    )
    cards = "\n".join(
        _card(bundle, image, difference, quality.metric, factor)
        for image, difference in zip(kept, differences, strict=True)
    )
    return section_of("Images", f'{intro}<div class="cards">\n{cards}\n</div>\n')


def _card(
    bundle: Bundle, image: ImageQuality, difference: Pixels | None, metric: str, factor: int
) -> str:
    """One prompt: source, ours and their difference side by side."""
    prompt = _prompt(image)
    figures = []
    for name, kind, who in (
        (image.source, "source", "the source"),
        (image.ours, "ours", "this bundle"),
    ):
        if name is None:
            figures.append(f'<p class="absent">{kind}: not kept</p>')
            continue
        data = bundle.read(name)
        opened = _decode(bundle, name, data)
        alt = f"Drawn by {who}: {prompt}"
        figures.append(_figure(kind, kind, alt, data, FORMATS[str(opened.format)], opened.size))
    if difference is not None:
        amplified = np.minimum(difference.astype(np.uint16) * factor, 255).astype(np.uint8)
        data, (height, width) = _png(amplified), amplified.shape[:2]
        alt = f"Difference of the two, amplified {factor} times: {prompt}"
        caption = f"difference x{factor}"
        figures.append(_figure("difference", caption, alt, data, "image/png", (width, height)))
    seed_and_scores = (
        f"seed {image.seed}, PSNR {_psnr(image, ' dB')}, SSIM {image.ssim:.4f}, "
        f"{metric} {image.distance:.4f}"
    )
    return (
        f'<article class="card">\n<h3 dir="auto">{escaped(prompt)}</h3>\n'
        f'<div class="pair">{"".join(figures)}</div>\n'
        f'<p class="note">{escaped(seed_and_scores)}</p>\n</article>'
    )


def _figure(
    kind: str, caption: str, alt: str, data: bytes, media_type: str, size: tuple[int, int]
) -> str:
    sharp = " sharp" if max(size) < _PIXELATED_BELOW else ""
    uri = f"data:{media_type};base64,{base64.b64encode(data).decode()}"
    return (
        f'<figure class="{kind}{sharp}"><img src="{uri}" width="{size[0]}" height="{size[1]}" '
        f'alt="{escaped(alt)}"><figcaption>{escaped(caption)}</figcaption></figure>'
    )


def _layers(manifest: BundleManifest) -> str:
    recipe = manifest.recipe
    if not recipe:
        return section_of(
            "Layers",
            f"<p>Nothing was quantized: the weights are {escaped(manifest.precision)}. "
            f"{_how_to(manifest)}</p>\n",
        )
    if not recipe.layers:
        return section_of("Layers", f"<p>The recipe {escaped(recipe.name)} lists no layer.</p>\n")
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
        for layer in sorted(recipe.layers, key=lambda layer: -layer.error)
    ]
    intro = (
        f"<p>{escaped(counted(len(recipe.layers), 'layer'))}, recipe {escaped(recipe.name)}. "
        "The error of a layer is the RMS of the change of its output over the RMS of that output, "
        "on calibrated inputs.</p>\n"
    )
    chart = _histogram([layer.error for layer in recipe.layers])
    table = table_of("All layers, largest error first", columns, rows, row_header=1)
    return section_of("Layers", intro + chart + _raised(recipe.layers) + table)


def _raised(layers: Iterable[LayerRecipe]) -> str:
    """What was raised, and why: one entry for each (from, to, reason) with its layers."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for layer in layers:
        if layer.planned_scheme is not None or layer.reason is not None:
            key = (
                layer.planned_scheme or layer.scheme,
                layer.scheme,
                layer.reason or "no reason given",
            )
            groups.setdefault(key, []).append(f"{layer.component}/{layer.name}")
    title = "<h3>What was raised, and why</h3>\n"
    if not groups:
        return f"{title}<p>Nothing: every layer has the scheme that was planned.</p>\n"
    items = []
    for (before, after, reason), names in groups.items():
        change = f"{before} to {after}" if before != after else f"kept at {after}"
        listed = "".join(f"<li><code>{escaped(name)}</code></li>" for name in names)
        items.append(
            f"<li><strong>{escaped(change)}</strong>: {escaped(reason)} "
            f"<details open><summary>{escaped(counted(len(names), 'layer'))}</summary>"
            f"<ul>{listed}</ul></details></li>"
        )
    return f'{title}<ul class="raised">{"".join(items)}</ul>\n'


def _calibration(recipe: QuantRecipe | None) -> str:
    if not recipe:
        return ""
    calibration = recipe.calibration
    if not calibration:
        text = "<p>None: no activations were recorded for this recipe.</p>\n"
        return section_of("Calibration", text)
    prompts, steps = calibration.prompts, calibration.num_inference_steps
    loop = f"{counted(steps, 'step')} of {calibration.scheduler}"
    facts = (
        ("Recorded on", f"{counted(prompts, 'prompt')}, drawn by the pipeline's own loop"),
        ("Prompts' sha256", calibration.prompts_sha256),
        ("Drawn with", f"{loop}, guidance {calibration.guidance_scale:g}"),
        ("Image size", f"{calibration.width}x{calibration.height}"),
    )
    return section_of("Calibration", fact_list(facts))


def _how_to(manifest: BundleManifest) -> str:
    command = f"edgesd build MODEL --target {manifest.target} --precision w8a8"
    return (
        f"To get figures, build a quantized bundle: <code>{escaped(command)}</code> "
        "(<code>edgesd build --help</code> lists the precisions)."
    )


# --- images ---------------------------------------------------------------------------------


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


# --- the chart of errors ----------------------------------------------------------------------

_CHART_WIDTH, _CHART_HEIGHT = 720, 220
_PLOT_LEFT, _PLOT_TOP, _PLOT_RIGHT, _PLOT_BOTTOM = 44, 10, 708, 170
_MAX_DECADES = 8


def _histogram(errors: Sequence[float]) -> str:
    """An SVG histogram of the measured (positive) `errors` over a logarithmic axis."""
    measured = [error for error in errors if error > 0]
    if not measured:
        return "<p>No layer's error was measured.</p>\n"
    last = math.floor(math.log10(max(measured))) + 1
    first = max(math.floor(math.log10(min(measured))), last - _MAX_DECADES)
    per_decade = 6 if last - first <= 4 else 3
    counts = [0] * ((last - first) * per_decade)
    for error in measured:
        at = int((math.log10(error) - first) * per_decade)
        counts[min(max(at, 0), len(counts) - 1)] += 1

    bar = (_PLOT_RIGHT - _PLOT_LEFT) / len(counts)
    tall = (_PLOT_BOTTOM - _PLOT_TOP) / max(counts)
    parts = []
    for decade in range(first, last + 1):
        x = _PLOT_LEFT + (decade - first) * per_decade * bar
        label = f"{10.0**decade:g}" if -4 <= decade <= 4 else f"1e{decade}"
        parts.append(
            f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{_PLOT_TOP}" y2="{_PLOT_BOTTOM}"/>'
            f'<text x="{x:.1f}" y="{_PLOT_BOTTOM + 20}" text-anchor="middle">{label}</text>'
        )
    for index, count in enumerate(counts):
        if count:
            low, high = (10 ** min(first + at / per_decade, 308.0) for at in (index, index + 1))
            parts.append(
                f'<rect x="{_PLOT_LEFT + index * bar + 1:.1f}" width="{bar - 2:.1f}" '
                f'y="{_PLOT_BOTTOM - count * tall:.1f}" height="{count * tall:.1f}">'
                f"<title>{counted(count, 'layer')}, {low:.2g} to {high:.2g}</title></rect>"
            )
    for count, y in ((0, _PLOT_BOTTOM), (max(counts), _PLOT_TOP)):
        parts.append(f'<text x="{_PLOT_LEFT - 8}" y="{y + 5}" text-anchor="end">{count}</text>')
    middle = (_PLOT_LEFT + _PLOT_RIGHT) / 2
    parts.append(
        f'<line class="axis" x1="{_PLOT_LEFT}" x2="{_PLOT_RIGHT}" y1="{_PLOT_BOTTOM}" '
        f'y2="{_PLOT_BOTTOM}"/><text x="{middle}" y="{_CHART_HEIGHT - 8}" text-anchor="middle">'
        "error of the layer (logarithmic)</text>"
    )
    label = (
        f"Histogram of the errors of {counted(len(measured), 'layer')}, "
        f"from {min(measured):.3g} to {max(measured):.3g}"
    )
    missing = len(errors) - len(measured)
    without = f"; {missing} not measured" if missing else ""
    return (
        f'<figure class="chart"><svg viewBox="0 0 {_CHART_WIDTH} {_CHART_HEIGHT}" role="img" '
        f'aria-label="{label}">{"".join(parts)}</svg>'
        f"<figcaption>Layers by error{without}</figcaption></figure>\n"
    )


# --- pieces of HTML ---------------------------------------------------------------------------


def _psnr(image: ImageQuality, unit: str = "") -> str:
    return "equal" if image.psnr is None else f"{image.psnr:.2f}{unit}"


def _prompt(image: ImageQuality) -> str:
    return image.prompt or "(empty prompt)"


def _fp32_bytes(layers: Iterable[LayerRecipe]) -> int:
    return sum(4 * math.prod(layer.shape) for layer in layers)


# --- style and script -------------------------------------------------------------------------

_SCRIPT = """
"use strict";
for (const table of document.querySelectorAll("table")) {
  const heads = [...table.tHead.rows[0].cells];
  if (!heads.some(head => head.hasAttribute("aria-sort"))) continue;
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.append(...head.childNodes);
    head.append(button);
    const key = row => row.cells[column].dataset.order ?? row.cells[column].textContent;
    button.addEventListener("click", () => {
      const before = head.getAttribute("aria-sort");
      const down = before ? before === "ascending" : head.classList.contains("number");
      heads.forEach(other => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const compare = (a, b) =>
        key(a).localeCompare(key(b), undefined, { numeric: true });
      const byNumber = (a, b) => key(a) - key(b);
      const numeric = table.tBodies[0].rows[0]?.cells[column].dataset.order !== undefined;
      const rows = [...table.tBodies[0].rows].sort(numeric ? byNumber : compare);
      table.tBodies[0].append(...(down ? rows.reverse() : rows));
    });
  });
}
for (const pair of document.querySelectorAll(".pair")) {
  const source = pair.querySelector(".source img"), ours = pair.querySelector(".ours img");
  if (!source || !ours) continue;
  const caption = ours.nextElementSibling, own = ours.src, alt = ours.alt;
  const button = document.createElement("button");
  button.className = "flip";
  button.type = "button";
  button.textContent = "Show the source in place of ours";
  button.setAttribute("aria-pressed", "false");
  button.addEventListener("click", () => {
    const pressed = button.getAttribute("aria-pressed") !== "true";
    button.setAttribute("aria-pressed", String(pressed));
    ours.src = pressed ? source.src : own;
    ours.alt = pressed ? source.alt : alt;
    caption.textContent = pressed ? "source, for comparison" : "ours";
  });
  pair.after(button);
}
"""
