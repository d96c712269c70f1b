"""edgesd eval: prompter"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgesd.cli.common import Reporter, print_json, say
from edgesd.cli.options import json_option, lpips_option

if TYPE_CHECKING:
    from edgesd.evaluate.prompter import Agreed


@click.group("eval", short_help="Measure how much a part of a bundle helps.")
def eval_group() -> None:
    """Measure how much a part of a bundle helps."""


@eval_group.command("prompter")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--pairs",
    type=click.Path(path_type=Path, dir_okay=False),
    required=True,
    help="The pairs it was trained on; the held-out ones are used here.",
)
@click.option(
    "-n",
    "--count",
    type=click.IntRange(2),
    default=200,
    show_default=True,
    help="Short prompts, spread over the held-out pairs.",
)
@click.option(
    "--judge",
    "folder",
    type=click.Path(path_type=Path, file_okay=False),
    help="Judge of images and texts: a CLIP model's folder, or one with judge.json. [default: "
    "for emoji the small one in a checkout of edgesd]",
)
@lpips_option
@json_option
def prompter_command(
    bundle: Path,
    pairs: Path,
    count: int,
    folder: Path | None,
    lpips: Path | None,
    as_json: bool,
) -> None:
    """Measure whether BUNDLE's prompter helps: generate images of held-out short prompts, and of
    the prompts made from them.

    Each image is compared with the text of its pair's prompt, and with an image that the same
    bundle generates of that prompt from another seed. These scores do not measure aesthetics.
    """
    from edgesd.evaluate.agreement import open_agreement
    from edgesd.evaluate.perceptual import open_perceptual
    from edgesd.evaluate.prompter import judge
    from edgesd.export.prompter.pairs import read_pairs
    from edgesd.recipes import demo_judge
    from edgesd.runtime.bundle import open_bundle
    from edgesd.runtime.prompter import in_form

    found = read_pairs(pairs)
    chosen = [
        (pair.user_prompt, in_form(found.form, pair.prompt)) for pair in found.some_held(count)
    ]
    folder = folder or (demo_judge() if found.domain == "emoji" else None)
    agreement = open_agreement(folder) if folder else None
    reporter = Reporter(quiet=as_json)
    with reporter.bar():
        judged = judge(open_bundle(bundle), chosen, open_perceptual(lpips), agreement, reporter)
    if as_json:
        print_json(judged)
        return
    of = len(judged.user_prompts)
    say(f"{of} held-out short prompts; means with 95 % intervals; {judged.metric}")
    for name, short, prompt in (
        ("distance to the wanted image", judged.distance_user_prompt, judged.distance_prompt),
        ("nearest to the wanted one of all", judged.nearest_user_prompt, judged.nearest_prompt),
    ):
        say(
            f"{name:33} short prompt {short.mean:.3f} ({short.low:.3f} to {short.high:.3f})   "
            f"prompt {prompt.mean:.3f} ({prompt.low:.3f} to {prompt.high:.3f})"
        )
    gain, exact = judged.gain, judged.exact
    say(
        f"gain {gain.mean:.3f} ({gain.low:.3f} to {gain.high:.3f}); the wanted prompt itself: "
        f"{exact.mean:.2f}"
    )
    if judged.agreement:
        _print_agreement(judged.agreement)
    say(
        f"{judged.user_prompt_words:.1f} words a short prompt, {judged.words:.1f} a prompt; "
        f"{judged.seconds:.2f} s each, {judged.process_bytes / 1e6:.0f} MB"
    )


def _print_agreement(agreed: Agreed) -> None:
    say(f"agreement of image and text; {agreed.judge}")
    for name, short, prompt, wanted in (
        ("score", agreed.score_user_prompt, agreed.score_prompt, agreed.score_wanted),
        ("found", agreed.found_user_prompt, agreed.found_prompt, agreed.found_wanted),
    ):
        parts = (("short prompt", short), ("prompt", prompt), ("wanted prompt", wanted))
        say(
            f"{name:6}"
            + "   ".join(f"{what} {x.mean:.3f} ({x.low:.3f} to {x.high:.3f})" for what, x in parts)
        )
    gain = agreed.gain
    say(
        f"gain of the score {gain.mean:.2f} ({gain.low:.2f} to {gain.high:.2f}); other texts "
        f"score {agreed.chance:.2f}"
    )
