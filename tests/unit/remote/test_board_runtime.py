"""Wheels for a board, and how the runtime is installed there, with wheels that are made up."""

from __future__ import annotations

import asyncio
import base64
import ensurepip
import hashlib
import json
import os
import platform
import shutil
import sys
import zipfile
from pathlib import Path

import pytest

from edgesd.device.capabilities import normal_arch
from edgesd.device.slots import Slots
from edgesd.errors import InputError, LinkError, ResourceError, TargetError
from edgesd.progress import SILENT, Progress
from edgesd.remote import board as boards
from edgesd.remote import deploy as deploying
from edgesd.remote import wheels as making
from edgesd.remote.board import Finished, FolderBoard
from edgesd.remote.wheels import fitting_wheels, platform_tags
from edgesd.runtime.bundle import CHECKSUM, MANIFEST, Bundle, checksum_line, open_bundle
from edgesd.spec.bundle import SCHEMA_VERSION
from scripts import vendor_wheels
from tests.support import Recorded
from tests.unit.device.test_slots import install

pytestmark = pytest.mark.integration

PYTHON = f"{sys.version_info[0]}.{sys.version_info[1]}"


def wheel(
    folder: Path, name: str, version: str = "1.0", tag: str = "py3-none-any", code: str = ""
) -> Path:
    """A wheel of one module, which prints its version as a command of its name, or runs `code`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{version}-{tag}.whl"
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as file:
        code = code or f"print('{name} {version}')"
        file.writestr(f"{name}_made_up.py", f"def main():\n    {code}\n")
        about = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        file.writestr(f"{info}/METADATA", about)
        file.writestr(f"{info}/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n")
        scripts = f"[console_scripts]\n{name} = {name}_made_up:main\n"
        file.writestr(f"{info}/entry_points.txt", scripts)
        file.writestr(f"{info}/RECORD", "")
    return path


def test_platforms_are_those_of_the_board_s_c_library() -> None:
    assert platform_tags("aarch64", 28) == [
        *(f"manylinux_2_{minor}_aarch64" for minor in (28, 27, 26, 24, 17)),
        "manylinux2014_aarch64",
    ]
    assert "manylinux_2_39_aarch64" not in platform_tags("aarch64")


def test_wheels_that_fit(tmp_path: Path) -> None:
    for name, tag in (
        ("edgesd", "py3-none-any"),
        ("pip", "py3-none-any"),
        ("numpy", "cp311-cp311-manylinux_2_28_aarch64"),
        ("msgspec", "cp311-cp311-manylinux2014_aarch64.manylinux_2_17_aarch64"),
        ("tokenizers", "cp39-abi3-manylinux_2_17_aarch64"),
        ("older", "cp310-cp310-manylinux_2_28_aarch64"),
        ("intel", "cp311-cp311-manylinux_2_28_x86_64"),
        ("newer", "cp311-cp311-manylinux_2_39_aarch64"),
    ):
        wheel(tmp_path, name, tag=tag)
    (tmp_path / "no wheel.whl").touch()
    (tmp_path / "folder-1.0-py3-none-any.whl").mkdir()
    (tmp_path / "nowhere-1.0-py3-none-any.whl").symlink_to("nowhere")
    os.mkfifo(tmp_path / "fifo-1.0-py3-none-any.whl")
    found = fitting_wheels(tmp_path, "3.11", "aarch64", 36)
    assert {path.name.partition("-")[0] for path in found} == {
        "edgesd",
        "pip",
        "numpy",
        "msgspec",
        "tokenizers",
    }
    (tmp_path / "edgesd-1.0-py3-none-any.whl").unlink()
    with pytest.raises(InputError, match=r"has no wheel of edgesd for Python 3\.11 on aarch64"):
        fitting_wheels(tmp_path, "3.11", "aarch64", 36)


def wheel_of_a_checkout(folder: Path) -> Path:
    """A wheel as pip makes it: with whatever lies in kernels/lib."""
    path = folder / "edgesd-1.0-py3-none-any.whl"
    names = ("edgesd/__init__.py", "edgesd/kernels/lib/edgesd-kernels-aarch64-0123456789ab.so")
    with zipfile.ZipFile(path, "w") as file:
        for name in names:
            file.writestr(name, name)
        record = "edgesd-1.0.dist-info/RECORD"
        file.writestr(record, "".join(f"{name},sha256=x,1\n" for name in names) + f"{record},,\n")
    return path


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Architectures that kernels were "compiled" for, into a cache of its own; pip makes wheels."""
    archs: list[str] = []

    def build(arch: str, progress: Progress) -> Path:
        out = tmp_path / "cache" / making.library_name(arch)
        if not out.exists():
            archs.append(arch)
            progress.line(f"compiling edgesd's kernels for {arch}: neon, 1 of 2")
            out.parent.mkdir(exist_ok=True)
            out.write_bytes(b"code")
        return out

    def pip(arguments: list[str]) -> None:
        if arguments[0] == "wheel":
            wheel_of_a_checkout(Path(arguments[arguments.index("--wheel-dir") + 1]))

    monkeypatch.setattr(making, "library_folders", lambda: (tmp_path / "lib", tmp_path / "cache"))
    monkeypatch.setattr(making, "build_library", build)
    monkeypatch.setattr(making, "_pip", pip)
    monkeypatch.setattr(making, "_fingerprint", lambda: "sources")
    monkeypatch.setenv("EDGESD_CACHE", str(tmp_path / "user"))
    return archs


def libraries(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as file:
        rows = file.read("edgesd-1.0.dist-info/RECORD").decode().splitlines()
        assert sorted(row.split(",")[0] for row in rows) == sorted(file.namelist())
        for row in rows:
            name, digest, size = row.split(",")
            if name.endswith(".so"):
                data = hashlib.sha256(file.read(name)).digest()
                assert digest == "sha256=" + base64.urlsafe_b64encode(data).decode().rstrip("=")
                assert int(size) == len(file.read(name))
        return [name.rpartition("/")[2] for name in file.namelist() if name.endswith(".so")]


def test_vendored_wheels_bring_the_kernels(
    tmp_path: Path,
    compiled: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """They are compiled for the board, and are alone in edgesd's wheel."""
    folder = tmp_path / "wheels"
    monkeypatch.setattr(sys, "argv", ["vendor_wheels", str(folder)])
    assert vendor_wheels.main() == 0
    printed = capsys.readouterr()
    assert "1 wheels" in printed.out and "compiling edgesd's kernels for aarch64" in printed.err
    (wheel,) = folder.iterdir()
    assert compiled == ["aarch64"] and libraries(wheel) == [making.library_name("aarch64")]


def test_kernels_are_compiled_for_bundles_that_have_graphs_for_them_alone(
    compiled: list[str], tmp_path: Path
) -> None:
    said = Recorded()
    asked = ("3.11", "aarch64", (), 36)
    (without,) = making.cached_wheels(*asked, kernels=False, progress=said)
    assert compiled == [] and libraries(without) == []
    assert said.lines == ["fetching wheels for Python 3.11 on aarch64 by pip: some 60 MB, once"]
    said.lines.clear()
    (wheel,) = making.cached_wheels(*asked, kernels=True, progress=said)
    assert compiled == ["aarch64"] and libraries(wheel) == [making.library_name("aarch64")]
    assert said.lines[0] == "compiling edgesd's kernels for aarch64: neon, 1 of 2"
    said.lines.clear()
    # What is compiled is brought in any case, so that a bundle to go back to keeps its kernels.
    assert making.cached_wheels(*asked, kernels=False, progress=said) == [wheel]
    assert said.lines == [] and not (tmp_path / "lib").exists()


class Answering(FolderBoard):
    """A board whose python3 answers what the test says."""

    answer = ""

    async def run(self, command, *listeners):  # type: ignore[no-untyped-def]
        if command[0] == "python3":
            return Finished(0 if self.answer else 127, self.answer, "")
        return await super().run(command, *listeners)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ("", "has no python3"),
        ('[[3, 9], "HERE", 64, "glibc", "2.31", false, 9000000]', "has Python 3.9: edgesd needs"),
        ('[[3, 14], "HERE", 64, "glibc", "2.41", false, 9000000]', "has Python 3.14: edgesd needs"),
        ('[[3, 11], "HERE", 32, "glibc", "2.36", false, 9000000]', "has a 32-bit Python"),
        ('[[3, 11], "riscv64", 64, "glibc", "2.36", false, 9000000]', "is riscv64, and"),
        ('[[3, 11], "HERE", 64, "", "", false, 9000000]', "has no glibc"),
        (
            '[[3, 11], "HERE", 64, "glibc", "2.36", false, 140000]',
            r"has 9 MB of memory for edgesd, and \w+ needs \d+ MB to generate 16x16 pixels",
        ),
    ],
)
def test_boards_that_cannot_have_it(
    answer: str, words: str, miniature: Bundle, tmp_path: Path
) -> None:
    board = Answering(tmp_path)
    board.answer = answer.replace("HERE", miniature.manifest.arch)
    with pytest.raises(TargetError, match=words):
        asyncio.run(deploying.deploy(board, miniature))
    assert board.received == 0


def add_pip(wheels: Path) -> None:
    """Python's own, which wheels are installed with."""
    bundled = Path(ensurepip.__file__).parent / "_bundled"
    (pip,) = [*bundled.glob("pip-*.whl"), *Path("/usr/share/python-wheels").glob("pip-*.whl")][:1]
    shutil.copy(pip, wheels)


def runtime(home: Path, bundle: Bundle, wheels: Path) -> tuple[int, int]:
    minor = int(platform.libc_ver()[1].split(".")[1])
    here = deploying._Here(PYTHON, normal_arch(platform.machine()), minor, False)
    return asyncio.run(deploying._runtime(FolderBoard(home), bundle, here, wheels, SILENT))


def version(home: Path) -> str:
    return asyncio.run(boards.edgesd(FolderBoard(home), "--version"))


def test_installed_once_and_switched_as_a_whole(miniature: Bundle, tmp_path: Path) -> None:
    home, wheels = tmp_path / "home", tmp_path / "wheels"
    home.mkdir()
    for name in ("edgesd", "cryptography"):
        wheel(wheels, name)
    add_pip(wheels)
    sent, written = runtime(home, miniature, wheels)
    assert sent == sum(path.stat().st_size for path in wheels.iterdir()) < written
    assert version(home) == "edgesd 1.0\n"
    assert (home / ".local/bin/edgesd").resolve() == (home / "edgesd/bin/edgesd").resolve()
    assert runtime(home, miniature, wheels) == (0, 0)

    (whole,) = (home / "edgesd/runtime").glob("*/whole")
    whole.unlink()  # as when it was killed at the end
    (whole.parent / "bin/edgesd").unlink()
    sent, written = runtime(home, miniature, wheels)
    assert sent == 0 < written
    assert version(home) == "edgesd 1.0\n"

    (wheels / "edgesd-1.0-py3-none-any.whl").unlink()
    newer = wheel(wheels, "edgesd", "2.0")
    (home / "edgesd/runtime/half").mkdir()  # of a deploy that was killed
    sent, _ = runtime(home, miniature, wheels)
    assert sent == newer.stat().st_size
    assert version(home) == "edgesd 2.0\n"
    assert len(list((home / "edgesd/runtime").iterdir())) == 1


def run_code(schema: int) -> str:
    """Python that runs this edgesd, as one that reads bundles of schemas up to `schema`."""
    root = Path(__file__).resolve().parents[3]
    run = (
        f"import edgesd.spec.bundle as b; b.SCHEMA_VERSION = {schema}; "
        "from edgesd.cli import main; main()"
    )
    command = f"[{sys.executable!r}, '-c', {run!r}, *sys.argv[1:]]"
    path = f"os.environ['PYTHONPATH'] = {str(root)!r}"
    return f"import os, sys; {path}; os.execv({sys.executable!r}, {command})"


def test_the_runtime_is_updated_first_and_a_cut_leaves_one_that_reads_the_active_bundle(
    miniature: Bundle, tmp_path: Path
) -> None:
    home, wheels, older = tmp_path / "home", tmp_path / "wheels", tmp_path / "older"
    # On the board: an older runtime, and a bundle of the schema that it reads.
    (home / "edgesd/runtime/old/bin").mkdir(parents=True)
    (home / "edgesd/bin").symlink_to("runtime/old/bin")
    program = home / "edgesd/runtime/old/bin/edgesd"
    program.write_text(f"#!{sys.executable}\n{run_code(SCHEMA_VERSION - 1)}\n")
    program.chmod(0o755)
    shutil.copytree(miniature.path, older)
    manifest = json.loads((older / MANIFEST).read_bytes())
    raw = json.dumps(manifest | {"schema_version": SCHEMA_VERSION - 1}).encode()
    (older / MANIFEST).write_bytes(raw)
    (older / CHECKSUM).write_bytes(checksum_line(raw))
    install(Slots(home / "edgesd"), open_bundle(older))
    # Here: a newer runtime, and a bundle of its schema.
    for name in ("edgesd", "cryptography"):
        code = run_code(SCHEMA_VERSION) if name == "edgesd" else ""
        wheel(wheels, name, code=code)
    add_pip(wheels)
    runtime_bytes = sum(path.stat().st_size for path in wheels.iterdir())
    seen = []
    for cut in (runtime_bytes // 2, runtime_bytes - runtime_bytes // 2 + 1, 1000, None):
        board = FolderBoard(home, fail_after=cut)
        work = deploying.deploy(board, miniature, wheels, self_test=False)
        if cut is None:
            asyncio.run(work)
        else:
            with pytest.raises(LinkError):
                asyncio.run(work)
        # Whatever arrived: the runtime that is there reads the bundle that is active.
        asyncio.run(boards.edgesd(FolderBoard(home), "inspect", "edgesd/current"))
        newer = not (home / "edgesd/runtime/old").exists()
        switched = open_bundle(home / "edgesd/current").manifest_sha256 == miniature.manifest_sha256
        seen.append((newer, switched))
    assert seen == [(False, False), (True, False), (True, False), (True, True)]


def test_a_disk_that_is_too_small_for_it(
    miniature: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deploying, "_SPARE_BYTES", 1 << 60)
    for name in ("edgesd", "cryptography", "pip"):
        wheel(tmp_path / "wheels", name)
    (tmp_path / "home").mkdir()
    with pytest.raises(ResourceError, match="to be left: free some space"):
        runtime(tmp_path / "home", miniature, tmp_path / "wheels")
