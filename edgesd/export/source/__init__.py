"""From what the user names as a model to a checked local folder.

Takes a diffusers folder (with model_index.json) or a Hugging Face hub id (owner/name).
`resolve_source` tells them apart: another kind of input (a single-file checkpoint, an ONNX folder)
begins there.
"""

from __future__ import annotations

import re
from pathlib import Path

from edgesd.errors import InputError
from edgesd.export.source.folder import SINGLE_FILE, ModelSource, not_a_folder, open_folder
from edgesd.export.source.hub import download
from edgesd.export.source.network import open_network
from edgesd.files import expanded

__all__ = ["ModelSource", "is_hub_id", "resolve_network", "resolve_source"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def resolve_source(model: str | Path) -> ModelSource:
    """Find a model: a local diffusers folder, or a hub id, which is downloaded to its cache.

    What looks like a path (it exists, starts with . / or ~, or its parent folder exists) is never
    looked up on the network. Raises InputError when the model can't be found, read or reached, or
    is of no supported family; MissingDependencyError when a download needs edgesd[build].
    """
    name = str(model)
    path = expanded(name)
    if path.is_file():
        raise InputError(not_a_folder(path))
    if path.is_dir():
        return open_folder(name, path)
    if _looks_local(model):
        raise InputError(
            f"{name} doesn't exist: give a diffusers folder (with model_index.json), "
            "or a hub id such as owner/name"
        )
    return open_folder(name, download(name))


def resolve_network(model: str, component: str) -> ModelSource:
    """Find a network to stand in for the `component` of a model: its own folder, that of a pipeline
    that has one, or a hub id of either. Raises InputError."""
    path = expanded(model)
    if path.is_file():
        raise InputError(
            f"{model} is a file: expected the folder of one network, as diffusers saves it, or of "
            "a pipeline"
        )
    if path.is_dir():
        return open_network(model, path, component)
    if _looks_local(model):
        raise InputError(
            f"{model} doesn't exist: give the folder of one network, as diffusers saves it, or of "
            "a pipeline, or a hub id such as owner/name"
        )
    return open_network(model, download(model, component), component)


def is_hub_id(model: str) -> bool:
    """Whether `resolve_source` would look `model` up on the hub, and open nothing local."""
    return not expanded(model).exists() and not _looks_local(model)


def _looks_local(model: str | Path) -> bool:
    if isinstance(model, Path) or not _HUB_ID.fullmatch(model):
        return True
    return Path(model).suffix.lower() in SINGLE_FILE or Path(model).parent.is_dir()
