"""edgesd deploy"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgesd.cli.common import Reporter, print_json, show_each
from edgesd.cli.options import json_option, self_test_option
from edgesd.progress import Prefixed

if TYPE_CHECKING:
    from edgesd.device.slots import Installed
    from edgesd.remote.board import Board
    from edgesd.remote.deploy import Deployed


@click.command("deploy", short_help="Bring BUNDLE, and edgesd itself, onto boards over SSH.")
@click.argument("arguments", nargs=-1, required=True, metavar="[BUNDLE] USER@BOARD[:PORT]...")
@click.option("--rollback", is_flag=True, help="Go back to the bundle before; name boards alone.")
@click.option(
    "--wheels",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    help="Folder of wheels for the boards. [default: got by pip, here]",
)
@self_test_option
@json_option
def deploy_command(
    arguments: tuple[str, ...],
    rollback: bool,
    wheels: Path | None,
    self_test: bool,
    as_json: bool,
) -> None:
    """Bring BUNDLE onto one or more boards, with edgesd itself, and make it the active one there.

    Only what a board lacks is sent; a link that was lost costs nothing that had arrived. The board
    verifies every byte and generates a test image before it switches, so that what is active is
    always whole. The board needs python3 and sshd, no network.
    """
    from edgesd.remote import deploy
    from edgesd.remote.hosts import on_each
    from edgesd.runtime.bundle import SUFFIX, open_bundle

    reporter = Reporter(quiet=as_json)
    if rollback:
        for name in arguments:
            if name.endswith(SUFFIX) or Path(name).exists():
                raise click.UsageError(
                    f"--rollback goes back to the bundle that a board had before: {name} is a "
                    "bundle or a file here, so name boards alone"
                )
    hosts = arguments if rollback else arguments[1:]
    if not hosts:
        raise click.UsageError("name the board: edgesd deploy BUNDLE USER@BOARD")
    found: dict[str, Deployed | Installed] = {}

    def show_deployed(host: str, done: Deployed) -> None:
        found[host] = done
        reporter.line(_deployed(host, done))

    def show_installed(host: str, done: Installed) -> None:
        found[host] = done
        slot = done.slot
        reporter.line(f"{host}: {slot.name} {slot.manifest_sha256[:16]} is active again")

    try:
        with reporter.bar():
            if rollback:
                going_back = on_each(
                    hosts,
                    lambda board: deploy.rollback(board, self_test, _prefixed(reporter, board)),
                )
                show_each(going_back, show_installed)
                return
            bundle = open_bundle(Path(arguments[0]))
            deployed = on_each(
                hosts,
                lambda board: deploy.deploy(
                    board, bundle, wheels, self_test, _prefixed(reporter, board)
                ),
            )
        show_each(deployed, show_deployed)
    finally:
        if as_json and found:
            print_json(found)


def _prefixed(reporter: Reporter, board: Board) -> Prefixed:
    return Prefixed(reporter, f"{board.name}: ")


def _deployed(host: str, done: Deployed) -> str:
    if done.installed is None:
        return f"{host}: that bundle is active already, and every byte of it is right"
    tested = done.installed.self_test
    speed = "emulated" if tested and tested.emulated else "{:.2f} s a step"
    test = f", tested ({speed.format(tested.step_seconds)})" if tested else ", not tested"
    by = f", signed by {done.installed.signer}" if done.installed.signer else ""
    return (
        f"{host}: active in slot {done.slot.slot}: {done.slot.name} {done.slot.precision}{test}{by}"
        f"; runtime {done.runtime}; sent {done.sent_bytes / 1e6:.1f} MB, wrote "
        f"{done.written_bytes / 1e6:.1f} MB, {done.seconds:.0f} s. Generate there: "
        'edgesd/bin/edgesd generate edgesd/current -p "a red apple"'
    )
