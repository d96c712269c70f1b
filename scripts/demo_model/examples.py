"""Draw the examples beside the models: a picture to begin with, and a sketch to follow.

    python -m scripts.demo_model.examples --models models

They are drawn by the lines below, at four times their size, and have no other source.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image, ImageDraw

SIDE = 128
FINER = 4


def canvas(colour: str) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """An empty drawing, four times as large, with a pen."""
    drawing = Image.new("RGB", (SIDE * FINER, SIDE * FINER), colour)
    return drawing, ImageDraw.Draw(drawing)


def shrunk(drawing: Image.Image) -> Image.Image:
    return drawing.resize((SIDE, SIDE), Image.Resampling.BOX)


def scaled(*places: float) -> list[float]:
    return [place * FINER for place in places]


def crude_picture() -> Image.Image:
    """Something purple and round with something green on top."""
    drawing, pen = canvas("white")
    pen.ellipse(scaled(20, 34, 108, 118), fill="#7a35d8")
    pen.ellipse(scaled(34, 46, 58, 68), fill="#a878ec")
    pen.polygon(scaled(62, 36, 72, 14, 98, 12, 88, 32), fill="#3f9b45")
    pen.line(scaled(62, 40, 66, 20), fill="#6b4226", width=5 * FINER)
    return shrunk(drawing)


def face() -> Image.Image:
    """A yellow face that smiles."""
    drawing, pen = canvas("white")
    pen.ellipse(scaled(8, 8, 120, 120), fill="#ffb02e")
    for left in (36, 74):
        pen.ellipse(scaled(left, 42, left + 18, 66), fill="#402a32")
    pen.arc(scaled(36, 50, 92, 100), 25, 155, fill="#402a32", width=6 * FINER)
    return shrunk(drawing)


def eyes() -> Image.Image:
    """The mask of the face's eyes and brows."""
    drawing, pen = canvas("black")
    pen.rectangle(scaled(4, 24, 124, 76), fill="white")
    return shrunk(drawing)


def sketch() -> Image.Image:
    """White outline of a round fruit with a stalk and a leaf, on black."""
    drawing, pen = canvas("black")
    half = [(0, 40), (12, 35), (25, 36), (36, 46), (40, 62), (36, 82), (27, 100), (14, 111)]
    half += [(6, 111), (0, 108)]
    left, right = ([(64 + side * x, y) for x, y in half] for side in (-1, 1))
    leaf = [(66, 28), (72, 16), (84, 9), (98, 9), (92, 21), (80, 28), (66, 28)]
    for line in (left, right, leaf, [(64, 40), (65, 32), (66, 28)]):
        places = [(x * FINER, y * FINER) for x, y in line]
        pen.line(places, fill="white", width=2 * FINER, joint="curve")
    return shrunk(drawing)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", type=Path, required=True, help="folder of the models")
    models = parser.parse_args().models
    for path, drawn in {
        models / "emoji" / "example" / "image.png": crude_picture(),
        models / "emoji-inpaint" / "example" / "image.png": face(),
        models / "emoji-inpaint" / "example" / "mask.png": eyes(),
        models / "emoji-sketch" / "example" / "sketch.png": sketch(),
    }.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        drawn.save(path, optimize=True)


if __name__ == "__main__":
    main()
