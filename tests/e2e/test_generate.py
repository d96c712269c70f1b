"""edgesd generate on a bundle of real graphs, as a user calls it."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgesd.runtime.bundle import Bundle
from edgesd.runtime.pipeline import Pipeline
from tests.support import PATIENCE_SECONDS, assert_refused, run_cli


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_one_image_with_its_making_in_it(miniature: Bundle, tmp_path: Path) -> None:
    out = tmp_path / "apple.png"
    prompt = "a red apple, très beau 🍎"
    outcome = run_cli(
        "generate", miniature.path, "-p", prompt, "--seed", 7, "--steps", 3, "--guidance", 2,
        "--negative", "blue", "--size", "20x12", "--scheduler", "dpmpp-2m", "-o", out,
    )  # fmt: skip
    assert outcome.code == 0
    image = Image.open(out)
    assert image.size == (20, 12)
    expected = {
        "prompt": prompt, "negative_prompt": "blue", "seed": "7", "steps": "3",
        "guidance_scale": "2.0", "scheduler": "dpmpp-2m", "size": "20x12", "model": "miniature",
        "precision": "fp32",
    }  # fmt: skip
    assert expected.items() <= image.text.items()  # type: ignore[attr-defined]


def test_the_one_file_form_makes_the_same_image(
    miniature: Bundle, miniature_file: Path, tmp_path: Path
) -> None:
    for name, bundle in (("a.png", miniature.path), ("b.png", miniature_file)):
        out = tmp_path / name
        assert run_cli("generate", bundle, "-p", "a cat", "--seed", 1, "-o", out).code == 0
    assert np.array_equal(pixels(tmp_path / "a.png"), pixels(tmp_path / "b.png"))


def test_many_images_from_files_and_flags(miniature: Bundle, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red apple\n\n  a blue cat  \n", encoding="utf-8")
    out = tmp_path / "out"
    outcome = run_cli(
        "generate", miniature.path, "-p", "a cat", "--prompts", prompts, "-n", 2, "--seed", 5,
        "--batch", 4, "-o", out, "--json",
    )  # fmt: skip
    assert outcome.code == 0
    report = json.loads(outcome.out)
    names = [Path(image["path"]).name for image in report["images"]]
    assert names == [
        "000-a-cat-5.png", "001-a-cat-6.png", "002-a-red-apple-5.png",
        "003-a-red-apple-6.png", "004-a-blue-cat-5.png", "005-a-blue-cat-6.png",
    ]  # fmt: skip
    assert sorted(path.name for path in out.iterdir()) == names
    assert report["peak_memory_bytes"] > 0
    assert report["run_seconds"].keys() == {"text_encoder", "unet", "vae_decoder"}
    assert len(report["step_seconds"]) == 2 * 4


def test_a_image_does_not_depend_on_its_batch(miniature: Bundle, tmp_path: Path) -> None:
    base = ("generate", miniature.path, "-p", "a cat", "-n", 3, "--seed", 5)
    base += ("--scheduler", "euler-a")
    assert run_cli(*base, "--batch", 3, "-o", tmp_path / "together").code == 0
    assert run_cli(*base, "--memory", "balanced", "-o", tmp_path / "alone").code == 0
    for path in (tmp_path / "together").iterdir():
        difference = pixels(path).astype(int) - pixels(tmp_path / "alone" / path.name)
        assert abs(difference).max() <= 1


def test_batches_too_large_for_both_halves_of_guidance(miniature: Bundle, tmp_path: Path) -> None:
    base = ("generate", miniature.path, "-p", "a cat", "-n", 40, "--seed", 5)
    assert run_cli(*base, "--batch", 40, "-o", tmp_path).code == 0
    assert len(list(tmp_path.iterdir())) == 40


def test_preview_is_there_until_the_image_is(
    miniature: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, tuple[int, int]]] = []
    out = tmp_path / "a.png"

    def generate(self: Pipeline, *arguments: object) -> object:
        made = generated(self, *arguments)  # type: ignore[arg-type]
        seen.append({path.name: Image.open(path).size for path in tmp_path.iterdir()})
        return made

    generated = Pipeline.generate
    monkeypatch.setattr(Pipeline, "generate", generate)
    run_cli("generate", miniature.path, "-p", "a cat", "--steps", 4, "--preview", 3, "-o", out)
    assert seen == [{"a.preview.png": (16, 16)}]
    assert list(tmp_path.iterdir()) == [out]


def test_a_long_prompt_is_cut_with_a_warning(miniature: Bundle, tmp_path: Path) -> None:
    prompt = "a cat " * 1700
    outcome = run_cli("generate", miniature.path, "-p", prompt, "-o", tmp_path / "a.png")
    assert outcome.code == 0
    warnings = [line for line in outcome.err.splitlines() if "warning" in line]
    assert len(warnings) == 1
    assert "takes 75 tokens; 3325 were cut: cat a cat" in warnings[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "no prompt"),
        (["-p", "x", "--steps", "0"], "0"),
        (["-p", "x", "--steps", "5000"], "5000"),
        (["-p", "x", "--size", "15x16"], "width 15 isn't a multiple of 2: the nearest is 16"),
        (["-p", "x", "--size", "big"], "isn't a size"),
        (["-p", "x", "--scheduler", "dim"], "did you mean 'ddim'"),
        (["-p", "x", "--scheduler", "flow-euler"], "flow-euler"),
        (["-p", "x", "--scheduler", ""], "unknown scheduler '': valid: ddim"),
        (["-p", "x", "--guidance", "nan"], "isn't a finite number"),
        (["-p", "x", "--guidance", "1e40"], "is not in the range -1000<=x<=1000"),
        (["-p", "x", "-o", "a.jpg"], "ending in .png"),
        (["-p", "x", "-o", "/proc/x/a.png"], "/proc/x"),
        (["-p", "x", "--guidance", "1", "--negative", "a\0b"], "NUL"),
        (["-p", "x", "--seed", "-1"], "seed"),
        (["-p", "x", "-n", "2", "-o", "two.png"], "one file for 2 images"),
        (
            ["-p", "x", "-n", "64", "--batch", "64"],
            "up to 63; 64 at a time need 128 (batched guidance)",
        ),
        (["-p", "a\0b"], "NUL"),
        (["--prompts", "missing.txt"], "missing.txt"),
        (
            ["-p", "x", "--memory", "fast", "--max-memory", "1GB"],
            "--memory fast is used whatever it needs, and --max-memory chooses one that fits",
        ),
    ],
)
def test_bad_values_are_refused_in_one_line(
    miniature: Bundle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert_refused(run_cli("generate", miniature.path, *arguments), words)
    assert not list(tmp_path.rglob("*.png"))


def test_prompt_file_must_be_text(miniature: Bundle, tmp_path: Path) -> None:
    path = tmp_path / "prompts"
    path.write_bytes(b"\xff\xfe\x00")
    assert_refused(run_cli("generate", miniature.path, "--prompts", path), "UTF-8")
    path.write_bytes(b"\n \n")
    assert_refused(run_cli("generate", miniature.path, "--prompts", path), "no prompt in it")


def test_a_full_disk_leaves_the_old_image(
    miniature: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "a.png"
    out.write_bytes(b"old")

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert_refused(run_cli("generate", miniature.path, "-p", "a cat", "-o", out), "no space left")
    assert out.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [out]


def test_too_little_memory_is_refused_before_loading(
    miniature: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgesd.runtime.loaded.available_bytes", lambda: 1 << 20)
    out = tmp_path / "a.png"
    outcome = run_cli("generate", miniature.path, "-p", "a cat", "-o", out)
    assert outcome.code == 6
    assert_refused(outcome, "16x16 pixels need about", "MB more of memory, and 1 MB are free")
    assert not out.exists()


@pytest.mark.parametrize("memory", ["balanced", "stream"])
def test_less_memory_generates_the_same_image(
    memory: str, miniature: Bundle, tmp_path: Path
) -> None:
    images = []
    for mode in ("fast", memory):
        out = tmp_path / f"{mode}.png"
        base = ("generate", miniature.path, "-p", "a cat", "--seed", "1", "--memory", mode)
        assert run_cli(*base, "-o", out).code == 0
        images.append(pixels(out).astype(int))
    assert np.abs(images[0] - images[1]).max() <= 1


def test_the_fastest_mode_that_fits_is_taken(miniature: Bundle, tmp_path: Path) -> None:
    base = ("generate", miniature.path, "-p", "a cat", "-o", tmp_path / "a.png", "--json")
    assert json.loads(run_cli(*base, "--max-memory", "10 GB").out)["memory"] == "fast"
    refused = run_cli(*base, "--max-memory", "30MB")
    assert refused.code == 6
    assert_refused(refused, "16x16 pixels need about", "--max-memory is 30 MB: allow")


@pytest.mark.parametrize(
    ("size", "words"),
    [
        *((size, "is no size in memory") for size in ("-1MB", "4TB", "1e9", "nan", "", "4 0MB")),
        *((size, "is less than 1 MB") for size in ("5", "400", "0MB", "999999", "0.9 MB", "900KB")),
    ],
)
def test_what_is_no_size_in_memory(size: str, words: str, miniature: Bundle) -> None:
    refused = run_cli("generate", miniature.path, "-p", "a cat", "--max-memory", size)
    assert refused.code == 2
    assert_refused(refused, f"{size!r} {words}: write 400MB or 1.5GB")


@pytest.mark.parametrize("size", ["1MB", "1000000", "0.001GB", "1MiB"])
def test_a_megabyte_is_a_size_in_memory(size: str, miniature: Bundle) -> None:
    refused = run_cli("generate", miniature.path, "-p", "a cat", "--max-memory", size)
    assert refused.code == 6
    assert_refused(refused, "--max-memory is 1 MB")


def test_components_are_released_when_memory_is_short(
    miniature: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def report(*options: str) -> dict[str, object]:
        base = ("generate", miniature.path, "-p", "a cat", "-o", tmp_path / "a.png", "--json")
        return dict(json.loads(run_cli(*base, *options).out))

    assert report()["memory"] == "fast"
    assert report("--memory", "balanced")["memory"] == "balanced"
    monkeypatch.setattr("edgesd.runtime.loaded.available_bytes", lambda: 80 << 20)
    assert report()["memory"] == "stream"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_leaves_no_half_file(miniature: Bundle, tmp_path: Path, number: int) -> None:
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-c", "from edgesd.cli import main; main()", "generate",
         str(miniature.path), "-p", "a cat", "-n", "100000", "--steps", "50", "-o", str(out)],
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr
    assert process.stderr.readline()  # the first image, or step, is there
    time.sleep(0.3)
    process.send_signal(number)
    _, rest = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 130
    assert "Traceback" not in rest
    assert rest.splitlines()[-1] == "edgesd: interrupted; no unfinished file was left"
    for path in out.glob("*"):  # none yet, on a busy machine
        assert path.suffix == ".png"
        Image.open(path).load()


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    outcome = run_cli("generate", tmp_path / "none", "-p", "x", "--debug")
    assert outcome.code == 4
    assert "Traceback" in outcome.err and "no bundle at" in outcome.err.splitlines()[-1]
