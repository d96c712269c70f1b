"""edgesd lora ..."""

from __future__ import annotations

from pathlib import Path

import click

from edgesd.cli.common import OutputPath, say, say_error


@click.group("lora", short_help="LoRAs for bundles with places for them.")
def lora_group() -> None:
    """LoRAs for bundles that were built with --lora-slots."""


@lora_group.command("convert", short_help="Make a file for boards of a LoRA.")
@click.argument("lora", metavar="FILE[:SCALE]")
@click.option(
    "--for",
    "bundle",
    type=click.Path(path_type=Path),
    metavar="BUNDLE",
    required=True,
    help="A bundle that was built with --lora-slots: the file fits all that have the same slots.",
)
@click.option(
    "-o",
    "--output",
    type=OutputPath(dir_okay=False),
    help="New file. [default: FILE with the suffix .lora]",
)
@click.option(
    "--key",
    type=click.Path(path_type=Path),
    help="Sign the file by NAME.key: as FILE.lora.sig, for boards that run signed bundles only.",
)
def convert_command(lora: str, bundle: Path, output: Path | None, key: Path | None) -> None:
    """Make a file for boards of the LoRA in FILE (.safetensors of diffusers, peft or Kohya's
    scripts), which `edgesd generate --lora` uses.

    Whatever of it has no place in the bundle is an error, and so are DoRA, LoHa and LoKr: merge
    these by `edgesd build --lora`. Layers that the pipeline never runs are left out, and named.
    """
    from edgesd.export.lora.board import convert
    from edgesd.runtime.bundle import open_bundle
    from edgesd.runtime.lora import read_lora
    from edgesd.runtime.signature import sign_lora

    made = convert(lora, open_bundle(bundle), output)
    if made.unused:
        say_error(
            f"note: {len(made.unused)} layers are left out, which the pipeline doesn't run: "
            f"{', '.join(made.unused[:3])}{' ...' if len(made.unused) > 3 else ''}"
        )
    size = made.path.stat().st_size
    say(f"{made.path}: {made.layers} layers, rank {made.rank}, {size / 1e6:.1f} MB")
    if key is not None:
        say(f"signed: {sign_lora(made.path, read_lora(made.path).sha256, key)}")
