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
    help="Build them on that board, over SSH, and write a bundle that includes them.",
)
@click.option("-o", "--output", type=OutputPath(), help="With --on: new folder or NAME.edgesd.")
@click.option("--check", is_flag=True, help="Only show what plans are built for on this machine.")
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
    reporter = Reporter(quiet=as_json)
    with reporter.bar():
        if host is not None and output:
            found = _on_board(bundle, host, output, reporter)
        else:
            found = _here(bundle, plans, reporter)
    if as_json:
        print_json(found)
        return
    _show(found)
    if output:
        say(f"bundle with the plans of {host}: {output}")


def _on_board(path: Path, host: str, output: Path, reporter: Reporter) -> dict[str, Finalized]:
    from edgesd.remote.on_board import finalize_on
    from edgesd.runtime.bundle import open_bundle

    return finalize_on(host, open_bundle(path), output, reporter)


def _here(path: Path, folder: Path | None, reporter: Reporter) -> dict[str, Finalized]:
    from edgesd.engines.plans import Finalized, plans_folder, prepare_plans, read_plan
    from edgesd.runtime.bundle import open_bundle

    plans = prepare_plans(open_bundle(path), folder or plans_folder(), reporter)
    return {
        name: Finalized(printable(plan), read_plan(plan)) if plan else Finalized(None, None)
        for name, plan in plans.items()
    }


def _check(as_json: bool) -> None:
    from edgesd.device.detect import describe_machine, detect_machine
    from edgesd.engines.plans import FinalizeCheck, plan_environment

    here = FinalizeCheck(detect_machine(), plan_environment())
    if as_json:
        print_json(here)
    else:
        say(describe_machine(here.machine))
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
