"""Measures how fast a bundle generates on this machine, and the memory, heat and energy it needs.

Light: this runs on boards. What it finds is a `Bench`, one JSON object, with its images and every
sample in it.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from importlib import metadata
from io import BytesIO
from itertools import pairwise
from pathlib import Path

import msgspec

import edgesd
from edgesd.device.detect import detect_machine, emulated
from edgesd.device.telemetry import Sample, Sampler, board_watts, power_mode
from edgesd.errors import InputError, UsageError
from edgesd.progress import SILENT, Progress
from edgesd.runtime.bundle import Bundle
from edgesd.runtime.loaded import Timings
from edgesd.runtime.memory import MemoryMode
from edgesd.runtime.pipeline import Pipeline
from edgesd.runtime.requests import Request, painted_whole
from edgesd.runtime.settings import Settings
from edgesd.spec.base import Spec, decode_json
from edgesd.spec.target import Machine
from edgesd.textfiles import read_text

BENCH_VERSION = 2
"""Version of the JSON. A reader refuses a newer one; it is raised on any change of meaning."""
_LIBRARIES = ("numpy", "onnxruntime", "tokenizers", "pillow")
_FIRST_SAMPLE_SECONDS = 15


class Stats(Spec, frozen=True):
    """Of `count` values, in their own unit. p90: nearest rank. spread: the interquartile range."""

    count: int
    median: float
    p90: float
    minimum: float
    maximum: float
    spread: float


class Run(Spec, frozen=True):
    """One image. start, end: seconds on the samples' clock. load, run: seconds by component
    (load: of what had to be loaded for it). steps: wall time of each."""

    seed: int
    start: float
    end: float
    load: dict[str, float]
    run: dict[str, float]
    steps: tuple[float, ...]

    @property
    def seconds(self) -> float:
        """Wall time of the image, from prompt to pixels."""
        return self.end - self.start


class Asked(Spec, frozen=True):
    """What was generated. threads: 0 for all cores."""

    prompt: str
    seed: int
    num_inference_steps: int
    guidance_scale: float
    width: int
    height: int
    scheduler: str
    threads: int
    memory: MemoryMode
    warm_up: int
    runs: int
    interval: float


class Summary(Spec, frozen=True):
    """The figures. Seconds, bytes, degrees Celsius, MHz, watts, joules; None: this machine doesn't
    report it.

    load: by component, of the first image, from a file system whose cache was emptied of the
    bundle. peak_memory_bytes: of the process. idle_watts: before anything was loaded. joules: per
    image, all of the board's; joules_above_idle: without what it takes doing nothing. throttled:
    what held the board back during the runs and the warm-up; throttled_at: seconds since sampling
    began when it was first seen.
    """

    image: Stats = msgspec.field(name="picture")
    step: Stats
    components: dict[str, Stats]
    load: dict[str, float]
    peak_memory_bytes: int
    system_memory_bytes: int | None
    hottest_celsius: float | None
    cpu_mhz: Stats | None
    gpu_mhz: Stats | None
    idle_watts: float | None
    watts: Stats | None
    joules: float | None
    joules_above_idle: float | None
    throttled: tuple[str, ...]
    throttled_at: float | None


class Bench(Spec, frozen=True):
    """One benchmark. emulated: the times are not a board's. began: UTC, ISO 8601. host: where it
    ran, as it was named. images: PNG files, of the runs in order."""

    version: int
    edgesd: str
    began: str
    machine: Machine
    emulated: bool
    kernel: str
    libraries: dict[str, str]
    power_mode: str
    bundle: str
    manifest_sha256: str
    target: str
    backend: str
    precision: str
    bundle_bytes: int
    fallbacks: dict[str, str]
    asked: Asked
    summary: Summary
    warm_up: tuple[Run, ...]
    runs: tuple[Run, ...]
    samples: tuple[Sample, ...]
    images: tuple[bytes, ...] = msgspec.field(name="pictures")
    host: str | None = None

    def __post_init__(self) -> None:
        """Refuse what no benchmark lacks: when decoded, as an invalid value."""
        if not self.runs or not all(run.steps for run in self.runs):
            raise ValueError("a benchmark has runs, and each has steps")
        if len(self.images) != len(self.runs):
            raise ValueError("a benchmark has an image of each run")
        if self.summary.throttled and self.summary.throttled_at is None:
            raise ValueError("a board that was throttled was so from some time on")

    @property
    def title(self) -> str:
        """Where it ran."""
        return self.host or self.machine.target or self.machine.model


@dataclass(frozen=True)
class BenchSettings:
    """What to measure. warm_up: images before those that count, at least 1: the first one loads.
    interval: seconds between samples. idle: seconds of doing nothing before."""

    request: Request
    warm_up: int = 1
    runs: int = 5
    interval: float = 0.5
    idle: float = 2.0


def stats(values: Sequence[float]) -> Stats:
    """Of at least one value."""
    ordered = sorted(values)
    quarters = statistics.quantiles(ordered, n=4, method="inclusive") if len(ordered) > 1 else None
    return Stats(
        count=len(ordered),
        median=statistics.median(ordered),
        p90=ordered[-(-9 * len(ordered) // 10) - 1],
        minimum=ordered[0],
        maximum=ordered[-1],
        spread=quarters[2] - quarters[0] if quarters else 0.0,
    )


def measure(
    bundle: Bundle, settings: Settings, asked: BenchSettings, progress: Progress = SILENT
) -> Bench:
    """Generate with `bundle` again and again, one image at a time, each from a seed of its own.

    The prompt is encoded anew each time. Raises UsageError for bad settings, else as
    Pipeline.generate.
    """
    if asked.warm_up < 1 or asked.runs < 1:
        raise UsageError("a benchmark needs at least one image to warm up, and one that counts")
    began = datetime.now(timezone.utc).isoformat(timespec="seconds")
    _empty_cache(bundle)
    with Sampler(asked.interval, os.getpid()) as sampler, Pipeline(bundle, settings) as pipeline:
        request = pipeline.complete(painted_whole(pipeline.spec, asked.request))
        _wait(sampler, asked.idle)
        ready = time.monotonic() - sampler.zero
        images: list[bytes] = []

        def generate(name: str, seed: int) -> Run:
            pipeline.timings = Timings()
            pipeline.forget()
            start = time.monotonic()
            image = pipeline.generate(
                [replace(request, seed=seed)],
                lambda step: progress.update(name, step.index + 1, step.count),
            )[0]
            end = time.monotonic()
            out = BytesIO()
            image.save(out, "PNG")
            images.append(out.getvalue())
            timings = pipeline.timings
            return Run(
                seed,
                round(start - sampler.zero, 4),
                round(end - sampler.zero, 4),
                timings.load,
                timings.run,
                tuple(timings.steps),
            )

        warm = [generate("warm-up", request.seed) for _ in range(asked.warm_up)]
        images.clear()
        seeds = [(request.seed + index) % 2**64 for index in range(asked.runs)]
        runs = [generate(f"run {index + 1} of {asked.runs}", s) for index, s in enumerate(seeds)]
        peak = pipeline.timings.peak_memory_bytes
        memory, fallbacks = pipeline.memory, dict(pipeline.fallbacks)
        time.sleep(asked.interval)  # a last sample, after the last run
    manifest = bundle.manifest
    return Bench(
        version=BENCH_VERSION,
        edgesd=edgesd.__version__,
        began=began,
        machine=detect_machine(),
        emulated=emulated(),
        kernel=platform.release(),
        libraries={"python": platform.python_version(), **_versions()},
        power_mode=power_mode(),
        bundle=manifest.name,
        manifest_sha256=bundle.manifest_sha256,
        target=manifest.target,
        backend=manifest.backend,
        precision=manifest.precision,
        bundle_bytes=bundle.disk_bytes(),
        fallbacks=fallbacks,
        asked=Asked(
            request.prompt,
            request.seed,
            request.num_inference_steps,
            request.guidance_scale,
            request.width,
            request.height,
            request.scheduler,
            settings.threads,
            memory,
            asked.warm_up,
            asked.runs,
            asked.interval,
        ),
        summary=summarize(warm, runs, sampler.samples, ready, peak),
        warm_up=tuple(warm),
        runs=tuple(runs),
        samples=tuple(sampler.samples),
        images=tuple(images),
    )


def summarize(
    warm: Sequence[Run],
    runs: Sequence[Run],
    samples: Sequence[Sample],
    idle_until: float,
    peak_memory_bytes: int,
) -> Summary:
    """The figures of `runs`, by the samples that were taken meanwhile."""
    start, end = runs[0].start, runs[-1].end
    during = [sample for sample in samples if start <= sample.seconds <= end]
    working = [sample for sample in samples if warm[0].start <= sample.seconds <= end]
    before = [s for s in samples if s.seconds <= idle_until]
    heat = [max(sample.celsius.values()) for sample in working if sample.celsius]
    memory = [s.memory_used_bytes for s in working if s.memory_used_bytes is not None]
    idle, watts = _watts(before), _watts(during)
    idle_watts = statistics.mean(idle) if idle else None
    energy = energy_joules(samples, start, end)
    seconds = end - start
    above = None if energy is None or idle_watts is None else energy - idle_watts * seconds
    held = [sample for sample in working if sample.limits]
    names = {name for run in runs for name in run.run}
    return Summary(
        image=stats([run.seconds for run in runs]),
        step=stats([step for run in runs for step in run.steps]),
        components={
            name: stats([run.run[name] for run in runs if name in run.run])
            for name in sorted(names)
        },
        load=warm[0].load,
        peak_memory_bytes=peak_memory_bytes,
        system_memory_bytes=max(memory, default=None),
        hottest_celsius=max(heat, default=None),
        cpu_mhz=_maybe_stats(max(s.cpu_mhz) for s in during if s.cpu_mhz),
        gpu_mhz=_maybe_stats(max(s.gpu_mhz) for s in during if s.gpu_mhz),
        idle_watts=idle_watts,
        watts=_maybe_stats(watts),
        joules=None if energy is None else energy / len(runs),
        joules_above_idle=None if above is None else above / len(runs),
        throttled=tuple(dict.fromkeys(limit for sample in held for limit in sample.limits)),
        throttled_at=held[0].seconds if held else None,
    )


def energy_joules(samples: Sequence[Sample], start: float, end: float) -> float | None:
    """The integral of the board's power from `start` to `end`, in seconds on the samples' clock.

    Between samples power is a straight line; None unless they reach both ends.
    """
    points = [(s.seconds, watts) for s in samples if (watts := board_watts(s.watts)) is not None]
    if len(points) < 2 or points[0][0] > start or points[-1][0] < end:
        return None
    total = 0.0
    for (t0, w0), (t1, w1) in pairwise(points):
        low, high = max(t0, start), min(t1, end)
        if high > low:
            slope = (w1 - w0) / (t1 - t0)
            total += (high - low) * (w0 + slope * ((low + high) / 2 - t0))
    return total


def read_bench(path: Path) -> list[Bench]:
    """The benchmarks in a file of `edgesd bench --json`: one, or those of several boards.

    Raises InputError when it isn't one, or of a newer version.
    """

    class Header(msgspec.Struct):
        version: int

    raw = read_text(path, 1 << 30)
    try:
        headers = decode_json(raw, list[Header])
        newest = max((header.version for header in headers), default=0)
    except InputError as exc:
        raise InputError(f"{path} isn't a file of `edgesd bench --json`: {exc}") from exc
    if newest > BENCH_VERSION:
        raise InputError(
            f"{path} has version {str(newest)[:20]}; this edgesd reads up to {BENCH_VERSION}: "
            "upgrade it"
        )
    try:
        found = decode_json(raw, list[Bench])
    except InputError as exc:
        raise InputError(f"{path} isn't a file of `edgesd bench --json`: {exc}") from exc
    if not found:
        raise InputError(f"{path} holds no benchmark")
    return found


def compare(before: Bench, after: Bench) -> dict[str, tuple[float, float]]:
    """Figure -> its value in both, where both have it. Raises UsageError for what can't be
    compared: an emulated machine's times with a real one's, or other work."""
    if before.emulated != after.emulated:
        raise UsageError("one of the two ran under emulation: its times aren't a board's")
    for name in ("num_inference_steps", "width", "height", "guidance_scale"):
        one, other = getattr(before.asked, name), getattr(after.asked, name)
        if one != other:
            raise UsageError(f"they generated different images: {name} was {one} and {other}")
    a, b = before.summary, after.summary
    rows: dict[str, tuple[float | None, float | None]] = {
        "s per image": (a.image.median, b.image.median),
        "s per image, p90": (a.image.p90, b.image.p90),
        "s per step": (a.step.median, b.step.median),
    }
    for name in a.components.keys() & b.components.keys():
        rows[f"s in {name}"] = (a.components[name].median, b.components[name].median)
    rows |= {
        "s to load": (sum(a.load.values()), sum(b.load.values())),
        "MB of memory": (a.peak_memory_bytes / 1e6, b.peak_memory_bytes / 1e6),
        "MB on disk": (before.bundle_bytes / 1e6, after.bundle_bytes / 1e6),
        "J per image": (a.joules, b.joules),
        "W": (_median(a.watts), _median(b.watts)),
        "C at most": (a.hottest_celsius, b.hottest_celsius),
    }
    return {
        name: (one, other)
        for name, (one, other) in rows.items()
        if one is not None and other is not None
    }


def _maybe_stats(values: Iterable[float]) -> Stats | None:
    found = list(values)
    return stats(found) if found else None


def _median(found: Stats | None) -> float | None:
    return None if found is None else found.median


def _watts(samples: Iterable[Sample]) -> list[float]:
    """Of the whole board, where it is measured."""
    found = (board_watts(sample.watts) for sample in samples)
    return [watts for watts in found if watts is not None]


def _wait(sampler: Sampler, idle: float) -> None:
    """Until the first sample is there, and `idle` seconds of samples."""
    end = time.monotonic() + _FIRST_SAMPLE_SECONDS
    while not sampler.samples and time.monotonic() < end:
        time.sleep(0.02)
    time.sleep(idle)


def _empty_cache(bundle: Bundle) -> None:
    """Have the kernel forget the bundle's files, so that loading reads them from the disk."""
    for name in bundle.manifest.files:
        file, offset = bundle.location(name)
        os.posix_fadvise(file.fileno(), offset, bundle.size(name), os.POSIX_FADV_DONTNEED)


def _versions() -> dict[str, str]:
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
