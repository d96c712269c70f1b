"""Linears of joined values, split: against the same graph whole, and through a quantized graph."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

ir = pytest.importorskip("onnx_ir")
pytest.importorskip("torch")

import onnx  # noqa: E402
import onnxruntime  # noqa: E402
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from edgesd.errors import EdgesdError  # noqa: E402
from edgesd.export.backends.onnxruntime import LOWERING  # noqa: E402
from edgesd.export.calibrate import LayerStats, _part_of  # noqa: E402
from edgesd.export.passes.split_concat import SplitConcat  # noqa: E402
from edgesd.export.quantize import store as layer_store  # noqa: E402
from edgesd.export.quantize.assign import planned  # noqa: E402
from edgesd.export.quantize.layers import GELU_FLOOR, Layer, find_layers, matrix_of  # noqa: E402
from edgesd.export.quantize.methods import get_method  # noqa: E402
from edgesd.export.quantize.quantize import joint_smoothing  # noqa: E402
from edgesd.export.quantize.store import GraphForm, LayerStore, find_nodes  # noqa: E402
from edgesd.export.source_graphs import SourceGraphs  # noqa: E402
from edgesd.progress import SILENT  # noqa: E402
from edgesd.spec.scheme import parse_scheme  # noqa: E402
from tests.quantizing import normal  # noqa: E402

Array = npt.NDArray[np.float32]

pytestmark = pytest.mark.usefixtures("one_thread")

D, WIDE = 64, 128


def transformer(axis: int = -1, known: bool = True, approximate: str = "tanh") -> onnx.ModelProto:
    """x [1, T, 16] -> y [1, T, 16] by a block like the single ones of FLUX: queries, keys and
    a wide part behind GELU, joined along `axis`. known: whether their sizes are."""
    weights = {
        "in.weight": normal(16, D) / 4,
        "q.weight": normal(D, D, seed=1) / 8,
        "k.weight": normal(D, D, seed=2) / 8,
        "wide.weight": normal(D, WIDE, seed=3) / 8,
        "out.weight": normal(D + WIDE, D, seed=4) / 8,
        "out.bias": normal(D, seed=5),
        "last.weight": normal(D, 16, seed=6) / 8,
        "scale": np.exp(normal(D, seed=7)),
    }
    nodes = [
        helper.make_node("MatMul", ["x", "in.weight"], ["embedded"], "in/MatMul"),
        helper.make_node("Mul", ["embedded", "scale"], ["h"], "Mul"),
        helper.make_node("MatMul", ["h", "q.weight"], ["q"], "block.q/MatMul"),
        helper.make_node("MatMul", ["h", "k.weight"], ["k"], "block.k/MatMul"),
        helper.make_node("Mul", ["q", "k"], ["attended"], "block.attn/Mul"),
        helper.make_node("MatMul", ["h", "wide.weight"], ["w"], "block.wide/MatMul"),
        helper.make_node("Gelu", ["w"], ["gelu"], "block.act/Gelu", approximate=approximate),
        helper.make_node("Concat", ["attended", "gelu"], ["joined"], "block/Concat", axis=axis),
        helper.make_node("MatMul", ["joined", "out.weight"], ["o"], "block.out/MatMul"),
        helper.make_node("Add", ["o", "out.bias"], ["b"], "block.out/Add"),
        helper.make_node("Add", ["h", "b"], ["residual"], "block/Add"),
        helper.make_node("MatMul", ["residual", "last.weight"], ["y"], "last/MatMul"),
    ]
    floats = TensorProto.FLOAT
    graph = helper.make_graph(
        nodes,
        "transformer",
        [helper.make_tensor_value_info("x", floats, ["batch", "tokens", 16])],
        [helper.make_tensor_value_info("y", floats, ["batch", "tokens", 16])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
        value_info=[
            helper.make_tensor_value_info(name, floats, ["batch", "tokens", size])
            for name, size in {"attended": D, "gelu": WIDE, "joined": D + WIDE, "o": D}.items()
            if known
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def loaded(proto: onnx.ModelProto) -> Any:
    return ir.serde.deserialize_model(proto)


def run(model: Any, x: Array) -> Array:
    proto = model if isinstance(model, bytes) else ir.serde.serialize_model(model)
    given = proto if isinstance(proto, bytes) else proto.SerializeToString()
    out: Array = onnxruntime.InferenceSession(given).run(None, {"x": x})[0]
    return out


def test_parts_compute_what_the_whole_does() -> None:
    proto, x = transformer(), normal(1, 7, 16)
    model = loaded(proto)
    assert SplitConcat()(model)
    onnx.checker.check_model(ir.serde.serialize_model(model))
    ops = [node.op_type for node in model.graph]
    assert ops.count("MatMul") == 7 and "Concat" not in ops
    assert "out.weight" not in model.graph.initializers
    np.testing.assert_allclose(run(model, x), run(loaded(proto), x), rtol=2e-4, atol=2e-5)
    assert not SplitConcat()(model)


def test_parts_are_layers_of_their_module() -> None:
    proto = transformer()
    (whole,) = (la for la in find_layers("transformer", loaded(proto)) if la.name == "block.out")
    assert (whole.part, whole.module, whole.floor) == (None, "block.out", 0.0)
    model = loaded(proto)
    SplitConcat()(model)
    nodes = {node.name: node for node in model.graph}
    parts = [la for la in find_layers("transformer", model) if la.module == "block.out"]
    assert [(la.name, la.shape, la.part, la.floor) for la in parts] == [
        ("block.out.0", (D, D), (0, D), 0.0),
        ("block.out.1", (D, WIDE), (D, D + WIDE), GELU_FLOOR),
    ]
    matrices = [matrix_of(nodes[la.node], la) for la in parts]
    weight = numpy_helper.to_array(
        next(t for t in proto.graph.initializer if t.name == "out.weight")
    )
    np.testing.assert_array_equal(np.concatenate(matrices, 1), weight.T)


@pytest.mark.parametrize("kept", ["tokens", "unknown", "shared", "read", "unwanted"])
def test_what_is_not_split(kept: str) -> None:
    proto = transformer(axis=1 if kept == "tokens" else 2, known=kept != "unknown")
    more = {"shared": ("joined", "out.weight"), "read": ("joined", "other.weight")}.get(kept)
    if more:
        weight = numpy_helper.from_array(normal(D + WIDE, 4), "other.weight")
        proto.graph.initializer.append(weight)
        proto.graph.node.append(helper.make_node("MatMul", more, ["z"], "other/MatMul"))
        proto.graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, None))
    model = loaded(proto)
    changed = SplitConcat(lambda name: kept not in ("unwanted", "read") or name == "other")(model)
    assert changed == (kept == "read")
    left = [node.name for node in model.graph if node.op_type == "Concat"]
    assert left == ["block/Concat"]


def test_a_layer_that_is_left_whole_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SplitConcat, "call", lambda self, model: False)
    with pytest.raises(EdgesdError, match=r"block\.out/MatMul isn't split"):
        SplitConcat()(loaded(transformer()))


@pytest.mark.parametrize("size", [24, 40, 64, 192])
def test_statistics_of_a_part(size: int) -> None:
    """Whatever the covariance's blocks are."""
    x = normal(50, D + WIDE)
    columns = [slice(at, at + size) for at in range(0, D + WIDE, size)]
    whole = LayerStats(
        low=x.min(0)[None],
        high=x.max(0)[None],
        blocks=tuple(x[:, span].T @ x[:, span] for span in columns),
        count=50,
        rows=x.astype(np.float16),
        row_steps=np.zeros(50, np.int64),
        rows_per_run=9,
    )
    part = _part_of(whole, D, D + WIDE)
    np.testing.assert_array_equal(part.rows, whole.rows[:, D:])
    np.testing.assert_array_equal(part.high, whole.high[:, D:])
    assert (part.count, part.rows_per_run, sum(map(len, part.blocks))) == (50, 9, WIDE)
    diagonal = np.concatenate([block.diagonal() for block in part.blocks])
    np.testing.assert_allclose(diagonal, np.square(x[:, D:]).sum(0), rtol=1e-5)
    first = part.blocks[0]
    expected = x[:, D : D + len(first)]
    np.testing.assert_allclose(first, expected.T @ expected, rtol=1e-4, atol=1e-4)


# Through a store of layers, to a graph.


class Recorded:
    """Stands in for a Calibration of the graph above."""

    folder = Path("calibration-of-a-test")

    def __init__(self, proto: onnx.ModelProto, x: Array) -> None:
        model = loaded(proto)
        names = {
            layer.name: next(n for n in model.graph if n.name == layer.node).inputs[0].name
            for layer in find_layers("transformer", model, 1)
        }
        given = onnx.ModelProto.FromString(proto.SerializeToString())
        for name in sorted({*names.values()} - {"x"}):
            given.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
        session = onnxruntime.InferenceSession(given.SerializeToString())
        wanted = [out.name for out in session.get_outputs()]
        values = {**dict(zip(wanted, session.run(None, {"x": x}), strict=True)), "x": x}
        self.inputs = {name: values[read].reshape(-1, values[read].shape[-1])
                       for name, read in names.items()}  # fmt: skip

    def layer(self, layer: Layer) -> LayerStats:
        rows = self.inputs[layer.module]
        stats = LayerStats(
            low=rows.min(0)[None],
            high=rows.max(0)[None],
            blocks=(rows.T @ rows,),
            count=len(rows),
            rows=rows.astype(np.float16),
            row_steps=np.zeros(len(rows), np.int64),
        )
        return stats if layer.part is None else _part_of(stats, *layer.part)

    def timesteps(self) -> Array:
        return np.zeros(1, np.float32)


def store(proto: onnx.ModelProto, folder: Path, measures: tuple[str, ...] | None) -> LayerStore:
    (folder / "source" / "transformer").mkdir(parents=True, exist_ok=True)
    ir.save(loaded(proto), folder / "source" / "transformer" / "model.onnx")
    graphs = SourceGraphs(folder / "source", [SimpleNamespace(name="transformer")])  # type: ignore[list-item]
    method = get_method("svdquant", measures=measures)
    models = {"transformer": graphs.load("transformer")}
    whole = list(find_nodes(models))
    nodes = find_nodes(models, split="split" in method.measures)
    # The graph that the layers to calibrate were found in is the one that is split.
    assert (list(nodes) == whole) == (measures == ())
    wiring: Any = SimpleNamespace(autoencoder=(), input_of=lambda *_: None)
    calibration: Any = Recorded(proto, normal(1, 400, 16, seed=9))
    return LayerStore(graphs, nodes, calibration, method, folder, LOWERING, wiring)


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8-g32-lr8", "w4a4-g32-lr8"])
@pytest.mark.parametrize("measures", [None, ()])
def test_a_quantized_graph(tmp_path: Path, scheme: str, measures: tuple[str, ...] | None) -> None:
    proto, x = transformer(), normal(1, 300, 16, seed=8)
    made = store(proto, tmp_path, measures)
    ends = measures is None
    schemes = planned(made.layers, parse_scheme(scheme), ends)
    assert {la.name for la, chosen in schemes.items() if chosen is None} == (
        {"in", "last"} if ends else set()
    )
    made.write("transformer", schemes, tmp_path / "out", GraphForm())
    graph = ir.load(tmp_path / "out" / "model.onnx")
    assert ("Concat" in [node.op_type for node in graph.graph]) == (measures == ())
    found = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx").run(None, {"x": x})[0]
    wanted = run(loaded(proto), x)
    error = np.sqrt(np.square(found - wanted).mean() / np.square(wanted).mean())
    assert error < {"w8a8": 0.05, "w4a8-g32-lr8": 0.08, "w4a4-g32-lr8": 0.2}[scheme]


def test_one_smoothing_for_layers_of_one_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    searched: list[str] = []

    def search(layer: Layer, *given: Any) -> Any:
        searched.append(layer.source)
        return joint_smoothing(layer, *given)

    monkeypatch.setattr(layer_store, "joint_smoothing", search)
    proto = transformer()
    proto.graph.initializer[-1].CopyFrom(  # two channels far above the others
        numpy_helper.from_array(np.where(np.arange(D) % 40 == 3, 60, 1).astype(np.float32), "scale")
    )
    made = store(proto, tmp_path, None)
    scheme = parse_scheme("w4a4-g32-lr8")
    made.quantize([(la, scheme) for la in made.layers if la.source == "h"], SILENT, "layers")
    assert searched == ["h"]
    layers = {la.name: made.get(la, scheme) for la in made.layers if la.source == "h"}
    assert sorted(layers) == ["block.k", "block.q", "block.wide"]
    first = layers["block.q"].smooth
    assert first is not None
    for layer in layers.values():
        np.testing.assert_array_equal(layer.smooth, first)
    made.write("transformer", planned(made.layers, scheme), tmp_path / "out", GraphForm())
    graph = ir.load(tmp_path / "out" / "model.onnx").graph
    readers = [node for node in graph if node.inputs and node.inputs[0].name == "h"]
    smoothed = [node for node in readers if node.op_type == "Mul"]
    assert len(smoothed) == 1 and len(smoothed[0].outputs[0].uses()) >= 6


def test_each_layer_its_own_smoothing_where_that_is_asked_for(tmp_path: Path) -> None:
    proto = transformer()
    made = store(proto, tmp_path, ("split", "unsigned", "ends"))
    assert made._reading == {}


# What layers are known by.


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_is_above_its_floor(approximate: str) -> None:
    torch = pytest.importorskip("torch")
    x = torch.linspace(-6, 6, 100_001)
    least = float(torch.nn.functional.gelu(x, approximate=approximate).min())
    assert -GELU_FLOOR < least < -GELU_FLOOR + 0.002
    model = loaded(transformer(approximate=approximate))
    SplitConcat()(model)
    floors = {la.name: la.floor for la in find_layers("transformer", model)}
    assert [name for name, floor in floors.items() if floor] == ["block.out.1"]


def test_ends_of_a_transformer() -> None:
    proto = transformer()
    ends = {la.name for la in find_layers("transformer", loaded(proto), 1) if la.end}
    assert ends == {"in", "last"}
    # A size that is read of an input is no value, and two layers that read one are no way in.
    proto.graph.node.insert(0, helper.make_node("Shape", ["x"], ["size"], "Shape"))
    proto.graph.node.append(helper.make_node("Reshape", ["residual", "size"], ["r"], "Reshape"))
    proto.graph.initializer.append(numpy_helper.from_array(normal(16, 16), "second.weight"))
    proto.graph.node.append(helper.make_node("MatMul", ["x", "second.weight"], ["z"], "second/M"))
    proto.graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, None))
    assert not any(la.end for la in find_layers("transformer", loaded(proto), 1))
