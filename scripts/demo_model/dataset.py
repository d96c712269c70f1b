"""The training set on disk: ``pictures.npz`` (uint8 [N, S, S, 3] on white) and ``emoji.json``."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

FORMAT = 1
Kind = Literal["shown", "core", "rest", "tint", "held"]


@dataclass(frozen=True)
class Emoji:
    """One picture of the training set.

    ``held`` marks a colour and object pair that diffusion training never sees, and ``tint`` a pair
    that it does; the other kinds are emoji as drawn, by how often they are sampled.
    """

    style: str
    name: str
    tags: tuple[str, ...]
    kind: Kind


def save(folder: Path, pictures: npt.NDArray[np.uint8], emoji: list[Emoji]) -> None:
    """Write both files; ``pictures`` is [N, S, S, 3] in the order of ``emoji``."""
    if len(pictures) != len(emoji):
        raise ValueError(f"{len(pictures)} pictures but {len(emoji)} entries: they must match")
    folder.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(folder / "pictures.npz", pictures=pictures)
    document = {"format": FORMAT, "emoji": [asdict(entry) for entry in emoji]}
    (folder / "emoji.json").write_text(json.dumps(document, ensure_ascii=False), encoding="utf-8")


def load(folder: Path, style: str | None = None) -> tuple[npt.NDArray[np.uint8], list[Emoji]]:
    """Read the set, or only one style of it: pictures [N, S, S, 3] and their entries."""
    document = json.loads((folder / "emoji.json").read_text(encoding="utf-8"))
    if document["format"] != FORMAT:
        raise ValueError(
            f"{folder / 'emoji.json'} has format {document['format']}, expected {FORMAT}: "
            "run prepare_data again"
        )
    emoji = [Emoji(**{**entry, "tags": tuple(entry["tags"])}) for entry in document["emoji"]]
    pictures: npt.NDArray[np.uint8] = np.load(folder / "pictures.npz")["pictures"]
    if style is not None:
        keep = [index for index, entry in enumerate(emoji) if entry.style == style]
        pictures, emoji = pictures[keep], [emoji[index] for index in keep]
    return pictures, emoji
