"""Configs and tokenizers of models whose checkpoints hold weights alone.

LAYOUT.json: file of a diffusers folder -> its content, as the published model has it; LAYOUT is
what diffusers calls checkpoints of its kind. merges.txt: of CLIP's tokenizer, which all of them
have, and from which vocab.json follows. NOTICE says where it comes from.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import weakref
from pathlib import Path
from typing import Any

from edgesd.files import disk_errors

_HERE = Path(__file__).parent
_MERGES = "merges.txt"
_TOKENIZER = "tokenizer_config.json"


class ConfigFolder:
    """A temporary folder of configs as a diffusers pipeline has them, removed with the last
    reference to it. root: the folder."""

    def __init__(self) -> None:
        """Raises ResourceError where no folder can be made."""
        with disk_errors(Path(tempfile.gettempdir())):
            self.root = Path(tempfile.mkdtemp(prefix="edgesd-configs-"))
        weakref.finalize(self, shutil.rmtree, self.root, ignore_errors=True)

    def write(self, name: str, content: dict[str, Any]) -> None:
        """Write a JSON file; `name` is relative to the folder."""
        path = self.root / name
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(content, indent=2))


def known_layouts() -> tuple[str, ...]:
    """Names of the layouts that `lay_out` takes."""
    return tuple(sorted(path.stem for path in _HERE.glob("*.json")))


def lay_out(layout: str) -> ConfigFolder:
    """The configs and tokenizers of a layout as a diffusers folder without weights. Raises
    ResourceError when the disk is full."""
    folder = ConfigFolder()
    files = json.loads((_HERE / f"{layout}.json").read_text())
    for name, content in files.items():
        folder.write(name, content)
        if name.endswith(f"/{_TOKENIZER}"):
            tokenizer = (folder.root / name).parent
            with disk_errors(tokenizer):
                shutil.copyfile(_HERE / _MERGES, tokenizer / _MERGES)
            folder.write(f"{tokenizer.name}/vocab.json", clip_vocabulary())
    return folder


def clip_vocabulary() -> dict[str, int]:
    """CLIP's vocabulary: token -> id, 49408 of them.

    Byte-level BPE (Radford et al. 2021, arXiv 2103.00020; the characters for bytes are GPT-2's):
    each byte, each byte that ends a word, what each merge makes, and two marks.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = 0x100 - len(printable)
    tokens = [chr(code) for code in (*printable, *range(0x100, 0x100 + others))]
    tokens += [f"{token}</w>" for token in tokens]
    merges = (_HERE / _MERGES).read_text(encoding="utf-8").rstrip("\n").split("\n")[1:]
    tokens += [merge.replace(" ", "") for merge in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return {token: index for index, token in enumerate(tokens)}
