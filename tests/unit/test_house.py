"""The house rules that a linter can't see: light imports, and the samplers that the help names."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest

from edgesd.cli.generate import generate_command
from edgesd.runtime.schedulers import SCHEDULERS

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "diffusers", "transformers", "onnx", "onnxscript", "peft", "safetensors")


def modules_after(code: str) -> set[str]:
    """Top-level modules that a fresh interpreter has loaded after `code`."""
    report = "import json, sys; print(json.dumps(sorted({m.split('.')[0] for m in sys.modules})))"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{report}"], check=True, capture_output=True, text=True
    )
    return set(json.loads(done.stdout))


@pytest.mark.parametrize(
    "code",
    [
        "import edgesd.runtime.runners.onnxruntime, edgesd.runtime.pictures",
        "import edgesd.device.targets, edgesd.device.detect",
        "import edgesd.runtime.prompter_worker, edgesd.runtime.prompter",
        "import edgesd.cli",
    ],
)
def test_the_device_side_imports_nothing_heavy(code: str) -> None:
    loaded = modules_after(code)
    assert not loaded & {*HEAVY, "onnxruntime", "pydantic", "scipy"}


def test_help_loads_no_numpy() -> None:
    assert "numpy" not in modules_after("import edgesd.cli")


def test_onnxruntime_keeps_nothing_in_the_user_s_cache(tmp_path: Path) -> None:
    code = "import edgesd, onnxruntime; onnxruntime.SessionOptions()"
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, cwd=ROOT)
    assert not list(tmp_path.iterdir())


def test_help_names_every_scheduler() -> None:
    (option,) = (p for p in generate_command.params if p.name == "scheduler")
    assert isinstance(option, click.Option) and option.help
    assert all(name in re.split(r"[ ,.]+", option.help) for name in SCHEDULERS)


def test_the_command_reference_is_up_to_date() -> None:
    done = subprocess.run([sys.executable, "scripts/write_cli_docs.py", "--check"], cwd=ROOT)
    assert done.returncode == 0, "run `make docs`"
