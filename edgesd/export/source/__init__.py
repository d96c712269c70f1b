"""From what the user names as a model to a checked one on this machine.

Takes a diffusers folder (with model_index.json), a folder of ONNX graphs that optimum exported, a
single .safetensors file, or what the Hugging Face hub has of the first and the last (owner/name,
owner/name/file.safetensors). `resolve_source` tells them apart: another form of model begins there.
"""

from __future__ import annotations

import re
from pathlib import Path

from edgesd.errors import InputError, UsageError
from edgesd.export.source.folder import (
    PICKLES,
    SAFETENSORS,
    ModelSource,
    not_a_folder,
    open_folder,
)
from edgesd.export.source.hub import download, download_file
from edgesd.export.source.network import open_network
from edgesd.export.source.onnx_folder import is_onnx_folder, open_onnx_folder
from edgesd.export.source.single_file import open_single_file
from edgesd.files import expanded

__all__ = ["ModelSource", "is_hub_id", "resolve_network", "resolve_source"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_FILE = re.compile(rf"({_HUB_ID.pattern})/((?:[\w-][\w.-]*/)*[\w-][\w.-]*\{SAFETENSORS})")


def resolve_source(
    model: str | Path, configs: Path | None = None, weights: bool = True
) -> ModelSource:
    """Find a model of any of these forms; what the hub has is downloaded to its cache, but, of a
    pipeline, for its weights where these aren't wanted.

    configs: a diffusers folder whose configs and tokenizers a single file gets; None for those of
    the published model of its layout.

    What looks like a path (it exists, starts with . / or ~, or its parent folder exists) is never
    looked up on the network. Raises InputError when the model can't be found, read or reached, or
    is of no supported family; UsageError for configs of what has its own; MissingDependencyError
    when a download needs edgesd[build].
    """
    name = str(model)
    path = expanded(name)
    if path.is_file():
        if path.suffix.lower() != SAFETENSORS:
            raise InputError(not_a_folder(path))
        return open_single_file(name, path, configs)
    if not path.is_dir() and not _looks_local(model) and (found := _HUB_FILE.fullmatch(name)):
        return open_single_file(name, download_file(found[1], found[2]), configs)
    if configs is not None:
        raise UsageError(f"{name} is no single file: --config is for those, which have no configs")
    if path.is_dir():
        return open_onnx_folder(name, path) if is_onnx_folder(path) else open_folder(name, path)
    if _looks_local(model):
        raise InputError(
            f"{name} doesn't exist: give a diffusers folder (with model_index.json), a folder of "
            "optimum's ONNX graphs, a .safetensors file, or a hub id such as owner/name"
        )
    return open_folder(name, download(name, weights=weights))


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
    if isinstance(model, Path):
        return True
    if _HUB_FILE.fullmatch(model):
        return Path(Path(model).parts[0]).is_dir()
    if not _HUB_ID.fullmatch(model):
        return True
    return Path(model).suffix.lower() in (SAFETENSORS, *PICKLES) or Path(model).parent.is_dir()
