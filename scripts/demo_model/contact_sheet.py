"""Draw the 32 prompts of the contact sheet, eight to a row.

python -m scripts.demo_model.contact_sheet --pipeline models/emoji --out docs/demo-sheet.png
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from .sampling import draw, open_pipeline, settings_of
from .vocabulary import SHEET_PROMPTS

COLUMNS = 8
GAP = 4  # pixels around each tile


def tile(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures of equal size, row by row, on white."""
    side = pictures[0].width + GAP
    rows = -(-len(pictures) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * side, rows * side), "white")
    for place, picture in enumerate(pictures):
        row, column = divmod(place, COLUMNS)
        sheet.paste(picture, (column * side + GAP // 2, row * side + GAP // 2))
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--pipeline", type=Path, required=True, help="pipeline folder")
    parser.add_argument("--out", type=Path, required=True, help="PNG to write")
    parser.add_argument("--prompts", help="other prompts, separated by semicolons")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="[default: the model's]")
    parser.add_argument("--guidance", type=float, help="[default: the model's]")
    arguments = parser.parse_args()
    prompts = arguments.prompts.split(";") if arguments.prompts else SHEET_PROMPTS
    settings = settings_of(arguments.pipeline, arguments.steps, arguments.guidance)
    pictures = draw(open_pipeline(arguments.pipeline), prompts, seed=arguments.seed, **settings)
    tile(pictures).save(arguments.out, optimize=True)


if __name__ == "__main__":
    main()
