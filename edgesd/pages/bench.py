"""Benchmarks as one HTML page, with plots and the images in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from edgesd.device.bench import Bench, Run, Stats
from edgesd.device.telemetry import Sample, board_watts
from edgesd.pages.page import (
    Cell,
    Column,
    Fact,
    Figure,
    Mark,
    Table,
    counted,
    data_uri,
    megabytes,
    render,
)

_WIDTH, _HEIGHT = 640, 200
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 632, 12, 172
"""Of a plot and its axes, in the units of its drawing."""

_PIXELATED_BELOW = 257
"""Images narrower than this, in pixels, are scaled up with their pixels kept sharp."""

_MEMORY = {
    "fast": "all networks resident",
    "balanced": "networks released after use",
    "stream": "weights left in their file",
}


class Span(NamedTuple):
    """A part of a plot that is shaded, in its units."""

    x: float
    width: float


class Plot(NamedTuple):
    """A plot, in its units. joined: the points are one line. label: what is plotted, for screen
    readers."""

    title: str
    label: str
    points: tuple[tuple[float, float], ...]
    joined: bool
    x_marks: tuple[Mark, ...]
    y_marks: tuple[Mark, ...]
    spans: tuple[Span, ...] = ()
    width: int = _WIDTH
    height: int = _HEIGHT
    left: int = _LEFT
    right: int = _RIGHT
    top: int = _TOP
    bottom: int = _BOTTOM


class BenchImage(NamedTuple):
    """One image of the measured runs."""

    uri: str
    caption: str


class BoardPart(NamedTuple):
    """The page's part on one board. prefix: of its headings, where there are several boards.
    small: images are shown with their pixels kept sharp. throttled: "" where nothing held it back.
    """

    prefix: str
    times: Table
    loading: str
    steps: Plot
    sampled: bool
    throttled: str
    plots: tuple[Plot, ...]
    prompt: str
    images: tuple[BenchImage, ...]
    small: bool
    about: tuple[Fact, ...]


class _Line(NamedTuple):
    """A plot over time: its title, its unit, and its value in a sample, None where unknown."""

    title: str
    unit: str
    value: Callable[[Sample], float | None]


_LINES = (
    _Line("Memory of the process", "MB", lambda s: _scaled(s.process_bytes, 1e6)),
    _Line("Memory of the machine", "MB", lambda s: _scaled(s.memory_used_bytes, 1e6)),
    _Line("Hottest sensor", "C", lambda s: max(s.celsius.values(), default=None)),
    _Line("Fastest core", "MHz", lambda s: max(s.cpu_mhz, default=None)),
    _Line("GPU clock", "MHz", lambda s: max(s.gpu_mhz, default=None)),
    _Line("GPU load", "%", lambda s: s.gpu_percent),
    _Line("Power of the board", "W", lambda s: board_watts(s.watts)),
)


def bench_html(benches: Sequence[Bench]) -> str:
    """The page on `benches`, of one board or several. Raises ModuleNotFoundError without jinja2."""
    prefixes = [f"{bench.title}: " if len(benches) > 1 else "" for bench in benches]
    named = list(zip(prefixes, benches, strict=True))
    return render(
        "bench.html.j2",
        title=", ".join(dict.fromkeys(bench.title for bench in benches)),
        lead=f"{benches[0].bundle}, {benches[0].precision}",
        notices=[notice for bench in benches for notice in _notices(bench)],
        figures=[figure for prefix, bench in named for figure in _figures(prefix, bench)],
        boards=[_board(prefix, bench) for prefix, bench in named],
    )


def _notices(bench: Bench) -> list[str]:
    emulated = [f"{bench.title} is emulated: its times are not a board's."]
    return (emulated if bench.emulated else []) + [
        f"{component}: {reason}" for component, reason in bench.fallbacks.items()
    ]


def _figures(prefix: str, bench: Bench) -> list[Figure]:
    found = bench.summary
    count = counted(bench.asked.runs, "image")
    figures = [
        Figure("an image", _seconds(found.image.median), f"median of {count}"),
        Figure("a step", _seconds(found.step.median), f"p90 {_seconds(found.step.p90)}"),
    ]
    if bench.emulated:
        figures = []
    figures += [
        Figure("memory at most", megabytes(found.peak_memory_bytes), "of the process"),
        Figure("throttled", "yes" if found.throttled else "no", ", ".join(found.throttled)),
    ]
    if found.joules is not None:
        figures.append(Figure("energy", f"{found.joules:.1f} J", "per image"))
    return [figure._replace(name=prefix + figure.name) for figure in figures]


def _board(prefix: str, bench: Bench) -> BoardPart:
    found = bench.summary
    load = ", ".join(f"{name} {_seconds(value)}" for name, value in found.load.items())
    throttled = ""
    if found.throttled:
        throttled = f"{', '.join(found.throttled)}, from {found.throttled_at:.1f} s on"
    return BoardPart(
        prefix=prefix,
        times=_times(bench),
        loading=f"{load} (files read from the disk)",
        steps=_steps(bench),
        sampled=bool(bench.samples),
        throttled=throttled,
        plots=tuple(plot for line in _LINES if (plot := _over_time(bench, line))),
        prompt=bench.asked.prompt,
        images=tuple(
            BenchImage(data_uri("image/png", image), f"seed {run.seed}, {_seconds(run.seconds)}")
            for run, image in zip(bench.runs, bench.images, strict=True)
        ),
        small=bench.asked.width < _PIXELATED_BELOW,
        about=_about(bench),
    )


def _times(bench: Bench) -> Table:
    found = bench.summary
    columns = [
        Column("seconds"),
        *(Column(name, numeric=True) for name in ("median", "p90", "least", "most", "spread", "n")),
    ]
    rows = {"image": found.image, "step": found.step, **found.components}

    def row(name: str, of: Stats) -> list[Cell]:
        values = (of.median, of.p90, of.minimum, of.maximum, of.spread)
        return [Cell(name), *(Cell(f"{value:.4f}") for value in values), Cell(str(of.count))]

    cells = [row(name, of) for name, of in rows.items()]
    return Table("Spread is the interquartile range", columns, cells)


def _steps(bench: Bench) -> Plot:
    """Every step of every run, by its place in the run."""
    points = [(index + 1.0, step) for run in bench.runs for index, step in enumerate(run.steps)]
    count = max(len(run.steps) for run in bench.runs)
    return _plot("Each step, s", "s by step", points, (0.5, count + 0.5), "step", joined=False)


def _over_time(bench: Bench, line: _Line) -> Plot | None:
    """None for fewer than two values."""
    points = [
        (sample.seconds, value)
        for sample in bench.samples
        if (value := line.value(sample)) is not None
    ]
    if len(points) < 2:
        return None
    title, label = f"{line.title}, {line.unit}", f"{line.unit} by seconds"
    ends = (0.0, bench.samples[-1].seconds)
    return _plot(title, label, points, ends, "seconds", joined=True, runs=bench.runs)


def _about(bench: Bench) -> tuple[Fact, ...]:
    asked, found = bench.asked, bench.summary
    clocks = found.cpu_mhz and f"{found.cpu_mhz.median:.0f} MHz, least {found.cpu_mhz.minimum:.0f}"
    power = found.watts and f"{found.watts.median:.2f} W, idle {found.idle_watts or 0:.2f} W"
    heat = None if found.hottest_celsius is None else f"{found.hottest_celsius:.1f} C"
    libraries = (f"{name} {version}" for name, version in bench.libraries.items())
    return (
        ("machine", f"{bench.machine.model}, {bench.machine.arch}, kernel {bench.kernel}"),
        ("power mode", bench.power_mode or None),
        ("clocks", clocks or None),
        ("power", power or "unknown: this machine doesn't report it"),
        ("hottest", heat),
        ("bundle", f"{bench.bundle}, {bench.precision}, for {bench.target}, {bench.backend}"),
        ("manifest", bench.manifest_sha256),
        ("on disk", megabytes(bench.bundle_bytes)),
        (
            "images",
            f"{asked.width}x{asked.height}, {asked.num_inference_steps} steps of "
            f"{asked.scheduler}, guidance {asked.guidance_scale:g}, one at a time, "
            f"{asked.warm_up} to warm up",
        ),
        ("threads", str(asked.threads or "all cores")),
        ("memory", _MEMORY[asked.memory]),
        ("began", bench.began),
        ("software", ", ".join([f"edgesd {bench.edgesd}", *libraries])),
    )


def _plot(
    title: str,
    label: str,
    points: Sequence[tuple[float, float]],
    ends: tuple[float, float],
    across: str,
    *,
    joined: bool,
    runs: Sequence[Run] = (),
) -> Plot:
    """`points` (x, y) over x from one end to the other, y from 0 or a little under the least on.

    across: the unit of x. runs: shaded.
    """
    low, span = ends[0], max(ends[1] - ends[0], 1e-9)
    values = [value for _, value in points]
    least, most = min(values), max(values)
    base = 0.0 if least < most / 2 else least - (most - least or most or 1) * 0.25
    top = most + (most - base or 1) * 0.05

    def x(value: float) -> float:
        return round(_LEFT + (value - low) / span * (_RIGHT - _LEFT), 1)

    def y(value: float) -> float:
        return round(_BOTTOM - (value - base) / (top - base) * (_BOTTOM - _TOP), 1)

    return Plot(
        title=title,
        label=label,
        points=tuple((x(at), y(value)) for at, value in points),
        joined=joined,
        x_marks=(
            Mark(x(low), _short(low)),
            Mark(x(low + span / 2), across),
            Mark(x(low + span), _short(low + span)),
        ),
        y_marks=tuple(Mark(y(value), _short(value)) for value in (base, (base + top) / 2, top)),
        spans=tuple(Span(x(run.start), round(x(run.end) - x(run.start), 1)) for run in runs),
    )


def _scaled(value: int | None, unit: float) -> float | None:
    return None if value is None else value / unit


def _seconds(value: float) -> str:
    return f"{value:.3g} s" if value >= 1e-3 else f"{value * 1e6:.0f} us"


def _short(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
