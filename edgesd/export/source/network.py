"""One network that stands in for a model's own, such as an autoencoder of the same latents."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from edgesd.errors import InputError
from edgesd.export.families import Family
from edgesd.export.families.checkpoint import DIFFUSERS_STEM
from edgesd.export.source.folder import (
    INDEX,
    ModelSource,
    is_pipeline,
    open_folder,
    read_json_object,
)


@dataclass(frozen=True)
class NetworkFolder(ModelSource):
    """A network in a folder of its own: config.json, weights, perhaps a card and a licence."""

    def folder(self, name: str) -> Path:
        """The folder itself, whatever the network is called in a pipeline."""
        return self.root


def open_network(name: str, root: Path, component: str) -> ModelSource:
    """The network in the folder `root`: alone, or the `component` of the pipeline that is there.

    Raises InputError for another folder.
    """
    if is_pipeline(root):
        return open_folder(name, root)
    if not (root / "config.json").is_file():
        raise InputError(
            f"{name} has neither config.json nor {INDEX}: expected the folder of one network, as "
            "diffusers saves it, or of a pipeline"
        )
    class_name = read_json_object(root / "config.json").get("_class_name")
    if not isinstance(class_name, str):
        raise InputError(f"{root / 'config.json'} names no class of diffusers (_class_name)")
    index = {component: ["diffusers", class_name]}
    family = Family(component, (), {component: DIFFUSERS_STEM}, (), _no_pipeline)
    return NetworkFolder(name, root, index, family)


def _no_pipeline(*_: object) -> NoReturn:
    raise InputError("one network is no pipeline: give the folder of a pipeline")
