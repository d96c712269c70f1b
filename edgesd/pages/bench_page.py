"""Benchmarks as one HTML page, with plots and the images in it."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from typing import NamedTuple

from edgesd.device.bench import Bench, Run, Stats
from edgesd.device.telemetry import Sample, board_watts
from edgesd.pages.page import (
    Cell,
    Column,
    counted,
    escaped,
    fact_list,
    html_page,
    megabytes,
    section_of,
    table_of,
)

_WIDTH, _HEIGHT = 640, 200
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 8, 12, 28

_MEMORY = {
    "fast": "all networks resident",
    "balanced": "networks released after use",
    "stream": "weights left in their file",
}


class _Line(NamedTuple):
    """A plot over time: its title, its unit, and its value in a sample (None: not told)."""

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
    """The page on `benches`, of one board or several."""
    title = ", ".join(dict.fromkeys(bench.title for bench in benches))
    sections = [_head(benches, title)]
    for bench in benches:
        where = f"{bench.title}: " if len(benches) > 1 else ""
        sections += [
            section_of(f"{where}times", _times(bench) + _steps(bench)),
            section_of(f"{where}over time", _telemetry(bench)),
            section_of(f"{where}images", _images(bench)),
            section_of(f"{where}what was measured", _facts(bench)),
        ]
    return html_page(f"{title}: edgesd benchmark", sections)


def _head(benches: Sequence[Bench], title: str) -> str:
    tiles, notices = "", ""
    for bench in benches:
        found = bench.summary
        n = counted(bench.asked.runs, "image")
        times = [
            ("an image", _seconds(found.image.median), f"median of {n}"),
            ("a step", _seconds(found.step.median), f"p90 {_seconds(found.step.p90)}"),
        ]
        figures = [
            *([] if bench.emulated else times),
            ("memory at most", megabytes(found.peak_memory_bytes), "of the process"),
            ("throttled", "yes" if found.throttled else "no", ", ".join(found.throttled)),
        ]
        if found.joules is not None:
            figures.append(("energy", f"{found.joules:.1f} J", "per image"))
        name = f"{bench.title}: " if len(benches) > 1 else ""
        tiles += "".join(
            f"<div><dt>{escaped(name + what)}</dt><dd><strong>{escaped(value)}</strong>"
            f"<span>{escaped(note)}</span></dd></div>\n"
            for what, value, note in figures
        )
        if bench.emulated:
            notices += (
                f'<p class="notice">{escaped(bench.title)} is emulated: its times are not a '
                "board's.</p>\n"
            )
        notices += "".join(
            f'<p class="notice">{escaped(component)} ran on the CPU: {escaped(reason)}</p>\n'
            for component, reason in bench.fallbacks.items()
        )
    first = benches[0]
    return (
        '<header>\n<p class="kicker">edgesd benchmark</p>\n'
        f'<h1 dir="auto">{escaped(title)}</h1>\n'
        f'<p class="lead">{escaped(f"{first.bundle}, {first.precision}")}</p>\n{notices}'
        f'<dl class="figures">{tiles}</dl>\n</header>\n'
    )


def _times(bench: Bench) -> str:
    found = bench.summary
    columns = [
        Column("seconds"),
        *(Column(name, numeric=True) for name in ("median", "p90", "least", "most", "spread", "n")),
    ]
    rows = {"image": found.image, "step": found.step, **found.components}

    def row(name: str, of: Stats) -> list[Cell]:
        values = (of.median, of.p90, of.minimum, of.maximum, of.spread)
        return [Cell(name), *(Cell(f"{value:.4f}") for value in values), Cell(str(of.count))]

    load = ", ".join(f"{name} {_seconds(value)}" for name, value in found.load.items())
    return table_of(
        "Spread is the interquartile range", columns, [row(*item) for item in rows.items()]
    ) + fact_list([("loading, once", f"{load} (files read from the disk)")])


def _steps(bench: Bench) -> str:
    """Every step of every run, by its place in the run."""
    points = [(index + 1, step) for run in bench.runs for index, step in enumerate(run.steps)]
    count = max(len(run.steps) for run in bench.runs)
    dots = _Plot(0.5, count + 0.5, [value for _, value in points])
    body = "".join(
        f'<circle cx="{dots.x(at):.1f}" cy="{dots.y(value):.1f}" r="3" fill="var(--accent)" '
        'fill-opacity=".5"/>'
        for at, value in points
    )
    return "<h3>Each step, s</h3>\n" + dots.draw(body, "step", "s", [])


def _telemetry(bench: Bench) -> str:
    if not bench.samples:
        return "<p>No samples were taken.</p>\n"
    plots = ""
    for line in _LINES:
        points = [
            (sample.seconds, value)
            for sample in bench.samples
            if (value := line.value(sample)) is not None
        ]
        if len(points) < 2:
            continue
        plot = _Plot(0, bench.samples[-1].seconds, [value for _, value in points])
        path = " ".join(f"{plot.x(at):.1f},{plot.y(value):.1f}" for at, value in points)
        body = f'<polyline points="{path}" fill="none" stroke="var(--accent)" stroke-width="2"/>'
        plots += f"<h3>{escaped(f'{line.title}, {line.unit}')}</h3>\n"
        plots += plot.draw(body, "seconds", line.unit, bench.runs)
    found = bench.summary
    if found.throttled:
        held = ", ".join(found.throttled)
        plots = (
            f'<p class="notice">{escaped(held)}, from {found.throttled_at:.1f} s on.</p>' + plots
        )
    return plots + '<p class="note">Shaded: images that count.</p>\n'


def _images(bench: Bench) -> str:
    small = ' class="gallery sharp"' if bench.asked.width < 257 else ' class="gallery"'
    cards = "".join(
        '<figure class="card"><img alt="" src="data:image/png;base64,'
        f'{base64.b64encode(image).decode()}"><figcaption>seed {run.seed}, '
        f"{_seconds(run.seconds)}</figcaption></figure>\n"
        for run, image in zip(bench.runs, bench.images, strict=True)
    )
    return f'<p dir="auto">{escaped(bench.asked.prompt)}</p>\n<div{small}>{cards}</div>\n'


def _facts(bench: Bench) -> str:
    asked, found = bench.asked, bench.summary
    clocks = found.cpu_mhz and f"{found.cpu_mhz.median:.0f} MHz, least {found.cpu_mhz.minimum:.0f}"
    power = found.watts and f"{found.watts.median:.2f} W, idle {found.idle_watts or 0:.2f} W"
    heat = None if found.hottest_celsius is None else f"{found.hottest_celsius:.1f} C"
    return fact_list(
        [
            ("machine", f"{bench.machine.model}, {bench.machine.arch}, kernel {bench.kernel}"),
            ("power mode", bench.power_mode or None),
            ("clocks", clocks or None),
            ("power", power or "unknown: this machine doesn't tell"),
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
            (
                "software",
                ", ".join(
                    [f"edgesd {bench.edgesd}", *(f"{n} {v}" for n, v in bench.libraries.items())]
                ),
            ),
        ]
    )


class _Plot:
    """Axes of a plot: x from `low` to `high`, y from 0 (or a little under the least) on."""

    def __init__(self, low: float, high: float, values: Sequence[float]) -> None:
        self._low, self._span = low, max(high - low, 1e-9)
        least, most = min(values), max(values)
        self._base = 0.0 if least < most / 2 else least - (most - least or most or 1) * 0.25
        self._top = most + (most - self._base or 1) * 0.05

    def x(self, value: float) -> float:
        """Across, in the image's units."""
        return _LEFT + (value - self._low) / self._span * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        """Down, in the image's units."""
        part = (value - self._base) / (self._top - self._base)
        return _HEIGHT - _BOTTOM - part * (_HEIGHT - _TOP - _BOTTOM)

    def draw(self, body: str, across: str, unit: str, runs: Sequence[Run]) -> str:
        """The whole plot, with `runs` shaded."""
        shade = "".join(
            f'<rect x="{self.x(run.start):.1f}" y="{_TOP}" fill="var(--accent)" '
            f'fill-opacity="{0.14 if index % 2 else 0.08}" '
            f'width="{self.x(run.end) - self.x(run.start):.1f}" '
            f'height="{_HEIGHT - _TOP - _BOTTOM}"/>'
            for index, run in enumerate(runs)
        )
        marks = "".join(
            f'<text x="{_LEFT - 6}" y="{self.y(value) + 4:.1f}" text-anchor="end">'
            f"{_short(value)}</text>"
            f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{self.y(value):.1f}" '
            f'y2="{self.y(value):.1f}" stroke="var(--line)"/>'
            for value in (self._base, (self._base + self._top) / 2, self._top)
        )
        ends = "".join(
            f'<text x="{self.x(value):.1f}" y="{_HEIGHT - 8}" text-anchor="{anchor}">{text}</text>'
            for value, anchor, text in (
                (self._low, "start", _short(self._low)),
                (self._low + self._span / 2, "middle", escaped(across)),
                (self._low + self._span, "end", _short(self._low + self._span)),
            )
        )
        return (
            f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" width="100%" role="img" font-size="12" '
            f'fill="var(--soft)" aria-label="{escaped(unit)} by {escaped(across)}">'
            f"{shade}{marks}{ends}{body}</svg>\n"
        )


def _scaled(value: int | None, unit: float) -> float | None:
    return None if value is None else value / unit


def _seconds(value: float) -> str:
    return f"{value:.3g} s" if value >= 1e-3 else f"{value * 1e6:.0f} us"


def _short(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
