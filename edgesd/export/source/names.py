"""Names of weights, which differ between releases of the libraries that networks are made of."""

from __future__ import annotations

from collections.abc import Container

_WRAPPER = "text_model."
"""What a text encoder's names begin with in some checkpoints, and in transformers before 5.6."""


def known_name(name: str, wanted: Container[str]) -> str:
    """The one of `wanted` that a network has for a weight; `name` where it has none."""
    bare = name.removeprefix(_WRAPPER)
    return next((n for n in (name, bare, f"{_WRAPPER}{bare}") if n in wanted), name)
