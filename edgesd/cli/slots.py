"""edgesd slots ..."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from edgesd.cli.common import Reporter, print_json, say
from edgesd.cli.options import json_option, self_test_option

if TYPE_CHECKING:
    from edgesd.device.slots import BoardLora, Installed, Slot


@click.group("slots", short_help="The bundles that were deployed to this machine.")
def slots_group() -> None:
    """The bundles that were deployed to this machine: the active one, and one to go back to.

    They lie in ~/edgesd (EDGESD_HOME); ~/edgesd/current is the active one.
    """


@slots_group.command("show")
@click.option("--wait", is_flag=True, help="Wait until no deploy is at work.")
@json_option
def show_command(wait: bool, as_json: bool) -> None:
    """Show both slots, and the LoRAs beside them."""
    from edgesd.device.slots import Slots

    slots = Slots()
    found = slots.show(wait)
    if as_json:
        print_json(found)
        return
    for slot in found:
        say(slot_line(slot))
    for lora in slots.loras():
        say(_lora_line(lora))
    if not found:
        say("none: edgesd deploy installs one")


@slots_group.command("install")
@click.argument("manifest")
@click.argument("checksum")
@click.option("--signature", help="SHA-256 of bundle.sig.")
@self_test_option
@json_option
def install_command(
    manifest: str, checksum: str, signature: str | None, self_test: bool, as_json: bool
) -> None:
    """Activate a bundle that was sent to ~/edgesd/objects; `edgesd deploy` runs this command.

    MANIFEST, CHECKSUM: SHA-256 of its bundle.json and bundle.sha256.
    """
    from edgesd.device.slots import Slots

    _tell(Slots().install(manifest, checksum, signature, self_test, Reporter()), as_json)


@slots_group.command("lora")
@click.argument("name")
@click.argument("sha256")
@click.option("--signature", help="SHA-256 of NAME.lora.sig.")
@json_option
def lora_command(name: str, sha256: str, signature: str | None, as_json: bool) -> None:
    """Let `generate --lora NAME` use a file that was sent to ~/edgesd/objects; `edgesd deploy`
    runs this command.

    SHA256: of the file, which `edgesd lora convert` made for the active bundle, or one with the
    same slots.
    """
    from edgesd.device.slots import Slots

    placed = Slots().put_lora(name, sha256, signature)
    if as_json:
        print_json(placed)
        return
    say(_lora_line(placed))


@slots_group.command("rollback")
@self_test_option
@json_option
def rollback_command(self_test: bool, as_json: bool) -> None:
    """Activate the other bundle, once it is verified and has generated an image."""
    from edgesd.device.slots import Slots

    _tell(Slots().rollback(self_test, Reporter()), as_json)


@slots_group.command("check")
@json_option
def check_command(as_json: bool) -> None:
    """Verify every byte of the active bundle."""
    from edgesd.device.slots import Slots

    slot = Slots().check(Reporter())
    if as_json:
        print_json(slot)
    else:
        say(f"verified: {slot_line(slot)}")


def slot_line(slot: Slot) -> str:
    """One slot for people."""
    state = "active" if slot.active else "before"
    if slot.problem:
        return f"{slot.slot}  {state}  damaged: {slot.problem}"
    return (
        f"{slot.slot}  {state}  {slot.name}, {slot.precision}, for {slot.target}, "
        f"{slot.bytes / 1e6:.1f} MB, {slot.manifest_sha256[:16]}"
    )


def _lora_line(lora: BoardLora) -> str:
    return f"lora  {lora.name}, {lora.bytes / 1e6:.1f} MB"


def _tell(installed: Installed, as_json: bool) -> None:
    if as_json:
        print_json(installed)
        return
    say(slot_line(installed.slot))
