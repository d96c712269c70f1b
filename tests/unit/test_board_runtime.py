"""Wheels for a board, and how the runtime is installed there, with wheels that are made up."""

from __future__ import annotations

import asyncio
import ensurepip
import platform
import shutil
import sys
import zipfile
from pathlib import Path

import pytest

from edgesd.build import deploy as deploying
from edgesd.build import wheels as making
from edgesd.build.wheels import fitting_wheels, platform_tags
from edgesd.device import board as boards
from edgesd.device.board import Finished, FolderBoard
from edgesd.device.capabilities import normal_arch
from edgesd.errors import InputError, ResourceError, TargetError
from edgesd.runtime.bundle import Bundle
from scripts import vendor_wheels

pytestmark = pytest.mark.integration

PYTHON = f"{sys.version_info[0]}.{sys.version_info[1]}"


def wheel(folder: Path, name: str, version: str = "1.0", tag: str = "py3-none-any") -> Path:
    """A wheel of one module, which prints its version as a command of its name."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{version}-{tag}.whl"
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as file:
        code = f"def main():\n    print('{name} {version}')\n"
        file.writestr(f"{name}_made_up.py", code)
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


def test_vendored_wheels_bring_the_kernels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are compiled for the board before edgesd's wheel is made; older ones are removed."""
    lib, folder = tmp_path / "lib", tmp_path / "wheels"
    lib.mkdir()
    (lib / "edgesd-kernels-aarch64-0123456789ab.so").touch()
    (lib / "edgesd-kernels-x86_64-0123456789ab.so").touch()

    def compiled(arch: str, out: Path) -> Path:
        (out / making.library_name(arch)).touch()
        return out / making.library_name(arch)

    def pip(arguments: list[str]) -> None:
        if arguments[0] == "wheel":
            assert sorted(path.name for path in lib.iterdir()) == [
                making.library_name("aarch64"),
                "edgesd-kernels-x86_64-0123456789ab.so",
            ]
            wheel(folder, "edgesd")

    monkeypatch.setattr(making, "library_folders", lambda: (lib, tmp_path / "cache"))
    monkeypatch.setattr(making, "build_library", compiled)
    monkeypatch.setattr(making, "_pip", pip)
    monkeypatch.setattr(sys, "argv", ["vendor_wheels", str(folder)])
    assert vendor_wheels.main() == 0
    assert "1 wheels" in capsys.readouterr().out


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
        ('[[3, 9], "HERE", 64, "glibc", "2.31", false]', "has Python 3.9: edgesd needs"),
        ('[[3, 14], "HERE", 64, "glibc", "2.41", false]', "has Python 3.14: edgesd needs"),
        ('[[3, 11], "HERE", 32, "glibc", "2.36", false]', "has a 32-bit Python"),
        ('[[3, 11], "riscv64", 64, "glibc", "2.36", false]', "is riscv64, and"),
        ('[[3, 11], "HERE", 64, "", "", false]', "has no glibc"),
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


def runtime(home: Path, bundle: Bundle, wheels: Path) -> tuple[int, int]:
    minor = int(platform.libc_ver()[1].split(".")[1])
    here = deploying._Here(PYTHON, normal_arch(platform.machine()), minor, False)
    said: list[str] = []
    return asyncio.run(
        deploying._runtime(
            FolderBoard(home), bundle, here, wheels, said.append, lambda *moved: None
        )
    )


def version(home: Path) -> str:
    return asyncio.run(boards.edgesd(FolderBoard(home), "--version"))


def test_installed_once_and_switched_as_a_whole(miniature: Bundle, tmp_path: Path) -> None:
    home, wheels = tmp_path / "home", tmp_path / "wheels"
    home.mkdir()
    for name in ("edgesd", "cryptography"):
        wheel(wheels, name)
    bundled = Path(ensurepip.__file__).parent / "_bundled"
    (pip,) = [*bundled.glob("pip-*.whl"), *Path("/usr/share/python-wheels").glob("pip-*.whl")][:1]
    shutil.copy(pip, wheels)
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


def test_a_disk_that_is_too_small_for_it(
    miniature: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deploying, "_SPARE_BYTES", 1 << 60)
    for name in ("edgesd", "cryptography", "pip"):
        wheel(tmp_path / "wheels", name)
    (tmp_path / "home").mkdir()
    with pytest.raises(ResourceError, match="to be left: free some space"):
        runtime(tmp_path / "home", miniature, tmp_path / "wheels")
