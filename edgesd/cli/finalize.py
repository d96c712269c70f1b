"""edgesd finalize"""

from __future__ import annotations

from pathlib import Path

import click

from edgesd.cli.common import Reporter, json_option, plan_progress, print_json, printable


@click.command("finalize", short_help="Build BUNDLE's TensorRT plans for this machine.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--plans",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder to keep them in. [default: EDGESD_PLANS, or ~/.cache/edgesd/plans]",
)
@json_option
def finalize_command(bundle: Path, plans: Path | None, as_json: bool) -> None:
    """Build the TensorRT plans of BUNDLE on the machine that will run it.

    `edgesd generate` does so on its first run, too. A plan fits this GPU, this TensorRT and this
    JetPack only; it is built anew when one of them changes.
    """
    from edgesd.engines.plans import plans_folder, prepare_plans, read_plan
    from edgesd.runtime.bundle import open_bundle

    reporter = Reporter(quiet=as_json)
    with reporter.bar():
        paths = prepare_plans(open_bundle(bundle), plans or plans_folder(), plan_progress(reporter))
    found = {component: read_plan(path) for component, path in paths.items()}
    if as_json:
        print_json(
            {name: {"path": printable(paths[name]), "plan": plan} for name, plan in found.items()}
        )
        return
    for name, plan in found.items():
        report = plan.report
        click.echo(
            f"{name:13} {report.plan_bytes / 1e6:9.1f} MB  {report.environment}  built in "
            f"{report.seconds:.0f} s, {report.peak_bytes / 1e6:.0f} MB at most"
        )
