"""edgesd prompter: data, train, export, run"""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

import click

from edgesd.cli.common import Finite, OutputPath, Reporter, print_json, printable, say, say_error
from edgesd.cli.options import json_option, threads_option
from edgesd.export.prompter.options import (
    ADAPTER_STARTS,
    GRIDS,
    MERGED_TYPES,
    OPTIMIZERS,
    PAIR_FORMATS,
)

_FILE = click.Path(path_type=Path, dir_okay=False)


@click.group("prompter", short_help="Tune a small language model that improves short prompts.")
def prompter_group() -> None:
    """Tune a small language model that turns a short prompt into a full one, and run it.

    \b
    edgesd prompter data models/emoji/prompts/domain.json --format emoji -o pairs.jsonl
    edgesd prompter train pairs.jsonl --base SmolLM2-135M-Instruct.Q4_1.gguf -o run
    edgesd prompter export run --base ... --pairs pairs.jsonl --licence Apache-2.0 -o prompter
    edgesd prompter run prompter "sleepy whale"
    """


@prompter_group.command("data")
@click.argument("source", type=_FILE)
@click.option(
    "--format",
    "kind",
    type=click.Choice(PAIR_FORMATS),
    required=True,
    help="captions: one per line; templates: JSON with slots; coco, mjhq, sdci: those data sets' "
    "files; emoji: the embedded model's domain.json.",
)
@click.option(
    "--closed/--open",
    default=None,
    help="Whether the image model knows only these prompts; the prompter then always answers with "
    "one of them. [default: closed for emoji]",
)
@click.option("--domain", help="Name of the domain. [default: the format's]")
@click.option(
    "--held",
    type=Finite(0, 0.9, min_open=True),
    default=0.1,
    show_default=True,
    help="Fraction of the subjects that is held out of training.",
)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option(
    "-o",
    "--output",
    type=OutputPath(dir_okay=False),
    required=True,
    help="File of pairs to write (.jsonl); an older one is replaced.",
)
@json_option
def data_command(
    source: Path,
    kind: str,
    closed: bool | None,
    domain: str | None,
    held: float,
    seed: int,
    output: Path,
    as_json: bool,
) -> None:
    """Make pairs of a short prompt and a prompt from SOURCE, split by subject."""
    from edgesd.export.prompter.pairs import make_pairs, write_pairs
    from edgesd.export.prompter.sources import SOURCES
    from edgesd.files import check_file_place

    check_file_place(output, source)
    if closed is None:
        closed = kind == "emoji"
    made = make_pairs(domain or kind, SOURCES[kind](source, seed), held, seed, closed)
    write_pairs(output, made)
    subjects = len({pair.subject for pair in made.pairs})
    if as_json:
        print_json(
            {
                "pairs": printable(output),
                "training": len(made.training),
                "held": len(made.held),
                "subjects": subjects,
                "form": made.form,
            }
        )
        return
    say(
        f"{len(made.training)} pairs to train on, {len(made.held)} held back, {subjects} subjects; "
        f"what code adds: {made.form!r}"
    )
    say(output)


@prompter_group.command("train")
@click.argument("pairs", type=_FILE)
@click.option(
    "--base",
    type=click.Path(path_type=Path),
    required=True,
    help="The GGUF file that will be deployed (or the folder of a transformers model).",
)
@click.option("--steps", type=click.IntRange(1), default=300, show_default=True)
@click.option("--batch", type=click.IntRange(1), default=16, show_default=True)
@click.option("--rank", type=click.IntRange(1, 256), default=8, show_default=True)
@click.option("--alpha", type=click.IntRange(1), help="[default: twice the rank]")
@click.option(
    "--init",
    "start",
    type=click.Choice(ADAPTER_STARTS),
    default="default",
    show_default=True,
    help="How the adapter starts. loftq: the error of rounding to NF4 (peft, needs CUDA); "
    "loftq-gguf: the error of rounding to --grid; -control: random directions of the same norms.",
)
@click.option(
    "--grid",
    type=click.Choice(GRIDS),
    default="Q4_0",
    show_default=True,
    help="Type that loftq-gguf rounds the base to. The run then includes its own base.gguf.",
)
@click.option(
    "--iterations",
    type=click.IntRange(1, 100),
    default=5,
    show_default=True,
    help="LoftQ's iterations of rounding and decomposing.",
)
@click.option("--full", is_flag=True, help="Train all weights instead of an adapter.")
@click.option(
    "--optim",
    type=click.Choice(OPTIMIZERS),
    default="adamw",
    show_default=True,
    help="Optimizer for --full; galore and apollo keep less state than adamw.",
)
@click.option(
    "--learning-rate",
    type=Finite(0, 1, min_open=True),
    help="[default: 1e-3; for --full 1e-4 by adamw, 3e-4 by apollo]",
)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option(
    "-o",
    "--output",
    type=OutputPath(file_okay=False),
    required=True,
    help="Folder of the run, new or that of an earlier run; an interrupted run continues.",
)
@json_option
def train_command(
    pairs: Path,
    base: Path,
    steps: int,
    batch: int,
    rank: int,
    alpha: int | None,
    start: str,
    grid: str,
    iterations: int,
    full: bool,
    optim: str,
    learning_rate: float | None,
    seed: int,
    output: Path,
    as_json: bool,
) -> None:
    """Train a LoRA adapter on PAIRS, on the weights of the model that will be deployed."""
    from edgesd.export.prompter.pairs import read_pairs
    from edgesd.export.prompter.starts import OWN_BASE, AdapterSettings
    from edgesd.export.prompter.train import LEARNING_RATES, Training, train
    from edgesd.files import sha256_file

    if full and start != "default":
        raise click.UsageError("--init is an adapter's, and --full trains none")
    found = read_pairs(pairs)
    adapter = None
    if not full:
        adapter = AdapterSettings(rank, alpha or 2 * rank, start, grid, iterations, seed)
    rate = learning_rate or LEARNING_RATES[optim if full else "lora"]
    training = Training(adapter, optim, steps, batch, rate, seed=seed)
    reporter = Reporter(quiet=as_json)

    with reporter.bar():
        report = train(base, found, sha256_file(pairs), output, training, reporter)
    if as_json:
        print_json(report)
        return
    say(
        f"held-out loss {report.loss_before:.4f} -> {report.loss_after:.4f} nats per token, "
        f"{report.steps} steps in {report.seconds:.0f} s, {report.peak_bytes / 1e9:.2f} GB at most "
        f"({report.state_bytes / 1e6:.0f} MB of it the optimizer's state)"
    )
    for name, loss in report.starts.items():
        say(f"before training, begun as {name}: {loss:.4f}")
    if start.startswith("loftq"):
        say(f"export it with --base {output / OWN_BASE}: its adapter is for that")
    say(output)


@prompter_group.command("export")
@click.argument("run", type=click.Path(path_type=Path, file_okay=False))
@click.option("--base", type=_FILE, required=True, help="The GGUF file that it was trained on.")
@click.option(
    "--pairs",
    type=_FILE,
    required=True,
    help="The pairs it was trained on; the held-out ones are used here.",
)
@click.option("--licence", required=True, help="Name and licence of the base model.")
@click.option(
    "--merge",
    type=click.Choice(MERGED_TYPES),
    help="Write one merged model of that type, instead of the unchanged base and an adapter.",
)
@click.option("-o", "--output", type=OutputPath(), required=True, help="New folder.")
@json_option
def export_command(
    run: Path,
    base: Path,
    pairs: Path,
    licence: str,
    merge: str | None,
    output: Path,
    as_json: bool,
) -> None:
    """Export the training in the folder RUN for `edgesd build --prompter`.

    The held-out loss is measured in llama.cpp; the export fails when it is more than 3 % worse than
    after training.
    """
    from edgesd.export.prompter.export import export
    from edgesd.export.prompter.pairs import read_pairs

    reporter = Reporter(quiet=as_json)
    made = export(run, base, read_pairs(pairs), output, licence, merge, reporter)
    if as_json:
        print_json(made)
        return
    total = sum(made.types.values())
    types = ", ".join(f"{kind} {100 * n / total:.0f} %" for kind, n in made.types.items())
    say(
        f"held-out loss in llama.cpp {made.loss_llama:.4f} nats per token (in training "
        f"{made.loss_torch:.4f}); {made.bytes / 1e6:.0f} MB; weights of the model: {types}"
    )
    say(output)


@prompter_group.command("run")
@click.argument("prompter", type=click.Path(path_type=Path))
@click.argument("prompts", nargs=-1)
@click.option(
    "--prompts", "prompts_file", type=click.File("rb"), help="File of short prompts, one per line."
)
@click.option(
    "--seconds",
    type=Finite(0, min_open=True),
    default=20.0,
    show_default=True,
    help="Time limit of one short prompt.",
)
@threads_option
@json_option
def run_command(
    prompter: Path,
    prompts: tuple[str, ...],
    prompts_file: BinaryIO | None,
    seconds: float,
    threads: int,
    as_json: bool,
) -> None:
    """Turn short PROMPTS into full ones by PROMPTER: a bundle that includes one, or an exported
    folder."""
    from edgesd.runtime.bundle import open_bundle
    from edgesd.runtime.images import read_prompts
    from edgesd.runtime.prompter import SPEC, enhance, prompter_in, prompter_of
    from edgesd.runtime.tokenizer import tokenizer_of

    texts = [*prompts, *(read_prompts(prompts_file) if prompts_file else ())]
    if not texts:
        raise click.UsageError("no short prompt: give one, or --prompts FILE")
    tokenizer = None
    if (prompter / SPEC).is_file():
        found = prompter_in(prompter)
    else:
        bundle = open_bundle(prompter)
        found, tokenizer = prompter_of(bundle), tokenizer_of(bundle)
    done = enhance(found, texts, tokenizer, threads, seconds)
    if as_json:
        print_json({"prompts": [result._asdict() for result in done]})
        return
    for result in done:
        say(result.prompt)
        if result.problem:
            say_error(f"warning: {result.problem}: the short prompt is used unchanged")
