"""edgesd finalize"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgesd.cli.common import OutputPath, Reporter, print_json, printable, say
from edgesd.cli.options import json_option

if TYPE_CHECKING:
    from edgesd.engines.plans import Finalized


@click.command("finalize", short_help="Build BUNDLE's TensorRT plans, here or on a board.")
@click.argument("bundle", type=click.Path(path_type=Path), required=False)
@click.option(
    "--plans",
    type=OutputPath(file_okay=False),
    help="Folder to keep them in. [default: EDGESD_PLANS, or ~/.cache/edgesd/plans]",
)
@click.option(
    "--on",
    "host",
    metavar="USER@BOARD[:PORT]",
    help="Build them on that board, over SSH, and write a bundle that brings them.",
)
@click.option("-o", "--output", type=OutputPath(), help="With --on: new folder or NAME.edgesd.")
@click.option("--check", is_flag=True, help="Only say what plans are built for here.")
@json_option
def finalize_command(
    bundle: Path | None,
    plans: Path | None,
    host: str | None,
    output: Path | None,
    check: bool,
    as_json: bool,
) -> None:
    """Build the TensorRT plans of BUNDLE on the machine that will run it.

    `edgesd generate` does so on its first run, too. A plan fits this GPU, this TensorRT and this
    JetPack only; it is built anew when one of them changes.
    """
    if check:
        if bundle or plans or host or output:
            raise click.UsageError("--check looks at this machine alone: give nothing else")
        _check(as_json)
        return
    if bundle is None:
        raise click.UsageError("Missing argument 'BUNDLE'.")
    if host is not None and (output is None or plans):
        raise click.UsageError("--on writes another bundle: name it by -o, and leave --plans out")
    if output and host is None:
        raise click.UsageError("-o goes with --on: plans of this machine are kept in --plans")
    from edgesd.engines.plans import Finalized, plans_folder, prepare_plans, read_plan
    from edgesd.runtime.bundle import open_bundle
    from edgesd.runtime.signature import check_trusted

    opened = open_bundle(bundle)
    reporter = Reporter(quiet=as_json)
    with reporter.bar():
        if host is not None and output:
            from edgesd.remote.on_board import finalize_on

            found = finalize_on(host, opened, output, reporter)
        else:
            check_trusted(opened)
            paths = prepare_plans(opened, plans or plans_folder(), reporter)
            found = {
                name: Finalized(printable(path), read_plan(path)) if path else Finalized(None, None)
                for name, path in paths.items()
            }
    if as_json:
        print_json(found)
        return
    _show(found)
    if output:
        say(f"bundle with the plans of {host}: {output}")


def _check(as_json: bool) -> None:
    from edgesd.device.detect import detect_machine, explain_machine
    from edgesd.engines.plans import FinalizeCheck, plan_environment

    here = FinalizeCheck(detect_machine(), plan_environment())
    if as_json:
        print_json(here)
    else:
        say(explain_machine(here.machine))
        say(f"plans are built for {here.environment}")


def _show(found: dict[str, Finalized]) -> None:
    for name, final in found.items():
        if final.plan is None:
            say(f"{name:13} the bundle's own plan fits")
            continue
        report = final.plan.report
        say(
            f"{name:13} {report.plan_bytes / 1e6:9.1f} MB  {report.environment}  built in "
            f"{report.seconds:.0f} s, {report.peak_bytes / 1e6:.0f} MB at most"
        )
