"""Rules of the whole command line that no linter sees: help, completion, exit statuses."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest

from edgesd.cli.bench import run_command as bench_command
from edgesd.cli.build import build_command
from edgesd.cli.generate import generate_command
from edgesd.errors import EXIT_STATUSES, EdgesdError
from edgesd.runtime.schedulers import SCHEDULERS
from tests.support import run_cli

ROOT = Path(__file__).resolve().parents[3]


def test_onnxruntime_keeps_nothing_in_the_user_s_cache(tmp_path: Path) -> None:
    code = "import edgesd, onnxruntime; onnxruntime.SessionOptions()"
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, cwd=ROOT)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", [generate_command, build_command, bench_command])
def test_help_names_every_scheduler(command: click.Command) -> None:
    (option,) = (p for p in command.params if p.name == "scheduler")
    record = option.get_help_record(click.Context(command))
    assert record and record[0] == "--scheduler NAME"
    assert all(name in re.split(r"[ ,.:]+", record[1]) for name in SCHEDULERS)


def test_every_exit_status_is_documented() -> None:
    kinds: list[type[EdgesdError]] = [EdgesdError]
    for kind in kinds:
        kinds += kind.__subclasses__()
    ours = {kind.exit_code for kind in kinds if kind.__module__.startswith("edgesd.")}
    assert {0, 2, 130, *ours} == set(EXIT_STATUSES)
    told = run_cli("--help").out
    assert all(f"{status:<5} {meaning}" in told for status, meaning in EXIT_STATUSES.items())


def test_the_help_of_bench_has_the_options_of_measuring() -> None:
    told = run_cli("bench", "--help").out
    assert "edgesd bench [OPTIONS] BUNDLE" in told and "edgesd bench compare" in told
    options = {option for param in bench_command.params for option in param.opts if "-" in option}
    assert all(option in told for option in options - {"--detached"})


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        ("edgesd ben", "bench"),
        ("edgesd generate --sche", "--scheduler"),
        ("edgesd keys tr", "trust"),
    ],
)
def test_shells_complete_commands_and_options(words: str, completed: str) -> None:
    environment = {
        **os.environ,
        "_EDGESD_COMPLETE": "bash_complete",
        "COMP_WORDS": words,
        "COMP_CWORD": str(words.count(" ")),
    }
    code = "from edgesd.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout.split() == [f"plain,{completed}"], done.stderr


def test_the_command_reference_is_up_to_date() -> None:
    done = subprocess.run([sys.executable, "scripts/write_cli_docs.py", "--check"], cwd=ROOT)
    assert done.returncode == 0, "run `make docs`"
