"""edgesd generate"""

from __future__ import annotations

import dataclasses
import secrets
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any, BinaryIO

import click

from edgesd.cli.common import (
    STDOUT,
    OutputPath,
    Reporter,
    binary_stdout,
    plans_of,
    print_json,
    printable,
)
from edgesd.cli.options import (
    ControlOptions,
    FineOptions,
    GenerationOptions,
    PictureOptions,
    PromptOptions,
    RefinerOptions,
    RunOptions,
    ScheduleOptions,
    any_machine_option,
    control_options,
    fine_options,
    generation_options,
    json_option,
    picture_options,
    prompt_options,
    refiner_options,
    run_options,
    schedule_options,
)
from edgesd.errors import BundleError, EdgesdError

if TYPE_CHECKING:
    from edgesd.runtime.bundle import Bundle
    from edgesd.runtime.denoise import Step
    from edgesd.runtime.flow import GuidanceMode
    from edgesd.runtime.images import SavedImage
    from edgesd.runtime.lora import Used
    from edgesd.runtime.pipeline import Pipeline
    from edgesd.runtime.recorded import Recorded
    from edgesd.runtime.refined import Refined
    from edgesd.runtime.requests import Request
    from edgesd.runtime.settings import Settings


_MOST_REMARKS = 5
"""On how prompts are read, before images are generated."""


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
@click.option(
    "--like",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    metavar="PNG",
    help="Generate the image in this file again, by what edgesd or AUTOMATIC1111's web UI wrote "
    "into it; other options change that.",
)
@generation_options("bundle")
@picture_options
@prompt_options
@schedule_options
@fine_options
@control_options
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
    help="A .png file, which is replaced; a folder, where numbering continues; or - for standard "
    "output.",
)
@click.option(
    "--preview",
    type=click.IntRange(0),
    default=0,
    metavar="K",
    help="Write NAME.preview.png every K steps, until the image is done. [default: never]",
)
@refiner_options
@click.option(
    "--lora",
    "loras",
    metavar="FILE[:SCALE]",
    multiple=True,
    help="Use a LoRA that `edgesd lora convert` made for the bundle: a file, or the name of one "
    "that was deployed to this machine; may be repeated. With --refiner it is of BUNDLE, the base.",
)
@run_options
@click.option(
    "--guidance-mode",
    type=click.Choice(["batched", "sequential"]),
    help="Run the two passes of guidance together, or one by one in less memory. [default: by "
    "memory]",
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
@any_machine_option
@json_option
def generate_command(
    bundle: Path,
    prompts: tuple[str, ...],
    prompt_file: BinaryIO | None,
    count: int,
    seed: int | None,
    like: Path | None,
    generation: GenerationOptions,
    pictures: PictureOptions,
    prompting: PromptOptions,
    schedule: ScheduleOptions,
    fine: FineOptions,
    control: ControlOptions,
    batch: int,
    output: Path,
    preview: int,
    refining: RefinerOptions,
    loras: tuple[str, ...],
    run: RunOptions,
    guidance_mode: GuidanceMode | None,
    no_fallback: bool,
    enhance: bool,
    show_prompt: bool,
    any_machine: bool,
    as_json: bool,
) -> None:
    """Generate images with BUNDLE (a folder, or a .edgesd file).

    No image of an earlier run is replaced, unless -o names its file. An image that can't be written
    to its place is kept in the cache or the temporary folder, and the error says where.
    """
    from edgesd.device.opening import open_for_generate
    from edgesd.device.slots import lora_folder
    from edgesd.runtime.images import check_output, expand_requests, read_prompts
    from edgesd.runtime.lora import open_lora
    from edgesd.runtime.recorded import recorded
    from edgesd.runtime.refined import check_roles

    texts = [*prompts, *(read_prompts(prompt_file) if prompt_file else ())]
    known = None if like is None else recorded(like)
    if known and not texts and not enhance:
        texts = [known.values["prompt"]]
    if not texts:
        raise click.UsageError("no prompt: give -p PROMPT, or --prompts FILE")
    if show_prompt and not enhance:
        raise click.UsageError("--show-prompt goes with --enhance")
    if output == STDOUT and (as_json or preview):
        raise click.UsageError("-o - writes the image alone: leave --json and --preview out")
    opened = open_for_generate(bundle, any_machine)
    second = open_for_generate(refining.refiner, any_machine) if refining.refiner else None
    check_roles(opened, second, pictures.image is not None)
    used = [open_lora(given, lora_folder()) for given in loras]
    reporter = Reporter(quiet=as_json)

    def settings(of: Bundle) -> Settings:
        plans, fallback = plans_of(of, reporter), not no_fallback
        return run.settings(guidance_mode=guidance_mode, plan_of=plans, fallback=fallback)

    with binary_stdout() if output == STDOUT else nullcontext(output) as out:
        check_output(out, len(texts) * count)
        if enhance:
            syntax = prompting.prompt_syntax or (known and known.values.get("syntax"))
            weighed = syntax not in (None, "plain")
            texts = _enhanced(opened, texts, run.threads, show_prompt, reporter, weighed)
        first = pictures.applied(generation.request("", _seed(seed, known)))
        first = refining.applied(schedule.applied(fine.applied(prompting.applied(first))))
        first = control.applied(first, known)
        if like and known:
            first = known.request(first)
            _tell(like, known, first, opened, second, used, reporter)
        for shown in first.controls:
            for note in shown.picture.notes:
                reporter.warn(f"{shown.picture.name}: {note}")
        requests = expand_requests(first, texts, count)
        with _pipeline(opened, second, settings, used) as pipeline:
            made = generate(pipeline, requests, out, reporter, batch, preview)
            if as_json:
                print_json(_outcome(pipeline, made))
            reporter.line(summary(pipeline, made))


@contextmanager
def _pipeline(
    bundle: Bundle,
    refiner: Bundle | None,
    settings: Callable[[Bundle], Settings],
    loras: Sequence[Used],
) -> Iterator[Pipeline | Refined]:
    """The bundle's pipeline with LoRAs, and with a refiner's if there is one."""
    from edgesd.runtime.pipeline import Pipeline
    from edgesd.runtime.refined import Refined

    with Pipeline(bundle, settings(bundle)) as base:
        base.use_loras(loras)
        if refiner is None:
            yield base
            return
        with Pipeline(refiner, settings(refiner)) as second:
            yield Refined(base, second)


def _seed(given: int | None, known: Recorded | None) -> int:
    """The seed that was given, or is known of an image; else a random one."""
    if given is None and known is not None:
        given = known.values.get("seed")
    return secrets.randbits(32) if given is None else given


def _tell(
    like: Path,
    known: Recorded,
    request: Request,
    bundle: Bundle,
    refiner: Bundle | None,
    loras: Sequence[Used],
    reporter: Reporter,
) -> None:
    """Warn of what makes another image than that in the file `like`. Raises UsageError where it
    takes a refiner, or images that it was made from, and there is none."""
    from edgesd.runtime.recorded import LORAS

    if missing := [name for name in known.pictures if getattr(request, name) is None]:
        files = " and ".join(f"--{name} FILE" for name in missing)
        said = ", ".join(f"{name}: sha256 {known.pictures[name]}" for name in missing)
        raise click.UsageError(f"{like} was made from other images: give {files} ({said})")
    for name, sha256 in known.pictures.items():
        if getattr(request, name).sha256 != sha256:
            reporter.warn(f"--{name} isn't the file that {like} was made from (sha256 {sha256})")
    if refiner is None and "denoising_end" in known.values:
        raise click.UsageError(
            f"{like} was finished by a refiner ({known.made_by.get('refiner_model', '')[:60]}): "
            "give --refiner BUNDLE"
        )
    other = refiner.manifest if refiner else None
    differing = known.differing(bundle.manifest, other, loras)
    if LORAS in differing:
        differing.remove(LORAS)
        said = known.made_by[LORAS][:160]
        reporter.warn(f"{like} was made with other LoRAs ({said}): --lora FILE:SCALE gives them")
    if differing:
        said = ", ".join(f"{name} {known.made_by[name][:60]}" for name in differing)
        reporter.warn(f"{like} was made by another bundle ({said}): this one's image differs")
    for remark in known.remarks:
        reporter.warn(f"{like}: {remark}")
    then = {one.name: one.sha256 for one in known.controls}
    for control in request.controls:
        if control.picture.sha256 != then.get(control.name, control.picture.sha256):
            reporter.warn(
                f"{control.picture.name} isn't the picture that {like} was made with: this image "
                "differs"
            )


def _enhanced(
    bundle: Bundle,
    user_prompts: list[str],
    threads: int,
    show: bool,
    reporter: Reporter,
    weighed: bool,
) -> list[str]:
    """A prompt for each short prompt; warns when one is used unchanged. weighed: whether prompts
    are read with weights, which those that the prompter makes don't have."""
    from edgesd.runtime.prompter import enhance, prompter_of
    from edgesd.runtime.syntax import escaped
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
    return [
        escaped(result.prompt) if weighed and not result.problem else result.prompt
        for result in found
    ]


def generate(
    pipeline: Pipeline | Refined,
    requests: list[Request],
    output: Path | BinaryIO,
    reporter: Reporter,
    batch: int = 1,
    preview_every: int = 0,
) -> list[SavedImage]:
    """Make and write `requests`, showing each step, each file, and messages for the user."""
    from edgesd.runtime.images import make_images
    from edgesd.runtime.requests import unused

    spec, first = pipeline.bundle.manifest.pipeline, pipeline.complete(requests[0])
    notes = *_picture_notes(pipeline, requests[0]), *unused(spec, first)
    for remark in (*_remarks(requests), *notes):
        reporter.warn(remark)
    warned: set[str] = set()

    def warn(key: str, text: str) -> None:
        if key not in warned:
            warned.add(key)
            reporter.warn(text)

    def warn_of_fallbacks() -> None:
        for reason in pipeline.fallbacks.values():
            warn(reason, reason)

    def on_step(images: range, step: Step) -> None:
        warn_of_fallbacks()
        for prompt, cut in pipeline.truncations.items():
            words = f"{cut.cut_tokens} were cut: {shorten(cut.text, 200)}"
            warn(prompt, f"the text encoder takes {cut.kept_tokens} tokens; {words}")
        first, last = images.start + 1, images.stop
        name = f"image {last}" if first == last else f"images {first}-{last}"
        reporter.update(
            f"{name} of {len(requests)}", step.index + 1, step.count, f"{step.seconds:.3f} s/step"
        )

    def on_image(image: SavedImage) -> None:
        older = "; it replaces an older file" if image.replaced else ""
        name = image.path or "standard output"
        reporter.line(f"{name}  (seed {image.request.seed}{older})")

    with reporter.bar():
        made = make_images(
            pipeline, requests, output, batch, preview_every, on_step, on_image, reporter.warn
        )
    warn_of_fallbacks()
    return made


def _remarks(requests: Sequence[Request]) -> list[str]:
    """What the user should know of how prompts are read: of plain ones, one example."""
    from edgesd.runtime.syntax import remarks

    found: dict[str, None] = {}
    for request in requests:
        texts = (
            request.prompt,
            request.negative_prompt,
            request.prompt_2,
            request.negative_prompt_2,
        )
        for text in filter(None, texts):
            found |= dict.fromkeys(remarks(text, request.syntax or "plain"))
            if found and request.syntax in (None, "plain"):
                return list(found)
    return list(found)[:_MOST_REMARKS]


def _picture_notes(pipeline: Pipeline | Refined, request: Request) -> Iterator[str]:
    """What the user should know of how images are read."""
    from edgesd.runtime.pictures import shrunk, stretched

    complete = pipeline.complete(request)
    for picture in (complete.image, complete.mask):
        yield from picture.notes if picture else ()
    if complete.image and complete.mask_padding is None:
        drawn = complete.width, complete.height
        unasked = request.width is request.height is None
        free = unasked and pipeline.bundle.manifest.pipeline.shape.dynamic
        told = stretched(complete.image, *drawn) or (free and shrunk(complete.image, *drawn))
        yield from (told,) if told else ()
    painted = complete.painting()
    yield from painted.notes if painted else ()


def summary(pipeline: Pipeline | Refined, made: Sequence[SavedImage]) -> str:
    """How many images were made, how fast, and in how much memory."""
    timings = pipeline.timings
    return (
        f"{len(made)} image{'s' * (len(made) != 1)} in {timings.total:.1f} s, "
        f"{statistics.median(timings.steps):.3f} s per step, "
        f"peak memory {timings.peak_memory_bytes / 1e6:.0f} MB"
    )


def _said(value: Any) -> Any:
    """What a request says, for JSON: of a picture its file's name and hash."""
    from edgesd.runtime.pictures import Picture

    if isinstance(value, Picture):
        return {"name": value.name, "sha256": value.sha256}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {each.name: _said(getattr(value, each.name)) for each in dataclasses.fields(value)}
    return [_said(each) for each in value] if isinstance(value, tuple) else value


def _outcome(pipeline: Pipeline | Refined, made: Sequence[SavedImage]) -> dict[str, object]:
    """The summary, and more, for programs."""
    timings = pipeline.timings
    return {
        "images": [
            {"path": printable(image.path), **_said(image.request)}
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
