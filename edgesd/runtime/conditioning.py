"""What the denoiser is conditioned on: prompts, encoded by one text encoder after another, and
sizes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from edgesd.errors import BundleError
from edgesd.runtime.arrays import Array, Float
from edgesd.runtime.chunks import Chunk, Prompt, chunks_of
from edgesd.runtime.requests import CompleteMicro, CompleteRequest
from edgesd.runtime.tokenizer import PromptTokenizer, Truncation
from edgesd.spec.build import MOST_CHUNKS
from edgesd.spec.pipeline import Fill, Part, TextSpec

Encoded = Mapping[Part | Fill, Float]
"""What a half of guidance is conditioned on [B, ...]: by the output of a text encoder, or by how
an input is filled."""

_KEPT = 64
"""Prompts whose chunks are remembered: an image's are looked at again and again."""

Run = Callable[[str, Mapping[str, Array]], Mapping[str, Array]]
"""Runs one component on inputs of batch 1 and returns its outputs, which the caller copies."""


class Conditioned(NamedTuple):
    """What both halves of guidance are conditioned on; `negative` is None without guidance."""

    positive: Encoded
    negative: Encoded | None


class Prompts:
    """Encodes prompts, and caches what it encoded last until `forget`.

    truncations: of every text that was too long for each encoder that reads it, the least that
    was cut.
    """

    def __init__(
        self,
        texts: Sequence[TextSpec],
        tokenizers: Mapping[str, PromptTokenizer],
        chunks: int | None = 1,
        whole: Collection[str] = (),
    ) -> None:
        """tokenizers: by the folders that `texts` name. chunks: that each prompt is given as
        (chunks.fixed_chunks); None for as many as the longest of a batch has. whole: folders of
        tokenizers whose prompts aren't cut into chunks."""
        self.truncations: dict[str, Truncation] = {}
        self._least: dict[str, Truncation | None] = {}
        self._whole = frozenset(whole)
        self._texts, self._tokenizers, self._fixed = texts, tokenizers, chunks
        self._places = list(dict.fromkeys(text.tokenizer for text in texts))
        self._known: dict[tuple[str, bytes], dict[str, Float]] = {}
        self._chunks = lru_cache(_KEPT)(self._cut)

    def count(self, prompts: Iterable[Prompt | None]) -> int:
        """Chunks that each of `prompts` is given as when they are encoded together, all encoders
        and both halves of guidance alike."""
        if self._fixed:
            return self._fixed
        given = (prompt for prompt in dict.fromkeys(prompts) if prompt is not None)
        return max(len(self._chunks(prompt, folder)) for prompt in given for folder in self._places)

    def conditioned(
        self,
        positive: Sequence[Prompt],
        negative: Sequence[Prompt | None] | None,
        run: Run,
        done: Callable[[str], None],
    ) -> Conditioned:
        """Encode prompts, one encoder after another; each distinct chunk is run once.

        negative: None without guidance; a prompt that is None becomes zeros. done: called with each
        encoder when nothing is left for it to run. Shorter prompts are filled up with chunks
        without a token, as the web UI does (`pad_cond_uncond`).
        """
        both = (*positive, *(negative or ()))
        count, known = self.count(both), self._known
        encoded: dict[tuple[Prompt, str], dict[str, Float]] = {}
        self._known = {}
        for text in self._texts:
            for prompt in dict.fromkeys(one for one in both if one is not None):
                chunks = self._chunks(prompt, text.tokenizer)
                empty = Chunk(self._tokenizers[text.tokenizer].framed(()))
                chunks += (empty,) * (count - len(chunks))
                for chunk in chunks:
                    key = text.component, chunk.ids.tobytes()
                    if key not in self._known:
                        self._known[key] = known.get(key) or _run(text, chunk, run)
                encoded[prompt, text.component] = self._outputs(text, chunks)
            done(text.component)
        return Conditioned(
            self._joined(encoded, positive, positive[0]),
            None if negative is None else self._joined(encoded, negative, positive[0]),
        )

    def forget(self) -> None:
        """Encode every prompt anew from now on."""
        self._known.clear()

    def _cut(self, prompt: Prompt, folder: str) -> tuple[Chunk, ...]:
        """The chunks of what a tokenizer reads of a prompt."""
        text = prompt.texts[min(self._places.index(folder), len(prompt.texts) - 1)]
        most = self._fixed or MOST_CHUNKS
        whole = folder in self._whole
        chunks, cut = chunks_of(self._tokenizers[folder], text, prompt.syntax, most, whole)
        # A user is told what no encoder has read: FLUX's CLIP reads the beginning alone.
        both = self._least.get(text, cut), cut
        least = self._least[text] = min(both, key=lambda one: one.cut_tokens if one else 0)
        if least:
            self.truncations[text] = least
        else:
            self.truncations.pop(text, None)
        return tuple(chunks)

    def _outputs(self, text: TextSpec, chunks: Sequence[Chunk]) -> dict[str, Float]:
        """All outputs of an encoder for the chunks of a prompt: embeddings of tokens one after
        another [1, chunks x tokens, C]; what is of a whole prompt, as the first chunk has it."""
        outputs = [self._known[text.component, chunk.ids.tobytes()] for chunk in chunks]
        found = {}
        for name, first in outputs[0].items():
            found[name] = first
            if first.ndim == 3:
                pairs = zip(chunks, outputs, strict=True)
                rows = [chunk.weighted(each[name]) for chunk, each in pairs]
                found[name] = stacked(rows, Part(text.component, name), 1)
        return found

    def _joined(
        self,
        encoded: Mapping[tuple[Prompt, str], Mapping[str, Float]],
        prompts: Sequence[Prompt | None],
        like: Prompt,
    ) -> Encoded:
        """All outputs of all encoders for a batch of prompts; for None zeros, shaped as for the
        prompt `like`."""
        joined: dict[Part | Fill, Float] = {}
        for text in self._texts:
            for name, values in encoded[like, text.component].items():
                rows = [
                    np.zeros_like(values)
                    if prompt is None
                    else encoded[prompt, text.component][name]
                    for prompt in prompts
                ]
                part = Part(text.component, name)
                joined[part] = stacked(rows, part)
        return joined


def _run(text: TextSpec, chunk: Chunk, run: Run) -> dict[str, Float]:
    outputs = run(text.component, {text.input: chunk.ids})
    return {name: np.array(values, np.float32) for name, values in outputs.items()}


def with_size_ids(conditioned: Conditioned, request: CompleteRequest, count: int) -> Conditioned:
    """Encoded prompts of `count` images like `request`, and what the model is told of their sizes,
    if anything."""
    if request.micro is None or request.negative_micro is None:
        return conditioned
    positive, negative = conditioned
    return Conditioned(
        {**positive, **_size_ids(request.micro, count)},
        None if negative is None else {**negative, **_size_ids(request.negative_micro, count)},
    )


def _size_ids(micro: CompleteMicro, count: int) -> dict[Part | Fill, Float]:
    """As diffusers' _get_add_time_ids: sizes [count, 6]; sizes and aesthetic score [count, 5]."""
    sizes = [*micro.original_size[::-1], *micro.crop[::-1]]
    ids: dict[Part | Fill, list[float]] = {
        "size_ids": [*sizes, *micro.target_size[::-1]],
        "aesthetic_ids": [*sizes, micro.aesthetic_score],
    }
    return {fill: np.array([row] * count, np.float32) for fill, row in ids.items()}


def joined(encoded: Encoded, parts: Sequence[Part]) -> Float:
    """Outputs of encoders side by side on their last axis: [B, ..., C]."""
    return stacked([encoded[part] for part in parts], parts[0], -1)


def stacked(arrays: Sequence[Float], part: Part, axis: int = 0) -> Float:
    """Arrays joined on an axis. part: where the first is from. Raises BundleError when their other
    sizes differ."""
    try:
        return np.concatenate(arrays, axis)
    except ValueError as exc:
        shapes = ", ".join(str(list(array.shape)) for array in arrays[:4])
        raise BundleError(
            f"{part.component} makes {part.output} of shapes that don't fit each other ({shapes}): "
            "build the bundle again"
        ) from exc
