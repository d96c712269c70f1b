"""The fp32 graphs that quantization starts from, with weights in their files and without."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("diffusers")

from edgesd.errors import EdgesdError, ParityError
from edgesd.export import source_graphs
from edgesd.export.families import ExportSpec
from edgesd.export.passes.values import array_of
from edgesd.export.pipeline import export_pipeline, export_spec
from edgesd.export.quantize.layers import matrix_of
from edgesd.export.quantize.store import find_nodes
from edgesd.export.source import resolve_source
from edgesd.export.source_graphs import SourceGraphs
from edgesd.recipes.demo import demo_model

pytestmark = pytest.mark.integration

NAME = "text_encoder"


@pytest.fixture(scope="module")
def plan() -> ExportSpec:
    spec = export_spec(resolve_source(demo_model()))
    parts = tuple(component for component in spec.components if component.name == NAME)
    return ExportSpec(spec.pipeline, parts, spec.own)


@pytest.fixture(scope="module")
def both(plan: ExportSpec, tmp_path_factory: pytest.TempPathFactory) -> list[SourceGraphs]:
    """Graphs with their weights, and graphs that leave them in the checkpoint."""
    made, source = [], resolve_source(demo_model())
    for limit in (1 << 30, 0):
        folder = tmp_path_factory.mktemp("graphs") / "source"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(source_graphs, "REFER_BYTES", limit)
            export_pipeline(source, plan, folder, as_source=True)
        made.append(SourceGraphs(folder, plan.components))
    return made


def test_weights_that_stay_in_the_checkpoint_are_the_same(both: list[SourceGraphs]) -> None:
    whole, referring = both
    assert whole.whole() and not referring.whole()
    files = [(graphs.folder / NAME / "weights.bin").stat().st_size for graphs in both]
    assert files[1] < 0.1 * files[0]
    added = referring.extra_bytes() - whole.extra_bytes()
    assert files[0] - files[1] == pytest.approx(added, rel=0.01)  # but for what aligns them
    models = [graphs.load(NAME) for graphs in both]
    assert [str(node) for node in models[0].graph] == [str(node) for node in models[1].graph]
    first, second = (model.graph.initializers for model in models)
    assert list(first) == list(second)
    for name in first:
        assert np.array_equal(array_of(first[name]), array_of(second[name])), name
    layers = [find_nodes({NAME: model}) for model in models]
    assert list(layers[0]) == list(layers[1])
    for layer in layers[0]:
        weights = [matrix_of(nodes[layer], layer) for nodes in layers]
        assert np.array_equal(*weights)


def test_what_the_source_computes_is_kept(both: list[SourceGraphs], plan: ExportSpec) -> None:
    from edgesd.export.parity import reference_cases

    (component,) = plan.components
    for graphs in both:
        kept, again = graphs.cases(NAME), reference_cases(component.load(), component)
        for (inputs, outputs), (wanted_inputs, wanted) in zip(kept, again, strict=True):
            assert list(inputs) == list(wanted_inputs)
            for name in inputs:
                assert np.array_equal(inputs[name], wanted_inputs[name])
            assert all(np.array_equal(*pair) for pair in zip(outputs, wanted, strict=True))


def test_graphs_of_another_model(both: list[SourceGraphs], plan: ExportSpec) -> None:
    graphs = SourceGraphs(both[1].folder, plan.components)
    state = dict(graphs._state(NAME))
    graphs._states[NAME] = {name: state[name] for name in list(state)[:2]}
    with pytest.raises(EdgesdError, match="is of another model: text_encoder has no "):
        graphs.load(NAME)


def test_a_wrong_layer_is_seen(
    plan: ExportSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The parity gate looks at weights that stay in the checkpoint, too."""
    from edgesd.export.passes import bind

    class Wrong(bind.BoundTensor):
        def numpy(self) -> np.ndarray:  # type: ignore[type-arg]
            return super().numpy() * np.float32(1.01 if "mlp.fc1" in self.source else 1)

    monkeypatch.setattr(source_graphs, "REFER_BYTES", 0)
    monkeypatch.setattr(bind, "BoundTensor", Wrong)
    monkeypatch.setattr(source_graphs, "BoundTensor", Wrong)
    with pytest.raises(ParityError, match="differs from its source"):
        export_pipeline(resolve_source(demo_model()), plan, tmp_path / "out", as_source=True)
