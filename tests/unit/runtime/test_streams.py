"""Standard streams that are closed, full or broken: no fault, and the work is done all the same."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from edgesd.cli import common
from edgesd.errors import MissingDependencyError
from edgesd.processes import module_command
from edgesd.runtime.bundle import Bundle
from tests.marks import utf8_names
from tests.support import assert_refused, run_cli

pytestmark = pytest.mark.integration

EDGESD = shlex.join(module_command("edgesd"))
CLOSED = ("<&-", ">&-", "2>&-", "<&- >&-", "<&- 2>&-", ">&- 2>&-", "<&- >&- 2>&-")


def shell(command: str) -> subprocess.CompletedProcess[str]:
    """What the shell comes to; its standard error is what it has left open."""
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize("streams", [*CLOSED, "2>/dev/full", ">/dev/full", "2> >(exit)"])
def test_a_image_is_written_whatever_becomes_of_the_streams(
    streams: str, miniature_file: Path, tmp_path: Path
) -> None:
    image = tmp_path / "image.png"
    arguments = [str(miniature_file), "-p", "x", "--steps", "1", "-o", str(image)]
    command = f"{EDGESD} generate {shlex.join(arguments)} --any-machine {streams}"
    done = shell(command)
    assert done.returncode == 0, done.stderr
    assert "fault" not in done.stderr and "Exception" not in done.stderr
    assert image.read_bytes().startswith(b"\x89PNG") and b"IEND" in image.read_bytes()[-12:]
    assert [path.name for path in tmp_path.iterdir()] == [image.name]


@pytest.mark.parametrize("streams", CLOSED)
@pytest.mark.parametrize(("arguments", "status"), [("targets", 0), ("inspect none", 4)])
def test_a_command_without_streams_ends_as_it_does_with_them(
    arguments: str, status: int, streams: str
) -> None:
    done = shell(f"{EDGESD} {arguments} {streams}")
    assert done.returncode == status and "fault" not in done.stderr


@pytest.mark.parametrize("arguments", ["targets", "targets --json", "--help", "--version"])
def test_a_full_disk_behind_standard_output_is_one_line(arguments: str) -> None:
    done = shell(f"{EDGESD} {arguments} >/dev/full")
    assert done.returncode == 3
    assert done.stderr.startswith("edgesd: ") and done.stderr.count("\n") == 1
    assert "No space left on device" in done.stderr


def test_a_reader_that_leaves_is_no_fault() -> None:
    done = shell(f"{EDGESD} targets | true; {EDGESD} targets 2>&1 >&- | true")
    assert done.stderr == ""


@utf8_names
def test_characters_that_an_encoding_lacks_are_escapes(miniature: Bundle) -> None:
    done = shell(f"PYTHONIOENCODING=ascii {EDGESD} inspect $'no\\xc3\\xa4me' 2>&1")
    assert done.returncode == 4 and "no\\xe4me" in done.stdout


@pytest.mark.parametrize("argument", ["a\0b", "\0"])
def test_an_argument_with_a_nul_byte_is_refused_as_one(argument: str) -> None:
    for arguments in (("inspect", argument), ("generate", "x", "-p", argument), (argument,)):
        assert_refused(run_cli(*arguments), "NUL")


@pytest.mark.parametrize(
    "argument", ["x" * 10**6, "\udcff\udc9b", "\udcff" * 300, "/" + "y" * 5000]
)
def test_odd_arguments_are_refused_in_one_line_of_bounded_length(argument: str) -> None:
    for arguments in (
        ("inspect", argument),
        ("build", argument, "--target", "x86-64-cpu"),
        ("build", "none", "--target", argument),
        ("build", "none", "--target", "x86-64-cpu", "--precision", argument),
        ("generate", argument, "-p", "x"),
        ("plan", argument, "--target", argument),
        ("keys", "trust", argument),
        (argument,),
    ):
        outcome = run_cli(*arguments)
        assert_refused(outcome)
        assert "internal fault" not in outcome.err and len(outcome.err) < 50_000


def test_standard_streams_stay_as_they_are_where_none_is_closed() -> None:
    common.open_streams()
    assert not common.closed_streams


def test_an_interrupt_while_edgesd_is_imported_is_one_line() -> None:
    code = """if True:
        import sys
        from edgesd.__main__ import main
        class Interrupting:
            def find_spec(self, name, path=None, target=None):
                if name == "edgesd.cli":
                    raise KeyboardInterrupt
        sys.meta_path.insert(0, Interrupting())
        main()
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (130, "edgesd: interrupted\n")


def test_an_interrupt_within_an_import_is_no_missing_package(
    capsys: pytest.CaptureFixture[str],
) -> None:
    stopped = ImportError("initialization failed")
    stopped.__cause__ = KeyboardInterrupt()
    told = MissingDependencyError("onnxruntime can't be imported")
    assert common.fail(told, debug=False) == 5
    told.__cause__ = stopped
    assert common.fail(told, debug=False) == 130
    assert "interrupted" in capsys.readouterr().err
