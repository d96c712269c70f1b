"""Single files: which model they hold, that it is the same as in a folder, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from edgesd.export.mapped import state_of
from edgesd.export.pipeline import export_spec
from edgesd.export.source import ModelSource, resolve_source
from tests.single_files import (
    without_weights,
    write_single_file,
)
from tests.tiny_pipelines import write_tiny

KINDS = ("sd", "sd2-v")


class Forms:
    """A tiny pipeline in both forms: `folder`, and the single file with `configs`."""

    def __init__(self, name: str, root: Path) -> None:
        self.folder = write_tiny(name, root / "folder")
        self.file = write_single_file(self.folder, root / "model.safetensors")
        self.configs = without_weights(Path(shutil.copytree(self.folder, root / "configs")))

    def open(self) -> ModelSource:
        return resolve_source(self.file, self.configs)


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Forms]:
    return {name: Forms(name, tmp_path_factory.mktemp(name)) for name in KINDS}


@pytest.mark.parametrize("name", KINDS)
def test_weights_are_those_of_the_folder(forms: dict[str, Forms], name: str) -> None:
    form = forms[name]
    ours = export_spec(form.open())
    theirs = export_spec(resolve_source(form.folder))
    assert [c.spec for c in ours.components] == [c.spec for c in theirs.components]
    assert ours.pipeline.wiring == theirs.pipeline.wiring
    for component, other in zip(ours.components, theirs.components, strict=True):
        expected = state_of(other.load())
        found = state_of(component.load())
        assert found.keys() == expected.keys()
        for key, tensor in found.items():
            assert tensor.dtype == expected[key].dtype
            assert torch.equal(tensor, expected[key]), key
