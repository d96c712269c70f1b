"""Adds textual inversions to tokenizers and text encoders, as diffusers' load_textual_inversion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from edgesd.errors import InputError
from edgesd.export.families import TOKENIZER_OF
from edgesd.export.families.checkpoint import Checkpoint, Embedding

_NAMES = dict(zip(TOKENIZER_OF, ("clip_l", "clip_g"), strict=True))
"""Text encoder -> the name of its vectors in files for two."""


def add_tokens(tokenizer: Any, embeddings: Sequence[Embedding]) -> None:
    """Add the tokens of all vectors, one after another. Raises InputError for one that is known
    already."""
    known = tokenizer.get_vocab()
    for embedding in embeddings:
        for token in embedding.tokens:
            if token in known:
                raise InputError(
                    f"--embedding: the model knows the token {token!r} already: give another, as "
                    "in FILE:TOKEN"
                )
        tokenizer.add_tokens(embedding.tokens)


def add_vectors(net: nn.Module, source: Checkpoint, component: str) -> None:
    """Add the vectors of the source's textual inversions to a text encoder's table of tokens, in
    place; a net on torch's meta device gets the room for them. Other networks stay as they are.

    As in diffusers, the table then has as many rows as the tokenizer has tokens. Raises InputError
    for vectors that are another model's.
    """
    if not source.embeddings or component not in _NAMES:
        return
    from edgesd.export.families.parts.clip import load_tokenizer

    tokenizer, name = TOKENIZER_OF[component], _NAMES[component]
    table: Any = net.get_input_embeddings()  # type: ignore[operator]
    rows = [_vectors(source, component, name, embedding) for embedding in source.embeddings]
    count = len(load_tokenizer(source.folder(tokenizer)))
    own = table.weight.data[:count]
    if len(own) < count:
        raise InputError(
            f"{source.name}: {tokenizer} has {count} tokens, and {component} rows for {len(own)}: "
            "do both belong to one model?"
        )
    for embedding, vectors in zip(source.embeddings, rows, strict=True):
        if vectors.shape[1] != own.shape[1]:
            raise InputError(
                f"--embedding: {embedding.token!r} has vectors of {vectors.shape[1]} values, and "
                f"{component} of {source.name} takes {own.shape[1]}: it was made for another model"
            )
    more = torch.cat(rows)
    if own.is_meta:
        more = more.to("meta")
    lossless = own.is_meta or torch.equal(more.to(own.dtype).float(), more)
    both = torch.cat([own, more.to(own.dtype)] if lossless else [own.float(), more])
    table.weight = nn.Parameter(both, requires_grad=False)
    table.num_embeddings = len(both)
    net.config.vocab_size = len(both)  # type: ignore[union-attr]


def _vectors(source: Checkpoint, component: str, name: str, embedding: Embedding) -> Tensor:
    """Those for one text encoder, of as many as the pipeline has."""
    encoders = [each for each in _NAMES if _has(source, each)]
    both = len(embedding.vectors) > 1
    if len(encoders) > 1 and not both:
        raise InputError(
            f"--embedding: {embedding.token!r} has vectors for one text encoder, and {source.name} "
            "has two: give a file with clip_l and clip_g"
        )
    if both and len(encoders) == 1 and component == "text_encoder":
        raise InputError(
            f"--embedding: {embedding.token!r} has vectors for two text encoders, as SDXL has, and "
            f"{source.name} has one: it was made for another model"
        )
    return embedding.vectors[name if both else ""]


def _has(source: Checkpoint, component: str) -> bool:
    entry = source.index.get(component)
    return isinstance(entry, list) and all(isinstance(part, str) for part in entry)
