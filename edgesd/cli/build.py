"""edgesd build"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import click

from edgesd.cli.common import (
    Finite,
    OutputPath,
    Reporter,
    Size,
    json_option,
    lpips_option,
    print_json,
    printable,
    say,
    scheduler_option,
)
from edgesd.errors import EdgesdError
from edgesd.export.quantize.methods import METHODS
from edgesd.spec.scheme import Precision


@click.command("build")
@click.argument("model")
@click.option("--target", required=True, help="Board to build for; `edgesd targets` lists them.")
@click.option(
    "--precision",
    default="fp32",
    show_default=True,
    metavar="NAME",
    help="fp32, fp16 (on CPUs storage only), or fewer bits for weights and activations: w8a16, "
    "w8a8, w4a16-g64, w4a8-g64, w4a4-g64 (simulated). -gN: N weights share a scale; -lrR behind it "
    "adds a 16-bit branch of rank R, as in w4a8-g64-lr32.",
)
@click.option(
    "--min-psnr",
    type=Finite(0, 100),
    metavar="DB",
    help="Least PSNR in dB of the worst image against the source's: layers are raised until it "
    "holds, or the build fails.",
)
@click.option(
    "--max-size",
    type=Finite(0, 1, min_open=True),
    metavar="PART",
    help="Largest bundle, as a part of the fp32 one (0.2): ranks and bits go where images gain.",
)
@click.option(
    "--max-time",
    type=Finite(0, min_open=True),
    metavar="PART",
    help="The same for the estimated time of an image.",
)
@click.option(
    "--method",
    type=click.Choice(METHODS),
    default="svdquant",
    show_default=True,
    help="How codes and branches are chosen.",
)
@click.option(
    "--static",
    is_flag=True,
    help="8-bit activations: ranges recorded for each timestep, instead of those at hand.",
)
@click.option(
    "--calibration-prompts",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="Text file, a prompt per line. [default: the model's prompts/calibration.txt]",
)
@click.option(
    "--quality-prompts",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="Prompts to compare images of; their places are the seeds. [default: the model's "
    "prompts/quality.txt]",
)
@click.option(
    "--pool-attention",
    is_flag=True,
    help="On CPUs, quantized: average keys and values of the largest self-attention over 2x2 "
    "latents, which is faster, if the worst images lose at most 1 dB by it.",
)
@click.option("--no-quality", is_flag=True, help="Don't generate and compare images.")
@click.option(
    "--work",
    type=OutputPath(file_okay=False),
    help="Folder for intermediate results, from which an interrupted build goes on. "
    "[default: EDGESD_CACHE, or ~/.cache/edgesd]",
)
@lpips_option
@click.option(
    "--size",
    type=Size(),
    help="Fix the image's size in pixels (static graphs), to any that diffusers generates. Without "
    "it the bundle generates any multiple of all the UNet's levels (mostly 64 pixels), and any "
    "number of images at a time.",
)
@click.option(
    "--batch",
    type=click.IntRange(1),
    help="With --size: rows of the static UNet. An image takes two of them in batched guidance, "
    "one otherwise.  [default: 1]",
)
@scheduler_option("Default sampler of the bundle")
@click.option(
    "-o",
    "--output",
    type=OutputPath(),
    help="New folder of the bundle, or NAME.edgesd for one file. "
    "[default: bundles/MODEL-TARGET-PRECISION]",
)
@click.option(
    "--prompter",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder of an exported prompter (edgesd prompter export): the bundle brings it.",
)
@click.option(
    "--on",
    "host",
    metavar="USER@BOARD[:PORT]",
    help="For Jetsons: let that board build the TensorRT plans, over SSH; the bundle brings them.",
)
@json_option
def build_command(
    model: str,
    target: str,
    precision: Precision,
    min_psnr: float | None,
    max_size: float | None,
    max_time: float | None,
    method: str,
    static: bool,
    calibration_prompts: Path | None,
    quality_prompts: Path | None,
    pool_attention: bool,
    no_quality: bool,
    work: Path | None,
    lpips: Path | None,
    size: tuple[int, int] | None,
    batch: int | None,
    scheduler: str | None,
    output: Path | None,
    prompter: Path | None,
    host: str | None,
    as_json: bool,
) -> None:
    """Turn MODEL into a bundle for a board.

    MODEL is `demo` (the embedded pipeline), the folder of a diffusers pipeline, or a hub id such as
    OWNER/NAME. Each network is compared with its source before the bundle is written; of a
    quantized bundle the images are, too, and `edgesd report` shows them.
    """
    from edgesd.recipes import QuantOptions, build, default_output

    if batch and not size:
        raise click.UsageError("--batch fixes the rows of static graphs: give --size, too")
    reporter = Reporter(quiet=as_json)
    out = output or default_output(model, target, precision)
    if no_quality and any(limit is not None for limit in (min_psnr, max_size, max_time)):
        raise click.UsageError(
            "--min-psnr, --max-size and --max-time are held by drawing images: "
            "leave --no-quality out"
        )
    options = QuantOptions(
        method=method,
        static=static,
        calibration_prompts=_prompts(calibration_prompts),
        quality_prompts=() if no_quality else _prompts(quality_prompts),
        min_psnr=min_psnr,
        max_size=max_size,
        max_time=max_time,
        work=work,
        lpips=lpips,
        pool_attention=pool_attention,
    )
    finish = None
    if host is not None:
        from edgesd.device.targets import get_target
        from edgesd.remote.on_board import add_plans, check_board
        from edgesd.runtime.backends import get_backend

        if not get_backend(get_target(target).backends[0]).needs_plans:
            raise click.UsageError(f"--on builds plans, and {target} takes none")
        place = check_board(host, target).environment  # before long work
        reporter.line(f"{host} builds plans for {place}")
        finish = partial(add_plans, host, progress=reporter)
    built = build(
        model,
        target,
        precision,
        out,
        size,
        scheduler,
        batch or 1,
        progress=reporter,
        quantization=options,
        finish=finish,
        prompter=prompter,
        warn=reporter.warn,
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
                "quality": manifest.quality,
            }
        )
        _raise_unfinished(built.unfinished, built.path, host)
        return
    for name, engine in manifest.engines.items():
        say(
            f"{name:13} {sizes[name] / 1e6:9.1f} MB   differs from its source by "
            f"{engine.parity.rel_rms:.1e} RMS (allowed {engine.parity.tolerance:.0e})"
        )
    if manifest.quality:
        q = manifest.quality
        say(
            f"images against the source's, {len(q.images)} prompts, {q.num_inference_steps} "
            f"steps: PSNR {q.psnr_mean:.1f} dB (least {q.psnr_min:.1f}), SSIM {q.ssim_mean:.3f}, "
            f"{q.metric} {q.distance_mean:.4f}"
        )
    if manifest.recipe and manifest.recipe.simulated:
        say("note: simulated: no engine computes in this format; the images are right")
    if built.note:
        say(f"note: {built.note}")
    say(f"bundle for {manifest.target}: {built.path}")
    _raise_unfinished(built.unfinished, built.path, host)


def _raise_unfinished(error: EdgesdError | None, path: Path, host: str | None) -> None:
    """Fail behind a bundle that lacks the board's plans."""
    if error is not None:
        raise type(error)(
            f"{error} ({path} is whole, without plans: edgesd finalize {path} --on {host} -o NEW "
            "adds them)"
        )


def _prompts(path: Path | None) -> tuple[str, ...] | None:
    from edgesd.runtime.images import read_prompts

    return None if path is None else tuple(read_prompts(path))
