"""edgesd demo"""

from __future__ import annotations

from pathlib import Path

import click

from edgesd.cli.common import OutputPath, Reporter, plans_of, say
from edgesd.spec.build import DEMO, EMBEDDED

PROMPTS = (
    "a red apple",
    "a blue heart",
    "a grinning cat",
    "a rocket",
    "a pizza",
    "a green dinosaur",
    "a penguin",
    "a yellow balloon",
)


@click.command("demo", short_help="Build an embedded pipeline and generate with it.")
@click.option(
    "--model",
    type=click.Choice(EMBEDDED),
    help="Which of them: Stable Diffusion's form, XL's, a latent consistency model of four steps, "
    f"or FLUX.1's, schnell or dev.  [default: {EMBEDDED[0]}]",
)
@click.option(
    "--task",
    type=click.Choice(("image", "inpaint", "sketch")),
    help="Begin with a picture that comes with the models: change all of it, paint a part of it "
    "anew, or follow it as a sketch. The task says which model.",
)
@click.option(
    "-o",
    "--output",
    type=OutputPath(file_okay=False),
    default=Path("out/demo"),
    show_default=True,
    help="Folder for the bundle and the images; those of an earlier run stay.",
)
@click.option("--seed", type=click.IntRange(0, 2**64 - 1), default=0, show_default=True)
def demo_command(model: str | None, task: str | None, output: Path, seed: int) -> None:
    """Build an embedded pipeline for this computer, generate images with it, and put them on a
    sheet."""
    from edgesd.cli.generate import generate, summary
    from edgesd.errors import BundleError
    from edgesd.recipes import BuildOptions, LocalFolders, build, demo_model, demo_target
    from edgesd.recipes.demo import TASK_DEMOS, Demo
    from edgesd.runtime.bundle import open_bundle
    from edgesd.runtime.images import check_output, contact_sheet, expand_requests
    from edgesd.runtime.pipeline import Pipeline
    from edgesd.runtime.settings import Settings

    if task and model:
        raise click.UsageError(f"--task {task} says which model: leave --model out")
    demo = TASK_DEMOS[task] if task else Demo(model or EMBEDDED[0], PROMPTS)
    reporter = Reporter()
    target = demo_target()
    bundle = output / "-".join(filter(None, ("bundle", target, task, demo.sha256()[:8])))
    requests = expand_requests(demo.request(seed), demo.prompts, 1)
    check_output(output / "images", len(requests))
    built = not bundle.exists()
    if not built:
        try:
            opened = open_bundle(bundle)
        except BundleError as exc:
            raise BundleError(f"{exc}; remove {bundle}, and run the demo again") from exc
        reporter.line(f"using the bundle {bundle}")
    else:
        reporter.line(f"building the embedded pipeline {demo.model} for {target}")
        opened = build(
            DEMO if demo.model == EMBEDDED[0] else str(demo_model(demo.model)),
            BuildOptions(target, tasks=demo.tasks),
            bundle,
            LocalFolders(controlnets=demo.controlnets),
            progress=reporter,
        ).bundle
    settings = Settings(plan_of=plans_of(opened, reporter), made_here=built)
    with Pipeline(opened, settings) as pipeline:
        made = generate(pipeline, requests, output / "images", reporter)
        reporter.line(summary(pipeline, made))
    paths = [image.path for image in made if image.path]
    sheet = contact_sheet([*demo.files.values(), *paths], output / "images.png", columns=4)
    say(f"the images: {output / 'images'}/*.png, all on one sheet: {sheet}")
    given = "".join(f" --{option} {file}" for option, file in demo.files.items())
    say(f'next: edgesd generate {bundle} -p "a purple star"{given} -o star.png')
