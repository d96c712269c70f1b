"""What docs/architecture.md promises and no type checker sees: who imports what, and which names
are spelled where."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from edgesd.runtime.backends import backend_names

ROOT = Path(__file__).resolve().parents[2]
TREES = ("edgesd", "tests", "docs", "benchmarks", "scripts")
HEAVY = ("torch", "diffusers", "transformers", "onnx", "onnxscript", "peft", "safetensors")

COMPONENTS = {"text_encoder", "unet", "vae_decoder", "vae_encoder"}
TENSORS = {"input_ids", "encoder_hidden_states", "timestep_cond", "noise_pred"}
"""Inputs and outputs of networks. `sample` and `timestep` are ways to fill an input, too."""
KNOW_NETWORKS = (
    "edgesd/export/families",
    "edgesd/runtime/flow.py",
    "edgesd/runtime/old_bundles.py",
    "edgesd/spec/pipeline.py",
)

BACKENDS = set(backend_names())
KNOW_BACKENDS = ("edgesd/runtime/backends", "edgesd/export/backends")

LIGHT = (
    "edgesd/runtime/noise.py",
    "edgesd/device/slots.py",
    "edgesd/engines/plans.py",
    "edgesd/remote/ssh.py",
    "edgesd/spec/base.py",
    *(f"edgesd/{p.name}" for p in (ROOT / "edgesd").glob("*.py") if not p.name.startswith("__")),
)
"""A module of each light package, and all that lie in none."""


def modules_after(code: str) -> set[str]:
    """Top-level modules that a fresh interpreter has loaded after `code`."""
    report = "import json, sys; print(json.dumps(sorted({m.split('.')[0] for m in sys.modules})))"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{report}"], check=True, capture_output=True, text=True
    )
    return set(json.loads(done.stdout))


def trees(leave_out: tuple[str, ...]) -> Iterator[tuple[str, ast.Module]]:
    """Path and syntax tree of each module of edgesd that isn't below `leave_out`."""
    for path in sorted((ROOT / "edgesd").rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        if not any(name == one or name.startswith(f"{one}/") for one in leave_out):
            yield name, ast.parse(path.read_text("utf-8"))


def strings(tree: ast.Module) -> Iterator[ast.Constant]:
    """String literals that are neither docstrings nor stand alone in a line."""
    alone = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in alone:
            yield node


def constants(tree: ast.Module) -> set[str]:
    """Constants of a module that are a backend's name."""
    found = set()
    for node in tree.body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Constant):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if node.value.value in BACKENDS:
                found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found


def backend_comparisons(tree: ast.AST, known: set[str]) -> Iterator[int]:
    """Lines that compare with a backend's name, match one, or look one up. known: constants that
    are one, see `constants`."""

    def names(node: ast.AST | None) -> bool:
        if isinstance(node, ast.Constant):
            return node.value in BACKENDS
        if isinstance(node, ast.Name | ast.Attribute):
            return (node.id if isinstance(node, ast.Name) else node.attr) in known
        if isinstance(node, ast.Tuple | ast.List | ast.Set):
            return any(names(one) for one in node.elts)
        return False

    for node in ast.walk(tree):
        sides: list[ast.AST | None] = []
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
        elif isinstance(node, ast.Dict):
            sides = [*node.keys]
        elif isinstance(node, ast.MatchValue):
            sides = [node.value]
        if any(names(side) for side in sides):
            yield next(side.lineno for side in sides if isinstance(side, ast.expr))


@pytest.mark.parametrize(
    "code",
    [
        "import edgesd.runtime.backends.onnxruntime, edgesd.runtime.images",
        "import edgesd.device.targets, edgesd.device.detect, edgesd.device.slots",
        "import edgesd.runtime.prompter_worker, edgesd.runtime.prompter",
        "import edgesd.engines.plans, edgesd.engines.tensorrt_worker",
        "import edgesd.remote.deploy, edgesd.remote.on_board",
        "import edgesd.cli",
    ],
)
def test_light_packages_import_nothing_heavy(code: str) -> None:
    assert not modules_after(code) & {*HEAVY, "onnx_ir", "onnxruntime", "pydantic", "scipy"}


def test_the_command_line_is_imported_without_numpy() -> None:
    assert "numpy" not in modules_after("import edgesd.cli")


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A copy of the source tree, with the contracts."""
    shutil.copytree(
        ROOT / "edgesd", tmp_path / "edgesd", ignore=shutil.ignore_patterns("__pycache__")
    )
    shutil.copyfile(ROOT / "pyproject.toml", tmp_path / "pyproject.toml")
    return tmp_path


def contracts(root: Path) -> tuple[int, str]:
    """Exit status and output of lint-imports for the source tree `root`."""
    code = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    done = subprocess.run(
        [sys.executable, "-c", code, "--no-cache", "--no-logo"],
        cwd=root,
        env={"PYTHONPATH": str(root), "COLUMNS": "200"},
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout + done.stderr


def test_the_contracts_hold(copied: Path) -> None:
    status, output = contracts(copied)
    assert status == 0, output
    assert " 0 broken" in output


@pytest.mark.parametrize("heavy", ["onnx_ir", "edgesd.export.attention"])
def test_heavy_imports_in_light_packages_break_a_contract(heavy: str, copied: Path) -> None:
    line = "from __future__ import annotations\n"
    for module in LIGHT:
        path = copied / module
        text = path.read_text("utf-8")
        assert text.count(line) == 1
        path.write_text(text.replace(line, f"{line}\nimport {heavy}\n"), "utf-8")
    status, output = contracts(copied)
    assert status == 1, output
    for module in LIGHT:
        name = module.removesuffix(".py").replace("/", ".")
        package = ".".join(name.split(".")[:2])
        assert f"{package} is not allowed to import {heavy.removesuffix('.attention')}:" in output
        assert f"{name} -> {heavy}" in output, output


def test_components_and_their_tensors_are_named_in_families_and_flow_alone() -> None:
    spelled = {
        f"{name}:{node.lineno}: {node.value!r}"
        for name, tree in trees(KNOW_NETWORKS)
        for node in strings(tree)
        if node.value in COMPONENTS | TENSORS
    }
    assert not spelled
    assert {"unet"} == {node.value for node in strings(ast.parse('"""Of unet."""\nx = "unet"'))}


def test_no_backend_s_name_is_compared_with_outside_the_backends() -> None:
    known = set().union(*(constants(tree) for _, tree in trees(())))
    assert "REFERENCE" in known
    compared = {
        f"{name}:{line}"
        for name, tree in trees(KNOW_BACKENDS)
        for line in backend_comparisons(tree, known)
    }
    assert not compared


@pytest.mark.parametrize(
    "code",
    [
        'gpu = engine.backend == "tensorrt"',
        'if "onnxruntime" != backend: pass',
        'if backend in ("tensorrt", "other"): pass',
        "gpu = backend != tensorrt.BACKEND",
        "gpu = backend == BACKEND",
        'build = {"tensorrt": make_plan}[backend]',
        "match backend:\n    case 'tensorrt': pass",
    ],
)
def test_a_comparison_with_a_backend_s_name_is_seen(code: str) -> None:
    assert list(backend_comparisons(ast.parse(code), {"BACKEND"}))


def stray_strings(tree: ast.Module) -> Iterator[int]:
    """Lines of strings that describe nothing: they follow no assignment directly."""
    for scope in ast.walk(tree):
        if isinstance(scope, ast.Module | ast.ClassDef | ast.FunctionDef):
            for before, node in pairwise(scope.body):
                alone = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
                named = isinstance(before, ast.Assign | ast.AnnAssign)
                if alone and not (named and node.lineno == (before.end_lineno or 0) + 1):
                    yield node.lineno


def test_every_string_that_stands_alone_describes_the_name_above_it() -> None:
    assert not {f"{name}:{line}" for name, tree in trees(()) for line in stray_strings(tree)}
    gone = 'x = 1\n\n"""Of what is gone."""\n'
    assert list(stray_strings(ast.parse(gone))) == [3]


@pytest.mark.parametrize("document", ["CONTRIBUTING.md", "docs/architecture.md"])
def test_documents_name_files_that_are_there(document: str) -> None:
    text = (ROOT / document).read_text("utf-8")
    there = {path.name for top in TREES for path in (ROOT / top).rglob("*.*")}
    there |= {path.name for path in ROOT.iterdir()}
    assert not {*re.findall(r"\b\w+\.(?:py|cpp|md)\b", text)} - there
    paths = re.findall(r"(?:edgesd|tests|docs|benchmarks|scripts)/[\w/.]*\w", text)
    assert paths and not {path for path in paths if not (ROOT / path).exists()}


def test_the_unit_tests_mirror_the_packages() -> None:
    unit = ROOT / "tests" / "unit"
    folders = {path.parent.relative_to(unit) for path in unit.rglob("test_*.py")}
    for folder in folders:
        assert any((root / folder).is_dir() for root in (ROOT / "edgesd", ROOT)), folder
