"""Quantization methods and schemes on one model: pictures, size and time of each.

python -m benchmarks.quantization [MODEL] --work FOLDER [--only NAME ...] [--json FILE]

Every row is a bundle that `edgesd build` makes; its pictures are drawn by ONNX Runtime, as on a
board, and compared with those of the fp32 bundle: same prompts (the model's prompts/quality.txt),
same seeds, the model's own sampler with its default steps, and DPM-Solver++ with few. Time: one
denoising step of one guided picture, alternating with fp32 in the same run.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.common import environment, paired_ratio, parser, run, spread, table, write_json
from edgesd.errors import EdgesdError
from edgesd.evaluate.perceptual import Perceptual, open_perceptual
from edgesd.evaluate.quality import compare, draw, draw_cached, requests_for, summarise
from edgesd.recipes import DEMO, QuantOptions, build
from edgesd.runtime.bundle import Bundle
from edgesd.runtime.images import read_prompts
from edgesd.runtime.pipeline import Pipeline, Request
from edgesd.spec.quality import Quality

TARGET = "x86-64-cpu"
FEW = {"num_inference_steps": 8, "scheduler": "dpmpp-2m"}


class Case(NamedTuple):
    """A row: its name, the scheme, and the options of the build."""

    name: str
    precision: str
    options: QuantOptions


class Row(NamedTuple):
    """Figures of a row; PSNR in dB, distances by the metric in the head, size as a part of fp32."""

    name: str
    scheme: str
    psnr_mean: float
    psnr_min: float
    ssim: float
    distance: float
    few_psnr_mean: float
    few_psnr_min: float
    size: float
    step_ms: float
    step_ratio: float
    raised: int


def cases(work: Path) -> list[Case]:
    """All rows. Rows with a size or a floor show what the gate makes of a scheme."""

    def plain(method: str, scheme: str) -> Case:
        return Case(method, scheme, QuantOptions(method=method, work=work, quality_prompts=()))

    rows = [
        plain("rtn", scheme)
        for scheme in (
            *("w8a16", "w8a8", "w4a16-g64", "w4a16-g64-lr32"),
            *("w4a8-g64", "w4a8-g64-lr32", "w4a4-g64", "w4a4-g64-lr32"),
        )
    ]
    rows += [plain("gptq", scheme) for scheme in ("w8a8", "w4a16-g64", "w4a8-g64", "w4a4-g64")]
    rows += [
        plain("svdquant", scheme)
        for scheme in (
            *("w8a8", "w4a16-g64-lr32", "w4a8-g64-lr32", "w4a4-g64-lr32"),
            *("w4a16-g64-lr8", "w4a8-g64-lr8", "w4a4-g64-lr8"),
        )
    ]
    static = QuantOptions(static=True, work=work, quality_prompts=())
    rows.append(Case("svdquant, static", "w8a8", static))
    gated = (("w8a8", 38.0, 0.3), ("w4a16-g64-lr32", 33.0, 0.2), ("w4a8-g64-lr32", 32.0, 0.2))
    for scheme, floor, size in (*gated, ("w4a4-g64-lr32", 16.0, 0.2)):
        what = f">= {floor:g} dB, size <= {size:g}"
        options = QuantOptions(min_psnr=floor, max_size=size, work=work)
        rows.append(Case(f"svdquant, {what}", scheme, options))
    return rows


def measure(
    case: Case, model: str, work: Path, prompts: Sequence[str], perceptual: Perceptual
) -> Row:
    """Build one row's bundle, draw with it, and remove it."""
    out = work / "row"
    shutil.rmtree(out, ignore_errors=True)
    built = build(model, TARGET, case.precision, out, quantization=case.options)
    source, recipe = built.reference, built.bundle.manifest.recipe
    assert source is not None and recipe is not None
    usual, few = (
        _quality(built.bundle, source, requests_for(prompts, **settings), work, perceptual)
        for settings in ({}, FEW)
    )
    ours, theirs = _steps(built.bundle, source)
    row = Row(
        name=case.name,
        scheme=case.precision,
        psnr_mean=usual.psnr_mean,
        psnr_min=usual.psnr_min,
        ssim=usual.ssim_mean,
        distance=usual.distance_mean,
        few_psnr_mean=few.psnr_mean,
        few_psnr_min=few.psnr_min,
        size=built.bundle.disk_bytes() / source.disk_bytes(),
        step_ms=1000 * spread(ours).median,
        step_ratio=paired_ratio(ours, theirs).median,
        raised=sum(layer.raised_from is not None for layer in recipe.layers),
    )
    shutil.rmtree(out)
    return row


def _quality(
    bundle: Bundle, source: Bundle, requests: Sequence[Request], work: Path, perceptual: Perceptual
) -> Quality:
    key = hashlib.sha256(repr((source.path.name, requests)).encode()).hexdigest()[:16]
    with Pipeline(source) as pipeline:
        theirs = draw_cached(pipeline, requests, work / f"benchmark-{key}")
    with Pipeline(bundle) as pipeline:
        pairs = compare(requests, theirs, draw(pipeline, requests), perceptual)
        return summarise(pairs, pipeline, requests[0], perceptual, None)


def _steps(ours: Bundle, theirs: Bundle, rounds: int = 7) -> tuple[list[float], list[float]]:
    """Seconds of a step, each the median of a picture's, in turn."""
    request = Request("red apple", 0)
    found: tuple[list[float], list[float]] = ([], [])
    with Pipeline(ours) as first, Pipeline(theirs) as second:
        for pipeline in (first, second):
            pipeline.generate([request])
        for _ in range(rounds):
            for pipeline, times in zip((first, second), found, strict=True):
                pipeline.timings.steps.clear()
                pipeline.generate([request])
                times.append(spread(pipeline.timings.steps).median)
    return found


def main() -> None:
    made = parser(__doc__)
    made.add_argument("model", nargs="?", default=DEMO)
    made.add_argument("--work", type=Path, required=True, help="folder for what is kept")
    made.add_argument("--prompts", type=Path, default=Path("models/emoji/prompts/quality.txt"))
    made.add_argument("--only", nargs="*", help="rows whose name or scheme holds one of these")
    made.add_argument("--lpips", type=Path, help="folder with the weights of LPIPS")
    given = made.parse_args()
    with given.prompts.open("rb") as file:
        prompts = read_prompts(file)
    perceptual = open_perceptual(given.lpips)
    print(f"{len(prompts)} prompts; distance: {perceptual.name}", flush=True)
    rows = []
    for case in cases(given.work):
        label = f"{case.name} {case.precision}"
        if given.only and not any(part in label for part in given.only):
            continue
        try:
            rows.append(measure(case, given.model, given.work, prompts, perceptual))
        except EdgesdError as exc:
            print(f"{label}: {exc}", flush=True)
            continue
        print(table(Row._fields, rows[-1:]).splitlines()[-1], flush=True)
    print()
    print(table(Row._fields, rows))
    write_json(
        given.json,
        {
            "environment": environment("torch"),
            "metric": perceptual.name,
            "rows": [row._asdict() for row in rows],
        },
    )


if __name__ == "__main__":
    run(main)
