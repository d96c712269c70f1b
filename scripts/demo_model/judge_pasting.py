"""Measure what a bundle's inpainting leaves of the picture around the mask.

    edgesd build models/emoji-inpaint --target x86-64-cpu -o nine
    python -m scripts.demo_model.judge_pasting nine --sheet pasting.png

The pictures are those of a contact sheet, under boxes and blobs in turn, and filled by their own
prompts: once written whole, once pasted into the picture by a blurred mask. Told are PSNR where the
mask is 0, PSNR of the steps across the mask's border (the seam), and in how many pictures all
pixels where the mask is 0 are those given. The sheet has for each of the first prompts the
picture, what is left of it, what was drawn, and what was pasted.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from edgesd.runtime.bundle import open_bundle
from edgesd.runtime.pipeline import Pipeline
from edgesd.runtime.requests import Request

from .contact_sheet import tile, tiles
from .judge_inpaint import decibels, partial_masks, seams
from .judge_sketch import as_images, as_tensor
from .vocabulary import SHEET_PROMPTS

SHOWN = 16  # prompts on the sheet


def filled(
    bundle: Path, pictures: list[Image.Image], masks: list[Image.Image], blur: float
) -> dict[str, tuple[Tensor, Tensor]]:
    """What is drawn, and what is pasted: pixels [N, 3, S, S], and where the mask isn't 0,
    [N, 1, S, S]."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    with Pipeline(open_bundle(bundle)) as pipeline:
        for label, mask_blur in (("drawn", None), ("pasted", blur)):
            requests = [
                pipeline.complete(
                    Request(prompt, seed, image=image, mask=mask, mask_blur=mask_blur)
                )
                for seed, (prompt, image, mask) in enumerate(
                    zip(SHEET_PROMPTS, pictures, masks, strict=True)
                )
            ]
            drawn = [image for one in requests for image in pipeline.generate([one])]
            paintings = [request.painting() for request in requests]
            places = [np.asarray(one.mask) for one in paintings if one]
            touched = torch.from_numpy(np.stack(places) > 0).float()[:, None]
            found[label] = (as_tensor(drawn).float(), touched)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("bundle", type=Path, help="of a model of the demo's, that inpaints")
    parser.add_argument("--pictures", type=Path, default=Path("docs/demo-sheet.png"))
    parser.add_argument("--mask-blur", type=float, default=4.0)
    parser.add_argument("--sheet", type=Path, help="PNG of what was given, drawn and pasted")
    arguments = parser.parse_args()
    torch.manual_seed(1234)
    with Image.open(arguments.pictures) as sheet:
        pictures = tiles(sheet.convert("RGB"))
    given = as_tensor(pictures).float()
    mask = partial_masks(len(pictures), given.shape[-1])
    images = as_images((mask * 255).to(torch.uint8).expand_as(given))
    found = filled(arguments.bundle, pictures, images, arguments.mask_blur)
    for label, (drawn, touched) in found.items():
        outside = decibels(drawn - given, 1 - touched)
        seam = seams(drawn, given, mask).mean()
        kept = ((drawn == given) | (touched > 0)).flatten(1).all(dim=1).sum()
        print(
            f"{label}: where the mask is 0 {outside.mean():.1f} dB (worst {outside.min():.1f}), "
            f"seam {seam:.1f} dB, all bits kept in {kept} of {len(pictures)}"
        )
    if arguments.sheet:
        shown = [given, given * (1 - mask) + 127.0 * mask, *(drawn for drawn, _ in found.values())]
        rows = torch.stack(shown, dim=1)[:SHOWN].flatten(0, 1)
        tile(as_images(rows.to(torch.uint8))).save(arguments.sheet, optimize=True)


if __name__ == "__main__":
    main()
