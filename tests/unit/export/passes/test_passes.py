"""Graph rewrites, the weights file and the parity gate, on graphs of a few nodes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

ir = pytest.importorskip("onnx_ir")
pytest.importorskip("torch")

import onnx  # noqa: E402
import onnxruntime  # noqa: E402

from edgesd.errors import EdgesdError, ParityError  # noqa: E402
from edgesd.export.external_data import write_model  # noqa: E402
from edgesd.export.families import Component  # noqa: E402
from edgesd.export.parity import check_parity, relative_rms  # noqa: E402
from edgesd.export.passes.check import CheckGraph  # noqa: E402
from edgesd.export.passes.fp16_weights import Fp16Weights  # noqa: E402
from edgesd.export.passes.no_shapes import NoShapes  # noqa: E402
from edgesd.export.passes.tidy import Tidy  # noqa: E402
from edgesd.spec.pipeline import ComponentSpec, TensorSpec  # noqa: E402

Array = npt.NDArray[np.float32]
SPEC = ComponentSpec(
    "unet",
    (TensorSpec("x", "float32", ("batch", 64)),),
    (TensorSpec("y", "float32", ("batch", 32)),),
)


def linear(weight: Array, op: str = "MatMul") -> ir.Model:
    """y = (x @ weight) * 1 + bias."""
    proto = onnx.parser.parse_model(f"""
        <ir_version: 10, opset_import: ["" : 20]>
        g (float[batch, 64] x) => (float[batch, 32] y) {{
            one = Constant <value_float: float = 1.0> ()
            a = {op}(x, w)
            b = Mul(a, one)
            y = Add(b, bias)
        }}""")
    for name, array in (("w", weight), ("bias", np.arange(32, dtype=np.float32))):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    proto = onnx.shape_inference.infer_shapes(proto)
    return ir.serde.deserialize_model(proto)


@pytest.fixture
def weight() -> Array:
    return np.random.default_rng(0).standard_normal((64, 32), dtype=np.float32)


def run(folder: Path, x: Array) -> Array:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(folder / "model.onnx"))
    out: Array = session.run(None, {"x": x})[0]
    return out


def test_tidy_removes_what_computes_nothing(weight: Array) -> None:
    model = linear(weight)
    assert Tidy()(model)
    assert [node.op_type for node in model.graph] == ["MatMul", "Add"]
    assert not Tidy()(model)


def test_weights_go_to_one_aligned_file(weight: Array, tmp_path: Path) -> None:
    model = linear(weight)
    big = np.ones((200, 200), np.float32)
    for name in ("first", "second"):
        value = ir.Value(name=name, const_value=ir.tensor(big, name=name))
        value.shape, value.dtype = ir.Shape(big.shape), ir.DataType.FLOAT
        model.graph.initializers.add(value)
    write_model(model, tmp_path)
    proto = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    entries = {t.name: {e.key: e.value for e in t.external_data} for t in proto.graph.initializer}
    assert entries["bias"] == {}  # 128 bytes: inline
    for name, align in (("w", 64), ("first", 4096), ("second", 4096)):
        assert set(entries[name]) == {"location", "offset", "length"}
        assert entries[name]["location"] == "weights.bin"
        assert int(entries[name]["offset"]) % align == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.onnx", "weights.bin"]
    loaded = onnx.load(tmp_path / "model.onnx")
    arrays = {t.name: onnx.numpy_helper.to_array(t) for t in loaded.graph.initializer}
    np.testing.assert_array_equal(arrays["w"], weight)
    x = np.ones((3, 64), np.float32)
    np.testing.assert_allclose(run(tmp_path, x), x @ weight + np.arange(32), rtol=1e-5)


def test_fp16_weights(weight: Array, tmp_path: Path) -> None:
    model = linear(weight)
    fp16_weights = Fp16Weights()
    assert fp16_weights(model)
    assert fp16_weights.kept == ()
    assert model.graph.initializers["w"].dtype == ir.DataType.FLOAT16
    assert model.graph.initializers["bias"].dtype == ir.DataType.FLOAT
    write_model(model, tmp_path)
    x = np.ones((3, 64), np.float32)
    wanted = x @ weight.astype(np.float16).astype(np.float32) + np.arange(32)
    np.testing.assert_allclose(run(tmp_path, x), wanted, rtol=1e-5)
    assert not Fp16Weights()(model)


def test_rows_of_a_table_are_read_in_fp16(weight: Array) -> None:
    proto = onnx.parser.parse_model("""
        <ir_version: 10, opset_import: ["" : 20]>
        g (int64[n] x, int64[m] z) => (float[n, 32] y, float[64, m] across, float[n, 32] twice) {
            y = Gather(w, x)
            across = Gather <axis: int = 1> (w, z)
            twice = Add(y, y)
        }""")
    proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    model = ir.serde.deserialize_model(onnx.shape_inference.infer_shapes(proto))
    assert Fp16Weights()(model)
    casts = {node.name: node.inputs[0] for node in model.graph if node.op_type == "Cast"}
    assert [value.dtype for value in casts.values() if value] == [ir.DataType.FLOAT16] * 2
    assert [value.name for value in casts.values() if value and value.is_initializer()] == ["w"]
    content = ir.serde.serialize_model(model)
    onnx.checker.check_model(content, full_check=True)
    session = onnxruntime.InferenceSession(content.SerializeToString())
    rows = np.array([5, 0, 5])
    y, across, twice = session.run(None, {"x": rows, "z": rows})
    half = weight.astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(y, half[rows])
    np.testing.assert_array_equal(across, half[:, rows])
    np.testing.assert_array_equal(twice, 2 * half[rows])


def test_fp16_takes_the_weights_it_is_told_to(weight: Array) -> None:
    assert not Fp16Weights(only={"bias"})(linear(weight))
    assert Fp16Weights(only={"w"})(linear(weight))


def test_shapes_of_values_in_between_are_dropped(weight: Array, tmp_path: Path) -> None:
    model = linear(weight)
    assert len(ir.serde.serialize_model(model).graph.value_info) == 5
    assert NoShapes()(model)
    assert not NoShapes()(model)
    write_model(model, tmp_path)
    proto = onnx.load(tmp_path / "model.onnx")
    assert not proto.graph.value_info
    assert [d.dim_value for d in proto.graph.output[0].type.tensor_type.shape.dim] == [0, 32]
    x = np.ones((3, 64), np.float32)
    np.testing.assert_allclose(run(tmp_path, x), x @ weight + np.arange(32), rtol=1e-5)


@pytest.mark.parametrize("value", [65520.0, -1e30])
def test_fp16_keeps_what_overflows(weight: Array, value: float) -> None:
    weight[3, 4] = value
    model = linear(weight)
    fp16_weights = Fp16Weights()
    assert not fp16_weights(model)
    assert fp16_weights.kept == ("w",)
    assert model.graph.initializers["w"].dtype == ir.DataType.FLOAT


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_must_be_finite(weight: Array, value: float) -> None:
    CheckGraph(0, "ort-mha")(linear(weight))
    weight[3, 4] = value
    with pytest.raises(EdgesdError, match="w holds NaN or infinite"):
        CheckGraph(0, "ort-mha")(linear(weight))


def test_attention_must_be_fused(weight: Array) -> None:
    with pytest.raises(EdgesdError, match="expected 1"):
        CheckGraph(1, "ort-mha")(linear(weight))
    CheckGraph(1, "sdpa")(linear(weight))


class TestParity:
    @pytest.fixture
    def graph(self, weight: Array, tmp_path: Path) -> Path:
        write_model(linear(weight), tmp_path)
        return tmp_path / "model.onnx"

    @staticmethod
    def check(graph: Path, y: Array) -> float:
        component = Component(SPEC, lambda: None, ())  # type: ignore[arg-type, return-value]
        cases = [({"x": np.ones((2, 64), np.float32)}, (y,))]
        return check_parity(graph, component, cases, "fp32").rel_rms

    def test_equal(self, graph: Path) -> None:
        y = run(graph.parent, np.ones((2, 64), np.float32))
        assert self.check(graph, y) == 0

    def test_different(self, graph: Path) -> None:
        y = run(graph.parent, np.ones((2, 64), np.float32)) * np.float32(1.01)
        with pytest.raises(ParityError, match=r"unet \(fp32\) differs.*9\.9.e-03.*1e-04"):
            self.check(graph, y)

    def test_source_of_nan_fails(self, graph: Path) -> None:
        y = np.full((2, 32), np.nan, np.float32)
        with pytest.raises(ParityError, match="y of the source isn't finite"):
            self.check(graph, y)

    def test_wrong_shape(self, graph: Path) -> None:
        with pytest.raises(ParityError, match="shape"):
            self.check(graph, np.zeros((1, 32), np.float32))

    def test_a_graph_that_does_not_load(self, graph: Path) -> None:
        graph.write_bytes(b"no graph")
        with pytest.raises(ParityError, match="ONNX Runtime can't run"):
            self.check(graph, np.zeros((2, 32), np.float32))

    def test_zero_source(self) -> None:
        zero, one = np.zeros(3), np.ones(3)
        assert relative_rms(zero, zero) == 0
        assert relative_rms(one, zero) == np.inf
        assert relative_rms(one * 1.5, one) == 0.5
