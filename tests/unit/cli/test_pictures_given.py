"""`edgesd generate` with whatever is given for a picture: an image, or one line and nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from edgesd.errors import EdgesdError
from edgesd.runtime.bundle import Bundle
from edgesd.runtime.pictures import read_picture
from tests.hostile_pictures import CASES, Case, encoded
from tests.support import Outcome, run_cli, write_bundle


@pytest.fixture(scope="module")
def painter(miniature: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle that begins with images and inpaints."""
    manifest, folder = miniature.manifest, tmp_path_factory.mktemp("bundles") / "painter"
    return write_bundle(folder, manifest.target, manifest.arch, images=True)


def generate(bundle: Bundle, folder: Path, *arguments: object) -> Outcome:
    """One image of 16x16 pixels in two steps, as folder/out.png."""
    given = "--size", "16x16", "--steps", 2, "--seed", 1, "-o", folder / "out.png"
    return run_cli("generate", bundle.path, "--prompt", "a cat", *given, *arguments)


def one_line(outcome: Outcome, code: int = 3) -> str:
    """The line by which a command was refused."""
    assert outcome.code == code, outcome
    assert outcome.out == ""
    (line,) = outcome.err.splitlines()
    assert line.startswith("edgesd: ")
    return line


def readable(case: Case, raw: bytes) -> bool:
    """Whether the bytes of a case are to be read: as it says, if all of Pillow's versions agree."""
    if case.outcome != "either":
        return case.outcome == "read"
    try:
        read_picture(raw)
    except EdgesdError:
        return False
    return True


@pytest.mark.parametrize("name", CASES)
def test_hostile_images(name: str, tmp_path: Path, painter: Bundle) -> None:
    case = CASES[name]
    path = tmp_path / "given.png"
    path.write_bytes(case.make())
    outcome = generate(painter, tmp_path, "--image", path)
    if readable(case, path.read_bytes()):
        assert outcome.code == 0, outcome
        assert case.said in outcome.err
        assert {each.name for each in tmp_path.iterdir()} == {"given.png", "out.png"}
        with Image.open(tmp_path / "out.png") as image:
            assert image.size == (16, 16)
        return
    line = one_line(outcome)
    assert str(path) in line
    assert case.said in line
    assert [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize("name", [*CASES][::4])
def test_hostile_masks(name: str, tmp_path: Path, painter: Bundle) -> None:
    mask, image = tmp_path / "mask.png", tmp_path / "image.png"
    mask.write_bytes(CASES[name].make())
    image.write_bytes(encoded("PNG", size=(40, 30)))
    line = one_line(generate(painter, tmp_path, "--image", image, "--mask", mask))
    assert str(mask) in line
    assert {*tmp_path.iterdir()} == {mask, image}


@pytest.mark.parametrize("name", [*CASES][2::8])
def test_hostile_control_images(name: str, tmp_path: Path, painter: Bundle) -> None:
    """They are read before anything else is: a bundle without a ControlNet says so behind that."""
    case, shown = CASES[name], tmp_path / "control.png"
    shown.write_bytes(case.make())
    outcome = generate(painter, tmp_path, "--control", shown)
    if readable(case, shown.read_bytes()):
        assert outcome.code == 2
        assert "this bundle has no ControlNet" in outcome.err.splitlines()[-1]
    else:
        line = one_line(outcome)
        assert str(shown) in line and case.said in line
    assert [*tmp_path.iterdir()] == [shown]


@pytest.mark.parametrize(
    ("mask", "said"),
    [
        (Image.new("L", (16, 24), 255), "has the shape of its image"),
        (Image.new("L", (24, 18), 255), "has the shape of its image"),
        (Image.new("L", (1, 3000), 255), "has the shape of its image"),
        (Image.new("L", (24, 16)), "no white in it"),
        (Image.new("1", (24, 16)), "no white in it"),
        (Image.new("RGB", (48, 32), "navy"), "no white in it"),
        (Image.new("RGBA", (24, 16)), "no white in it"),
        (Image.new("LA", (24, 16), (0, 255)), "no white in it"),
        (Image.new("I;16", (24, 16), 30_000), "no white in it"),
    ],
)
def test_masks_that_fit_no_image(
    mask: Image.Image, said: str, tmp_path: Path, painter: Bundle
) -> None:
    given, image = tmp_path / "mask.png", tmp_path / "image.png"
    mask.save(given)
    image.write_bytes(encoded("PNG"))
    line = one_line(generate(painter, tmp_path, "--image", image, "--mask", given))
    assert said in line and str(given) in line
    assert {*tmp_path.iterdir()} == {given, image}


def test_what_is_scaled_or_stretched_is_told(tmp_path: Path, painter: Bundle) -> None:
    (tmp_path / "image.png").write_bytes(encoded("PNG", size=(40, 30)))
    Image.new("1", (20, 15), 1).save(tmp_path / "mask.png")
    files = "--image", tmp_path / "image.png", "--mask", tmp_path / "mask.png"
    outcome = generate(painter, tmp_path, *files)
    assert outcome.code == 0, outcome
    assert "mask.png is scaled from 20x15 to the 40x30 pixels of" in outcome.err
    assert "is stretched to 16x16" in outcome.err
    outcome = generate(painter, tmp_path, *files, "--mask-padding", 2)
    assert outcome.code == 0, outcome
    assert "stretched" not in outcome.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--mask-blur", "nan"), "mask-blur"),
        (("--mask-blur", 300), "0 to 256"),
        (("--mask-blur", -1), "mask-blur"),
        (("--mask-padding", -1), "mask-padding"),
        (("--mask-padding", 10**9), "0 to 16384"),
        (("--strength", 0), "strength"),
        (("--strength", "nan"), "strength"),
        (("--strength", 1.5), "strength"),
    ],
)
def test_values_out_of_range(
    arguments: tuple[object, ...], said: str, tmp_path: Path, painter: Bundle
) -> None:
    image, mask = tmp_path / "image.png", tmp_path / "mask.png"
    image.write_bytes(encoded("PNG", size=(40, 30)))
    Image.new("1", (40, 30), 1).save(mask)
    files = "--image", image, "--mask", mask
    outcome = generate(painter, tmp_path, *files, *arguments)
    assert outcome.code == 2, outcome
    assert said in outcome.err
    assert {*tmp_path.iterdir()} == {mask, image}


def test_what_is_no_file(tmp_path: Path, painter: Bundle) -> None:
    for path in tmp_path, tmp_path / "missing.png", Path("/dev/zero"), tmp_path / "\x1b[31m.png":
        line = one_line(generate(painter, tmp_path, "--image", path))
        assert "\x1b" not in line
    assert not [*tmp_path.iterdir()]
