"""Groups of options: what they build, and that a board is asked for all that was given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import click
import pytest

from edgesd.cli import cli, generate, options, plan, profile, watch
from edgesd.cli.bench import _HERE
from edgesd.cli.bench import run_command as bench_run
from edgesd.cli.common import Bytes, Size
from edgesd.cli.options import (
    GenerationOptions,
    OptionGroup,
    PromptOptions,
    RunOptions,
    ScheduleOptions,
    generation_options,
    option_arguments,
    prompt_options,
    run_options,
    schedule_options,
)
from edgesd.runtime.schedulers import SIGMA_KINDS
from edgesd.runtime.syntax import SYNTAXES

EXAMPLES: dict[type[click.ParamType], Callable[[Any], str]] = {
    Size: lambda kind: "20x12",
    Bytes: lambda kind: "1.5GB",
    click.Choice: lambda kind: str(list(kind.choices)[-1]),
    click.IntRange: lambda kind: str((kind.min or 0) + 3),
    click.FloatRange: lambda kind: str((kind.min or 0) + 0.375),
}
"""Type of an option -> a value of it that no command has as its default."""


def example(option: click.Option) -> str:
    for kind, made in EXAMPLES.items():
        if isinstance(option.type, kind):
            return made(option.type)
    return "a 'quoted' text, --with=this"


def parsed(command: click.Command, arguments: list[str]) -> click.Context:
    return command.make_context(str(command.name), arguments)


def built(*groups: OptionGroup[Any]) -> Callable[..., dict[str, object]]:
    """What a command with `groups` is handed for arguments."""

    def run(*arguments: str) -> dict[str, object]:
        def body(**values: object) -> dict[str, object]:
            return values

        command: Any = body
        for group in groups:
            command = group(command)
        command = click.command("made")(command)
        found: dict[str, object] = command.main(list(arguments), "made", standalone_mode=False)
        return found

    return run


def test_a_group_hands_over_the_object_that_its_options_describe() -> None:
    run = built(run_options, generation_options("bundle"))
    assert run() == {"run": RunOptions(), "generation": GenerationOptions()}
    found = run(
        *("--steps", "7", "--guidance", "2.5", "--negative", "fog", "--size", "64x32"),
        *("--scheduler", "ddim", "--memory", "stream", "--threads", "3"),
    )
    assert found == {
        "run": RunOptions(3, "stream", None),
        "generation": GenerationOptions(7, 2.5, (64, 32), "ddim", "fog"),
    }


def test_what_the_objects_become() -> None:
    request = GenerationOptions(7, 2.5, (64, 32), "ddim", "fog").request("a cat", 3)
    assert (request.width, request.height, request.num_inference_steps) == (64, 32, 7)
    assert (request.prompt, request.seed, request.negative_prompt) == ("a cat", 3, "fog")
    assert (request.guidance_scale, request.scheduler) == (2.5, "ddim")
    settings = RunOptions(3, None, 10**8).settings(fallback=False)
    assert (settings.threads, settings.memory, settings.max_memory) == (3, None, 10**8)
    assert not settings.fallback


def test_every_field_of_a_group_s_object_has_an_option() -> None:
    for group, kind in (
        (generation_options("model"), GenerationOptions),
        (run_options, RunOptions),
    ):
        command = click.command("made")(group(lambda **values: None))
        assert {param.name for param in command.params} == {field.name for field in fields(kind)}


def test_options_that_are_left_out_are_unknown() -> None:
    with pytest.raises(click.NoSuchOption):
        built(generation_options("model", without=["negative"]))("--negative", "fog")


def test_one_of_memory_and_max_memory_may_be_given() -> None:
    with pytest.raises(click.UsageError, match="give only one of them"):
        built(run_options)("--memory", "stream", "--max-memory", "1GB")


def test_the_same_option_has_one_help_text() -> None:
    """But for whose defaults it has."""
    shared = {param.name for param in bench_run.params} & {
        param.name for param in generate.generate_command.params
    }
    told: dict[str, set[str]] = {}
    for command in (bench_run, generate.generate_command, plan.plan_command):
        for param in command.params:
            if param.name in ("steps", "guidance", "size", "scheduler", "memory", "threads"):
                assert isinstance(param, click.Option) and param.help
                told.setdefault(param.name, set()).add(
                    param.help.replace("the model's", "the bundle's")
                )
    assert told.keys() <= shared and all(len(texts) == 1 for texts in told.values())


HOST_COMMANDS = {
    "bench": (bench_run, ["bundle"], _HERE),
    "profile": (profile.profile_command, [], profile._HERE),
    "watch": (watch.watch_command, [], ("hosts",)),
    "keys trust": (cli.commands["keys"].commands["trust"], ["key"], ("hosts",)),  # type: ignore[attr-defined]
}


@pytest.mark.parametrize("name", HOST_COMMANDS)
def test_a_board_is_asked_for_every_option(name: str) -> None:
    """An option that is added to the command is passed on, or named among those that aren't."""
    command, positional, without = HOST_COMMANDS[name]
    passed = [
        param
        for param in command.params
        if isinstance(param, click.Option) and param.name not in without
    ]
    assert set(without) <= {param.name for param in command.params}
    for option in passed:
        arguments = [option.opts[-1], *([] if option.is_flag else [example(option)])]
        here = parsed(command, [*positional, *arguments])
        assert here.params[str(option.name)] != option.get_default(here), "no example of its own"
        there = parsed(command, [*positional, *option_arguments(here, without)])
        assert there.params == here.params, option.name


def test_defaults_reach_a_board_and_what_is_for_here_does_not() -> None:
    context = parsed(bench_run, ["bundle", "--host", "pi@board", "-o", "a.json", "--json"])
    assert option_arguments(context, _HERE) == [
        *("--runs=5", "--warm-up=1", "--prompt=a red apple", "--seed=0"),
        *("--threads=0", "--interval=0.5"),
    ]


def test_flags_with_two_names_are_passed_on_by_the_one_that_was_given() -> None:
    command = click.command("made")(options.self_test_option(lambda **values: None))
    for name in ("--self-test", "--no-self-test"):
        assert option_arguments(parsed(command, [name]), ()) == [name]


def test_where_steps_are_placed_is_a_kind_or_a_list() -> None:
    run = built(schedule_options)
    assert run("--sigmas", "karras")["schedule"] == ScheduleOptions("karras")
    assert run("--sigmas", "14.6,2,0")["schedule"] == ScheduleOptions((14.6, 2.0, 0.0))
    assert run("--timesteps", "999,499")["schedule"] == ScheduleOptions(None, (999, 499))
    request = ScheduleOptions("beta", (7,), 0.5).applied(GenerationOptions().request("a", 1))
    assert (request.sigmas, request.timesteps, request.eta) == ("beta", (7,), 0.5)


def test_words_that_are_imported_late_are_taken() -> None:
    run = built(schedule_options, prompt_options)
    for kind in SIGMA_KINDS:
        assert run("--sigmas", kind)["schedule"] == ScheduleOptions(kind)
    for syntax in SYNTAXES:
        assert run("--prompt-syntax", syntax)["prompting"] == PromptOptions(prompt_syntax=syntax)


@pytest.mark.parametrize(
    "arguments",
    [
        ("--sigmas", "karas"),
        ("--sigmas", "nan,0"),
        ("--sigmas", ""),
        ("--timesteps", "999,4.5"),
        ("--timesteps", ",".join(["1"] * 1002)),
        ("--timesteps", "9" * 5000),
        ("--eta", "1.5"),
    ],
)
def test_neither_kind_nor_list(arguments: tuple[str, str]) -> None:
    with pytest.raises(click.BadParameter):
        built(schedule_options)(*arguments)
