"""Converts tokenizers of transformers to the one file that boards read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from edgesd.errors import BundleError, InputError
from edgesd.export.families.checkpoint import Embedding
from edgesd.export.families.parts import clip, t5
from edgesd.export.quiet import quiet
from edgesd.files import atomic_write
from edgesd.runtime.tokenizer import PromptTokenizer, TokenizerSpec
from edgesd.text import first_sentence


def write_tokenizer(
    source: Path,
    folder: Path,
    max_tokens: int,
    embeddings: Sequence[Embedding] = (),
    class_name: str = "CLIPTokenizer",
) -> dict[str, bytes]:
    """Write tokenizer.json and tokenizer_spec.json to `folder` from a diffusers tokenizer folder.

    max_tokens: of a prompt, with its padding. embeddings: textual inversions whose tokens are
    added to CLIP's. class_name: of the tokenizer, in model_index.json. Returns the files, by name.
    Raises InputError when `source` can't be read. own_pipeline.py compares what is written with
    diffusers' ids.
    """
    try:
        with quiet():
            if class_name in t5.TOKENIZERS:
                original = t5.load_tokenizer(source)
            else:
                original = clip.load_tokenizer(source, embeddings)
            backend = original.backend_tokenizer
    except InputError:
        raise
    except Exception as exc:  # many libraries read here, each with exceptions of its own
        raise InputError(f"cannot read the tokenizer in {source}: {first_sentence(exc)}") from exc
    backend.no_truncation()
    backend.no_padding()
    spec = TokenizerSpec(
        max_length=max_tokens,
        pad_id=original.pad_token_id,
        bos_id=original.bos_token_id,
        eos_id=original.eos_token_id,
    )
    files = {
        "tokenizer.json": backend.to_str().encode(),
        "tokenizer_spec.json": msgspec.json.encode(spec),
    }
    try:
        PromptTokenizer(*files.values())
    except BundleError as exc:
        raise InputError(f"{source} doesn't hold a {class_name} as edgesd has it: {exc}") from exc
    for name, content in files.items():
        with atomic_write(folder / name) as file:
            file.write(content)
    return files
