"""The parts of a checkpoint that a family reads, whatever its form on disk (export/source)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True)
class Weights:
    """The weight files of one network: names in its folder, and how diffusers must load them."""

    files: tuple[str, ...]
    variant: str | None
    safetensors: bool


class Checkpoint(Protocol):
    """A model on this machine. `name` is what the user called it,
    `public_name` what bundles say of it; `index` is model_index.json."""

    @property
    def name(self) -> str: ...

    @property
    def public_name(self) -> str: ...

    @property
    def root(self) -> Path: ...

    @property
    def index(self) -> Mapping[str, Any]: ...

    def config(self, path: str) -> dict[str, Any]:
        """The json object in the file `path`, relative to the model. Raises InputError."""

    def class_of(self, component: str) -> str:
        """The class that model_index.json gives for a component. Raises InputError."""

    def library_of(self, component: str) -> str:
        """The library of that class: diffusers, transformers, or a file of the model's own."""

    def weights(self, component: str) -> Weights:
        """The best weight files of a component. Raises InputError when there are none."""

    def hints(self) -> dict[str, Any]:
        """Defaults that the model asks for: num_inference_steps, guidance_scale, variant (a kind
        of families/variants.py)."""

    def sha256(self) -> str:
        """Hash over the names and contents of all files that the pipeline is made from."""
