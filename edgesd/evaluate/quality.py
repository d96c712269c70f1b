"""How far a bundle's images are from its source's: same prompts, same seeds, same steps."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
from PIL import Image

from edgesd.errors import InputError
from edgesd.evaluate.perceptual import Perceptual
from edgesd.evaluate.psnr import psnr
from edgesd.evaluate.ssim import ssim
from edgesd.files import atomic_write
from edgesd.progress import SILENT, Progress
from edgesd.runtime.pipeline import Pipeline
from edgesd.runtime.requests import Request, image_task, painted_whole
from edgesd.spec.pipeline import Task
from edgesd.spec.quality import Gate, ImageQuality, Metric, Quality

EQUAL_DB = 100.0
"""PSNR of equal images in a mean, in dB."""

UNSEEN = 1e-3
"""A perceptual distance below this counts as this where distances are set in relation: nobody sees
it, and twice as much of it means nothing."""

METRIC_NAMES: Mapping[Metric, str] = {
    "psnr": "PSNR",
    "lpips": "LPIPS",
    "features": "feature distance",
}

_BATCH_PIXELS = 8 * 256 * 256
_MAX_BATCH = 8


def requests_for(prompts: Sequence[str], **settings: object) -> list[Request]:
    """One request per prompt; the prompt's place, counted from 0, is its seed."""
    return [Request(prompt, seed, **settings) for seed, prompt in enumerate(prompts)]  # type: ignore[arg-type]


def generate(
    pipeline: Pipeline,
    requests: Sequence[Request],
    progress: Progress = SILENT,
    task: str = "images",
    *,
    together: bool = False,
) -> list[Image.Image]:
    """The images of all requests, one by one, as `edgesd generate` does; of a bundle of a fixed
    batch as many of one task at a time as it makes.

    together: several at a time where they are small, which is faster. Images that are generated
    together share the ranges of dynamically quantized activations: figures would be worse.
    """
    shape = pipeline.spec.shape
    requests = [painted_whole(pipeline.spec, request) for request in requests]
    batch = 1
    if not shape.dynamic:
        batch = pipeline.images_per_run(requests[0]) if requests else 1
    elif together:
        batch = max(1, min(_MAX_BATCH, _BATCH_PIXELS // (shape.height * shape.width)))
    images: list[Image.Image] = []
    for _, found in groupby(requests, lambda each: (task_of(each), each.strength)):
        alike = list(found)
        for start in range(0, len(alike), batch):
            group = alike[start : start + batch]
            filled = group if shape.dynamic else group + group[-1:] * (batch - len(group))
            images += pipeline.generate(filled)[: len(group)]
            progress.update(task, len(images), len(requests))
    return images


def generate_cached(
    pipeline: Pipeline,
    requests: Sequence[Request],
    folder: Path,
    progress: Progress = SILENT,
    task: str = "images",
) -> list[Image.Image]:
    """The images of a source, kept in `folder`, whose name says what they depend on."""
    paths = [folder / f"{index:04d}.png" for index in range(len(requests))]
    if all(path.is_file() for path in paths):
        return [_open(path) for path in paths]
    images = generate(pipeline, requests, progress, task, together=True)
    for path, image in zip(paths, images, strict=True):
        with atomic_write(path) as file:
            image.save(file, "PNG")
    return images


def compare(
    requests: Sequence[Request],
    source: Sequence[Image.Image],
    ours: Sequence[Image.Image],
    perceptual: Perceptual,
    features: Perceptual | None = None,
) -> tuple[ImageQuality, ...]:
    """Every pair of images measured, in the requests' order. features: the feature distance, where
    it is wanted beside `perceptual`. Raises InputError as `psnr`."""
    found = []
    for request, first, second in zip(requests, source, ours, strict=True):
        value = psnr(first, second)
        found.append(
            ImageQuality(
                prompt=request.prompt,
                seed=request.seed,
                psnr=None if math.isinf(value) else value,
                ssim=ssim(first, second),
                distance=perceptual.distance(first, second),
                task=task_of(request),
                features=None if features is None else features.distance(first, second),
            )
        )
    return tuple(found)


def summarise(
    images: tuple[ImageQuality, ...],
    pipeline: Pipeline,
    request: Request,
    perceptual: Perceptual,
    gates: tuple[Gate, ...] = (),
) -> Quality:
    """The Quality of images that were all generated like `request`, and judged by `gates`. Raises
    InputError for no images."""
    if not images:
        raise InputError("no prompts to measure quality with: give a file with at least one")
    values = [decibels(image) for image in images]
    complete = pipeline.complete(painted_whole(pipeline.spec, request))
    return Quality(
        images=images,
        num_inference_steps=complete.num_inference_steps,
        guidance_scale=complete.guidance_scale,
        scheduler=complete.scheduler,
        psnr_mean=float(np.mean(values)),
        psnr_min=min(values),
        ssim_mean=float(np.mean([p.ssim for p in images])),
        distance_mean=float(np.mean([p.distance for p in images])),
        metric=perceptual.name,
        measured_on=arithmetic(),
        gates=gates,
    )


def task_of(request: Request) -> Task:
    """What is asked for."""
    return image_task(request) or "text"


def decibels(image: ImageQuality) -> float:
    """An image's PSNR in dB, EQUAL_DB for equal ones: what means and minima are taken of."""
    return EQUAL_DB if image.psnr is None else image.psnr


def value_of(image: ImageQuality, metric: Metric) -> float:
    """An image's figure by `metric`, in its unit. A distance is that which was measured: what the
    manifest says of LPIPS and its stand-in is for `Quality.metric` to tell apart."""
    if metric == "psnr":
        return decibels(image)
    if metric == "features" and image.features is not None:
        return image.features
    return image.distance


def shown(metric: Metric, value: float) -> str:
    """A figure with its unit, or with the name of a metric that has none."""
    return f"{value:.1f} dB" if metric == "psnr" else f"{METRIC_NAMES[metric]} {value:.4f}"


def nearness(metric: Metric, value: float) -> float:
    """A figure in dB, more for images that are nearer to one another.

    PSNR is that of a squared difference of pixels; a perceptual distance is a squared difference of
    features (weighted, Zhang et al. 2018, eq. 1), of which this is -10 log10. So ten times the
    squared error takes 10 dB from each, as long as features follow pixels.
    """
    return value if metric == "psnr" else -10 * math.log10(max(value, UNSEEN))


def worst_of(images: Sequence[ImageQuality], metric: Metric) -> float:
    """The figure of the worst image."""
    values = [value_of(image, metric) for image in images]
    return min(values) if metric == "psnr" else max(values)


def holds(gate: Gate, images: Sequence[ImageQuality]) -> bool:
    """Whether every image keeps the gate's limit, if it has one. What is no number doesn't."""
    if gate.limit is None:
        return True
    values = [value_of(image, gate.metric) for image in images]
    if gate.metric == "psnr":
        return all(value >= gate.limit for value in values)
    return all(value <= gate.limit for value in values)


def gate_words(quality: Quality, gate: Gate) -> str:
    """What images were judged by, in words: the metric, who chose it, and whether its limit held,
    if there is one."""
    chosen = {"family": "as for all models of the family", "option": "as an option asks"}
    return f"{METRIC_NAMES[gate.metric]}, {chosen[gate.source]}; {limit_words(quality, gate)}"


def limit_words(quality: Quality, gate: Gate) -> str:
    """A gate's limit in words, and whether it held."""
    if gate.limit is None:
        return "no limit was asked for"
    held = "held" if holds(gate, quality.images) else "not held"
    limit = f"at least {gate.limit:g} dB" if gate.metric == "psnr" else f"at most {gate.limit:g}"
    return f"{limit} was asked for: {held}"


def worst_first(images: Sequence[ImageQuality], metric: Metric = "psnr") -> list[int]:
    """Places of `images` by `metric`, the worst first; equal images last."""
    return sorted(range(len(images)), key=lambda index: rank(images[index], metric))


def rank(image: ImageQuality, metric: Metric = "psnr") -> float:
    """What images are ordered by, less for worse ones: PSNR in dB, and above any of it for equal
    ones; else the distance, negative."""
    if metric != "psnr":
        return -value_of(image, metric)
    return 1e9 if image.psnr is None else image.psnr


def arithmetic() -> str:
    """What generated the images, and that its int8 sums are exact."""
    import onnxruntime

    # The runner asks for exact sums where the processor's int8 instructions would saturate.
    return f"onnxruntime {onnxruntime.__version__} on {platform.machine()}, exact int8 sums"


def _open(path: Path) -> Image.Image:
    try:
        with Image.open(path) as file:
            image: Image.Image = file.convert("RGB")
            return image
    except OSError as exc:
        raise InputError(f"{path} can't be read ({exc}): remove it and run again") from exc
