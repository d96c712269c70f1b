"""Converts a CLIP tokenizer to the one file that boards read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import transformers

from edgesd.errors import InputError, ParityError
from edgesd.export.quiet import quiet
from edgesd.files import atomic_write
from edgesd.runtime.tokenizer import PromptTokenizer, TokenizerSpec
from edgesd.text import first_sentence

_PROBES = ("", "a red apple", "It's  3 DOGS, caf\u00e9!", "\u65e5\u672c \U0001f600", "word " * 100)


def write_tokenizer(source: Path, folder: Path, max_tokens: int) -> tuple[str, ...]:
    """Write tokenizer.json and tokenizer_spec.json to `folder` from a diffusers tokenizer folder.

    max_tokens: input length of the text encoder. Returns the names of the files. Raises InputError
    when `source` can't be read, ParityError when the result gives other ids than transformers.
    """
    try:
        with quiet():
            tokenizer_class: Any = transformers.CLIPTokenizerFast  # type: ignore[attr-defined]
            original = tokenizer_class.from_pretrained(str(source), local_files_only=True)
            backend = original.backend_tokenizer
            wanted = original(
                list(_PROBES), padding="max_length", truncation=True, max_length=max_tokens
            ).input_ids
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
    ours = PromptTokenizer(files["tokenizer.json"], files["tokenizer_spec.json"])
    for probe, ids in zip(_PROBES, wanted, strict=True):
        found = ours.encode(probe)[0][0].tolist()
        if found != ids:
            raise ParityError(f"tokenizer: {probe!r} became {found}, its source gives {ids}")
    for name, content in files.items():
        with atomic_write(folder / name) as file:
            file.write(content)
    return tuple(files)
