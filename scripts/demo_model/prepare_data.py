"""Fetch the emoji drawings (SVG) and their names, and render them to the training set.

    pip install resvg-py
    python -m scripts.demo_model.prepare_data --cache build/npm --out build/emoji-data

Needs ``npm`` on the path; the packages are fetched once into the cache folder.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import resvg_py
from PIL import Image

from .captions import is_held_out, nearest_colour
from .colour import HUES, main_hue, tint
from .dataset import Emoji, Kind, save
from .vocabulary import CORE, DROPPED, GROUPS, SHOWN, TINTED

PACKAGES = {
    "flat": "@iconify-json/fluent-emoji-flat@1.2.6",  # MIT
    "noto": "@iconify-json/noto@1.2.9",  # Apache-2.0; trains the autoencoder only
    "names": "emojibase-data@17.0.0",  # MIT, names and keywords from CLDR (Unicode-3.0)
}
OVERSAMPLING = 4
MAX_TAGS = 12


def fetch(package: str, cache: Path) -> Path:
    """Folder with the contents of an npm package; downloads it on first use."""
    folder = cache / package.replace("@", "_").replace("/", "_")
    if not folder.exists():
        cache.mkdir(parents=True, exist_ok=True)
        packed = subprocess.run(
            ["npm", "pack", "--silent", package],
            cwd=cache,
            check=True,
            capture_output=True,
            text=True,
        )
        with tarfile.open(cache / packed.stdout.split()[-1]) as archive:
            archive.extractall(folder, filter="data")
    return folder / "package"


def cldr_entries(compact: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Emojibase entries by code points in lower case, without the emoji variation selector."""
    return {entry["hexcode"].lower().replace("-fe0f", ""): entry for entry in compact}


def render(icon: Mapping[str, Any], default_size: int, size: int) -> Image.Image:
    """Draw one icon of an iconify set on white, ``size`` x ``size`` pixels."""
    width = icon.get("width", default_size)
    height = icon.get("height", default_size)
    box = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{width}" height="{height}" viewBox="{box}">{icon["body"]}</svg>'
    )
    png = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size)
    drawing = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    canvas = Image.new("RGBA", (size, size), "white")
    canvas.alpha_composite(drawing, ((size - drawing.width) // 2, (size - drawing.height) // 2))
    return canvas.convert("RGB")


def kind_of(name: str) -> Kind:
    """How often an emoji as drawn is sampled."""
    if name in SHOWN:
        return "shown"
    return "core" if name in CORE else "rest"


def emoji_pictures(
    style: str,
    icons: Mapping[str, Any],
    chars: Mapping[str, str],
    cldr: Mapping[str, Any],
    size: int,
) -> Iterator[tuple[Emoji, Image.Image]]:
    """The pictures of one icon set (``size`` x ``size``), each followed by its coloured variants.

    A drawing is repainted before it is scaled down, so that its soft edges take the new colour.
    """
    names = {entry["label"].lower() for entry in cldr.values()}
    for code_points, icon_name in chars.items():
        entry = cldr.get(code_points.replace("-fe0f", ""))
        icon = icons["icons"].get(icon_name)
        if entry is None or icon is None or entry.get("group") not in GROUPS:
            continue
        if any(word in entry["label"] for word in DROPPED):
            continue
        name = entry["label"].lower()
        tags = tuple(tag for tag in entry.get("tags", []) if tag.isascii())[:MAX_TAGS]
        large = render(icon, icons.get("width", 16), size * OVERSAMPLING)
        yield Emoji(style, name, tags, kind_of(name)), shrink(large, size)
        if name not in TINTED:
            continue
        short = TINTED[name]
        own = nearest_colour(main_hue(large) or 0.0)
        for colour in HUES:
            pair = f"{colour} {short}"
            held = is_held_out(colour, short, own) and pair not in names
            repainted = shrink(tint(large, colour), size)
            yield Emoji(style, pair, (), "held" if held else "tint"), repainted


def shrink(image: Image.Image, size: int) -> Image.Image:
    """Average blocks of pixels down to ``size`` x ``size``."""
    return image.resize((size, size), Image.Resampling.BOX)


def prepare(cache: Path, out: Path, size: int) -> Counter[tuple[str, Kind]]:
    """Write the training set to ``out``; returns how many pictures of each style and kind."""
    names = fetch(PACKAGES["names"], cache) / "en" / "compact.json"
    cldr = cldr_entries(json.loads(names.read_text(encoding="utf-8")))
    emoji: list[Emoji] = []
    pictures = []
    for style in ("flat", "noto"):
        folder = fetch(PACKAGES[style], cache)
        icons = json.loads((folder / "icons.json").read_text(encoding="utf-8"))
        chars = json.loads((folder / "chars.json").read_text(encoding="utf-8"))
        for entry, picture in emoji_pictures(style, icons, chars, cldr, size):
            emoji.append(entry)
            pictures.append(np.asarray(picture))
    save(out, np.stack(pictures), emoji)
    missing = CORE - {entry.name for entry in emoji}
    if missing:
        print(f"core names that no set has: {', '.join(sorted(missing))}")
    return Counter((entry.style, entry.kind) for entry in emoji)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--cache", type=Path, required=True, help="folder for the npm packages")
    parser.add_argument("--out", type=Path, required=True, help="folder of the training set")
    parser.add_argument("--size", type=int, default=128, help="side of the pictures in pixels")
    arguments = parser.parse_args()
    for (style, kind), count in sorted(
        prepare(arguments.cache, arguments.out, arguments.size).items()
    ):
        print(f"{style} {kind}: {count}")


if __name__ == "__main__":
    main()
