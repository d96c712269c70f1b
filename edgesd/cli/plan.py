"""edgesd plan"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgesd.cli.common import Bytes, print_json, say
from edgesd.cli.options import (
    GenerationOptions,
    config_option,
    generation_options,
    json_option,
    lora_slots_option,
    max_tokens_option,
    merged_lora_option,
    side_options,
    task_option,
    vae_option,
    variant_option,
)
from edgesd.export.quantize.methods import method_names
from edgesd.spec.build import DEFAULT_METHOD, Variant
from edgesd.spec.pipeline import ImageTask

if TYPE_CHECKING:
    from edgesd.recipes.estimate import Estimate


@click.command("plan", short_help="Predict size, memory and time of a bundle of MODEL.")
@click.argument("model")
@click.option("--target", required=True, help="Board to plan for; `edgesd targets` lists them.")
@click.option(
    "--precision",
    default="fp32",
    show_default=True,
    help="fp32, fp16, bf16, or a scheme: w8a8, w4a8-g64.",
)
@generation_options("model", without=["negative", "scheduler"])
@vae_option
@side_options[0]
@side_options[1]
@merged_lora_option
@lora_slots_option
@config_option
@variant_option
@max_tokens_option
@task_option
@click.option("--backend", help="tensorrt or onnxruntime. [default: the target's best]")
@click.option(
    "--method",
    type=click.Choice(method_names()),
    default=DEFAULT_METHOD,
    show_default=True,
    help="Quantization method.",
)
@click.option(
    "--max-memory", type=Bytes(), help="Memory limit for generating, instead of the target's RAM."
)
@click.option(
    "--rates",
    type=click.Path(path_type=Path, dir_okay=False),
    help="File of `edgesd profile` for the board. [default: the target's in the cache]",
)
@json_option
def plan_command(
    model: str,
    target: str,
    precision: str,
    generation: GenerationOptions,
    vae: str | None,
    controlnets: tuple[str, ...],
    adapters: tuple[str, ...],
    loras: tuple[str, ...],
    lora_slots: int | None,
    config: Path | None,
    variant: Variant | None,
    max_tokens: int | None,
    tasks: tuple[ImageTask, ...] | None,
    backend: str | None,
    method: str,
    max_memory: int | None,
    rates: Path | None,
    as_json: bool,
) -> None:
    """Predict size, memory and time of a bundle of MODEL on a board, before it is built.

    Prints the size on disk, the peak memory of each network and each --memory mode, the memory of
    the build and, if the board was profiled, the time of an image. MODEL as in `edgesd build`; its
    weights aren't read, needn't be there, and aren't downloaded.
    """
    from edgesd.export.pipeline import require_build_tools

    require_build_tools()
    from edgesd.device.targets import get_target
    from edgesd.recipes.estimate import PlanRequest
    from edgesd.recipes.options import sides_of
    from edgesd.recipes.planner import estimate_build
    from edgesd.runtime.rates import find_rates

    request = PlanRequest(
        precision=precision,
        size=generation.size,
        steps=generation.steps,
        guidance=generation.guidance,
        max_memory=max_memory,
        method=method,
        variant=variant,
        max_tokens=max_tokens,
        tasks=tasks or (),
        vae=vae,
        sides=sides_of(controlnets, adapters),
        loras=loras,
        lora_slots=lora_slots,
        config=config,
        rates=find_rates(get_target(target).name, rates),
    )
    estimate = estimate_build(model, target, request, backend)
    if as_json:
        print_json(estimate)
    else:
        _show(estimate)


def _show(estimate: Estimate) -> None:
    from edgesd.evaluate.quality import METRIC_NAMES

    guided = "without guidance" if estimate.guidance <= 1 else f"guidance {estimate.guidance:g}"
    if estimate.assumed:
        say(estimate.assumed)
    how = f"{estimate.backend}, own kernels" if estimate.kernels else estimate.backend
    say(
        f"{estimate.model} for {estimate.target} ({how}), "
        f"{estimate.precision}, {estimate.width}x{estimate.height}, {estimate.steps} steps, "
        f"{guided}"
    )
    modes = list(estimate.memory)
    timed = estimate.seconds is not None
    rows = [["", "MB on disk", "GMAC a run", *[f"{mode}: MB" for mode in modes]]]
    if timed:
        rows[0] += [f"{mode}: s" for mode in modes]
    for name, cost in estimate.components.items():
        row = [name, f"{cost.bytes / 1e6:.1f}", f"{sum(cost.macs.values()) / 1e9:.1f}"]
        row += [f"{cost.memory[mode] / 1e6:.0f}" if mode in cost.memory else "" for mode in modes]
        if timed:
            row += [f"{cost.seconds.get(mode) or 0:.2f}" if cost.runs else "" for mode in modes]
        rows.append(row)
    total = ["together", f"{estimate.bundle_bytes / 1e6:.1f}", ""]
    total += [f"{estimate.memory[mode] / 1e6:.0f}" for mode in modes]
    if estimate.seconds is not None:
        total += [f"{estimate.seconds[mode]:.2f}" for mode in modes]
    rows.append(total)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [text.rjust(width) for text, width in zip(row[1:], widths[1:], strict=True)]
        say("  ".join(cells).rstrip())
    usable = f"{estimate.usable_bytes / 1e6:.0f} MB"
    if estimate.mode is None:
        say(f"no --memory mode fits into {usable}")
    else:
        say(f"--memory {estimate.mode} is the fastest mode that fits into {usable}")
    if estimate.rates is None:
        say("time isn't known: edgesd profile --host USER@BOARD measures such a board")
    else:
        say(f"seconds are of one image, without loading, by rates of {estimate.rates}")
    if estimate.lora_slots is not None:
        say(
            f"memory and time are with LoRAs of rank {estimate.lora_slots} in all slots: "
            f"{estimate.lora_bytes / 1e6:.1f} MB of it are theirs"
        )
    say(f"building takes about {estimate.build_bytes / 1e9:.1f} GB of memory")
    if estimate.judged_by is not None:
        say(f"the build judges its images by {METRIC_NAMES[estimate.judged_by]}")
    for line in estimate.advice:
        say(f"instead: {line}")
