"""The language model under the adapter: read from the very GGUF file that is deployed."""

from __future__ import annotations

import contextlib
import io
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgesd.errors import InputError, MissingDependencyError
from edgesd.export.prompter.gguf_header import check_header
from edgesd.export.quiet import quiet
from edgesd.text import first_sentence


@dataclass
class Base:
    """model: transformers', fp32, its weights as the GGUF file's dequantized ones. eos: id of the
    token that ends an answer."""

    model: Any
    tokenizer: Any
    eos: int

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, which has been cleaned: it spells no control token."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return ids


def load_base(path: Path) -> Base:
    """Read a GGUF file, or the folder of a transformers model.

    Raises InputError when it can't be read, MissingDependencyError without edgesd[prompter].
    """
    if not path.exists():
        raise InputError(f"there is no model at {path}: give a .gguf file or a model's folder")
    try:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as exc:
        raise MissingDependencyError(
            f"training needs torch and transformers ({exc}): pip install 'edgesd[build]'"
        ) from exc
    options: dict[str, Any] = {}
    folder = path
    if path.is_file():
        require_gguf()
        check_header(path)
        # Its whole path: of a bare name transformers prefers a file in the working directory.
        folder, options["gguf_file"] = path.parent, str(path.resolve())
    try:
        with quiet(), contextlib.redirect_stderr(io.StringIO()):  # a bar that can't be turned off
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, **options)
            model = AutoModelForCausalLM.from_pretrained(
                folder, local_files_only=True, dtype=torch.float32, **options
            )
    except (OSError, ValueError, KeyError, RuntimeError, struct.error) as exc:
        raise InputError(
            f"{path} can't be read as a language model: {first_sentence(exc)}"
        ) from exc
    model.config.use_cache = False
    if tokenizer.eos_token_id is None:
        raise InputError(f"{path} has no token that ends a text")
    return Base(model, tokenizer, int(tokenizer.eos_token_id))


def require_gguf() -> Any:
    """The package gguf. Raises MissingDependencyError."""
    try:
        import gguf
    except ImportError as exc:
        raise MissingDependencyError(
            "GGUF files need the package gguf, which isn't installed: pip install "
            "'edgesd[prompter]'"
        ) from exc
    return gguf
