"""edgesd deploy"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgesd.cli.common import Reporter, print_json, show_each
from edgesd.cli.options import json_option, self_test_option
from edgesd.errors import EdgesdError
from edgesd.progress import Prefixed

if TYPE_CHECKING:
    from edgesd.device.slots import Installed
    from edgesd.remote.board import Board
    from edgesd.remote.deploy import Deployed


@click.command("deploy", short_help="Install BUNDLE, and edgesd itself, on boards over SSH.")
@click.argument("arguments", nargs=-1, required=True, metavar="[BUNDLE] USER@BOARD[:PORT]...")
@click.option("--rollback", is_flag=True, help="Go back to the previous bundle; give only boards.")
@click.option(
    "--wheels",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    help="Folder of wheels for the boards. [default: downloaded by pip, here]",
)
@click.option(
    "--lora",
    "loras",
    type=click.Path(path_type=Path),
    multiple=True,
    help="Put a LoRA that `edgesd lora convert` made beside the bundle: NAME.lora is `generate "
    "--lora NAME` there; may be repeated.",
)
@self_test_option
@json_option
def deploy_command(
    arguments: tuple[str, ...],
    rollback: bool,
    wheels: Path | None,
    loras: tuple[Path, ...],
    self_test: bool,
    as_json: bool,
) -> None:
    """Install BUNDLE, and edgesd itself, on one or more boards, and make it the active bundle.

    Only missing files are sent; after a lost link, the same command continues. The
    board verifies every byte and generates a test image before it switches, so that the active
    bundle is always whole. The board needs python3 and sshd, no network.
    """
    reporter = Reporter(quiet=as_json)
    hosts = arguments if rollback else arguments[1:]
    if rollback:
        _check_boards_alone(arguments)
        if loras:
            raise click.UsageError("--lora goes with a bundle, not with --rollback: LoRAs stay")
    if not hosts:
        raise click.UsageError("name the board: edgesd deploy BUNDLE USER@BOARD")
    found: dict[str, Deployed | Installed] = {}

    def show(host: str, done: Deployed | Installed) -> None:
        found[host] = done
        reporter.line(_line(host, done))

    try:
        with reporter.bar():
            if rollback:
                show_each(_roll_back(hosts, self_test, reporter), show)
            else:
                bundle = Path(arguments[0])
                show_each(_deploy(bundle, hosts, wheels, self_test, loras, reporter), show)
    finally:
        if as_json and found:
            print_json(found)


def _check_boards_alone(names: Sequence[str]) -> None:
    from edgesd.runtime.bundle import SUFFIX

    for name in names:
        if name.endswith(SUFFIX) or Path(name).exists():
            raise click.UsageError(
                f"--rollback goes back to the previous bundle of a board: {name} is a bundle or a "
                "file here, so give only boards"
            )


def _roll_back(
    hosts: Sequence[str], self_test: bool, reporter: Reporter
) -> Mapping[str, Installed | EdgesdError]:
    from edgesd.remote.deploy import rollback
    from edgesd.remote.hosts import on_each

    return on_each(hosts, lambda board: rollback(board, self_test, _prefixed(reporter, board)))


def _deploy(
    path: Path,
    hosts: Sequence[str],
    wheels: Path | None,
    self_test: bool,
    loras: Sequence[Path],
    reporter: Reporter,
) -> Mapping[str, Deployed | EdgesdError]:
    from edgesd.remote.deploy import deploy, lora_to_deploy
    from edgesd.remote.hosts import on_each
    from edgesd.runtime.bundle import open_bundle

    bundle = open_bundle(path)
    checked = [lora_to_deploy(lora, bundle) for lora in loras]
    if len({lora.name for lora in checked}) < len(checked):
        raise click.UsageError("two LoRAs have the same name: rename a file")
    return on_each(
        hosts,
        lambda board: deploy(board, bundle, wheels, self_test, _prefixed(reporter, board), checked),
    )


def _prefixed(reporter: Reporter, board: Board) -> Prefixed:
    return Prefixed(reporter, f"{board.name}: ")


def _line(host: str, done: Deployed | Installed) -> str:
    """The result of one board in a line."""
    from edgesd.device.slots import Installed

    if isinstance(done, Installed):
        slot = done.slot
        return f"{host}: {slot.name} {slot.manifest_sha256[:16]} is active again"
    loras = f"; LoRAs: {', '.join(lora.name for lora in done.loras)}" if done.loras else ""
    if done.installed is None:
        return f"{host}: that bundle is active already, and every byte of it is right{loras}"
    tested = done.installed.self_test
    speed = "emulated" if tested and tested.emulated else "{:.2f} s a step"
    test = f", tested ({speed.format(tested.step_seconds)})" if tested else ", not tested"
    by = f", signed by {done.installed.signer}" if done.installed.signer else ""
    return (
        f"{host}: active in slot {done.slot.slot}: {done.slot.name} {done.slot.precision}{test}{by}"
        f"; runtime {done.runtime}; sent {done.sent_bytes / 1e6:.1f} MB, wrote "
        f"{done.written_bytes / 1e6:.1f} MB, {done.seconds:.0f} s{loras}. Generate there: "
        'edgesd/bin/edgesd generate edgesd/current -p "a red apple"'
    )
