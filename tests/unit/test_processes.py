"""Processes that edgesd starts run nothing of the current folder."""

from __future__ import annotations

import ast
import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edgesd.device import detached
from edgesd.device.slots import Slots
from edgesd.device.telemetry import Sampler
from edgesd.engines import kernels
from edgesd.engines.tensorrt import BuildSpec, build_plan
from edgesd.errors import EdgesdError
from edgesd.processes import find_program, module_command
from edgesd.progress import SILENT
from edgesd.remote import wheels
from edgesd.runtime.bundle import Bundle
from edgesd.runtime.prompter import COMMAND
from tests.support import run_cli

pytestmark = pytest.mark.integration

ROOT = Path(__file__).resolve().parents[2]
PLANTED = (
    *("edgesd", "msgspec", "numpy", "onnxruntime", "PIL", "click", "rich", "tokenizers", "pip"),
    *("runpy", "random", "queue", "json", "signal", "threading", "typing", "pathlib", "selectors"),
    *("argparse", "socket", "tempfile", "dataclasses", "platform", "logging", "tensorrt_rtx"),
)


@pytest.fixture
def hostile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, full of modules that leave a mark when one is run."""
    folder = tmp_path / "downloaded"
    folder.mkdir()
    for name in PLANTED:
        mark = folder / f"{name}.ran"
        (folder / f"{name}.py").write_text(f"open({str(mark)!r}, 'w').close()\nraise SystemExit(9)")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("EDGESD_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("EDGESD_CACHE", str(tmp_path / "cache"))
    return folder


def marks(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.glob("*.ran"))


@pytest.mark.parametrize(
    "module",
    [
        *("edgesd", "edgesd.device.telemetry", "edgesd.device.detached", "pip"),
        *("edgesd.engines.tensorrt_worker", "edgesd.runtime.prompter_worker"),
    ],
)
def test_a_module_in_a_process_of_its_own_takes_nothing_from_the_current_folder(
    module: str, hostile: Path
) -> None:
    command = module_command(module, "--help")
    subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=60)
    assert marks(hostile) == []
    naive = [sys.executable, "-m", module, "--help"]
    subprocess.run(naive, stdin=subprocess.DEVNULL, capture_output=True, timeout=60)
    assert marks(hostile)


def test_the_telemetry_s_process_runs_nothing_of_the_current_folder(hostile: Path) -> None:
    with Sampler(0.05) as sampler:
        limit = time.monotonic() + 60
        while not sampler.samples and time.monotonic() < limit:
            time.sleep(0.02)
    assert sampler.samples and marks(hostile) == []


def test_a_detached_benchmark_runs_nothing_of_the_current_folder(
    hostile: Path, miniature: Bundle
) -> None:
    arguments = ["bench", "run", miniature.path, "-n", 1, "--any-machine", "--json"]
    outcome = run_cli(*arguments, "--steps", 1, "--detached", f"planted-{os.getpid()}")
    detached.forget(f"planted-{os.getpid()}")
    assert outcome.code == 0 and '"summary"' in outcome.out
    assert marks(hostile) == []


def test_the_self_test_of_a_slot_runs_nothing_of_the_current_folder(
    hostile: Path, miniature: Bundle
) -> None:
    tested = Slots()._self_test(miniature.path, SILENT)
    assert tested.step_seconds > 0 and marks(hostile) == []


def test_the_builder_of_plans_runs_nothing_of_the_current_folder(hostile: Path) -> None:
    with contextlib.suppress(EdgesdError):
        build_plan(hostile / "none.onnx", BuildSpec("unet", "json"), hostile / "plan")
    assert marks(hostile) == []


def test_the_prompter_s_process_runs_nothing_of_the_current_folder(hostile: Path) -> None:
    subprocess.run(COMMAND, input=b"", capture_output=True, timeout=60)
    assert marks(hostile) == []


def test_pip_runs_nothing_of_the_current_folder(hostile: Path) -> None:
    with contextlib.suppress(EdgesdError):
        wheels._pip(["--version"])
    assert marks(hostile) == []


def test_python_m_edgesd_takes_no_other_module_from_the_current_folder(hostile: Path) -> None:
    for name in (*sys.stdlib_module_names, "edgesd"):
        (hostile / f"{name}.py").unlink(missing_ok=True)  # they are imported before edgesd can tell
    done = subprocess.run(
        [sys.executable, "-m", "edgesd", "targets"], capture_output=True, timeout=60
    )
    assert done.returncode == 0 and marks(hostile) == []


def test_a_process_takes_the_same_edgesd_from_a_checkout_that_isn_t_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "edgesd"
    copy.mkdir()
    for name in ("__init__", "processes"):
        (copy / f"{name}.py").write_bytes((ROOT / f"edgesd/{name}.py").read_bytes())
    (copy / "where.py").write_text("print(__file__)")
    code = (
        "import subprocess; from edgesd.processes import module_command\n"
        "subprocess.run(module_command('edgesd.where'))"
    )
    for cwd, python_path in ((ROOT, str(tmp_path)), (tmp_path, "")):
        environment = {**os.environ, "PYTHONPATH": python_path}
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True
        )
        assert done.stdout.strip() == str(copy / "where.py"), done.stderr


def test_arguments_and_status_of_a_module_are_passed_on(tmp_path: Path) -> None:
    (tmp_path / "told.py").write_text("import sys; print(sys.argv[1:], __name__); sys.exit(3)")
    done = subprocess.run(
        module_command("told", "-x", "", "--", "a b"),
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (3, "['-x', '', '--', 'a b'] __main__\n")


@pytest.mark.parametrize("path", ["", ".", ":", "bin", "./bin:", "{bin}"])
def test_programs_are_found_in_absolute_folders_alone(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("g++", "c++", "clang++", "x86_64-linux-gnu-g++", "tegrastats", "vcgencmd", "nvpmodel")
    for folder in (tmp_path, tmp_path / "bin"):
        folder.mkdir(exist_ok=True)
        for name in names:
            (folder / name).write_text("#!/bin/sh\n")
            (folder / name).chmod(0o755)
    monkeypatch.chdir(tmp_path)
    absolute = str(tmp_path / "bin")
    monkeypatch.setenv("PATH", path.format(bin=absolute))
    for name in names:
        assert find_program(name) == (f"{absolute}/{name}" if path == "{bin}" else None)
    if path != "{bin}":
        assert kernels.find_compiler("x86_64") is None


def test_no_other_file_starts_python_itself() -> None:
    """By `-m`, which takes modules from the current folder first, or by hand."""
    found = []
    for folder in ("edgesd", "scripts", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            code = path.read_text()
            for node in ast.walk(ast.parse(code)):
                text = ast.unparse(node) if isinstance(node, ast.List | ast.Tuple) else ""
                if "sys.executable, '-m'" in text or (
                    folder == "edgesd" and "sys.executable" in text
                ):
                    found.append(path.relative_to(ROOT).as_posix())
            if folder == "edgesd" and "shutil.which" in code:
                found.append(path.relative_to(ROOT).as_posix())
    assert set(found) == {"edgesd/processes.py"}
