"""Which graphs of a quantized bundle are written, and when they are written anew."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

pytest.importorskip("torch")

from edgesd.errors import ParityError
from edgesd.export.external_data import GRAPH_FILE, KERNELS_FILE
from edgesd.export.quantize.assign import LayerScheme
from edgesd.export.quantize.layers import Layer
from edgesd.export.quantize.store import GraphForm
from edgesd.progress import SILENT
from edgesd.recipes import graph_files as module
from edgesd.recipes.graph_files import GraphFiles
from edgesd.spec.bundle import Parity
from edgesd.spec.scheme import Scheme

FIRST, SECOND = (Layer(name, "line", "Node", "linear", (8, 8)) for name in ("first", "second"))
SCHEMES: dict[Layer, LayerScheme] = {FIRST: Scheme(8, 8), SECOND: Scheme(8, 8)}


class FakeStore:
    """Writes empty graphs, and notes what it was asked for. pooled: what can be."""

    graphs, wiring = SimpleNamespace(cases=lambda component: []), None

    def __init__(self) -> None:
        self.written: list[tuple[str, GraphForm]] = []

    def quantize(self, wanted: object, progress: object, task: str) -> None:
        """There is nothing to quantize."""

    def write(
        self, component: str, schemes: object, folder: Path, form: GraphForm
    ) -> tuple[None, None]:
        folder.mkdir(parents=True)
        (folder / GRAPH_FILE).touch()
        if form.kernels:
            (folder / KERNELS_FILE).touch()
        self.written.append((component, form))
        return None, None

    def take(self) -> list[tuple[str, GraphForm]]:
        written, self.written = self.written, []
        return written


@pytest.fixture
def store() -> FakeStore:
    return FakeStore()


@pytest.fixture
def files(store: FakeStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> GraphFiles:
    monkeypatch.setattr(module, "check_parity", lambda *_, slots: Parity(0.0, 0.0, 0.5))
    monkeypatch.setattr(module, "can_pool", lambda graphs, name, wiring: name == "second")
    monkeypatch.setattr("edgesd.runtime.kernels.usable", lambda schemes: True)
    monkeypatch.setattr("edgesd.runtime.kernels.library", lambda: None)
    components = [SimpleNamespace(name=name) for name in ("first", "second")]
    return GraphFiles(tmp_path, cast(Any, store), cast(Any, components), "w8a8", SILENT)


def test_what_is_there_is_not_written_again(files: GraphFiles, store: FakeStore) -> None:
    files.write(SCHEMES, GraphForm())
    assert store.take() == [("first", GraphForm()), ("second", GraphForm())]
    files.write(dict(SCHEMES), GraphForm())
    assert store.take() == []
    files.write({**SCHEMES, FIRST: None}, GraphForm())
    assert store.take() == [("first", GraphForm())]


def test_only_what_can_be_pooled_is_pooled(files: GraphFiles, store: FakeStore) -> None:
    files.write(SCHEMES, GraphForm())
    store.take()
    files.write(SCHEMES, GraphForm(pooled=True))
    assert store.take() == [("second", GraphForm(pooled=True))]
    files.write(SCHEMES, GraphForm())
    assert store.take() == [("second", GraphForm())]


def test_without_kernels_attention_in_8_bits_means_nothing(
    files: GraphFiles, store: FakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    files.write(SCHEMES, GraphForm(kernels=True, attention=True))
    assert {form for _, form in store.take()} == {GraphForm(kernels=True, attention=True)}
    assert files.graphs["first"].kernels == f"first/{KERNELS_FILE}"
    files.write(SCHEMES, GraphForm(kernels=False, attention=True))
    assert {form for _, form in store.take()} == {GraphForm()}
    assert files.graphs["first"].kernels is None
    monkeypatch.setattr("edgesd.runtime.kernels.usable", lambda schemes: False)
    files.write(SCHEMES, GraphForm(kernels=True))
    assert store.take() == []


def test_a_graph_that_failed_its_check_is_written_anew(
    files: GraphFiles, store: FakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    files.write(SCHEMES, GraphForm())
    store.take()

    def fails(*_: object, slots: object) -> Parity:
        raise ParityError("too far")

    with monkeypatch.context() as patch:
        patch.setattr(module, "check_parity", fails)
        with pytest.raises(ParityError):
            files.write(SCHEMES, GraphForm(pooled=True))
    store.take()
    files.write(SCHEMES, GraphForm())
    assert store.take() == [("second", GraphForm())]
