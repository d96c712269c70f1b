"""What commands write, where, and what they leave alone."""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from edgesd.runtime.bundle import Bundle, open_bundle
from edgesd.runtime.pipeline import Pipeline
from tests.support import assert_refused, run_cli


def edgesd(*arguments: object, **options: object) -> subprocess.CompletedProcess[bytes]:
    """Run `edgesd ARGUMENTS` in a process of its own."""
    command = [sys.executable, "-c", "from edgesd.cli import main; main()", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, timeout=120, **options)  # type: ignore[call-overload, no-any-return]


def generate(bundle: Bundle, out: Path, *options: object) -> list[str]:
    """Generate, and the images' names."""
    outcome = run_cli(
        "generate", bundle.path, "-p", "a cat", "--steps", 2, "--seed", 1, "-o", out, "--json",
        *options,
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    return [Path(image["path"]).name for image in json.loads(outcome.out)["images"]]


def test_images_of_an_earlier_run_stay(miniature: Bundle, tmp_path: Path) -> None:
    assert generate(miniature, tmp_path) == ["000-a-cat-1.png"]
    first = (tmp_path / "000-a-cat-1.png").read_bytes()
    (tmp_path / "007-mine.png").write_bytes(b"mine")
    assert generate(miniature, tmp_path, "-n", 2) == ["008-a-cat-1.png", "009-a-cat-2.png"]
    assert (tmp_path / "000-a-cat-1.png").read_bytes() == first
    assert (tmp_path / "007-mine.png").read_bytes() == b"mine"


def test_a_name_that_another_run_took_meanwhile_is_left_to_it(
    miniature: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = tmp_path / "000-a-cat-1.png"
    original = Pipeline.generate

    def after_theirs(self: Pipeline, *arguments: object) -> object:
        taken.write_bytes(b"theirs")
        return original(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Pipeline, "generate", after_theirs)
    assert generate(miniature, tmp_path) == ["001-a-cat-1.png"]
    assert taken.read_bytes() == b"theirs"


def test_a_named_image_is_replaced_and_told(miniature: Bundle, tmp_path: Path) -> None:
    out = tmp_path / "cat.png"
    out.write_bytes(b"old")
    out.chmod(0o600)
    done = run_cli("generate", miniature.path, "-p", "a cat", "--seed", 3, "-o", out)
    assert f"{out}  (seed 3; it replaces an older file)" in done.err
    Image.open(out).load()
    assert stat.S_IMODE(out.stat().st_mode) == 0o600


def test_a_preview_takes_no_name_that_is_taken(miniature: Bundle, tmp_path: Path) -> None:
    mine = tmp_path / "cat.preview.png"
    mine.write_bytes(b"mine")
    out = tmp_path / "cat.png"
    for options in ((), ("--preview", 1)):
        done = run_cli("generate", miniature.path, "-p", "a cat", "-o", out, *options)
        assert done.code == 0 and mine.read_bytes() == b"mine"
        assert set(tmp_path.iterdir()) == {mine, out}
    assert f"{mine} exists already: the preview is {tmp_path / 'cat.preview-2.png'}" in done.err


def test_a_preview_that_the_user_changed_is_theirs(
    miniature: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generated = Pipeline.generate

    def generate(self: Pipeline, *arguments: object) -> object:
        made = generated(self, *arguments)  # type: ignore[arg-type]
        (tmp_path / "cat.preview.png").write_bytes(b"mine now")
        return made

    monkeypatch.setattr(Pipeline, "generate", generate)
    out = tmp_path / "cat.png"
    assert run_cli(
        "generate", miniature.path, "-p", "a cat", "--preview", 1, "-o", out
    ).code == 0  # fmt: skip
    assert (tmp_path / "cat.preview.png").read_bytes() == b"mine now"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_no_preview(miniature: Bundle, tmp_path: Path, number: int) -> None:
    out = tmp_path / "cat.png"
    process = subprocess.Popen(
        [sys.executable, "-c", "from edgesd.cli import main; main()", "generate", miniature.path,
         "-p", "a cat", "--steps", "1000", "--size", "256x256", "--preview", "1", "-o", out],
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    end = time.monotonic() + 60
    while not (tmp_path / "cat.preview.png").exists():
        assert time.monotonic() < end, "no preview in a minute"
        time.sleep(0.01)
    process.send_signal(number)
    assert process.wait(60) == 130
    assert not list(tmp_path.iterdir())


def test_a_image_that_cannot_be_placed_is_kept(
    miniature: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "out"
    generated = Pipeline.generate

    def generate(self: Pipeline, *arguments: object) -> object:
        made = generated(self, *arguments)  # type: ignore[arg-type]
        if folder.exists():
            shutil.rmtree(folder)
        folder.write_bytes(b"a file now")
        return made

    monkeypatch.setattr(Pipeline, "generate", generate)
    outcome = run_cli(
        "generate", miniature.path, "-p", "a cat", "-n", 2, "--batch", 2, "--seed", 1, "-o", folder
    )
    assert outcome.code == 3
    kept = tmp_path / "cache/edgesd/kept"
    for name in ("000-a-cat-1.png", "001-a-cat-2.png"):
        Image.open(kept / name).load()
        assert str(kept / name) in outcome.err
    assert outcome.err.splitlines()[-1].startswith("edgesd: cannot write")


def test_a_image_on_standard_output(miniature: Bundle, tmp_path: Path) -> None:
    asked = ("generate", miniature.path, "-p", "a cat", "--seed", 1, "--steps", 2, "-o")
    done = edgesd(*asked, "-", cwd=tmp_path)
    assert done.returncode == 0 and b"standard output  (seed 1)" in done.stderr
    assert run_cli(*asked, tmp_path / "a.png").code == 0
    assert done.stdout == (tmp_path / "a.png").read_bytes()
    assert run_cli(*asked, f"{tmp_path}/./-").code == 0
    assert len(list((tmp_path / "-").iterdir())) == 1, "./- is a name"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--json",), "leave --json and --preview out"),
        (("--preview", 1), "leave --json and --preview out"),
        (("-n", 2), "standard output is one file for 2 images"),
    ],
)
def test_what_standard_output_does_not_take(
    options: tuple[object, ...], words: str, miniature: Bundle, tmp_path: Path
) -> None:
    done = edgesd("generate", miniature.path, "-p", "x", "-o", "-", *options, cwd=tmp_path)
    assert done.returncode == 2 and words.encode() in done.stderr and not done.stdout
    assert not list(tmp_path.iterdir())


def test_a_terminal_gets_no_image(miniature: Bundle, tmp_path: Path) -> None:
    terminal, inside = os.openpty()
    command = [sys.executable, "-c", "from edgesd.cli import main; main()", "generate"]
    command += [str(miniature.path), "-p", "x", "-o", "-"]
    done = subprocess.run(
        command, stdout=inside, stderr=subprocess.PIPE, cwd=tmp_path, timeout=120
    )  # fmt: skip
    os.close(inside)
    os.close(terminal)
    assert done.returncode == 2 and b"send it to a file or a pipe" in done.stderr


def test_a_reader_that_went_away_costs_no_image(miniature: Bundle, tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-c", "from edgesd.cli import main; main()", "generate"]
    command += [str(miniature.path), "-p", "x", "--steps", "1", "-o", "-"]
    done = subprocess.run(
        command, stdout=writing, stderr=subprocess.PIPE, timeout=120, text=True,
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path)},
    )  # fmt: skip
    os.close(writing)
    assert done.returncode == 3
    Image.open(done.stderr.rstrip().rpartition("kept as ")[2]).load()


@pytest.mark.parametrize(
    "arguments",
    [
        ("pack", "{bundle}", "-"),
        ("build", "demo", "--target", "x86-64-cpu", "-o", "-"),
        ("build", "demo", "--target", "x86-64-cpu", "--work", "-"),
        ("bench", "{bundle}", "-o", "-"),
        ("bench", "{bundle}", "--html", "-"),
        ("report", "{bundle}", "-o", "-"),
        ("demo", "-o", "-"),
        ("profile", "-o", "-"),
        ("finalize", "{bundle}", "--plans", "-"),
        ("keys", "new", "-"),
        ("prompter", "data", "x", "--format", "captions", "-o", "-"),
        ("prompter", "train", "x", "--base", "x", "-o", "-"),
    ],
)
def test_a_dash_is_no_name(
    arguments: tuple[str, ...], miniature: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = (word.format(bundle=miniature.path) for word in arguments)
    outcome = run_cli(*words)
    assert outcome.code == 2
    assert_refused(outcome, "standard output can't be written to: give a name")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", "{bundle}", "-p", "a", "-o", "a.png/"),
        ("pack", "{bundle}", "a.edgesd/"),
        ("report", "{bundle}", "-o", "a.html/"),
        ("bench", "{bundle}", "-o", "a.json/"),
    ],
)
def test_a_name_that_ends_in_a_slash_replaces_no_file(
    arguments: tuple[str, ...], miniature: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    older = tmp_path / arguments[-1]
    older.write_bytes(b"mine")
    outcome = run_cli(*(word.format(bundle=miniature.path) for word in arguments))
    assert outcome.code == 2
    assert_refused(outcome, "is a folder's name, by the slash at its end")
    assert older.read_bytes() == b"mine" and [*tmp_path.iterdir()] == [older]


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", "{bundle}", "-p", "a"),
        ("pack", "{bundle}", "x.edgesd"),
        ("build", "demo", "--target", "x86-64-cpu", "-o", "x.edgesd"),
        ("keys", "new", "x"),
    ],
)
def test_a_current_folder_that_was_removed_is_named(
    arguments: tuple[str, ...], miniature: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    outcome = run_cli(*(word.format(bundle=miniature.path) for word in arguments))
    assert outcome.code == 3
    assert_refused(outcome, "the current folder was removed")


def test_a_image_goes_into_a_device_as_it_is_named(miniature: Bundle, tmp_path: Path) -> None:
    null = tmp_path / "nothing"
    null.symlink_to("/dev/null")
    drawing = ("generate", miniature.path, "-p", "a", "--steps", 1)
    done = run_cli(*drawing, "-o", null)
    assert done.code == 0 and "replaces" not in done.err
    assert null.is_symlink() and [*tmp_path.iterdir()] == [null]
    assert_refused(run_cli(*drawing, "-n", 2, "-o", null), "is one file for 2 images")


def test_no_output_replaces_what_the_command_reads_or_writes_besides(
    miniature_file: Path, tmp_path: Path
) -> None:
    bundle, captions, page = tmp_path / "b.edgesd", tmp_path / "c.txt", tmp_path / "x.html"
    shutil.copy(miniature_file, bundle)
    captions.write_text("a cat\na dog\n")
    before = {path: path.read_bytes() for path in (bundle, captions)}
    link = tmp_path / "link.json"
    link.symlink_to(bundle)
    for arguments in (
        ("bench", bundle, "-o", bundle),
        ("bench", bundle, "-o", link),
        ("bench", bundle, "--html", page, "-o", page),
        ("prompter", "data", captions, "--format", "captions", "-o", captions),
    ):
        assert_refused(run_cli(*arguments), "is needed for something else here")
    assert {path: path.read_bytes() for path in before} == before and not page.exists()
    refused = run_cli("generate", bundle, "-p", "x", "-o", "")
    assert_refused(refused, "an empty name")


def test_a_private_bundle_stays_private_when_it_is_signed(
    miniature_file: Path, tmp_path: Path
) -> None:
    bundle = tmp_path / "b.edgesd"
    shutil.copy(miniature_file, bundle)
    bundle.chmod(0o600)
    before = os.umask(0o022)
    try:
        assert run_cli("keys", "new", tmp_path / "k").code == 0
        assert run_cli("keys", "sign", bundle, "--key", tmp_path / "k.key").code == 0
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes == {"b.edgesd": 0o600, "k.key": 0o600, "k.pub": 0o644}
    assert open_bundle(bundle).signed
    assert_refused(run_cli("keys", "new", tmp_path / "k"), "exists already")
    assert_refused(run_cli("pack", miniature_file, bundle), "exists already")


def no_entry(uid: int) -> None:
    raise KeyError(uid)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("generate", "{bundle}", "-p", "x", "--steps", "1", "-o", "a.png"), 0),
        (("bench", "{bundle}", "-n", "1", "--steps", "1"), 0),
        (("keys", "list"), 0),
        (("keys", "check", "{bundle}"), 0),
        (("keys", "trust", "ssh-ed25519 {key}"), 3),
        (("kernels", "status"), 0),
        (("slots", "show"), 3),
        (("slots", "rollback"), 3),
        (("build", "~/model", "--target", "x86-64-cpu"), 3),
        (("build", "~nobody-knows/model", "--target", "x86-64-cpu"), 3),
        (("build", "owner/name", "--target", "x86-64-cpu"), 3),
    ],
)
def test_a_user_without_home_and_name(
    arguments: tuple[str, ...],
    code: int,
    miniature: Bundle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pwd.getpwuid", no_entry)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for name in ("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "EDGESD_HOME", "EDGESD_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    key = base64.b64encode(b"\0\0\0\x0bssh-ed25519\0\0\0 " + bytes(32)).decode()
    outcome = run_cli(*(word.format(bundle=miniature.path, key=key) for word in arguments))
    assert outcome.code == code, outcome.err
    assert "fault" not in outcome.err and "Traceback" not in outcome.err
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("~")]
