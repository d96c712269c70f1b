"""edgesd report"""

from __future__ import annotations

from pathlib import Path

import click

from edgesd.cli.common import OutputPath, say


@click.command("report", short_help="Write a page on the quality of BUNDLE.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    type=OutputPath(),
    help="The page, NAME.html; an older file is replaced. [default: BUNDLE-report.html, which is "
    "replaced only if edgesd wrote it]",
)
def report_command(bundle: Path, output: Path | None) -> None:
    """Write an HTML page on BUNDLE: its images beside its source's, its layers, its sizes.

    The page is one file that loads nothing else. Nothing is measured again: the build stored the
    figures in the bundle.
    """
    from edgesd.pages.report import write_report
    from edgesd.runtime.bundle import open_bundle

    opened = open_bundle(bundle)
    path = write_report(opened, output)
    say(f"{path}: {path.stat().st_size / 1e6:.2f} MB")
