"""`edgesd kernels`: the library of edgesd's own kernels for CPUs."""

from __future__ import annotations

import platform
from pathlib import Path

import click

from edgesd.cli.common import Reporter, print_json, say
from edgesd.cli.options import json_option


@click.group("kernels", short_help="Compile edgesd's own kernels for CPUs.")
def kernels_group() -> None:
    """Kernels of edgesd's own, for quantized bundles on CPUs: faster, and in less memory.

    They are optional: without them ONNX Runtime's own operators are used. EDGESD_KERNELS=none
    leaves them out, EDGESD_KERNELS=FILE uses that library.
    """


@kernels_group.command("build", short_help="Compile the library.")
@click.option(
    "--arch",
    type=click.Choice(["x86_64", "aarch64"]),
    help="Architecture. [default: this machine's]",
)
@click.option(
    "-o", "--out", type=click.Path(path_type=Path, file_okay=False), help="Folder. [default: cache]"
)
def build_command(arch: str | None, out: Path | None) -> None:
    """Compile the library with the C++ compiler of this machine, in about a minute. Another
    architecture needs a cross compiler: apt install g++-aarch64-linux-gnu."""
    from edgesd.engines.kernels import build_library

    say(build_library(arch or platform.machine(), out, Reporter()))


@kernels_group.command("status", short_help="Which library is used here.")
@json_option
def status_command(as_json: bool) -> None:
    """Show where the library is, and which instruction set it uses here."""
    from edgesd.runtime.kernels import instruction_set, library

    path, isa = library(), instruction_set()
    if as_json:
        print_json({"library": None if path is None else str(path), "instruction_set": isa or None})
    elif path is None:
        say("no library: edgesd kernels build")
    elif not isa:
        say(f"{path}: can't be used on this machine")
    else:
        say(f"{path}: {isa}")
