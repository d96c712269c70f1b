"""Cuts prompts into chunks of as many tokens as a text encoder takes.

The tokens of each chunk stand between beginning and end and are padded, as if it were a prompt of
its own. diffusers' pipelines cut a long prompt off after the first chunk; its community pipelines
(lpw_stable_diffusion) and AUTOMATIC1111's web UI (`sd_hijack_clip.py`) encode all of them.

That is CLIP's. Other encoders, such as T5, take some hundred tokens of a prompt, and no more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgesd.runtime.arrays import Float
from edgesd.runtime.syntax import Syntax, segments
from edgesd.runtime.tokenizer import PromptTokenizer, Truncation, check_prompt
from edgesd.spec.build import MOST_CHUNKS
from edgesd.spec.pipeline import DenoiserSpec, PipelineSpec, SideSpec, Wiring

_BACKTRACK = 20
"""Tokens that are moved into the next chunk where the last comma is no further off: the web UI's
`comma_padding_backtrack`."""


class Prompt(NamedTuple):
    """texts: what each tokenizer of a wiring reads, in their order; the last one, where there are
    fewer."""

    texts: tuple[str, ...]
    syntax: Syntax = "plain"


@dataclass(frozen=True)
class Chunk:
    """ids: [1, tokens]. weights: [tokens] of their embeddings; None where all are 1."""

    ids: NDArray[np.int64]
    weights: Float | None = None

    def weighted(self, hidden: Float) -> Float:
        """Embeddings [1, tokens, C] with the weights, and the mean that they had without: what the
        web UI calls the emphasis "Original" (`sd_emphasis.py`)."""
        if self.weights is None:
            return hidden
        found = hidden * self.weights[None, :, None]
        mean, before = (float(values.mean(dtype=np.float64)) for values in (found, hidden))
        return found if mean == 0 else (found * np.float32(before / mean)).astype(np.float32)


def chunks_of(
    tokenizer: PromptTokenizer,
    text: str,
    syntax: Syntax = "plain",
    most: int = MOST_CHUNKS,
    whole: bool = False,
) -> tuple[list[Chunk], Truncation | None]:
    """The chunks of a prompt, at least one and at most `most`, and what didn't fit. whole: nothing
    ends a chunk before it is full.

    Raises InputError for a prompt that isn't text, or not of its syntax.
    """
    check_prompt(text)
    cutting = _Cutting(tokenizer.capacity, 0 if whole or syntax == "plain" else _BACKTRACK)
    for segment in segments(text, syntax):
        if segment.ends_chunk:
            if not whole:
                cutting.end()
            continue
        ids = tokenizer.ids(segment.text)
        # diffusers cuts the vectors of a token off as it cuts all others.
        units = ((one,) for one in ids) if syntax == "plain" else tokenizer.units(ids)
        for unit in units:
            cutting.add(unit, segment.weight, unit == (tokenizer.comma,))
    if cutting.current or not cutting.done:
        cutting.end()
    cut = [id_ for tokens in cutting.done[most:] for id_, _ in tokens]
    truncation = Truncation(tokenizer.text(cut), len(cut), most * tokenizer.capacity)
    return (
        [_chunk(tokenizer, tokens) for tokens in cutting.done[:most]],
        truncation if cut else None,
    )


_Tokens = list[tuple[int, float]]
"""Ids and weights."""


def _chunk(tokenizer: PromptTokenizer, tokens: _Tokens) -> Chunk:
    ids = tokenizer.framed([id_ for id_, _ in tokens])
    if all(weight == 1 for _, weight in tokens):
        return Chunk(ids)
    weights = np.ones(ids.shape[1], np.float32)
    first = len(tokenizer.spec.beginning)
    weights[first : first + len(tokens)] = [weight for _, weight in tokens]
    return Chunk(ids, weights)


@dataclass
class _Cutting:
    """Fills chunk after chunk of `capacity` tokens. backtrack: how far off a comma may be for a
    chunk to end there; 0: it ends anywhere."""

    capacity: int
    backtrack: int
    done: list[_Tokens] = field(default_factory=list)
    current: _Tokens = field(default_factory=list)
    _behind_comma: int | None = None
    """Where the current chunk goes on behind its last comma."""

    def add(self, unit: Sequence[int], weight: float, comma: bool) -> None:
        """Add tokens, which stay together where one chunk can hold them."""
        if comma:
            self._behind_comma = len(self.current) + 1
        elif self.backtrack and len(self.current) == self.capacity:
            self._end_at_comma()
        if len(self.current) == self.capacity or (
            len(self.current) + len(unit) > self.capacity >= len(unit)
        ):
            self.end()
        for id_ in unit:
            if len(self.current) == self.capacity:
                self.end()
            self.current.append((id_, weight))

    def end(self) -> None:
        """Begin a new chunk."""
        self.done.append(self.current)
        self.current, self._behind_comma = [], None

    def _end_at_comma(self) -> None:
        """Begin a new chunk with what stands behind the last comma."""
        at = self._behind_comma
        if at is not None and len(self.current) - (at - 1) <= self.backtrack:
            moved = self.current[at:]
            del self.current[at:]
            self.end()
            self.current = moved


def chunked(wiring: Wiring) -> bool:
    """Whether prompts may be given in chunks: all encoders of a pipeline get equally many."""
    return all(wiring.tokenizers[text.tokenizer].chunked for text in wiring.texts)


def fixed_chunks(pipeline: PipelineSpec) -> int | None:
    """How many chunks the networks of a pipeline take of each prompt; None: any number."""
    wiring = pipeline.wiring
    if not chunked(wiring):
        return 1
    tokens = min(wiring.tokenizers[text.tokenizer].max_tokens for text in wiring.texts)
    specs: tuple[DenoiserSpec | SideSpec, ...] = (wiring.denoiser, *wiring.sides)
    sizes = [
        tensor.shape[1]
        for spec in specs
        for one in spec.inputs
        if one.fill == "joined" and (tensor := pipeline.components[spec.component].input(one.name))
        if len(tensor.shape) == 3
    ]
    fixed = [size // tokens for size in sizes if isinstance(size, int)]
    return max(1, min(fixed)) if fixed else None if sizes else 1
