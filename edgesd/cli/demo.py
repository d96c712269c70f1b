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
    default=EMBEDDED[0],
    show_default=True,
    help="Which of them: Stable Diffusion's form, XL's, or a latent consistency model of four "
    "steps.",
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
def demo_command(model: str, output: Path, seed: int) -> None:
    """Build an embedded pipeline for this computer and generate eight images with it."""
    from edgesd.cli.generate import generate, summary
    from edgesd.errors import BundleError
    from edgesd.recipes import BuildOptions, build, demo_model, demo_sha256, demo_target
    from edgesd.runtime.bundle import open_bundle
    from edgesd.runtime.images import check_output, contact_sheet, expand_requests
    from edgesd.runtime.pipeline import Pipeline
    from edgesd.runtime.requests import Request
    from edgesd.runtime.settings import Settings

    reporter = Reporter()
    target = demo_target()
    bundle = output / f"bundle-{target}-{demo_sha256(model)[:8]}"
    check_output(output / "images", len(PROMPTS))
    built = not bundle.exists()
    if not built:
        try:
            opened = open_bundle(bundle)
        except BundleError as exc:
            raise BundleError(f"{exc}; remove {bundle}, and run the demo again") from exc
        reporter.line(f"using the bundle {bundle}")
    else:
        reporter.line(f"building the embedded pipeline {model} for {target}")
        opened = build(
            DEMO if model == EMBEDDED[0] else str(demo_model(model)),
            BuildOptions(target),
            bundle,
            progress=reporter,
        ).bundle
    requests = expand_requests(Request("", seed), PROMPTS, 1)
    settings = Settings(plan_of=plans_of(opened, reporter), made_here=built)
    with Pipeline(opened, settings) as pipeline:
        made = generate(pipeline, requests, output / "images", reporter)
        reporter.line(summary(pipeline, made))
    paths = [image.path for image in made if image.path]
    sheet = contact_sheet(paths, output / "images.png", columns=4)
    say(f"the images: {output / 'images'}/*.png, all on one sheet: {sheet}")
    say(f'next: edgesd generate {bundle} -p "a purple star" -o star.png')
