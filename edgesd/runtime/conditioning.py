"""Encodes prompts, text encoder by text encoder."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from edgesd.errors import BundleError
from edgesd.runtime.arrays import Array, Float
from edgesd.runtime.tokenizer import PromptTokenizer, Truncation
from edgesd.spec.pipeline import Part, TextSpec

Encoded = Mapping[Part, Float]
"""Output of a text encoder -> its values [B, ...]."""

Run = Callable[[str, Mapping[str, Array]], Mapping[str, Array]]
"""Runs one component on inputs of batch 1 and returns its outputs, which the caller copies."""


class Conditioned(NamedTuple):
    """The encoded prompts of a batch. `negative` is None without guidance."""

    positive: Encoded
    negative: Encoded | None


class Prompts:
    """Encodes prompts, and caches the results until `keep` or `forget`.

    truncations: of every prompt that was too long for an encoder, what was cut.
    """

    def __init__(
        self, texts: Sequence[TextSpec], tokenizers: Mapping[str, PromptTokenizer]
    ) -> None:
        """tokenizers: by the folders that `texts` name."""
        self.truncations: dict[str, Truncation] = {}
        self._texts, self._tokenizers = texts, tokenizers
        self._known: dict[tuple[str, str], dict[str, Float]] = {}

    def conditioned(
        self,
        positive: Sequence[str],
        negative: Sequence[str | None] | None,
        run: Run,
        done: Callable[[str], None],
    ) -> Conditioned:
        """Encode prompts, one encoder after another; each distinct prompt is run once.

        negative: None without guidance; a prompt that is None becomes zeros. done: called with each
        encoder when nothing is left for it to run.
        """
        for text in self._texts:
            for prompt in dict.fromkeys((*positive, *(negative or ()))):
                if prompt is not None and (prompt, text.component) not in self._known:
                    self._known[prompt, text.component] = self._encoded(text, prompt, run)
            done(text.component)
        return Conditioned(
            self._joined(positive, positive[0]),
            None if negative is None else self._joined(negative, positive[0]),
        )

    def keep(self, prompts: Iterable[str | None]) -> None:
        """Forget all prompts but these."""
        kept = {*prompts}
        self._known = {key: found for key, found in self._known.items() if key[0] in kept}

    def forget(self) -> None:
        """Encode every prompt anew from now on."""
        self._known.clear()

    def _encoded(self, text: TextSpec, prompt: str, run: Run) -> dict[str, Float]:
        ids, cut = self._tokenizers[text.tokenizer].encode(prompt)
        if cut:
            self.truncations.setdefault(prompt, cut)
        outputs = run(text.component, {text.input: ids})
        return {name: np.array(values, np.float32) for name, values in outputs.items()}

    def _joined(self, prompts: Sequence[str | None], like: str) -> Encoded:
        """All outputs of all encoders for a batch of prompts; for None zeros, shaped as for the
        prompt `like`."""
        joined: dict[Part, Float] = {}
        for text in self._texts:
            for name, values in self._known[like, text.component].items():
                rows = [
                    np.zeros_like(values)
                    if prompt is None
                    else self._known[prompt, text.component][name]
                    for prompt in prompts
                ]
                part = Part(text.component, name)
                joined[part] = stacked(rows, part)
        return joined


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
