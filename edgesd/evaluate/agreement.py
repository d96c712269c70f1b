"""Do an image and a text agree? Judged by CLIP if its weights are there, else by a small model.

CLIP score: 100 times the cosine of CLIP's embeddings of image and text, at least 0 (Hessel et al.
2021, arXiv 2104.08718, eq. 1, with the factor of 100 that has become usual). The small judge is of
the same kind but was trained on the emoji set alone (scripts/demo_model/train_agreement.py): it
knows that set's words and drawing style and nothing else, and its figures are no CLIP scores.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import msgspec
import numpy as np
import numpy.typing as npt
import onnxruntime
from PIL import Image

from edgesd.errors import InputError
from edgesd.evaluate.psnr import ImageLike, pixels_of
from edgesd.files import atomic_write
from edgesd.spec.base import Spec, decode_json
from edgesd.textfiles import read_text

Rows = npt.NDArray[np.float32]

JUDGE = "judge.json"
MAX_WORDS = 16
_TOWERS = ("pictures.onnx", "captions.onnx")
_WORD = re.compile(r"[^\W_]+(?:['-][^\W_]+)*")


class Agreement(Protocol):
    """Images and texts in one space. name: what to print beside figures. is_clip: whether they
    are CLIP scores, which may be set beside those of others."""

    name: str
    is_clip: bool

    def images(self, images: Sequence[ImageLike]) -> Rows:
        """8-bit RGB images [H, W, 3] -> unit rows [N, D]."""

    def texts(self, texts: Sequence[str]) -> Rows:
        """Texts -> unit rows [N, D]."""


class JudgeSpec(Spec, frozen=True):
    """judge.json. side: of the images, in pixels; words: known, the first has the id 1.

    recall_seen, recall_held: how often an image's own caption is the nearest of `captions`, over
    the set's images that it was trained on and over `held` that it wasn't.
    """

    side: int
    words: tuple[str, ...]
    images: int = msgspec.field(name="pictures")
    recall_seen: float
    recall_held: float
    held: int
    captions: int


def open_agreement(folder: Path) -> Agreement:
    """The judge in `folder`: a small one (judge.json), or a CLIP model as transformers saves it.

    Raises InputError for anything else, MissingDependencyError without what CLIP needs.
    """
    if (folder / JUDGE).is_file():
        return SmallJudge(folder)
    if (folder / "config.json").is_file():
        from edgesd.export.clip_net import ClipNet

        return ClipNet(folder)
    raise InputError(
        f"{folder} holds no judge: give the folder of a CLIP model (config.json, model.safetensors "
        f"and its tokenizer), or one with {JUDGE}"
    )


class SmallJudge:
    """See Agreement: two small ONNX models."""

    is_clip = False

    def __init__(self, folder: Path) -> None:
        try:
            self._spec = decode_json(read_text(folder / JUDGE), JudgeSpec)
            self._towers = [
                onnxruntime.InferenceSession(folder / name, providers=["CPUExecutionProvider"])
                for name in _TOWERS
            ]
        except (OSError, InputError, RuntimeError, *_ORT_ERRORS) as exc:
            raise InputError(f"{folder} can't be read as a judge: {exc}") from exc
        self.name = "contrastive judge trained on the emoji set; not CLIP"

    def images(self, images: Sequence[ImageLike]) -> Rows:
        size = (self._spec.side, self._spec.side)
        scaled = [
            np.asarray(Image.fromarray(pixels_of(one)).resize(size, Image.Resampling.BOX))
            for one in images
        ]
        return self._run(0, np.stack(scaled).transpose(0, 3, 1, 2).astype(np.float32) / 255)

    def texts(self, texts: Sequence[str]) -> Rows:
        """See Agreement. Words that aren't known count for nothing."""
        return self._run(1, word_ids(texts, self._spec.words))

    def _run(self, tower: int, values: npt.NDArray[np.float32] | npt.NDArray[np.int64]) -> Rows:
        found = [
            self._towers[tower].run(None, {"x": np.ascontiguousarray(part)})[0]
            for part in np.array_split(values, -(-len(values) // 256))
        ]
        return np.concatenate(found)


_ORT_ERRORS = (
    onnxruntime.capi.onnxruntime_pybind11_state.Fail,
    onnxruntime.capi.onnxruntime_pybind11_state.InvalidProtobuf,
    onnxruntime.capi.onnxruntime_pybind11_state.NoSuchFile,
)


def words_of(text: str) -> list[str]:
    """Words in lower case; hyphens and apostrophes are part of them."""
    return _WORD.findall(text.lower().replace("\u2019", "'"))


def word_ids(texts: Sequence[str], words: Sequence[str]) -> npt.NDArray[np.int64]:
    """Texts -> [N, MAX_WORDS]: places in `words` from 1; 0 for none, and for unknown ones."""
    places = {word: place for place, word in enumerate(words, start=1)}
    found = np.zeros((len(texts), MAX_WORDS), np.int64)
    for row, text in zip(found, texts, strict=True):
        for at, word in enumerate(words_of(text)[:MAX_WORDS]):
            row[at] = places.get(word, 0)
    return found


def write_judge(folder: Path, spec: JudgeSpec, images: bytes, captions: bytes) -> None:
    """Write a small judge: its two ONNX models and what it is."""
    folder.mkdir(parents=True, exist_ok=True)
    document = msgspec.json.format(msgspec.json.encode(spec), indent=1)
    for name, content in (*zip(_TOWERS, (images, captions), strict=True), (JUDGE, document)):
        with atomic_write(folder / name) as file:
            file.write(content)
