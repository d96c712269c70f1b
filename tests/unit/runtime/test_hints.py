"""Control images: edges of photos, lines of sketches."""

from __future__ import annotations

import io
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from edgesd.errors import InputError, UsageError
from edgesd.runtime.arrays import Array
from edgesd.runtime.hints import (
    HINTS,
    Hint,
    HintOptions,
    Lines,
    canny,
    control_image,
    making_bytes,
    scribble,
)
from edgesd.runtime.pictures import read_picture
from edgesd.runtime.requests import Control

GOLDEN = Path(__file__).parents[2] / "golden" / "canny.npz"
"""What OpenCV 5.0.0 finds in `photos()`: `cv2.Canny(photo, low, high)`, np.packbits of it."""

THRESHOLDS = [(100, 200), (50, 150), (0, 0), (30.7, 99.9), (200, 200), (600, 1000)]


def photos() -> dict[str, Array]:
    """Pictures [H, W, C] that are the same everywhere: numbers of NumPy's frozen generator."""
    random = np.random.RandomState(5)
    y, x = np.mgrid[:70, :90]
    rings = (((x - 30) ** 2 + (y - 40) ** 2) // 90 % 2 * 200 + 20).astype(np.uint8)
    slopes = ((x * 5 + y * 3) % 256)[..., None] * np.array([1, 2, 3])[None, None] // 3
    blocks = np.kron(random.randint(0, 256, (9, 12, 3)), np.ones((8, 8, 1), int))
    soft = (blocks[1:-1, 1:-1] + blocks[:-2, 1:-1] + blocks[2:, 1:-1] + blocks[1:-1, 2:]) // 4
    return {
        "noise": random.randint(0, 256, (60, 47, 3)).astype(np.uint8),
        "few levels": (random.randint(0, 4, (40, 50, 3)) * 60).astype(np.uint8),
        "rings": rings[..., None],
        "slopes": slopes.astype(np.uint8),
        "soft": soft.astype(np.uint8),
        "a row": random.randint(0, 256, (1, 60, 1)).astype(np.uint8),
        "a column": random.randint(0, 256, (60, 1, 3)).astype(np.uint8),
        "a pixel": np.full((1, 1, 3), 9, np.uint8),
    }


@pytest.mark.parametrize("name", photos())
def test_edges_are_opencvs(name: str) -> None:
    photo = photos()[name]
    with np.load(GOLDEN) as recorded:
        for index, (low, high) in enumerate(THRESHOLDS):
            bits = np.unpackbits(recorded[f"{name} {index}"], count=photo[..., 0].size)
            assert np.array_equal(canny(photo, low, high), bits.reshape(photo.shape[:2]))


def test_an_edge_of_a_thousand_turns_is_followed_to_its_end() -> None:
    spiral = np.zeros((257, 257, 1), np.uint8)
    first, last = 0, 256
    while last - first > 16:
        spiral[first, first:last] = spiral[first:last, last] = 100
        spiral[last, first + 8 : last + 1] = spiral[first + 8 : last, first + 8] = 100
        first, last = first + 8, last - 8
    assert not canny(spiral, 100, 700).any()
    spiral[0, :20] = 255
    found = canny(spiral, 100, 700)
    assert found[100:150, 100:150].any()


def sketch(size: int, dark: bool = True) -> Image.Image:
    """Lines of several widths on paper that is lit from one side."""
    paper = Image.new("L", (size, size), 235)
    pen = ImageDraw.Draw(paper)
    for box, width in ((0.2, 0.2, 0.8, 0.8), 60), ((0.35, 0.35, 0.6, 0.6), 200):
        pen.ellipse([side * size for side in box], outline=90, width=max(1, size // width))
    pen.line((0.1 * size, 0.9 * size, 0.5 * size, 0.85 * size), fill=60, width=size // 100)
    light = np.linspace(0.6, 1, size)[None] * np.asarray(paper)
    noise = np.random.RandomState(2).randn(size, size) * 3
    values = np.clip(light + noise, 0, 255).astype(np.uint8)
    return Image.fromarray(values if dark else 255 - values).convert("RGB")


def near(image: Array, y: int, x: int) -> bool:
    return bool(image[y - 2 : y + 3, x - 2 : x + 3].any())


@pytest.mark.parametrize("kind", ["canny", "scribble"])
def test_what_lines_take_in_memory_is_planned(kind: Hint) -> None:
    y, x = np.mgrid[:400, :400]
    waves = 127 + 100 * np.sin(x / 5 + y / 4)  # wide lines everywhere, which take most
    image = Image.fromarray(waves.astype(np.uint8)).convert("RGB")
    tracemalloc.start()
    try:
        control_image(image, kind, 256, 192)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak <= making_bytes(kind, 256, 192) <= 2 * peak


@pytest.mark.parametrize("size", [96, 200, 512])
def test_a_sketch_becomes_white_lines_of_one_width(size: int) -> None:
    hints = [
        np.asarray(control_image(sketch(400, dark), "scribble", size, size, HintOptions(lines=of)))
        for dark, of in ((True, None), (False, None), (True, "dark"), (False, "light"))
    ]
    for hint in hints:
        assert hint.shape == (size, size, 3)
        assert set(np.unique(hint)) == {0, 255}
        lines = hint[..., 0] > 0
        half = size // 2
        assert near(lines, size // 5, half)
        assert near(lines, round(size * 0.8), half)
        assert near(lines, half, round(size * 0.35))
        assert not near(lines, size // 20, half)
        assert not near(lines, round(size * 0.28), half)
        length = size * (0.6 * np.pi + 0.25 * np.pi + 0.4)
        width = max(1, round(size / 128))
        assert 0.8 * length * width < lines.sum() < 1.6 * length * width


@pytest.mark.parametrize("width", [1, 2, 3, 8])
@pytest.mark.parametrize("pen", [1, 2, 3, 9])
def test_lines_of_any_pen_and_direction_are_drawn_as_wide_as_asked(width: int, pen: int) -> None:
    for end in ((90, 50), (50, 90), (90, 90), (10, 90), (90, 70)):
        paper = Image.new("L", (101, 101), 255)
        start = (100 - end[0], 100 - end[1])
        ImageDraw.Draw(paper).line((*start, *end), fill=0, width=pen)
        found = scribble(np.asarray(paper), width)
        for part in (0.25, 0.5, 0.75):
            x, y = (round(a + (b - a) * part) for a, b in zip(start, end, strict=True))
            assert near(found, y, x)
        longest = max(abs(b - a) for a, b in zip(start, end, strict=True))
        assert found.sum() <= (longest + width) * (width + 1) * 1.5


def test_a_line_of_one_pixel_is_a_disc_wide() -> None:
    paper = np.full((41, 41), 255, np.uint8)
    paper[20, 5:36] = 0
    for width in 1, 2, 3, 4, 5:
        found = scribble(paper, width)
        assert found[:, 20].sum() == width
        assert found[20].sum() >= 29


def test_a_diagonal_line_of_two_pixels_does_not_vanish() -> None:
    line = np.eye(64, dtype=bool) | np.eye(64, k=1, dtype=bool)
    found = scribble(np.where(line, 0, 255).astype(np.uint8), 1)
    assert found.any(axis=0)[3:-3].all()


def test_a_thin_line_is_seen_where_little_is_drawn() -> None:
    paper = Image.new("L", (1024, 1024), 255)
    ImageDraw.Draw(paper).line((50, 500, 1000, 530), fill=0, width=2)
    found = np.asarray(control_image(paper.convert("RGB"), "scribble", 64, 64))[..., 0] > 0
    assert found[:, 4:60].any(axis=0).all()


def test_specks_are_left_out() -> None:
    paper = np.full((64, 64), 255, np.uint8)
    paper[30:33, 10:50] = 0
    alone = scribble(paper, 4)
    paper[5, 5] = paper[50, 50] = paper[51, 51] = 0
    assert np.array_equal(scribble(paper, 4), alone)
    paper[50:54, 50:54] = 0
    assert scribble(paper, 4)[48:56, 48:56].any()


def test_a_ready_hint_stays_as_it_is() -> None:
    image = sketch(64)
    assert control_image(image, "ready", 8, 8) is image


def test_a_control_image_is_made_with_its_options() -> None:
    ramp = np.tile(np.uint8([20] * 10 + [50] * 10), (20, 1))
    file = io.BytesIO()
    Image.fromarray(ramp).save(file, "PNG")
    picture = read_picture(file.getvalue())
    found = Control(picture, kind="canny").hint(20, 20)
    assert not found.any()  # 4 * 30 is below 200
    assert Control(picture, kind="canny", options=HintOptions(50, 100)).hint(20, 20).any()


def test_edges_are_those_of_the_size_that_is_drawn() -> None:
    image = sketch(100)
    found = np.asarray(control_image(image, "canny", 64, 48, HintOptions(low=40, high=80)))
    small = np.asarray(image.resize((64, 48), Image.Resampling.LANCZOS))
    assert np.array_equal(found, np.repeat(canny(small, 40, 80)[..., None] * 255, 3, 2))
    assert found.any()


@pytest.mark.parametrize("lines", [None, "dark", "light"])
@pytest.mark.parametrize("level", [0, 128, 255])
def test_an_empty_sheet_is_refused(level: int, lines: Lines | None) -> None:
    with pytest.raises(InputError, match="no lines that stand out"):
        control_image(
            Image.new("RGB", (50, 40), (level,) * 3),
            "scribble",
            32,
            64,
            HintOptions(lines=lines),
        )


@pytest.mark.parametrize(
    "values",
    [
        {"low": -1},
        {"low": 201},
        {"high": 2041},
        {"low": float("nan")},
        {"high": float("nan")},
        {"line_width": 0},
        {"line_width": 65},
    ],
)
def test_values_out_of_range_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        HintOptions(**values)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", HINTS)
@pytest.mark.parametrize("size", [(1, 1), (1, 200), (300, 2)])
def test_the_smallest_sizes_are_made(kind: str, size: tuple[int, int]) -> None:
    try:
        made = control_image(sketch(64), kind, *size)  # type: ignore[arg-type]
    except InputError:
        assert kind == "scribble"
    else:
        assert made.size == (size if kind != "ready" else (64, 64))
