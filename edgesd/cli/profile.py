"""edgesd profile"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec

from edgesd.cli.common import OutputPath, Reporter, print_json, say, say_error
from edgesd.cli.options import json_option, option_arguments, threads_option

if TYPE_CHECKING:
    from edgesd.runtime.rates import Rates

_HERE = ("host", "target", "output", "as_json")
"""Options that aren't passed on to a board: where the rates are kept, and how a board answers."""


@click.command("profile", short_help="Measure how fast this machine, or a board, is.")
@click.option("--host", metavar="USER@BOARD[:PORT]", help="Measure that board, over SSH.")
@click.option(
    "--target",
    help="Keep the rates under this name for `edgesd plan --target`. [default: the machine's "
    "target]",
)
@click.option(
    "-o",
    "--output",
    type=OutputPath(dir_okay=False),
    help="File to write; an older one is replaced. [default: the target's in the cache]",
)
@threads_option
@json_option
def profile_command(
    host: str | None, target: str | None, output: Path | None, threads: int, as_json: bool
) -> None:
    """Time each kind of operation alone, at sizes of real networks, so that `edgesd plan` can
    predict how long an image takes there. This takes a minute or two on a PC and some minutes on a
    board; nothing else should run meanwhile."""
    from edgesd.device.targets import get_target
    from edgesd.errors import EdgesdError
    from edgesd.files import check_file_place, save
    from edgesd.runtime.rates import rates_path, summary

    if target is not None:
        target = get_target(target).name
    path = output or (rates_path(target) if target else None)
    # Of a board that isn't asked yet the cache's name isn't known, but its folder is.
    check_file_place(path or rates_path("board"))
    if host is None:
        found, path = _here(threads, path, as_json)
    else:
        options = option_arguments(click.get_current_context(), without=_HERE)
        found, own = _on_board(host, options)
        path = path or (rates_path(own) if own else None)
    failure = None
    try:
        if path is not None:
            save(path, msgspec.json.format(msgspec.json.encode(found), indent=1))
    except EdgesdError as exc:
        failure = exc  # once the figures are shown
    if as_json:
        print_json(found)
    else:
        for kind, form, speed in summary(found):
            say(f"{kind:11} {form:12} {speed}")
    if failure:
        raise failure
    if not as_json:
        lost = "not kept: the board is no target that edgesd knows (--target or -o keeps them)"
        say(f"rates of {found.machine}: {path or lost}")


def _here(threads: int, path: Path | None, as_json: bool) -> tuple[Rates, Path | None]:
    """Rates of this machine, and where they are kept: `path`, or the place of its target."""
    from edgesd.device.detect import detect_machine
    from edgesd.runtime.rates import measure, rates_path

    machine = detect_machine()
    if path is None and machine.target:
        path = rates_path(machine.target)
    if path is None and not as_json:
        raise click.UsageError("this machine is no target that edgesd knows: give --target or -o")
    reporter = Reporter(quiet=as_json)
    with reporter.bar():
        return measure(machine.model, threads, reporter), path


def _on_board(host: str, options: Sequence[str]) -> tuple[Rates, str | None]:
    """Rates of a board, and which target it is."""
    from edgesd.errors import EdgesdError
    from edgesd.remote import board as boards
    from edgesd.remote.hosts import on_each
    from edgesd.runtime.rates import Rates
    from edgesd.spec.target import Machine

    async def ask(board: boards.Board) -> tuple[Rates, str | None]:
        told = await boards.edgesd(board, "profile", "--json", *options)
        here = await boards.edgesd(board, "targets", "--detect", "--json")
        return boards.decode(board, told, Rates), boards.decode(board, here, Machine).target

    found = on_each([host], ask)[host]
    if isinstance(found, EdgesdError):
        raise found
    return found


@click.command("calibrate", hidden=True, params=profile_command.params)
@click.pass_context
def calibrate_command(context: click.Context, /, **options: object) -> None:
    """The old name of `edgesd profile`."""
    say_error(
        "note: `edgesd calibrate` is now `edgesd profile`; the next release removes the old name"
    )
    context.forward(profile_command)
