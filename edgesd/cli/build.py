"""edgesd build"""

from __future__ import annotations

from pathlib import Path

import click

from edgesd.cli.common import Reporter, Size, json_option, print_json, printable
from edgesd.spec import PRECISIONS, Precision


@click.command("build")
@click.argument("model")
@click.option("--target", required=True, help="Board to build for; `edgesd targets` lists them.")
@click.option(
    "--precision",
    type=click.Choice(PRECISIONS),
    default="fp32",
    show_default=True,
    help="Number format of the weights. On CPUs fp16 halves the bundle and computes in fp32.",
)
@click.option(
    "--size",
    type=Size(),
    help="Fix the picture's size in pixels (static graphs). Without it the bundle draws any size, "
    "and any number of pictures at a time.",
)
@click.option(
    "--batch",
    type=click.IntRange(1),
    help="With --size: rows of the static UNet. A picture takes two of them in batched guidance, "
    "one otherwise.  [default: 1]",
)
@click.option(
    "--scheduler",
    help="Default sampler of the bundle, such as ddim or dpmpp-2m. [default: the model's own]",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="Folder of the bundle, or NAME.edgesd for one file. "
    "[default: bundles/MODEL-TARGET-PRECISION]",
)
@json_option
def build_command(
    model: str,
    target: str,
    precision: Precision,
    size: tuple[int, int] | None,
    batch: int | None,
    scheduler: str | None,
    output: Path | None,
    as_json: bool,
) -> None:
    """Turn MODEL into a bundle for a board.

    MODEL is `demo` (the embedded pipeline), the folder of a diffusers pipeline, or a hub id such as
    OWNER/NAME. Each network is compared with its source before the bundle is written.
    """
    from edgesd.build import build, default_output

    if batch and not size:
        raise click.UsageError("--batch fixes the rows of static graphs: give --size, too")
    reporter = Reporter(quiet=as_json)
    out = output or default_output(model, target, precision)
    built = build(
        model,
        target,
        precision,
        out,
        size,
        scheduler,
        batch or 1,
        progress=lambda stage, component: reporter.line(f"{component}: {stage}"),
    )
    manifest = built.bundle.manifest
    sizes = {name: built.bundle.weight_bytes(name) for name in manifest.engines}
    if as_json:
        print_json(
            {
                "bundle": printable(built.path),
                "target": manifest.target,
                "backend": manifest.backend,
                "precision": manifest.precision,
                "bytes": sizes,
                "note": built.note,
                "parity": {name: engine.parity for name, engine in manifest.engines.items()},
            }
        )
        return
    for name, engine in manifest.engines.items():
        click.echo(
            f"{name:13} {sizes[name] / 1e6:9.1f} MB   differs from its source by "
            f"{engine.parity.rel_rms:.1e} RMS (allowed {engine.parity.tolerance:.0e})"
        )
    if built.note:
        click.echo(f"note: {built.note}")
    click.echo(f"bundle for {manifest.target}: {built.path}")
