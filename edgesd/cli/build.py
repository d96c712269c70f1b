"""edgesd build"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click
import msgspec

from edgesd.cli.common import Finite, OutputPath, Reporter, Size, print_json, printable, say
from edgesd.cli.options import (
    OptionGroup,
    config_option,
    json_option,
    lora_slots_option,
    lpips_option,
    max_tokens_option,
    merged_lora_option,
    scheduler_option,
    side_options,
    task_option,
    vae_option,
    variant_option,
)
from edgesd.export.quantize.methods import method_names
from edgesd.spec.build import DEFAULT_METHOD, MOST_CHUNKS, MOST_SKIPPED, BuildOptions, QuantOptions

if TYPE_CHECKING:
    from edgesd.recipes import Built, LocalFolders


class Given(NamedTuple):
    """The options that were given, by their names in BuildOptions and QuantOptions; those that
    weren't are another bundle's, or the defaults."""

    build: dict[str, Any]
    quantization: dict[str, Any]

    def over(self, base: BuildOptions | None) -> BuildOptions:
        """`base`, overridden by the given options. Raises UsageError where no target is known."""
        if base is None:
            if "target" not in self.build:
                raise click.UsageError("Missing option '--target'.")
            base = BuildOptions(self.build["target"])
        elif "target" in self.build:
            base = msgspec.structs.replace(base, backend=None)  # the other one's
        quantization = msgspec.structs.replace(base.quantization, **self.quantization)
        return msgspec.structs.replace(base, **self.build, quantization=quantization)


_BUILD = (
    click.option("--target", help="Board to build for; `edgesd targets` lists them."),
    click.option(
        "--precision",
        metavar="NAME",
        help="fp32, fp16 (on CPUs storage only), bf16 (on GPUs alone), or fewer bits for weights "
        "and activations: w8a16, w8a8, w4a16-g64, w4a8-g64, w4a4-g64 (simulated). -gN: N weights "
        "share a scale; a final -lrR adds a 16-bit branch of rank R, as in w4a8-g64-lr32.  "
        "[default: fp32]",
    ),
    click.option(
        "--size",
        type=Size(),
        help="Fix the image size in pixels (static graphs); every size that diffusers generates is "
        "valid. Without it the bundle takes any batch, and any size that the UNet's levels divide "
        "(mostly multiples of 64).",
    ),
    click.option(
        "--batch",
        type=click.IntRange(1, 4096),
        help="With --size: batch of the static denoiser. Batched guidance needs 2 for each image, "
        "otherwise 1 is enough.  [default: 1]",
    ),
    scheduler_option("Default sampler of the bundle"),
    variant_option,
    task_option,
    click.option(
        "--clip-skip",
        type=click.IntRange(0, MOST_SKIPPED),
        help="Leave out so many of the text encoders' last layers: 1 for models that web UIs run "
        "with a Clip skip of 2. [default: the model's, mostly 0]",
    ),
    max_tokens_option,
    lora_slots_option,
    click.option(
        "--prompt-chunks",
        type=click.IntRange(1, MOST_CHUNKS),
        help="With --size, or for Jetsons: chunks of 75 tokens that a prompt is encoded in. Other "
        "bundles take prompts of any length.  [default: 1]",
    ),
)
_QUANTIZATION = (
    click.option(
        "--min-psnr",
        type=Finite(0, 100),
        metavar="DB",
        help="Least PSNR in dB of the worst image against the source's: layers get better schemes "
        "until it holds, or the build fails.",
    ),
    click.option(
        "--max-lpips",
        type=Finite(0, 100, min_open=True),
        metavar="DISTANCE",
        help="The same for LPIPS, e.g. 0.25: at most. Needs its weights (--lpips).",
    ),
    click.option(
        "--max-feature-distance",
        type=Finite(0, 100, min_open=True),
        metavar="DISTANCE",
        help="The same for features of a small network, which stand in for LPIPS; on a scale of "
        "their own, 0 to 4.",
    ),
    click.option(
        "--max-size",
        type=Finite(0, 1, min_open=True),
        metavar="RATIO",
        help="Size limit relative to fp32, e.g. 0.2: ranks and bits go to the layers where images "
        "gain most.",
    ),
    click.option(
        "--max-time",
        type=Finite(0, min_open=True),
        metavar="RATIO",
        help="Limit of the estimated time of an image relative to fp32, e.g. 0.5.",
    ),
    click.option(
        "--method",
        type=click.Choice(method_names()),
        help=f"Quantization method.  [default: {DEFAULT_METHOD}]",
    ),
    click.option(
        "--static/--no-static",
        default=None,
        help="Static activation ranges per timestep (default: dynamic).",
    ),
    click.option(
        "--calibration-prompts",
        type=click.Path(path_type=Path, dir_okay=False, exists=True),
        help="Text file, a prompt per line. [default: the model's prompts/calibration.txt]",
    ),
    click.option(
        "--quality-prompts",
        type=click.Path(path_type=Path, dir_okay=False, exists=True),
        help="Text file of prompts whose images are compared, a prompt per line; the first has "
        "seed 0. [default: the model's prompts/quality.txt]",
    ),
    click.option(
        "--pool-attention/--no-pool-attention",
        default=None,
        help="On CPUs, quantized: average keys and values of the largest self-attention over 2x2 "
        "latents, which is faster, if the worst images lose at most 1 dB by it.",
    ),
    click.option("--no-quality", is_flag=True, help="Don't generate and compare images."),
)
_FOLDERS = (
    click.option(
        "--work",
        type=OutputPath(file_okay=False),
        help="Folder for intermediate results, from which an interrupted build goes on; they stay "
        "there, while those of more than 10 GB are removed from the default one in the end. "
        "[default: EDGESD_CACHE, or ~/.cache/edgesd]",
    ),
    lpips_option,
    click.option(
        "--embedding",
        "embeddings",
        metavar="FILE[:TOKEN]",
        multiple=True,
        help="Add a textual inversion (.safetensors), which prompts name by TOKEN [default: the "
        "file's own, or its name]; may be repeated.",
    ),
    *side_options,
    merged_lora_option,
    click.option(
        "--prompter",
        type=click.Path(path_type=Path, file_okay=False),
        help="Folder of an exported prompter (edgesd prompter export), which is included in the "
        "bundle.",
    ),
    config_option,
)


def _given(**values: Any) -> Given:
    for name in ("calibration_prompts", "quality_prompts"):
        values[name] = _prompts(values[name])
    if values.pop("no_quality"):
        values["quality_prompts"] = ()
    build = _present(values)
    named = QuantOptions.__struct_fields__
    return Given(build, {name: build.pop(name) for name in named if name in build})


def _folders(**values: Any) -> LocalFolders:
    from edgesd.recipes import LocalFolders

    return LocalFolders(**_present(values), keep_work=values["work"] is not None)


def _present(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


@click.command("build")
@click.argument("model", required=False)
@OptionGroup("given", _given, (*_BUILD, *_QUANTIZATION))
@OptionGroup("folders", _folders, _FOLDERS)
@vae_option
@click.option(
    "--like",
    type=click.Path(path_type=Path, exists=True),
    metavar="BUNDLE",
    help="Build as BUNDLE was built, with its model and options except those given here.",
)
@click.option(
    "-o",
    "--output",
    type=OutputPath(),
    help="New folder of the bundle, or NAME.edgesd for one file. "
    "[default: bundles/MODEL-TARGET-PRECISION]",
)
@click.option(
    "--on",
    "host",
    metavar="USER@BOARD[:PORT]",
    help="For Jetsons: build the TensorRT plans on that board, over SSH, and include them in the "
    "bundle.",
)
@json_option
def build_command(
    model: str | None,
    given: Given,
    folders: LocalFolders,
    vae: str | None,
    like: Path | None,
    output: Path | None,
    host: str | None,
    as_json: bool,
) -> None:
    """Turn MODEL into a bundle for a board.

    MODEL is `demo` (the embedded pipeline), the folder of a diffusers pipeline or of the ONNX
    graphs that optimum exported of one, a single .safetensors file, or a hub id such as OWNER/NAME
    or OWNER/NAME/FILE.safetensors. Each network is compared with its source before the bundle is
    written. Images of a quantized bundle are compared, too; `edgesd report` shows them.

    A bundle holds the options that it was built with: `edgesd build --like BUNDLE` builds it again,
    and says whether graphs and weights are the same. Give MODEL if it was a folder or a file.
    """
    from edgesd.recipes import build, default_output
    from edgesd.recipes.like import Like

    reporter = Reporter(quiet=as_json)
    other = None if like is None else Like.of(like)
    options = given.over(other.record.options if other else None)
    if model is None:
        if other is None:
            raise click.UsageError("Missing argument 'MODEL'.")
        model = other.model()
    if other is not None:
        other.check_embeddings(folders.embeddings)
        other.check_loras(folders.loras)
        folders = dataclasses.replace(
            folders,
            controlnets=other.sides("controlnet", folders.controlnets),
            adapters=other.sides("adapter", folders.adapters),
        )
    if vae is None and other is not None:
        vae = other.vae()
    built = build(
        model,
        options,
        output or default_output(model, options.target, options.precision),
        folders,
        progress=reporter,
        warn=reporter.warn,
        finish=None if host is None else _plans_from(host, options.target, reporter),
        like=other,
        vae=vae,
    )
    differing = None if other is None else other.differing_files(built.bundle.manifest)
    if as_json:
        _print_json(built, differing)
    else:
        _show(built)
        if differing is not None:
            say(_compared(differing, like))
            if other is not None and (line := other.judged_otherwise(built.bundle.manifest)):
                say(line)
    if built.unfinished is not None:
        raise type(built.unfinished)(
            f"{built.unfinished} ({built.path} is whole, without plans: edgesd finalize "
            f"{built.path} --on {host} -o NEW adds them)"
        )


def _plans_from(host: str, target: str, reporter: Reporter) -> Callable[[Path], object]:
    """The function that adds the plans which the board `host` builds. Raises before long work."""
    from edgesd.device.targets import get_target
    from edgesd.remote.on_board import add_plans, check_board
    from edgesd.runtime.backends import get_backend

    if not get_backend(get_target(target).backends[0]).needs_plans:
        raise click.UsageError(f"--on builds plans, and {target} needs none")
    place = check_board(host, target).environment
    reporter.line(f"{host} builds plans for {place}")
    return partial(add_plans, host, progress=reporter)


def _print_json(built: Built, differing: list[str] | None) -> None:
    manifest = built.bundle.manifest
    print_json(
        {
            "bundle": printable(built.path),
            "target": manifest.target,
            "backend": manifest.backend,
            "precision": manifest.precision,
            "bytes": {name: built.bundle.weight_bytes(name) for name in manifest.engines},
            "note": built.note,
            "parity": {name: engine.parity for name, engine in manifest.engines.items()},
            "quality": manifest.quality,
            "differing": differing,
        }
    )


def _show(built: Built) -> None:
    from edgesd.evaluate.quality import gate_words

    manifest = built.bundle.manifest
    for name, engine in manifest.engines.items():
        say(
            f"{name:13} {built.bundle.weight_bytes(name) / 1e6:9.1f} MB   differs from its source "
            f"by {engine.parity.rel_rms:.1e} RMS (allowed {engine.parity.tolerance:.0e})"
        )
    if manifest.quality:
        q = manifest.quality
        say(
            f"{len(q.images)} images against the source's, {q.num_inference_steps} steps: "
            f"PSNR {q.psnr_mean:.1f} dB (least {q.psnr_min:.1f}), SSIM {q.ssim_mean:.3f}, "
            f"{q.metric} {q.distance_mean:.4f}"
        )
        for gate in q.judged_by:
            say(f"judged by {gate_words(q, gate)}")
    if manifest.recipe and manifest.recipe.simulated:
        say("note: simulated: no engine computes in this format; the images are right")
    if built.note:
        say(f"note: {built.note}")
    say(f"bundle for {manifest.target}: {built.path}")


def _compared(differing: list[str], like: Path | None) -> str:
    if not differing:
        return f"graphs and weights are those of {like}, byte for byte"
    more = f" and {len(differing) - 5} more" if len(differing) > 5 else ""
    return f"graphs or weights differ from those of {like}: {', '.join(differing[:5])}{more}"


def _prompts(path: Path | None) -> tuple[str, ...] | None:
    from edgesd.runtime.images import read_prompts

    return None if path is None else tuple(read_prompts(path))
