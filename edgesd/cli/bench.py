"""edgesd bench ..."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec

from edgesd.cli.common import (
    Finite,
    OutputPath,
    Reporter,
    Size,
    hosts_option,
    json_option,
    memory_options,
    plans_of,
    print_json,
    say,
    say_lines,
    scheduler_option,
    show_each,
)
from edgesd.errors import BoardError, EdgesdError
from edgesd.progress import Lines, Prefixed

if TYPE_CHECKING:
    from edgesd.device.bench import Bench
    from edgesd.runtime.memory import MemoryMode

_RETRIES = 60
_PROMPT = "a red apple"


class _RunByDefault(click.Group):
    """`edgesd bench BUNDLE` is `edgesd bench run BUNDLE`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put `run` before what is no subcommand."""
        if args and args[0] not in (*self.commands, *ctx.help_option_names):
            args = ["run", *args]
        return super().parse_args(ctx, args)

    def format_usage(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Both forms."""
        formatter.write_usage(ctx.command_path, "[OPTIONS] BUNDLE")
        formatter.write_usage(ctx.command_path, "compare [OPTIONS] BEFORE AFTER", prefix="       ")

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Those of `run`, and the other command."""
        self.commands["run"].format_options(ctx, formatter)
        self.format_commands(ctx, formatter)


@click.group("bench", cls=_RunByDefault, short_help="Measure BUNDLE, here or on boards over SSH.")
def bench_group() -> None:
    """Generate with BUNDLE again and again, and measure: per image, component and step; memory,
    heat and energy, too.

    With --host the bundle must be the active one there (edgesd deploy); a board goes on when the
    link is lost, and the same command joins it again. `edgesd bench compare` shows two results of
    -o side by side.
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
    help="Images that count.",
)
@click.option(
    "--warm-up",
    type=click.IntRange(1, 100),
    default=1,
    show_default=True,
    help="Images before those that count; the first one loads.",
)
@click.option("-p", "--prompt", default=_PROMPT, show_default=True, help="What to generate.")
@click.option("--seed", type=click.IntRange(0, 2**64 - 1), default=0, show_default=True)
@click.option("--steps", type=int, help="Denoising steps. [default: the bundle's]")
@click.option("--guidance", type=float, help="Guidance scale. [default: the bundle's]")
@click.option("--size", type=Size(), help="Image size in pixels. [default: the bundle's]")
@scheduler_option("Sampler")
@click.option("--threads", type=click.IntRange(0, 256), default=0, help="[default: all cores]")
@memory_options
@click.option(
    "--interval",
    type=Finite(0.05, 60),
    default=0.5,
    show_default=True,
    help="Seconds between samples of memory, clocks, heat and power.",
)
@click.option("--html", type=OutputPath(), help="Write a report, too; an older one is replaced.")
@click.option(
    "-o",
    "--output",
    type=OutputPath(),
    help="Write the JSON to a file; an older one is replaced.",
)
@click.option("--any-machine", is_flag=True, help="Run a bundle that was built for another board.")
@click.option("--detached", hidden=True, help="Run in the background under this key, or join it.")
@json_option
def run_command(
    bundle: Path,
    hosts: tuple[str, ...],
    runs: int,
    warm_up: int,
    prompt: str,
    seed: int,
    steps: int | None,
    guidance: float | None,
    size: tuple[int, int] | None,
    scheduler: str | None,
    threads: int,
    memory: MemoryMode | None,
    max_memory: int | None,
    interval: float,
    html: Path | None,
    output: Path | None,
    any_machine: bool,
    detached: str | None,
    as_json: bool,
) -> None:
    """Generate with BUNDLE again and again, and measure: what `edgesd bench BUNDLE` stands for."""
    from edgesd.files import check_file_place, save
    from edgesd.pages.page import check_page_path, page_bytes
    from edgesd.runtime.bundle import open_bundle

    if detached:
        _follow(detached)
        return
    if html:
        check_page_path(html)
    for path in filter(None, (html, output)):
        check_file_place(path, bundle, *([html] if html and path is output else []))
    opened = open_bundle(bundle)
    reporter = Reporter(quiet=as_json and not hosts)
    found: list[Bench] = []
    failure: Exception | None = None
    if hosts:
        from edgesd.remote.bench_hosts import bench_on
        from edgesd.remote.hosts import on_each

        options = [f"--runs={runs}", f"--warm-up={warm_up}", f"--prompt={prompt}", f"--seed={seed}"]
        options += [f"--threads={threads}", f"--interval={interval}"]
        options += [f"--steps={steps}"] if steps is not None else []
        options += [f"--guidance={guidance}"] if guidance is not None else []
        options += [f"--size={size[0]}x{size[1]}"] if size else []
        options += [f"--scheduler={scheduler}"] if scheduler else []
        options += [f"--memory={memory}"] if memory else []
        options += [f"--max-memory={max_memory}"] if max_memory is not None else []
        results = on_each(
            hosts,
            lambda board: bench_on(board, opened, options, Prefixed(reporter, f"{board.name}: ")),
            _RETRIES,
            lambda host, error: reporter.line(f"{host}: {error} (joining it again)"),
        )
        try:
            show_each(results, lambda host, bench: found.append(bench))
        except Exception as exc:
            if not found:
                raise
            failure = exc  # once the others' figures are shown
    else:
        from edgesd.device.bench import Plan, measure
        from edgesd.device.detect import check_machine, detect_machine
        from edgesd.runtime.requests import Request
        from edgesd.runtime.settings import Settings
        from edgesd.runtime.signature import check_trusted

        check_trusted(opened)
        if not any_machine:
            needs = opened.manifest
            check_machine(needs.target, needs.arch, detect_machine())
        width, height = size or (None, None)
        request = Request(prompt, seed, None, steps, guidance, height, width, scheduler)
        plans = plans_of(opened, reporter)
        settings = Settings(threads, memory, None, plans, max_memory=max_memory)
        with reporter.bar():
            progress = _Images() if as_json else reporter
            found = [measure(opened, settings, Plan(request, warm_up, runs, interval), progress)]
    try:
        if output:
            save(output, msgspec.json.encode(found))
        if html:
            from edgesd.pages.bench import bench_html

            save(html, page_bytes(bench_html(found)))
    except EdgesdError as exc:
        failure = failure or exc
    if as_json:
        print_json(found)
    else:
        for bench in found:
            _show(bench)
    if failure:
        raise failure


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
    """Progress of a benchmark on a board, for those who follow it: a line for each image."""

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
        say(f"{'power':20}{'unknown':>10}: this machine doesn't tell")
    if found.throttled:
        held = ", ".join(found.throttled)
        say(f"{'throttled':20}{'yes':>10}: {held}, from {found.throttled_at:.1f} s on")
    else:
        say(f"{'throttled':20}{'no':>10}")
    for component, reason in bench.fallbacks.items():
        say(f"{component}: {reason}")
