"""edgesd bench ..."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec

from edgesd.cli.common import (
    Finite,
    OutputPath,
    Reporter,
    plans_of,
    print_json,
    say,
    say_lines,
    show_each,
)
from edgesd.cli.options import (
    GenerationOptions,
    RunOptions,
    any_machine_option,
    generation_options,
    hosts_option,
    json_option,
    option_arguments,
    run_options,
)
from edgesd.errors import BoardError, EdgesdError
from edgesd.progress import Lines, Prefixed

if TYPE_CHECKING:
    from edgesd.device.bench import Bench, BenchSettings

_RETRIES = 60
_PROMPT = "a red apple"
_HERE = ("hosts", "html", "output", "detached", "as_json")
"""Options that aren't passed on to a board: what is done here, and how a board answers."""


class _RunByDefault(click.Group):
    """`edgesd bench BUNDLE` is `edgesd bench run BUNDLE`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put `run` before what is no subcommand."""
        if args and args[0] not in (*self.commands, *ctx.help_option_names):
            args = ["run", *args]
        return super().parse_args(ctx, args)

    def format_usage(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the usage of both forms."""
        formatter.write_usage(ctx.command_path, "[OPTIONS] BUNDLE")
        formatter.write_usage(ctx.command_path, "compare [OPTIONS] BEFORE AFTER", prefix="       ")

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Those of `run`, and the other command."""
        self.commands["run"].format_options(ctx, formatter)
        self.format_commands(ctx, formatter)


@click.group("bench", cls=_RunByDefault, short_help="Measure BUNDLE, here or on boards over SSH.")
def bench_group() -> None:
    """Generate images with BUNDLE, and measure the time of each image, component and step, and
    memory, heat and energy.

    With --host the bundle must be the active one there (edgesd deploy); if the link is lost, the
    board continues, and the same command joins it again. `edgesd bench compare` shows two results
    of -o side by side.
    """


@bench_group.command("run", short_help="Measure BUNDLE.", hidden=True)
@click.argument("bundle", type=click.Path(path_type=Path))
@hosts_option
@click.option(
    "-n",
    "--runs",
    type=click.IntRange(1, 1000),
    default=5,
    show_default=True,
    help="Images to measure.",
)
@click.option(
    "--warm-up",
    type=click.IntRange(1, 100),
    default=1,
    show_default=True,
    help="Images before those that are measured; the first one loads the networks.",
)
@click.option("-p", "--prompt", default=_PROMPT, show_default=True, help="What to generate.")
@click.option("--seed", type=click.IntRange(0, 2**64 - 1), default=0, show_default=True)
@generation_options("bundle", without=["negative"])
@run_options
@click.option(
    "--interval",
    type=Finite(0.05, 60),
    default=0.5,
    show_default=True,
    help="Seconds between samples of memory, clocks, heat and power.",
)
@click.option(
    "--html", type=OutputPath(), help="Also write an HTML report; an older one is replaced."
)
@click.option(
    "-o",
    "--output",
    type=OutputPath(),
    help="Write the JSON to a file; an older one is replaced.",
)
@any_machine_option
@click.option("--detached", hidden=True, help="Run in the background under this key, or join it.")
@json_option
def run_command(
    bundle: Path,
    hosts: tuple[str, ...],
    runs: int,
    warm_up: int,
    prompt: str,
    seed: int,
    generation: GenerationOptions,
    run: RunOptions,
    interval: float,
    html: Path | None,
    output: Path | None,
    any_machine: bool,
    detached: str | None,
    as_json: bool,
) -> None:
    """Generate images with BUNDLE, and measure: `edgesd bench BUNDLE` runs this command."""
    if detached:
        _follow(detached)
        return
    _check_places(bundle, html, output)
    reporter = Reporter(quiet=as_json and not hosts)
    failure: Exception | None = None
    if hosts:
        options = option_arguments(click.get_current_context(), without=_HERE)
        found, failure = _measure_on(hosts, bundle, options, reporter)
    else:
        from edgesd.device.bench import BenchSettings

        asked = BenchSettings(generation.request(prompt, seed), warm_up, runs, interval)
        found = [_measure_here(bundle, any_machine, run, asked, reporter)]
    try:
        _write(found, output, html)
    except EdgesdError as exc:
        failure = failure or exc
    if as_json:
        print_json(found)
    else:
        for bench in found:
            _show(bench)
    if failure:
        raise failure


def _check_places(bundle: Path, html: Path | None, output: Path | None) -> None:
    """Raise InputError for a file that can't be written, before anything is measured."""
    from edgesd.files import check_file_place
    from edgesd.pages.page import check_page_path

    if html:
        check_page_path(html)
    for path in filter(None, (html, output)):
        check_file_place(path, bundle, *([html] if html and path is output else []))


def _measure_here(
    path: Path, any_machine: bool, run: RunOptions, asked: BenchSettings, reporter: Reporter
) -> Bench:
    from edgesd.device.bench import measure
    from edgesd.device.opening import open_for_generate

    bundle = open_for_generate(path, any_machine)
    settings = run.settings(plan_of=plans_of(bundle, reporter))
    with reporter.bar():
        return measure(bundle, settings, asked, _Images() if reporter.quiet else reporter)


def _measure_on(
    hosts: Sequence[str], path: Path, options: Sequence[str], reporter: Reporter
) -> tuple[list[Bench], Exception | None]:
    """The benchmarks of those boards that made one, and the error of those that didn't."""
    from edgesd.remote.bench_hosts import bench_on
    from edgesd.remote.hosts import on_each
    from edgesd.runtime.bundle import open_bundle

    bundle = open_bundle(path)
    results = on_each(
        hosts,
        lambda board: bench_on(board, bundle, options, Prefixed(reporter, f"{board.name}: ")),
        _RETRIES,
        lambda host, error: reporter.line(f"{host}: {error} (joining it again)"),
    )
    found: list[Bench] = []
    try:
        show_each(results, lambda host, bench: found.append(bench))
    except Exception as exc:
        if not found:
            raise
        return found, exc  # raised once the others' figures are shown
    return found, None


def _write(found: list[Bench], output: Path | None, html: Path | None) -> None:
    from edgesd.files import save

    if output:
        save(output, msgspec.json.encode(found))
    if html:
        from edgesd.pages.bench import bench_html
        from edgesd.pages.page import page_bytes

        save(html, page_bytes(bench_html(found)))


@bench_group.command("compare", short_help="Two benchmarks, side by side.")
@click.argument("before", type=click.Path(path_type=Path))
@click.argument("after", type=click.Path(path_type=Path))
@json_option
def compare_command(before: Path, after: Path, as_json: bool) -> None:
    """Show BEFORE and AFTER, files of `edgesd bench -o`, side by side, with their ratios.

    Files of several boards are compared board by board, in their order.
    """
    from edgesd.device.bench import compare, read_bench
    from edgesd.errors import InputError

    one, other = read_bench(before), read_bench(after)
    if len(one) != len(other):
        raise InputError(f"{before} has {len(one)} benchmarks, {after} {len(other)}")
    tables = [compare(a, b) for a, b in zip(one, other, strict=True)]
    if as_json:
        print_json(
            [
                {name: {"before": a, "after": b} for name, (a, b) in table.items()}
                for table in tables
            ]
        )
        return
    for a, b, table in zip(one, other, tables, strict=True):
        say(f"{'':24}{'before':>12}{'after':>12}{'ratio':>9}")
        say(f"{a.bundle} {a.precision} on {a.title}; {b.bundle} {b.precision} on {b.title}")
        for name, (x, y) in table.items():
            ratio = f"{y / x:.3f}" if x else "-"
            say(f"{name:24}{x:12.4g}{y:12.4g}{ratio:>9}")


@bench_group.command("forget", hidden=True)
@click.argument("key")
def forget_command(key: str) -> None:
    """Remove the result that is kept under KEY: it has been fetched."""
    from edgesd.device.detached import forget

    forget(key)


class _Images(Lines):
    """Progress of a benchmark on a board: a line for each image."""

    def __init__(self) -> None:
        super().__init__(lambda text: say(text, err=True))

    def update(
        self, task: str, done: int, total: int, note: str = "", *, in_bytes: bool = False
    ) -> None:
        if done == total:
            self.line(f"{task}: done")


def _follow(key: str) -> None:
    """Run this very command in the background, without --detached, or join it; print its result."""
    from edgesd.device.detached import follow, forget
    from edgesd.processes import module_command

    arguments = [a for a in sys.argv[1:] if a not in ("--detached", key)]
    command = module_command("edgesd", *arguments)
    ended = follow(key, command, lambda line: say(line, err=True))
    if ended.status:
        forget(key)
        lines = [line for line in ended.err.splitlines() if line.strip()]
        words = lines[-1].removeprefix("edgesd: ") if lines else f"it ended with {ended.status}"
        raise BoardError(words)
    say_lines(ended.out.rstrip("\n"))


def _show(bench: Bench) -> None:
    found = bench.summary
    where = f"{bench.bundle} {bench.precision} on {bench.title}, {bench.machine.model}"
    mode = f", {bench.power_mode}" if bench.power_mode else ""
    say(where + mode)
    if bench.emulated:
        say("emulated: these times are not a board's")
    size = f"{bench.asked.width}x{bench.asked.height}, {bench.asked.num_inference_steps} steps"
    say(f"{'':20}{'median':>10}{'p90':>10}{'spread':>10}   {size}, n = {bench.asked.runs}")
    rows = {"image": found.image, "step": found.step, **found.components}
    for name, one in rows.items():
        say(f"{name:20}{one.median:10.4f}{one.p90:10.4f}{one.spread:10.4f} s")
    say(f"{'load':20}{sum(found.load.values()):10.3f} s")
    say(f"{'memory':20}{found.peak_memory_bytes / 1e6:10.1f} MB")
    if found.cpu_mhz:
        say(f"{'CPU clock':20}{found.cpu_mhz.median:10.0f} MHz")
    if found.hottest_celsius is not None:
        say(f"{'hottest':20}{found.hottest_celsius:10.1f} C")
    if found.watts and found.joules is not None:
        say(f"{'power':20}{found.watts.median:10.2f} W, {found.joules:.1f} J per image")
    else:
        say(f"{'power':20}{'unknown':>10}: this machine doesn't report it")
    if found.throttled:
        held = ", ".join(found.throttled)
        say(f"{'throttled':20}{'yes':>10}: {held}, from {found.throttled_at:.1f} s on")
    else:
        say(f"{'throttled':20}{'no':>10}")
    for component, reason in bench.fallbacks.items():
        say(f"{component}: {reason}")
