"""edgesd targets"""

from __future__ import annotations

import click

from edgesd.cli.common import print_json, say
from edgesd.cli.options import json_option


@click.command("targets")
@click.option("--detect", is_flag=True, help="Describe this machine instead.")
@json_option
def targets_command(detect: bool, as_json: bool) -> None:
    """List the boards that edgesd builds for."""
    from edgesd.device.detect import describe_machine, detect_machine
    from edgesd.device.targets import families, list_targets

    if detect:
        machine = detect_machine()
        if as_json:
            print_json(machine)
        else:
            say(describe_machine(machine))
        return
    targets = list_targets()
    if as_json:
        print_json({"targets": targets, "families": families()})
        return
    for target in targets:
        say(
            f"{target.name:24} {target.arch:8} {target.memory_bytes / 2**30:6.1f} GB  "
            f"{'/'.join(target.backends):24} {target.title}"
        )
    say()
    for family, member in families().items():
        say(f"{family:24} means {member}")
