"""Reads textual inversions: files of a few vectors that stand for a new token."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from edgesd.errors import InputError
from edgesd.export.families.checkpoint import Embedding
from edgesd.export.source.folder import check_no_pickle
from edgesd.files import expanded, named_path, sha256_file
from edgesd.text import first_sentence

if TYPE_CHECKING:
    from torch import Tensor

_MOST_BYTES = 64 << 20
_MOST_VECTORS = 75
"""As many as a prompt has tokens."""

_MOST_WIDTH = 1 << 14
_LONGEST_TOKEN = 100
_WEB_UI = "emb_params"
"""Name of the vectors in a file of AUTOMATIC1111's web UI for one text encoder."""

_BOTH = {"clip_l", "clip_g"}
"""Names of the vectors for the first and the second text encoder of SDXL."""


def read_embedding(given: str) -> Embedding:
    """The textual inversion in FILE, or in FILE:TOKEN under another token than the file's own.

    Files are .safetensors, as diffusers saves them (learned_embeds, named by the token) or as
    AUTOMATIC1111's web UI does (`emb_params`; clip_l and clip_g for SDXL), whose token is the
    file's name. Raises InputError for another file, for vectors that none has, and for a token that
    can't stand in a prompt.
    """
    where, token = named_path(given)
    path = expanded(where)
    if not path.is_file():
        raise InputError(f"--embedding {given}: there is no such file: give FILE or FILE:TOKEN")
    check_no_pickle(path, "prompts.md")
    tensors = _tensors(path)
    names = set(tensors)
    if names == _BOTH:
        vectors = tensors
    elif len(names) == 1:
        ((own, tensor),) = tensors.items()
        vectors = {"": tensor}
        if own != _WEB_UI:
            token = token or own
    else:
        shown = ", ".join(sorted(names)[:4])
        raise InputError(
            f"{path} holds {len(names)} tensors ({shown[:120]}): expected those of one textual "
            "inversion, a single one or clip_l and clip_g"
        )
    token = token or path.stem
    _check(path, token, vectors)
    return Embedding(token, sha256_file(path), vectors)


def _tensors(path: Path) -> dict[str, Tensor]:
    """The tensors in a file, in fp32 [n, C]."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if path.stat().st_size > _MOST_BYTES:
        raise InputError(
            f"{path} is larger than {_MOST_BYTES / 1e6:.0f} MB: a textual inversion has some "
            "kilobytes; is it the right file?"
        )
    try:
        found = load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError) as exc:
        raise InputError(f"{path} isn't a .safetensors file: {first_sentence(exc)}") from exc
    vectors = {}
    for name, tensor in found.items():
        shape = list(tensor.shape)
        known = tensor.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
        fits = len(shape) in (1, 2) and known and 0 < shape[-1] <= _MOST_WIDTH
        if not fits or not 0 < tensor.numel() <= _MOST_VECTORS * shape[-1]:
            raise InputError(
                f"{path} has {name[:60]!r} of {str(shape)[:60]} in {tensor.dtype}: expected 1 to "
                f"{_MOST_VECTORS} vectors in 16 or 32 bits"
            )
        vectors[name] = tensor.float().reshape(-1, shape[-1])
        if not bool(torch.isfinite(vectors[name]).all()):
            raise InputError(f"{path} holds NaN or infinite values: download it again")
    return vectors


def _check(path: Path, token: str, vectors: Mapping[str, Tensor]) -> None:
    counts = [len(each) for each in vectors.values()]
    if len(set(counts)) > 1:
        raise InputError(
            f"{path} has {' and '.join(map(str, counts))} vectors for the two encoders: "
            "expected as many for one as for the other; download it again"
        )
    if not 0 < len(token) <= _LONGEST_TOKEN or re.search(r"\s", token) or not token.isprintable():
        raise InputError(
            f"{path}: the token {token[:60]!r} can't stand in a prompt: give FILE:TOKEN with one "
            f"of at most {_LONGEST_TOKEN} characters, without blanks"
        )


def read_embeddings(given: Collection[str]) -> tuple[Embedding, ...]:
    """All of several. Raises InputError as `read_embedding`, and for a token that two have."""
    found: dict[str, Embedding] = {}
    for one in map(read_embedding, given):
        for token in one.tokens:
            if token in found:
                raise InputError(
                    f"--embedding: two files have the token {token!r}: give FILE:TOKEN"
                )
            found[token] = one
    return tuple(dict.fromkeys(found.values()))
