"""CLIP for `edgesd.evaluate.agreement`, by transformers, from a folder that it saved."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from edgesd.errors import InputError, MissingDependencyError
from edgesd.export.quiet import quiet
from edgesd.text import first_sentence

_AT_A_TIME = 32

# Of all of OpenAI's CLIP models, for channels of 0 to 1.
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)


class ClipNet:
    """A CLIP model (Radford et al. 2021, arXiv 2103.00020), fp32 on the CPU.

    Images are scaled bicubically to the model's size by their shorter side and cut to their
    middle; texts are cut at the model's length. Raises InputError when the folder can't be read.
    """

    is_clip = True

    def __init__(self, folder: Path) -> None:
        try:
            from transformers import AutoTokenizer, CLIPModel
        except ImportError as exc:
            raise MissingDependencyError(
                f"CLIP needs transformers ({exc}): pip install 'edgesd[build]'"
            ) from exc
        try:
            with quiet():
                self._model = CLIPModel.from_pretrained(folder, local_files_only=True)
                self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, KeyError, RuntimeError, TypeError) as exc:
            raise InputError(
                f"{folder} can't be read as a CLIP model: {first_sentence(exc)}"
            ) from exc
        config: Any = self._model.config
        self._side = int(config.vision_config.image_size)
        self._tokens = int(config.text_config.max_position_embeddings)
        self.name = f"CLIP ({config.vision_config.patch_size} px patches at {self._side} px)"

    @torch.inference_mode()
    def images(self, images: Sequence[Any]) -> npt.NDArray[np.float32]:
        """8-bit RGB images [H, W, 3] -> unit rows [N, D]."""
        found = []
        for at in range(0, len(images), _AT_A_TIME):
            pixels = torch.stack([self._prepared(one) for one in images[at : at + _AT_A_TIME]])
            vision = self._model.vision_model(pixel_values=pixels).pooler_output
            found.append(_unit(self._model.visual_projection(vision)))
        return torch.cat(found).numpy()

    @torch.inference_mode()
    def texts(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """Texts -> unit rows [N, D]."""
        found = []
        for at in range(0, len(texts), _AT_A_TIME):
            inputs = self._tokenizer(
                list(texts[at : at + _AT_A_TIME]),
                padding=True,
                truncation=True,
                max_length=self._tokens,
                return_tensors="pt",
            )
            text = self._model.text_model(**inputs).pooler_output
            found.append(_unit(self._model.text_projection(text)))
        return torch.cat(found).numpy()

    def _prepared(self, image: npt.NDArray[np.uint8]) -> torch.Tensor:
        values = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float()
        part = self._side / min(image.shape[:2])
        size = [max(self._side, round(part * n)) for n in image.shape[:2]]
        scaled = torch.nn.functional.interpolate(
            values, size, mode="bicubic", antialias=True, align_corners=False
        )
        top, left = ((n - self._side) // 2 for n in size)
        cut = scaled[0, :, top : top + self._side, left : left + self._side]
        mean, std = (torch.tensor(v)[:, None, None] for v in (_MEAN, _STD))
        return (cut.clamp(0, 255).round() / 255 - mean) / std


def _unit(rows: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(rows, dim=1)
