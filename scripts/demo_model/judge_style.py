"""Tell whether the pictures of a contact sheet have a style, and show their prompts' objects.

    python -m scripts.demo_model.judge_style line-art docs/demo-sheet-line-art.png --data DATA

In the style: how colourful a picture is, and how blue, is nearer to the means of pictures of the
set that were filtered than to those of plain ones, in units of their deviations; both as the
autoencoder gives them back. Right: of all filtered pictures of the set the nearest is of the
object, as ``judge`` has it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from diffusers import AutoencoderTiny
from PIL import Image

from . import dataset
from .contact_sheet import tiles
from .judge import features, judge, reconstructed
from .styles import STYLES
from .vocabulary import SHEET_PROMPTS

INKED = 230  # a pixel of which no channel is less is white
SAMPLE = 20  # of so many pictures of the set, one is compared with


def style_measures(pictures: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
    """How colourful what is not white is, 0 to 1, and which part of that is blue rather
    than red, -1 to 1: [N, 2] of pictures [N, S, S, 3]."""
    signed = pictures.astype(np.int16)
    inked = signed.min(axis=3) < INKED
    spread = (signed.max(axis=3) - signed.min(axis=3)) * inked
    blue = (signed[..., 2] - signed[..., 0]) * inked
    colours = spread.sum(axis=(1, 2))
    colourful = colours / (255.0 * inked.sum(axis=(1, 2)).clip(1))
    return np.stack([colourful, blue.sum(axis=(1, 2)) / colours.clip(1)], axis=1)


def styled(
    drawn: npt.NDArray[np.uint8],
    plain: npt.NDArray[np.uint8],
    filtered: npt.NDArray[np.uint8],
) -> int:
    """How many of the drawn pictures are nearer to the filtered than to the plain ones.

    All [N, S, S, 3].
    """
    rows = style_measures(drawn)
    distances = []
    for known in (style_measures(plain), style_measures(filtered)):
        scaled = (rows - known.mean(axis=0)) / (known.std(axis=0) + 0.1)
        distances.append((scaled**2).sum(axis=1))
    return int((distances[1] < distances[0]).sum())


def decoded(vae: AutoencoderTiny, pictures: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Pictures [N, S, S, 3] after encoding and decoding them."""
    drawn = reconstructed(vae, torch.from_numpy(pictures).permute(0, 3, 1, 2))
    return ((drawn + 1.0) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("style", choices=STYLES)
    parser.add_argument("sheets", type=Path, nargs="+", help="PNG of contact_sheet")
    parser.add_argument("--data", type=Path, required=True, help="folder made by prepare_data")
    parser.add_argument("--pipeline", type=Path, default=Path("models/emoji"))
    arguments = parser.parse_args()
    plain, emoji = dataset.load(arguments.data, style="flat")
    channels_first = torch.from_numpy(plain).permute(0, 3, 1, 2)
    filtered = STYLES[arguments.style](channels_first).permute(0, 2, 3, 1).numpy()
    vae = AutoencoderTiny.from_pretrained(arguments.pipeline / "vae")
    samples = [decoded(vae, each[::SAMPLE]) for each in (plain, filtered)]
    for label, own in zip(("plain", "filtered"), samples, strict=True):
        print(f"{label} pictures of the set: {styled(own, *samples)} of {len(own)} in the style")
    names = [entry.name for entry in emoji]
    for path in arguments.sheets:
        drawn = tiles(Image.open(path).convert("RGB"))
        count = styled(np.stack([np.asarray(each) for each in drawn]), *samples)
        verdicts = judge(SHEET_PROMPTS, drawn, features(filtered), names)
        right = sum(verdict.object_right for verdict in verdicts)
        print(f"{path}: {count} of {len(drawn)} in the style, {right} right")


if __name__ == "__main__":
    main()
