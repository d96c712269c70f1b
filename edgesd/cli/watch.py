"""edgesd watch"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import click

from edgesd.cli.common import Finite, print_json, say, show_each
from edgesd.cli.options import hosts_option, json_option, option_arguments

if TYPE_CHECKING:
    from edgesd.device.telemetry import Sample


@click.command("watch", short_help="Memory, clocks, heat and power of this board.")
@click.option(
    "--interval",
    type=Finite(0.05, 3600),
    default=1.0,
    show_default=True,
    help="Seconds between samples.",
)
@click.option(
    "--seconds", type=Finite(0, min_open=True), help="Stop after this time. [default: never]"
)
@click.option("--pid", type=click.IntRange(1), help="Also show the memory of this process.")
@hosts_option
@json_option
def watch_command(
    interval: float,
    seconds: float | None,
    pid: int | None,
    hosts: tuple[str, ...],
    as_json: bool,
) -> None:
    """Show memory, clocks, temperatures and power of this board, and what throttles it.

    By tegrastats on a Jetson, by vcgencmd on a Raspberry Pi, and by Linux's own files anywhere. A
    line per sample; with --json an object per line.
    """
    if hosts:
        _watch_hosts(hosts, option_arguments(click.get_current_context(), without=["hosts"]))
        return
    from edgesd.device.telemetry import sampled

    end = None if seconds is None else time.monotonic() + seconds
    for sample in sampled(interval, pid):
        if as_json:
            print_json(sample, indent=-1)
        else:
            say(_line(sample))
        if end is not None and time.monotonic() + interval > end:
            return


def _line(sample: Sample) -> str:
    """One sample for people."""
    from edgesd.device.telemetry import board_watts

    parts = [f"{sample.seconds:7.1f} s"]
    if sample.memory_used_bytes is not None and sample.memory_bytes:
        used, total = sample.memory_used_bytes >> 20, sample.memory_bytes >> 20
        parts.append(f"memory {used}/{total} MB")
    if sample.process_bytes is not None:
        parts.append(f"process {sample.process_bytes / 2**20:.0f} MB")
    if sample.cpu_mhz:
        parts.append(f"CPU {min(sample.cpu_mhz)} to {max(sample.cpu_mhz)} MHz")
    if sample.gpu_percent is not None:
        parts.append(f"GPU {sample.gpu_percent:.0f} %")
    if sample.gpu_mhz:
        parts.append(f"GPU {max(sample.gpu_mhz)} MHz")
    if sample.celsius:
        hottest = max(sample.celsius, key=lambda name: sample.celsius[name])
        parts.append(f"{hottest} {sample.celsius[hottest]:.1f} C")
    if (watts := board_watts(sample.watts)) is not None:
        parts.append(f"{watts:.2f} W")
    parts += [f"! {limit}" for limit in sample.limits]
    return "  ".join(parts)


def _watch_hosts(hosts: tuple[str, ...], options: list[str]) -> None:
    """Print what `edgesd watch` prints on each host, as it comes."""
    from edgesd.remote import board as boards
    from edgesd.remote.board import Board
    from edgesd.remote.hosts import on_each

    def show(board: Board, line: str) -> None:
        say(f"{board.name}: {line}" if len(hosts) > 1 else line)

    async def watch(board: Board) -> None:
        await boards.edgesd(board, "watch", *options, on_output=lambda line: show(board, line))

    show_each(on_each(hosts, watch), lambda host, nothing: None)
