"""Prompts to token ids, from a bundle's tokenizer.json and the few numbers it doesn't hold."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Annotated, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from edgesd.errors import BundleError, InputError
from edgesd.runtime.bundle import Bundle
from edgesd.spec.base import Spec, decode_json
from edgesd.textfiles import MOST_LINE_BYTES

TokenId = Annotated[int, msgspec.Meta(ge=-(1 << 31), lt=1 << 31)]


_MOST_CHARACTERS = 16 * MOST_LINE_BYTES
"""Of a prompt with all vectors of its textual inversions."""


class TokenizerSpec(Spec, frozen=True):
    """tokenizer_spec.json: what a text encoder expects around the tokens of a prompt.

    max_length: tokens of the encoder's input, with beginning and end (77 for CLIP). pad_id: fills
    up what is left (the end token in Stable Diffusion 1.x, 0 in 2.x and for T5). bos_id, eos_id:
    beginning and end; T5 has no beginning.
    """

    max_length: Annotated[int, msgspec.Meta(ge=0, le=1 << 16)]
    pad_id: TokenId
    bos_id: TokenId | None
    eos_id: TokenId

    @property
    def beginning(self) -> tuple[int, ...]:
        """Ids before those of a prompt."""
        return () if self.bos_id is None else (self.bos_id,)


class Truncation(NamedTuple):
    """The part of a prompt that didn't fit: its text, its number of tokens, and how many were kept.

    kept_tokens doesn't count beginning and end.
    """

    text: str
    cut_tokens: int
    kept_tokens: int


class PromptTokenizer:
    """Encodes prompts as diffusers' pipelines do.

    tokenizer_json: a tokenizer of the tokenizers package; padding and truncation that it may
    have set are not used. spec_json: a TokenizerSpec. Raises BundleError when either can't be
    read or they contradict each other.
    """

    def __init__(self, tokenizer_json: bytes, spec_json: bytes) -> None:
        from tokenizers import Tokenizer

        try:
            self.spec = spec = decode_json(spec_json, TokenizerSpec)
        except InputError as exc:
            raise BundleError(f"tokenizer_spec.json can't be read: {exc}") from exc
        with _faults("tokenizer.json can't be read"):
            text = tokenizer_json.decode()
            self._tokenizer = Tokenizer.from_str(text)
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()
            content = json.loads(text)
            word_end = content["model"].get("end_of_word_suffix")
            self._word_end = None if word_end is None else str(word_end)
            added = [str(token["content"]) for token in content.get("added_tokens", ())]
            self._vectors = _vectors(added, spec.max_length)
            comma = self._tokenizer.encode(",", add_special_tokens=False).ids
            self.comma: int | None = comma[0] if len(comma) == 1 else None
            frame = self._tokenizer.encode("").ids
            size = self._tokenizer.get_vocab_size()
        if (
            frame != [*spec.beginning, spec.eos_id]
            or spec.max_length < len(frame)
            or not 0 <= spec.pad_id < size
        ):
            raise BundleError(
                f"tokenizer_spec.json doesn't fit tokenizer.json: it says {spec}, but an empty "
                f"prompt becomes {str(frame)[:80]} of {size} known tokens; build the bundle again"
            )

    def encode(self, prompt: str) -> tuple[NDArray[np.int64], Truncation | None]:
        """Token ids [1, max_length], int64: beginning, tokens, end, padding; and what was cut.

        Names of control tokens in the prompt become these tokens, as in transformers; that of a
        textual inversion of several vectors becomes all of them, as in diffusers. Raises InputError
        for a prompt that isn't valid Unicode text or holds a NUL character.
        """
        ids = self.ids(prompt)
        cut = ids[self.capacity :]
        truncation = Truncation(self.text(cut), len(cut), self.capacity) if cut else None
        return self.framed(ids[: self.capacity]), truncation

    @property
    def capacity(self) -> int:
        """Tokens of a prompt between beginning and end."""
        return self.spec.max_length - len(self.spec.beginning) - 1

    def ids(self, text: str) -> list[int]:
        """The token ids of a text, however many. Raises InputError as `encode`."""
        check_prompt(text)
        with _faults("tokenizer.json can't encode the prompt"):
            with_all = self._with_all_vectors(text)
            ids: list[int] = self._tokenizer.encode(with_all, add_special_tokens=False).ids
        return ids

    def framed(self, ids: Sequence[int]) -> NDArray[np.int64]:
        """At most `capacity` ids with beginning, end and padding [1, max_length]."""
        spec = self.spec
        padded = np.full((1, spec.max_length), spec.pad_id, np.int64)
        framed = [*spec.beginning, *ids, spec.eos_id]
        padded[0, : len(framed)] = framed
        return padded

    def units(self, ids: Sequence[int]) -> Iterator[tuple[int, ...]]:
        """Ids in groups that belong together: the vectors of one textual inversion, and all others
        alone."""
        at = 0
        while at < len(ids):
            whole = self._runs.get(ids[at], ())
            count = len(whole) if whole and tuple(ids[at : at + len(whole)]) == whole else 1
            yield tuple(ids[at : at + count])
            at += count

    def _with_all_vectors(self, prompt: str) -> str:
        """The prompt with `<cat> <cat>_1 <cat>_2` for each `<cat>`, as diffusers'
        maybe_convert_prompt has it."""
        if self._vectors:
            found = self._tokenizer.encode(prompt, add_special_tokens=False).tokens
            for token in sorted(set(found) & self._vectors.keys()):
                whole = " ".join(self._vectors[token])
                if len(prompt) + prompt.count(token) * len(whole) > _MOST_CHARACTERS:
                    raise InputError(
                        f"the prompt has {prompt.count(token)} times {token[:40]!r}, which stands "
                        f"for {len(self._vectors[token])} tokens: text encoders take some hundred"
                    )
                prompt = prompt.replace(token, whole)
        return prompt

    @cached_property
    def _runs(self) -> dict[int, tuple[int, ...]]:
        """First id of a textual inversion of several vectors -> the ids of all."""
        known: dict[str, int] = self._tokenizer.get_vocab()
        runs = (tuple(known[name] for name in names) for names in self._vectors.values())
        return {run[0]: run for run in runs}

    def text(self, ids: Sequence[int]) -> str:
        """The text of tokens, control tokens included, with a space after each word."""
        with _faults("tokenizer.json can't decode its tokens"):
            text: str = self._tokenizer.decode([*ids], skip_special_tokens=False)
        return text.replace(self._word_end, " ").strip() if self._word_end else text


def _vectors(added: list[str], most: int) -> dict[str, list[str]]:
    """Each added token that has more than one vector -> it and `TOKEN_1`, `TOKEN_2` ... of these
    tokens; at most as many as a prompt has tokens."""
    known, found = set(added), {}
    for token in added:
        numbers = range(1, most)
        more = itertools.takewhile(known.__contains__, (f"{token}_{n}" for n in numbers))
        if len(names := [token, *more]) > 1:
            found[token] = names
    return found


def check_prompt(prompt: str) -> None:
    """Raise InputError, naming the place, unless the prompt can be encoded."""
    if len(prompt) > MOST_LINE_BYTES:
        raise InputError(
            f"the prompt has {len(prompt)} characters, and {MOST_LINE_BYTES} are the most: text "
            "encoders take some hundred"
        )
    at = prompt.find("\0")
    if at >= 0:
        raise InputError(f"the prompt holds a NUL character at position {at}: remove it")
    try:
        prompt.encode()
    except UnicodeEncodeError as exc:
        raise InputError(
            f"the prompt isn't valid Unicode text: character {exc.start} is "
            f"{prompt[exc.start]!a}, half of a pair; give it as UTF-8"
        ) from exc


@contextmanager
def _faults(what: str) -> Iterator[None]:
    """Turn whatever the tokenizers package raises into a BundleError: it is an error of the
    tokenizer's file. Its panics are no Exceptions. An InputError is of the prompt."""
    try:
        yield
    except BaseException as exc:
        faulty = isinstance(exc, Exception) or type(exc).__name__ == "PanicException"
        if isinstance(exc, InputError) or not faulty:
            raise
        raise BundleError(f"{what}: {' '.join(str(exc).split())[:300]}") from exc


def tokenizer_of(bundle: Bundle, folder: str | None = None) -> PromptTokenizer:
    """The tokenizer in `folder` of a bundle; None for that of its first text encoder. Raises
    BundleError when it was altered."""
    folder = folder or bundle.manifest.pipeline.wiring.texts[0].tokenizer
    return PromptTokenizer(
        bundle.read(f"{folder}/tokenizer.json"), bundle.read(f"{folder}/tokenizer_spec.json")
    )
