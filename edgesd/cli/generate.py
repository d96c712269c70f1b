"""edgesd generate"""

from __future__ import annotations

import dataclasses
import secrets
import statistics
from contextlib import nullcontext
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, BinaryIO

import click

from edgesd.cli.common import (
    STDOUT,
    OutputPath,
    Reporter,
    Size,
    binary_stdout,
    json_option,
    memory_options,
    plans_of,
    print_json,
    printable,
    scheduler_option,
)
from edgesd.errors import BundleError, EdgesdError

if TYPE_CHECKING:
    from edgesd.runtime.bundle import Bundle
    from edgesd.runtime.denoise import Step
    from edgesd.runtime.flow import GuidanceMode
    from edgesd.runtime.images import SavedImage
    from edgesd.runtime.memory import MemoryMode
    from edgesd.runtime.pipeline import Pipeline
    from edgesd.runtime.requests import Request


@click.command("generate", short_help="Generate images with BUNDLE.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("-p", "--prompt", "prompts", multiple=True, help="What to generate; may be repeated.")
@click.option(
    "--prompts",
    "prompt_file",
    type=click.File("rb"),
    help="File of prompts, one per line; - reads standard input.",
)
@click.option(
    "-n",
    "--count",
    type=click.IntRange(1, 100_000),
    default=1,
    show_default=True,
    help="Images per prompt; their seeds count up.",
)
@click.option(
    "--seed",
    type=click.IntRange(0, 2**64 - 1),
    help="Seed of the first image. [default: a random one, which is printed]",
)
@click.option("--steps", type=int, help="Denoising steps. [default: the bundle's]")
@click.option(
    "--guidance",
    type=float,
    help="Classifier-free guidance scale; 1 is none. [default: the bundle's]",
)
@click.option("--negative", help="What not to generate.")
@click.option("--size", type=Size(), help="Image size in pixels. [default: the bundle's]")
@scheduler_option("Sampler")
@click.option(
    "--batch",
    type=click.IntRange(1, 1024),
    default=1,
    show_default=True,
    help="Images generated at a time.",
)
@click.option(
    "-o",
    "--output",
    type=OutputPath(stdout=True),
    default=Path("images"),
    show_default=True,
    help="A .png, whose older file is replaced; a folder, whose images are numbered on; or - for "
    "standard output.",
)
@click.option(
    "--preview",
    type=click.IntRange(0),
    default=0,
    metavar="K",
    help="Write NAME.preview.png every K steps, until the image is there. [default: never]",
)
@memory_options
@click.option(
    "--guidance-mode",
    type=click.Choice(["batched", "sequential"]),
    help="Both halves of guidance in one run, or one by one in less memory. [default: by memory]",
)
@click.option(
    "--threads",
    type=click.IntRange(0, 256),
    default=0,
    show_default=True,
    help="CPU threads; 0 takes all cores.",
)
@click.option(
    "--no-fallback",
    is_flag=True,
    help="Fail where TensorRT can't run the bundle, instead of generating on the CPU.",
)
@click.option(
    "--enhance",
    is_flag=True,
    help="Let the bundle's prompter turn each short prompt into a full one first.",
)
@click.option(
    "--show-prompt", is_flag=True, help="With --enhance: print the prompts that it makes."
)
@click.option("--any-machine", is_flag=True, help="Run a bundle that was built for another board.")
@json_option
def generate_command(
    bundle: Path,
    prompts: tuple[str, ...],
    prompt_file: BinaryIO | None,
    count: int,
    seed: int | None,
    steps: int | None,
    guidance: float | None,
    negative: str | None,
    size: tuple[int, int] | None,
    scheduler: str | None,
    batch: int,
    output: Path,
    preview: int,
    memory: MemoryMode | None,
    max_memory: int | None,
    guidance_mode: GuidanceMode | None,
    threads: int,
    no_fallback: bool,
    enhance: bool,
    show_prompt: bool,
    any_machine: bool,
    as_json: bool,
) -> None:
    """Generate images with BUNDLE (a folder, or a .edgesd file).

    No image of an earlier run is replaced, unless -o names its file. One that can't be written
    when it is generated is kept in the cache or the temporary folder, and the error says where.
    """
    from edgesd.device.detect import check_machine, detect_machine
    from edgesd.runtime.bundle import open_bundle
    from edgesd.runtime.images import check_output, expand_requests, read_prompts
    from edgesd.runtime.pipeline import Pipeline
    from edgesd.runtime.requests import Request
    from edgesd.runtime.settings import Settings
    from edgesd.runtime.signature import check_trusted

    texts = list(prompts)
    if prompt_file:
        texts += read_prompts(prompt_file)
    if not texts:
        raise click.UsageError("no prompt: give -p PROMPT, or --prompts FILE")
    opened = open_bundle(bundle)
    check_trusted(opened)
    if not any_machine:
        manifest = opened.manifest
        check_machine(manifest.target, manifest.arch, detect_machine())
    reporter = Reporter(quiet=as_json)
    if show_prompt and not enhance:
        raise click.UsageError("--show-prompt goes with --enhance")
    if output == STDOUT and (as_json or preview):
        raise click.UsageError("-o - writes the image alone: leave --json and --preview out")
    with binary_stdout() if output == STDOUT else nullcontext(output) as out:
        check_output(out, len(texts) * count)
        if enhance:
            texts = _enhanced(opened, texts, threads, show_prompt, reporter)
        width, height = size or (None, None)
        template = Request(
            prompt="",
            seed=secrets.randbits(32) if seed is None else seed,
            negative_prompt=negative,
            num_inference_steps=steps,
            guidance_scale=guidance,
            height=height,
            width=width,
            scheduler=scheduler,
        )
        plans = plans_of(opened, reporter)
        settings = Settings(
            threads, memory, guidance_mode, plans, not no_fallback, max_memory=max_memory
        )
        with Pipeline(opened, settings) as pipeline:
            generate(
                pipeline,
                expand_requests(template, texts, count),
                out,
                batch=batch,
                preview_every=preview,
                as_json=as_json,
                reporter=reporter,
            )


def _enhanced(
    bundle: Bundle, user_prompts: list[str], threads: int, show: bool, reporter: Reporter
) -> list[str]:
    """A prompt for each short prompt; warns when one is used unchanged."""
    from edgesd.runtime.prompter import enhance, prompter_of
    from edgesd.runtime.tokenizer import tokenizer_of

    if bundle.manifest.prompter is None:
        raise BundleError(
            f"{bundle.path} includes no prompter: build it with --prompter, or leave --enhance out"
        )
    try:
        prompter = prompter_of(bundle)
    except (EdgesdError, OSError) as exc:
        reporter.warn(f"the prompter can't be used ({exc}): the short prompt is used unchanged")
        return user_prompts
    found = enhance(prompter, user_prompts, tokenizer_of(bundle), threads)
    for problem in dict.fromkeys(result.problem for result in found if result.problem):
        reporter.warn(f"the prompter failed ({problem}): the short prompt is used unchanged")
    if show:
        for result in found:
            reporter.line(f"{result.user_prompt!r} -> {result.prompt!r}")
    return [result.prompt for result in found]


def generate(
    pipeline: Pipeline,
    requests: list[Request],
    output: Path | BinaryIO,
    batch: int = 1,
    preview_every: int = 0,
    as_json: bool = False,
    reporter: Reporter | None = None,
) -> list[SavedImage]:
    """Make and write `requests`, showing each step and, at the end, the files and the times."""
    from edgesd.runtime.images import make_images

    reporter = reporter or Reporter(quiet=as_json)
    warned: set[str] = set()

    def warn_of_fallbacks() -> None:
        for reason in pipeline.fallbacks.values():
            if reason not in warned:
                warned.add(reason)
                reporter.warn(reason)

    def on_step(first: int, step: Step) -> None:
        warn_of_fallbacks()
        for prompt, cut in pipeline.truncations.items():
            if prompt not in warned:
                warned.add(prompt)
                reporter.warn(
                    f"the text encoder takes {cut.kept_tokens} tokens; "
                    f"{cut.cut_tokens} were cut: {shorten(cut.text, 200)}"
                )
        last = min(first + batch, len(requests))
        name = f"image {last}" if last == first + 1 else f"images {first + 1}-{last}"
        reporter.update(
            f"{name} of {len(requests)}", step.index + 1, step.count, f"{step.seconds:.3f} s/step"
        )

    def on_image(image: SavedImage) -> None:
        older = "; it replaces an older file" if image.replaced else ""
        name = image.path or "standard output"
        reporter.line(f"{name}  (seed {image.request.seed}{older})")

    with reporter.bar():
        made = make_images(
            pipeline,
            requests,
            output,
            batch,
            preview_every,
            on_step,
            on_image,
            reporter.warn,
        )
    warn_of_fallbacks()
    timings = pipeline.timings
    if as_json:
        print_json(
            {
                "images": [
                    {"path": printable(image.path), **dataclasses.asdict(image.request)}
                    for image in made
                    if image.path is not None
                ],
                "load_seconds": timings.load,
                "run_seconds": timings.run,
                "step_seconds": timings.steps,
                "total_seconds": timings.total,
                "peak_memory_bytes": timings.peak_memory_bytes,
                "memory": pipeline.memory,
                "fallbacks": pipeline.fallbacks,
                "truncated": {prompt: cut.text for prompt, cut in pipeline.truncations.items()},
            }
        )
        return made
    reporter.line(
        f"{len(made)} image{'s' * (len(made) != 1)} in {timings.total:.1f} s, "
        f"{statistics.median(timings.steps):.3f} s per step, "
        f"peak memory {timings.peak_memory_bytes / 1e6:.0f} MB"
    )
    return made
