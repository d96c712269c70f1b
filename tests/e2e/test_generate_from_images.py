"""edgesd generate --image and --mask, and the same from Python."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edgesd.errors import ResourceError, UsageError
from edgesd.runtime.bundle import Bundle
from edgesd.runtime.loaded import Timings
from edgesd.runtime.pipeline import Pipeline
from edgesd.runtime.requests import Request
from edgesd.runtime.settings import Settings
from tests.support import Outcome, assert_refused, run_cli, write_bundle

SIZE = (17, 15)
"""Width and height of the image that is given."""

DRAWN = (16, 14)


@pytest.fixture(scope="module")
def bundle(miniature: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    manifest = miniature.manifest
    folder = tmp_path_factory.mktemp("bundles") / "images"
    return write_bundle(folder, manifest.target, manifest.arch, images=True)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A photo of noise."""
    pixels = np.random.default_rng(3).integers(0, 256, (SIZE[1], SIZE[0], 3), np.uint8)
    path = tmp_path / "photo.png"
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def mask(tmp_path: Path) -> Path:
    """Of which the right half is painted."""
    values = np.zeros((SIZE[1], SIZE[0]), np.uint8)
    values[:, SIZE[0] // 2 :] = 255
    path = tmp_path / "mask.png"
    Image.fromarray(values).save(path)
    return path


def generate(bundle: Bundle, *options: object) -> Outcome:
    return run_cli("generate", bundle.path, "-p", "a cat", "--seed", 5, *options)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def pixels(path: Path) -> Any:
    with Image.open(path) as opened:
        return np.asarray(opened.convert("RGB"))


def test_an_image_says_what_it_was_made_from(bundle: Bundle, image: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.png"
    outcome = generate(bundle, "--image", image, "--strength", 0.5, "-o", tmp_path / "o", "--json")
    assert outcome.code == 0, outcome.err
    report = json.loads(outcome.out)
    (made,) = report["images"]
    assert made["image"]["sha256"] == sha256(image)
    assert (made["mask"], made["strength"]) == (None, 0.5)
    assert (made["width"], made["height"]) == DRAWN
    assert len(report["step_seconds"]) == 2 and "vae_encoder" in report["run_seconds"]
    path = Path(made["path"])
    with Image.open(path) as opened:
        assert opened.info["image"] == sha256(image) and opened.info["strength"] == "0.5"
        assert "Denoising strength: 0.5" in opened.info["parameters"]
        assert opened.size == DRAWN
    assert_refused(
        run_cli("generate", bundle.path, "--like", path, "-o", out),
        f"was made from other images: give --image FILE (image: sha256 {sha256(image)})",
    )
    again = run_cli("generate", bundle.path, "--like", path, "--image", image, "-o", out)
    assert again.code == 0, again.err
    assert np.array_equal(pixels(out), pixels(path)) and "isn't the file" not in again.err
    other = tmp_path / "other.png"
    Image.new("RGB", SIZE).save(other)
    again = run_cli("generate", bundle.path, "--like", path, "--image", other, "-o", out)
    assert again.code == 0 and f"isn't the file that {path} was made from" in again.err


def test_what_is_masked_is_painted_into_the_image(
    bundle: Bundle, image: Path, mask: Path, tmp_path: Path
) -> None:
    given = ("--image", image, "--mask", mask)
    out, whole = tmp_path / "pasted.png", tmp_path / "whole.png"
    outcome = generate(bundle, *given, "--mask-blur", 0, "-o", out)
    assert outcome.code == 0, outcome.err
    assert generate(bundle, *given, "-o", whole).code == 0
    half = SIZE[0] // 2
    assert pixels(out).shape == (SIZE[1], SIZE[0], 3)
    assert np.array_equal(pixels(out)[:, :half], pixels(image)[:, :half])
    assert not np.array_equal(pixels(out)[:, half:], pixels(image)[:, half:])
    assert pixels(whole).shape == (DRAWN[1], DRAWN[0], 3)
    with Image.open(out) as opened:
        assert opened.info["mask"] == sha256(mask) and opened.info["mask_blur"] == "0.0"
        assert "strength" in opened.info and "mask_padding" not in opened.info


def test_several_images_begin_with_one(
    bundle: Bundle, image: Path, mask: Path, tmp_path: Path
) -> None:
    """Each as on its own, whatever its batch and its memory mode."""
    given = ("--image", image, "--mask", mask, "-p", "a red apple", "-n", 2)
    for name, options in {
        "together": ("--batch", 4),
        "alone": (),
        "balanced": ("--memory", "balanced", "--preview", 1),
        "stream": ("--memory", "stream"),
    }.items():
        assert generate(bundle, *given, *options, "-o", tmp_path / name).code == 0
        found = sorted((tmp_path / name).iterdir())
        assert len(found) == 4
        for path in found:
            off = pixels(path).astype(int) - pixels(tmp_path / "together" / path.name)
            assert abs(off).max() <= 1


def test_notes_on_images_are_told(bundle: Bundle, image: Path, mask: Path, tmp_path: Path) -> None:
    with Image.open(mask) as opened:
        opened.resize((2 * SIZE[0], 2 * SIZE[1])).save(mask)
    outcome = generate(bundle, "--image", image, "--mask", mask, "-o", tmp_path / "a.png")
    assert outcome.code == 0 and "mask.png is scaled from 34x30" in outcome.err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--mask", "mask.png"], "a mask goes with an image: give --image"),
        (["--strength", 0.5], "strength goes with an image"),
        (["--mask-blur", 4], "mask_blur goes with an image"),
        (["--image", "photo.png", "--strength", 0], "0"),
        (["--image", "photo.png", "--strength", 1.5], "1.5"),
        (["--image", "photo.png", "--strength", 0.1], "strength 0.1 leaves no step of 4"),
        (["--image", "photo.png", "--mask-blur", 4], "go with a mask: give --mask"),
        (["--image", "tiny.png"], "tiny.png has 1x9 pixels, less than the 2x2 that can be drawn"),
        (["--image", "none.png"], "none.png can't be read: No such file"),
        (["--image", "text.png"], "text.png is damaged, or no picture"),
        (["--image", "photo.png", "--mask", "tiny.png"], "a mask has the shape of its image"),
        (["--image", "photo.png", "--mask", "black.png"], "has no white in it"),
        (["--image", "photo.png", "--size", "21x16"], "width 21 isn't a multiple of 2"),
    ],
)
def test_what_cannot_be_made_is_refused_before_anything_runs(
    options: Sequence[object],
    words: str,
    bundle: Bundle,
    image: Path,
    mask: Path,
    tmp_path: Path,
) -> None:
    Image.new("RGB", (1, 9)).save(tmp_path / "tiny.png")
    Image.new("L", SIZE).save(tmp_path / "black.png")
    (tmp_path / "text.png").write_text("a cat")
    out = tmp_path / "out"
    given = [tmp_path / one if str(one).endswith(".png") else one for one in options]
    assert_refused(generate(bundle, *given, "-o", out), words)
    assert not out.exists()


def test_a_bundle_for_text_says_how_one_for_images_is_built(
    miniature: Bundle, image: Path, tmp_path: Path
) -> None:
    outcome = generate(miniature, "--image", image, "-o", tmp_path / "a.png")
    assert_refused(outcome, "doesn't begin with an image: build it with --task image")


def test_python_takes_images_and_files(bundle: Bundle, image: Path) -> None:
    request = Request("a cat", 5)
    with Pipeline(bundle, Settings()) as pipeline, Image.open(image) as opened:
        wanted, *others = (
            pipeline.generate([replace(request, image=given)])[0]
            for given in (image, str(image), opened)
        )
    assert wanted.size == DRAWN
    for other in others:
        assert np.array_equal(np.asarray(wanted), np.asarray(other))


def test_a_large_image_is_drawn_with_as_many_pixels_as_the_bundle_has(
    bundle: Bundle, image: Path, mask: Path, tmp_path: Path
) -> None:
    photo = tmp_path / "large.png"
    with Image.open(image) as opened:
        opened.resize((800, 600)).save(photo)
    out = tmp_path / "a.png"
    outcome = generate(bundle, "--image", photo, "-o", out)
    assert outcome.code == 0, outcome.err
    told = "large.png has 800x600 pixels and is drawn with 18x14, which suits the model: --size"
    assert told in outcome.err
    assert pixels(out).shape == (14, 18, 3)
    outcome = generate(bundle, "--image", photo, "--size", "24x18", "-o", out)
    assert outcome.code == 0 and "is drawn with" not in outcome.err
    assert pixels(out).shape == (18, 24, 3)
    white = tmp_path / "white.png"
    Image.new("1", (80, 60), 1).save(white)
    given = ("--image", photo, "--mask", white, "--mask-blur", 2)
    assert generate(bundle, *given, "-o", out).code == 0
    assert pixels(out).shape == (600, 800, 3)


def test_images_are_encoded_once_for_all_batches(
    bundle: Bundle, image: Path, mask: Path, tmp_path: Path
) -> None:
    def encoded(pipeline: Pipeline, *seeds: int, **asked: Any) -> tuple[bool, list[bytes]]:
        """Whether the encoder ran, and the images."""
        pipeline.timings = Timings()
        made = pipeline.generate([Request("a cat", seed, **asked) for seed in seeds])
        return "vae_encoder" in pipeline.timings.run, [each.tobytes() for each in made]

    other = tmp_path / "other.png"
    Image.new("RGB", SIZE, "red").save(other)
    with Pipeline(bundle, Settings(memory="balanced")) as pipeline:
        first = encoded(pipeline, 1, image=image)
        second = encoded(pipeline, 2, image=image)
        assert first[0] and not second[0]
        assert encoded(pipeline, 1, 2, image=image) == (False, first[1] + second[1])
        assert encoded(pipeline, 1, image=image, width=8, height=8)[0]
        assert encoded(pipeline, 1, image=other)[0]
        assert encoded(pipeline, 1, image=image) == first
        assert encoded(pipeline, 1, image=image, mask=mask)[0]  # what the mask leaves of it
        assert not encoded(pipeline, 2, image=image, mask=mask, mask_blur=0)[0]
        pipeline.forget()
        assert encoded(pipeline, 2, image=image) == (True, second[1])


def test_reading_large_pictures_counts_as_memory(bundle: Bundle, tmp_path: Path) -> None:
    Image.new("RGB", (2000, 1500)).save(tmp_path / "large.png")
    Image.new("RGB", (16, 12)).save(tmp_path / "small.png")
    Image.new("L", (2000, 1500), 255).save(tmp_path / "mask.png")
    large, small = (
        Request("a cat", 5, image=tmp_path / f"{each}.png") for each in ("large", "small")
    )
    with Pipeline(bundle, Settings(memory="fast")) as pipeline:
        more, least = (
            pipeline.estimate(pipeline.complete(replace(each, width=16, height=12)), 1)
            for each in (large, small)
        )
        assert more - least >= 12 * 2000 * 1500 - 10**5
        masked = replace(large, mask=tmp_path / "mask.png")
        pasted = replace(masked, mask_blur=1)
        assert more < pipeline.estimate(pipeline.complete(masked), 1)
        one, two = (pipeline.estimate(pipeline.complete(pasted), count) for count in (1, 2))
        assert two - one > 8 * 2000 * 1500
    limit = Settings(max_memory=more - 10**6)
    with Pipeline(bundle, limit) as pipeline, pytest.raises(ResourceError) as caught:
        pipeline.fit(pipeline.complete(large), 1)
    assert "smaller pictures" in str(caught.value)


def test_the_encoder_stays_while_it_is_of_use(bundle: Bundle, image: Path) -> None:
    text, seen = Request("a cat", 5), list[tuple[str, ...]]()
    with Pipeline(bundle, Settings(memory="fast")) as pipeline:
        pipeline.generate([replace(text, image=image)])
        assert "vae_encoder" in pipeline.loaded
        from_image, from_text = (
            pipeline.estimate(pipeline.complete(each), 1)
            for each in (
                replace(text, image=image),
                replace(text, width=DRAWN[0], height=DRAWN[1]),
            )
        )
        assert from_image > from_text
        pipeline.generate([text])
        assert "vae_encoder" not in pipeline.loaded and "unet" in pipeline.loaded
    with Pipeline(bundle, Settings(memory="balanced")) as pipeline:
        pipeline.generate([replace(text, image=image)], lambda step: seen.append(pipeline.loaded))
        assert seen and all("vae_encoder" not in loaded for loaded in seen)


def test_a_part_of_an_image_is_not_left_to_a_refiner(
    bundle: Bundle, image: Path, mask: Path
) -> None:
    asked = Request("a cat", 5, image=image, mask=mask, denoising_end=0.8)
    with Pipeline(bundle) as pipeline, pytest.raises(UsageError, match="leave --refiner or --mask"):
        pipeline.begin([asked])
