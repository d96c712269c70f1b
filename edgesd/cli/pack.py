"""edgesd pack"""

from __future__ import annotations

from pathlib import Path

import click

from edgesd.cli.common import OutputPath, Reporter, say
from edgesd.progress import count_bytes


@click.command("pack", short_help="Write BUNDLE as one file.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("output", type=OutputPath())
def pack_command(bundle: Path, output: Path) -> None:
    """Write BUNDLE as the one file OUTPUT (NAME.edgesd), which every command can read.

    `tar -xf NAME.edgesd` turns it into a folder again.
    """
    from edgesd.engines.bundle import pack_bundle
    from edgesd.errors import InputError, UsageError
    from edgesd.files import check_new, check_writable
    from edgesd.runtime.bundle import SUFFIX, open_bundle

    if output.suffix != SUFFIX:
        raise UsageError(f"{output} must end in {SUFFIX}: try {output}{SUFFIX}")
    opened = open_bundle(bundle)
    check_new(output)
    if opened.path in output.resolve().parents:
        raise InputError(f"{output} lies in the bundle: choose another place")
    reporter = Reporter()
    total = opened.total_bytes()
    check_writable(output, total)
    with reporter.bar():
        pack_bundle(opened, output, count_bytes(reporter, "pack", total))
    say(f"{output}: {output.stat().st_size / 1e6:.1f} MB")
