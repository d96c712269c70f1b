"""Count how many prompts a pipeline draws right, without a person looking.

    python -m scripts.demo_model.judge --pipeline models/emoji --data DATA

A picture shows the right object when the nearest picture of the whole flat set (mean squared error
at 32x32, all colours of all objects) is of that object, and the right colour when its main hue is
nearer to the colour word asked for than to any other. The autoencoder's own loss is told apart by
its PSNR on the pictures of each kind.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from diffusers import AutoencoderTiny, DiffusionPipeline
from PIL import Image
from torch import Tensor

from . import dataset
from .colour import HUES, hue_distance, main_hue
from .contact_sheet import tile
from .dataset import Emoji, Kind
from .sampling import add_drawing_options, draw, open_pipeline, settings_of
from .training import to_unit_range
from .vocabulary import TINTED

FEATURE_SIZE = 32


@dataclass(frozen=True)
class Verdict:
    """What one drawn picture looks like."""

    prompt: str
    looks_like: str
    object_right: bool
    colour_right: bool

    @property
    def right(self) -> bool:
        return self.object_right and self.colour_right


def features(pictures: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Block means of pictures [N, S, S, 3] as rows [N, 32 * 32 * 3], 0 to 1."""
    count, side = pictures.shape[:2]
    block = side // FEATURE_SIZE
    blocks = pictures.reshape(count, FEATURE_SIZE, block, FEATURE_SIZE, block, 3)
    means: npt.NDArray[np.float32] = blocks.mean(axis=(2, 4), dtype=np.float32)
    return means.reshape(count, -1) / 255.0


def object_of(name: str) -> str:
    """``blue cat`` and ``cat face`` -> ``cat``; names without coloured variants stay."""
    if name in TINTED:
        return TINTED[name]
    colour, _, rest = name.partition(" ")
    return rest if colour in HUES and rest in TINTED.values() else name


def colour_right(picture: Image.Image, name: str) -> bool:
    """Whether the main hue is the one that the prompt names; true for prompts without colour."""
    colour, _, rest = name.partition(" ")
    if colour not in HUES or rest not in TINTED.values():
        return True
    hue = main_hue(picture)
    if hue is None:
        return False
    return min(HUES, key=lambda word: hue_distance(HUES[word], hue)) == colour


def judge(
    prompts: Sequence[str],
    drawn: Sequence[Image.Image],
    known: npt.NDArray[np.float32],
    names: Sequence[str],
) -> list[Verdict]:
    """A verdict for each drawn picture; ``known`` [N, F] are the features of the named pictures."""
    rows = features(np.stack([np.asarray(picture) for picture in drawn]))
    verdicts = []
    for prompt, picture, row in zip(prompts, drawn, rows, strict=True):
        nearest = names[int(((known - row) ** 2).sum(axis=1).argmin())]
        same = object_of(nearest) == object_of(prompt)
        verdicts.append(Verdict(prompt, nearest, same, colour_right(picture, prompt)))
    return verdicts


def names_of(emoji: Sequence[Emoji], kind: Kind, limit: int) -> list[str]:
    """Up to ``limit`` different names of a kind, evenly spread over the set."""
    names = list(dict.fromkeys(entry.name for entry in emoji if entry.kind == kind))
    stride = max(1, len(names) // limit)
    return names[::stride][:limit]


def mixed_names(emoji: Sequence[Emoji], limit: int) -> list[str]:
    """Up to ``limit`` names: a third each of those held out, shown and drawn as they are."""
    kinds: tuple[Kind, ...] = ("held", "shown", "core")
    names = [name for kind in kinds for name in names_of(emoji, kind, -(-limit // len(kinds)))]
    return names[:limit]


@torch.no_grad()
def reconstructed(vae: AutoencoderTiny, pictures: Tensor) -> Tensor:
    """uint8 pictures [N, 3, S, S] after encoding and decoding them: -1 to 1."""
    drawn = [
        vae.decode(vae.encode(batch).latents).sample.clamp(-1, 1)
        for batch in torch.split(to_unit_range(pictures), 16)
    ]
    return torch.cat(drawn)


def reconstruction_psnr(pipeline: DiffusionPipeline, pictures: npt.NDArray[np.uint8]) -> float:
    """PSNR in dB of pictures [N, S, S, 3] after encoding and decoding them."""
    given = torch.from_numpy(pictures).permute(0, 3, 1, 2)
    errors = (reconstructed(pipeline.vae, given) - to_unit_range(given)) / 2
    return float(-10 * torch.log10(errors.pow(2).mean()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add_drawing_options(parser)
    parser.add_argument("--data", type=Path, required=True, help="folder made by prepare_data")
    parser.add_argument("--kinds", default="held,shown,core,tint,rest")
    parser.add_argument("--limit", type=int, default=64, help="prompts of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sheets", type=Path, help="folder for a sheet of each kind")
    arguments = parser.parse_args()
    pictures, emoji = dataset.load(arguments.data, style="flat")
    known = features(pictures)
    names = [entry.name for entry in emoji]
    pipeline = open_pipeline(arguments.pipeline, arguments.adapter, arguments.lcm)
    settings = settings_of(arguments.pipeline, arguments.steps, arguments.guidance)
    for kind in arguments.kinds.split(","):
        prompts = names_of(emoji, kind, arguments.limit)
        drawn = draw(pipeline, prompts, seed=arguments.seed, **settings)
        verdicts = judge(prompts, drawn, known, names)
        right = sum(verdict.right for verdict in verdicts)
        chosen = [index for index, entry in enumerate(emoji) if entry.kind == kind]
        decibels = reconstruction_psnr(pipeline, pictures[chosen[: arguments.limit]])
        print(f"{kind}: {right} of {len(verdicts)} right, autoencoder {decibels:.1f} dB")
        for verdict in verdicts:
            if not verdict.right:
                wrong = "colour" if verdict.object_right else f"looks like {verdict.looks_like}"
                print(f"  {verdict.prompt}: {wrong}")
        if arguments.sheets:
            arguments.sheets.mkdir(parents=True, exist_ok=True)
            tile(drawn).save(arguments.sheets / f"{kind}.png")


if __name__ == "__main__":
    main()
