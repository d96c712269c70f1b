"""edgesd eval: prompter"""

from __future__ import annotations

from pathlib import Path

import click

from edgesd.cli.common import Reporter, json_option, lpips_option, print_json


@click.group("eval", short_help="Measure what a part of a bundle is good for.")
def eval_group() -> None:
    """Measure what a part of a bundle is good for."""


@eval_group.command("prompter")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--pairs",
    type=click.Path(path_type=Path, dir_okay=False),
    required=True,
    help="Those it was trained on: the held-out ones are judged.",
)
@click.option(
    "-n",
    "--count",
    type=click.IntRange(2),
    default=200,
    show_default=True,
    help="Wishes, spread over the held-out pairs.",
)
@lpips_option
@json_option
def prompter_command(
    bundle: Path, pairs: Path, count: int, lpips: Path | None, as_json: bool
) -> None:
    """Does BUNDLE's prompter help? Draws held-out wishes as they are, and the prompts made of them.

    Each picture is held against that of the prompt which its pair has, drawn from another seed by
    the same bundle: an offline judge, which knows no beauty.
    """
    from edgesd.evaluate.perceptual import open_perceptual
    from edgesd.evaluate.prompter import judge
    from edgesd.export.prompter.pairs import read_pairs
    from edgesd.runtime.bundle import open_bundle

    found = read_pairs(pairs)
    chosen = [(pair.wish, found.form.format(pair.prompt)) for pair in found.some_held(count)]
    reporter = Reporter(quiet=as_json)
    with reporter.bar():
        judged = judge(open_bundle(bundle), chosen, open_perceptual(lpips), reporter.update)
    if as_json:
        print_json(judged)
        return
    click.echo(f"{len(judged.wishes)} held-out wishes; means with 95 % intervals; {judged.metric}")
    for name, wish, prompt in (
        ("distance to the wanted picture", judged.distance_wish, judged.distance_prompt),
        ("nearest to the wanted one of all", judged.nearest_wish, judged.nearest_prompt),
    ):
        click.echo(
            f"{name:33} wish {wish.mean:.3f} ({wish.low:.3f} to {wish.high:.3f})   prompt "
            f"{prompt.mean:.3f} ({prompt.low:.3f} to {prompt.high:.3f})"
        )
    gain, exact = judged.gain, judged.exact
    click.echo(
        f"gain {gain.mean:.3f} ({gain.low:.3f} to {gain.high:.3f}); the wanted prompt itself: "
        f"{exact.mean:.2f}; {judged.words:.1f} words a prompt, {judged.seconds:.2f} s each"
    )
