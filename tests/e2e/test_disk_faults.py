"""File systems without modes and links, full disks and dying ones: no command loses a file, leaves
half of one, or ends in a fault of its own."""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from edgesd.files import sha256_file
from edgesd.runtime.bundle import CHECKSUM, MANIFEST, Bundle, open_bundle
from tests.support import run_cli

SOURCE = Path(__file__).parents[1] / "disk_faults.c"

# As vfat, exFAT and network disks are mounted.
PLAIN = {
    "chmod": errno.EPERM,
    "link": errno.EPERM,
    "fsyncdir": errno.EINVAL,
    "lock": errno.ENOSYS,
}
QUICK = [
    ("generate", PLAIN),
    ("pack", PLAIN),
    ("generate", {"rename": errno.EIO, "link": errno.EIO}),
]
BOUNDS = (0, 1, 2, 3, 5, 8, 13)
FAULTS: list[dict[str, int | str]] = [
    PLAIN,
    {**PLAIN, "symlink": errno.EPERM},
    {"link": errno.EOPNOTSUPP, "chmod": errno.EOPNOTSUPP},
    {"link": errno.ENOSYS, "fsyncdir": errno.EINVAL, "fsync": errno.EINVAL},
    {"name": f"{errno.ENAMETOOLONG}@60"},
    {"name": f"{errno.ENAMETOOLONG}@143"},
    *(
        {call: f"{number}@{bound}"}
        for call, numbers in {
            "write": (errno.ENOSPC, errno.EIO),
            "create": (errno.EROFS, errno.EACCES),
            "fsync": (errno.EIO, errno.ENOSPC),
            "fsyncdir": (errno.EIO,),
            "mkdir": (errno.EROFS, errno.ENOSPC),
            "rename": (errno.EIO, errno.EROFS),
            "link": (errno.EIO, errno.ENOSPC),
        }.items()
        for number in numbers
        for bound in BOUNDS
    ),
]
COMMANDS = ("generate", "folder", "pack", "sign", "bench", "report", "install")


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The calls that fail, compiled."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs a C compiler, and Linux")
    path = tmp_path_factory.mktemp("faults") / "faults.so"
    command = [compiler, "-shared", "-fPIC", "-O1", "-o", str(path), str(SOURCE), "-ldl"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"the C library can't be compiled: {done.stderr[:200]}")
    return path


@pytest.fixture(scope="session")
def key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A private key."""
    from edgesd.runtime.signature import new_key

    path = tmp_path_factory.mktemp("keys") / "k"
    new_key(path)
    return path.with_suffix(".key")


class Case:
    """A command that writes below `root`, where there are files already."""

    def __init__(self, name: str, bundle: Bundle, file: Path, key: Path, root: Path) -> None:
        self.name, self.root = name, root
        self.environment = {}
        root.mkdir()
        self.theirs = {root / "theirs.txt": b"theirs", root / "cat.preview.png": b"theirs"}
        self.wanted = root / {
            "generate": "cat.png", "folder": "images", "pack": "b.edgesd", "sign": "b.edgesd",
            "bench": "bench.json", "report": "page.html", "install": "current",
        }[name]  # fmt: skip
        generate = ["-p", "a cat", "--steps", "2", "--seed", "1"]
        self.arguments = {
            "generate": ["generate", bundle.path, *generate, "--preview", "1", "-o", self.wanted],
            "folder": ["generate", bundle.path, *generate, "-n", "3", "--batch", "2", "-o",
                       self.wanted],
            "pack": ["pack", bundle.path, self.wanted],
            "sign": ["keys", "sign", self.wanted, "--key", key],
            "bench": ["bench", bundle.path, "-n", "1", "--steps", "1", "-o", self.wanted],
            "report": ["report", bundle.path, "-o", self.wanted],
            "install": ["slots", "install", sha256_file(bundle.path / MANIFEST),
                        sha256_file(bundle.path / CHECKSUM), "--no-self-test"],
        }[name]  # fmt: skip
        if name in ("generate", "bench", "report"):
            self.wanted.write_bytes(b"older")
        if name == "sign":
            shutil.copy(file, self.wanted)
            self.wanted.chmod(0o600)
        if name == "folder":
            self.wanted.mkdir()
            self.theirs[self.wanted / "000-a-cat-1.png"] = b"theirs"
        if name == "install":
            self.environment["EDGESD_HOME"] = str(root)
            (root / "objects").mkdir()
            for each in [*bundle.manifest.files, *bundle.frame]:
                shutil.copy(bundle.path / each, root / "objects" / sha256_file(bundle.path / each))
        for path, content in self.theirs.items():
            path.write_bytes(content)

    def check(self, done: subprocess.CompletedProcess[str]) -> None:
        """Nothing is lost, nothing is half."""
        said = f"{self.name}: {done.returncode}: {done.stderr}"
        assert "Traceback" not in done.stderr and "internal fault" not in done.stderr, said
        assert done.returncode in (0, 3, 4, 6), said
        for path, content in self.theirs.items():
            assert path.read_bytes() == content, said
        for path in self.root.rglob("*"):
            assert not path.name.endswith(".part"), said
            if path.suffix == ".png" and path not in self.theirs and path.read_bytes() != b"older":
                assert not path.name.endswith(".preview.png"), said
                Image.open(path).load()
        if self.name in ("generate", "folder"):
            for kept in re.findall(r"kept as (\S+?\.png)", done.stderr):
                Image.open(kept).load()
            generated = "seconds per step" in done.stderr or "s per step" in done.stderr
            assert generated == (done.returncode == 0), said
        if done.returncode == 0:
            assert self.wanted.exists(), said
        if self.name in ("pack", "sign", "install") and self.wanted.exists():
            bundle = open_bundle(self.wanted)
            bundle.verify()
            assert self.name != "sign" or bundle.signed or done.returncode != 0, said
        if self.name in ("bench", "report"):
            content = self.wanted.read_bytes()
            whole = content.rstrip().endswith((b"}]", b"</html>"))
            assert whole if done.returncode == 0 else content == b"older" or whole, said


def run(
    name: str, faults: dict[str, int | str], library: Path, key: Path, bundle: Bundle,
    file: Path, folder: Path,
) -> None:  # fmt: skip
    case = Case(name, bundle, file, key, folder / "disk")
    environment = {
        **os.environ,
        **case.environment,
        "XDG_CACHE_HOME": str(folder / "cache"),
        "LD_PRELOAD": str(library),
        "FAULT_FOLDER": str(case.root),
        "FAULTS": ",".join(f"{call}={number}" for call, number in faults.items()),
    }
    command = [sys.executable, "-c", "from edgesd.cli import main; main()"]
    command += [str(word) for word in case.arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    case.check(done)
    if faults == PLAIN and name != "install":  # slots need a lock
        assert done.returncode == 0, done.stderr


def title(value: object) -> str | None:
    if isinstance(value, dict):
        return ",".join(f"{call}={number}" for call, number in value.items())
    return None


@pytest.mark.parametrize(("name", "faults"), QUICK, ids=title)
def test_a_disk_that_lacks_or_refuses(
    name: str,
    faults: dict[str, int | str],
    library: Path,
    key: Path,
    miniature: Bundle,
    miniature_file: Path,
    tmp_path: Path,
) -> None:
    run(name, faults, library, key, miniature, miniature_file, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_on_every_disk(
    name: str, library: Path, key: Path, miniature: Bundle, miniature_file: Path, tmp_path: Path
) -> None:
    for number, faults in enumerate(FAULTS):
        folder = tmp_path / str(number)
        folder.mkdir()
        try:
            run(name, faults, library, key, miniature, miniature_file, folder)
        except AssertionError as exc:
            raise AssertionError(f"{title(faults)}: {exc}") from exc


@pytest.fixture
def without_modes(tmp_path: Path) -> Iterator[Path]:
    """A folder in which chmod is refused, as on vfat, by a real file system."""
    if not shutil.which("bindfs") or not shutil.which("fusermount"):
        pytest.skip("needs bindfs and fusermount")
    (tmp_path / "disk").mkdir()
    mounted = tmp_path / "mounted"
    mounted.mkdir()
    done = subprocess.run(["bindfs", "--chmod-deny", tmp_path / "disk", mounted])
    if done.returncode:
        pytest.skip("bindfs can't mount here")
    yield mounted
    subprocess.run(["fusermount", "-u", "-z", mounted], check=True)


def test_a_mounted_disk_without_modes(
    without_modes: Path, miniature: Bundle, miniature_file: Path
) -> None:
    image, packed = without_modes / "a.png", without_modes / "b.edgesd"
    shutil.copyfile(miniature_file, without_modes / "c.edgesd")
    for arguments in (
        ("generate", miniature.path, "-p", "a cat", "--steps", 1, "-o", image),
        ("generate", miniature.path, "-p", "a cat", "--steps", 1, "-o", image),
        ("generate", miniature.path, "-p", "a cat", "--steps", 1, "-o", without_modes),
        ("pack", miniature.path, packed),
    ):
        outcome = run_cli(*arguments)
        assert outcome.code == 0, outcome.err
    Image.open(image).load()
    open_bundle(packed).verify()
    assert len(list(without_modes.iterdir())) == 4
