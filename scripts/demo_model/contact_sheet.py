"""Draw the 32 prompts of the contact sheet, eight to a row.

python -m scripts.demo_model.contact_sheet --pipeline models/emoji --out docs/demo-sheet.png
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from .sampling import add_drawing_options, draw, open_pipeline, settings_of
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


def tiles(sheet: Image.Image) -> list[Image.Image]:
    """The pictures of a contact sheet."""
    size = sheet.width // COLUMNS
    return [
        sheet.crop((left + GAP // 2, top + GAP // 2, left + size - GAP // 2, top + size - GAP // 2))
        for top in range(0, sheet.height, size)
        for left in range(0, sheet.width, size)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add_drawing_options(parser)
    parser.add_argument("--out", type=Path, required=True, help="PNG to write")
    parser.add_argument("--prompts", help="other prompts, separated by semicolons")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    prompts = arguments.prompts.split(";") if arguments.prompts else SHEET_PROMPTS
    settings = settings_of(arguments.pipeline, arguments.steps, arguments.guidance)
    pipeline = open_pipeline(arguments.pipeline, arguments.adapter, arguments.lcm)
    pictures = draw(pipeline, prompts, seed=arguments.seed, **settings)
    tile(pictures).save(arguments.out, optimize=True)


if __name__ == "__main__":
    main()
