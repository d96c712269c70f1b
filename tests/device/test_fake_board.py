"""Deploy, generate and bench on the emulated arm64 board of scripts/fake_board: a real sshd, real
aarch64 wheels. Needs root and Debian's packages; minutes. Its speed is never looked at."""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from edgesd.runtime.bundle import Bundle
from tests.support import assert_refused, run_cli, with_other_decoder, write_bundle

pytestmark = pytest.mark.fake_board
ROOT = Path(__file__).resolve().parents[2]


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fake", ROOT / "scripts/fake_board/__main__.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The board's address; this user's home for SSH is a folder of the test."""
    fake = script()
    if os.geteuid() != 0 or not all(shutil.which(tool) for tool in fake.NEEDED):
        pytest.skip("needs root, and apt-get install " + " ".join(fake.NEEDED.values()))
    home = tmp_path_factory.mktemp("home")
    (home / ".ssh").mkdir()
    key = home / ".ssh/id_ed25519"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    address = fake.start(key.with_suffix(".pub"))
    shutil.copy(fake.folder() / "known_hosts", home / ".ssh/known_hosts")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(fake.folder().parent.parent))
        patch.setenv("HOME", str(home))
        patch.setenv("SSH_AUTH_SOCK", "")
        yield address
    fake.stop()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_bundle(tmp_path_factory.mktemp("pi") / "miniature", "raspberry-pi-5", "aarch64")


def ssh(host: str, command: str) -> str:
    home = Path(os.environ["HOME"]) / ".ssh"
    options = ["-i", home / "id_ed25519", "-o", f"UserKnownHostsFile={home}/known_hosts"]
    options += ["-o", "BatchMode=yes"]
    done = subprocess.run(["ssh", *options, host, command], capture_output=True, check=True)
    return done.stdout.decode()


def test_deploy_generate_and_bench(host: str, bundle: Bundle, tmp_path: Path) -> None:
    assert ssh(host, "uname -m") == "aarch64\n"
    outcome = run_cli("deploy", bundle.path, host, "--json")
    assert outcome.code == 0, outcome.err
    told = json.loads(outcome.out)[host]
    assert told["runtime"] == "installed" and told["installed"]["self_test"]["emulated"]
    assert told["written_bytes"] > told["sent_bytes"] > 40e6

    again = run_cli("deploy", bundle.path, host, "--json")
    told = json.loads(again.out)[host]
    assert told["runtime"] == "kept" and told["sent_bytes"] == 0

    generate = "-p 'a star' --seed 3 --steps 3"
    ssh(host, f"edgesd/bin/edgesd generate edgesd/current {generate} -o there.png")
    here = tmp_path / "here.png"
    command = [sys.executable, "-m", "edgesd", "generate", str(bundle.path), "--any-machine"]
    arguments = ["-p", "a star", "--seed", "3", "--steps", "3", "-o", str(here)]
    subprocess.run([*command, *arguments], check=True)
    encoded = ssh(host, "base64 there.png")
    theirs = np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded))), np.float64)
    error = np.mean((theirs - np.asarray(Image.open(here), np.float64)) ** 2)
    assert error == 0 or 10 * np.log10(255**2 / error) >= 60

    page = tmp_path / "page.html"
    outcome = run_cli("bench", bundle.path, "--host", host, "-n", "2", "--html", page, "--json")
    assert outcome.code == 0, outcome.err
    (bench,) = json.loads(outcome.out)
    assert bench["emulated"] and bench["machine"]["model"] == "Raspberry Pi 5 Model B Rev 1.0"
    assert "is emulated" in page.read_text()


def test_only_what_changed_goes_there(host: str, bundle: Bundle, tmp_path: Path) -> None:
    other = with_other_decoder(bundle, tmp_path / "other")
    assert run_cli("deploy", bundle.path, host).code == 0
    outcome = run_cli("deploy", other.path, host, "--json")
    sent = json.loads(outcome.out)[host]["sent_bytes"]
    assert sent == other.size("vae_decoder/weights.bin") + sum(map(other.size, other.frame))
    assert run_cli("deploy", "--rollback", host).code == 0


def test_a_bundle_for_another_architecture(host: str, tmp_path: Path) -> None:
    wrong = write_bundle(tmp_path / "wrong", "x86-64-cpu", "x86_64")
    assert_refused(run_cli("deploy", wrong.path, host), "is aarch64", "x86-64-cpu (x86_64)")


def test_a_board_that_is_full(host: str, bundle: Bundle, tmp_path: Path) -> None:
    """Its home is a disk of 8 MB for a moment."""
    root = script().folder() / "root"
    small = root / "home/pi/edgesd"
    kept = root / "home/pi/kept"
    small.rename(kept)
    small.mkdir()
    within = script().mount_namespace()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m,mode=777", "t", small]
    subprocess.run([*within, *command], check=True)
    try:
        outcome = run_cli("deploy", bundle.path, host)
        assert outcome.code == 6
        assert "of disk free" in outcome.err.splitlines()[-1]
    finally:
        subprocess.run([*within, "umount", small], check=True)
        small.rmdir()
        kept.rename(small)
