"""Attention in standard operators, arithmetic in 16 bits: graphs for strongly typed compilers."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

ir = pytest.importorskip("onnx_ir")
pytest.importorskip("torch")

import onnx  # noqa: E402
import onnxruntime  # noqa: E402

from edgesd.errors import EdgesdError  # noqa: E402
from edgesd.export.passes.half_compute import HalfCompute  # noqa: E402
from edgesd.export.passes.standard_attention import StandardAttention  # noqa: E402
from edgesd.runtime.backends.onnxruntime import session_options  # noqa: E402
from edgesd.runtime.onnx_wire import bf16_in_fp32  # noqa: E402
from tests.quantizing import normal  # noqa: E402

Array = npt.NDArray[Any]
HEADS, WIDTH = 4, 32


def attention(causal: int = 0, dtype: str = "float", tokens: str = "7") -> ir.Model:
    """y = attention of q over k and v, whose tokens are the query's if causal."""
    others = tokens if causal else "5"
    return ir.serde.deserialize_model(
        onnx.parser.parse_model(f"""
        <ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]>
        g ({dtype}[2, {tokens}, {WIDTH}] q, {dtype}[2, {others}, {WIDTH}] k,
           {dtype}[2, {others}, {WIDTH}] v) => ({dtype}[2, {tokens}, {WIDTH}] y) {{
            y = com.microsoft.MultiHeadAttention <num_heads: int = {HEADS}, scale: float = 0.3,
                unidirectional: int = {causal}> (q, k, v)
        }}""")
    )


def run(model: ir.Model, feed: dict[str, Array]) -> Array:
    proto = ir.serde.serialize_model(model)
    options = session_options(1)
    out: Array = onnxruntime.InferenceSession(proto.SerializeToString(), options).run(None, feed)[0]
    return out


@pytest.mark.parametrize("causal", [0, 1])
def test_attention_in_standard_operators_is_the_same(causal: int) -> None:
    feed = {
        "q": normal(2, 7, WIDTH, seed=1),
        "k": normal(2, 7 if causal else 5, WIDTH, seed=2),
        "v": normal(2, 7 if causal else 5, WIDTH, seed=3),
    }
    model = attention(causal)
    wanted = run(model, feed)
    assert StandardAttention()(model)
    assert {node.domain for node in model.graph} == {""}
    assert list(model.graph.opset_imports) == [""]
    onnx.checker.check_model(ir.serde.serialize_model(model), full_check=True)
    np.testing.assert_allclose(run(model, feed), wanted, atol=2e-6)
    assert not StandardAttention()(model)


def test_attention_takes_any_number_of_tokens_unless_it_is_causal() -> None:
    model = attention(tokens="n")
    StandardAttention()(model)
    feed = {name: normal(2, n, WIDTH, seed=n) for name, n in (("q", 9), ("k", 5), ("v", 5))}
    assert run(model, feed).shape == (2, 9, WIDTH)
    with pytest.raises(EdgesdError, match="causal over an unknown number of tokens"):
        StandardAttention()(attention(1, tokens="n"))


def small_unet(weight: Array) -> ir.Model:
    """y = x @ w + sin(timestep * 1.1), cos(timestep * 1.1) and a LayerNormalization behind it."""
    proto = onnx.parser.parse_model("""
        <ir_version: 10, opset_import: ["" : 20]>
        g (float[2, 64] sample, float[1] timestep, int64[1] ids) => (float[2, 32] y) {
            phase = Mul(timestep, frequency)
            a = Sin(phase)
            b = Cos(phase)
            wave = Concat <axis = 0> (a, b)
            product = MatMul(sample, w)
            row = Gather(table, ids)
            sum = Add(product, row)
            moved = Add(sum, wave)
            y = LayerNormalization(moved, gain)
        }""")
    rng = np.random.default_rng(0)
    for name, array in (
        ("w", weight),
        ("frequency", rng.uniform(0.9, 1.1, 16).astype(np.float32)),
        ("table", rng.standard_normal((3, 32)).astype(np.float32)),
        ("gain", rng.uniform(0.5, 2, 32).astype(np.float32)),
    ):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return ir.serde.deserialize_model(onnx.shape_inference.infer_shapes(proto))


def test_arithmetic_is_fp16_and_the_phase_of_the_timestep_is_not() -> None:
    model = small_unet(normal(64, 32))
    feed = {
        "sample": normal(2, 64, seed=5),
        "timestep": np.array([987.0], np.float32),
        "ids": np.array([1]),
    }
    wanted = run(model, feed)
    assert HalfCompute()(model)
    proto = ir.serde.serialize_model(model)
    onnx.checker.check_model(proto, full_check=True)
    types = {value.name: value.dtype for node in model.graph for value in node.outputs}
    assert types["phase"] == types["a"] == ir.DataType.FLOAT
    assert types["product"] == types["wave"] == types["sum"] == ir.DataType.FLOAT16
    initializers = {n: v.const_value.dtype for n, v in model.graph.initializers.items()}
    assert initializers["frequency"] == ir.DataType.FLOAT
    assert {initializers[n] for n in ("w", "table", "gain")} == {ir.DataType.FLOAT16}
    assert [v.dtype for v in model.graph.inputs] == [
        ir.DataType.FLOAT,
        ir.DataType.FLOAT,
        ir.DataType.INT64,
    ]
    assert [(v.name, v.dtype) for v in model.graph.outputs] == [("y", ir.DataType.FLOAT)]
    np.testing.assert_allclose(run(model, feed), wanted, atol=4e-3)


def test_bf16_holds_what_fp16_does_not_and_runs_in_fp32_on_cpus() -> None:
    weight = normal(64, 32)
    weight[3, 4] = 7e4
    model = small_unet(weight)
    feed = {
        "sample": normal(2, 64, seed=5),
        "timestep": np.array([987.0], np.float32),
        "ids": np.array([1]),
    }
    assert HalfCompute(dtype=ir.DataType.BFLOAT16)(model)
    proto = ir.serde.serialize_model(model)
    onnx.checker.check_model(proto, full_check=True)
    types = {value.name: value.dtype for node in model.graph for value in node.outputs}
    assert types["phase"] == ir.DataType.FLOAT
    assert types["product"] == types["wave"] == types["sum"] == ir.DataType.BFLOAT16
    assert [(v.name, v.dtype) for v in model.graph.outputs] == [("y", ir.DataType.FLOAT)]

    raw = bf16_in_fp32(proto.SerializeToString())
    found = onnx.load_model_from_string(raw)
    onnx.checker.check_model(found, full_check=True)
    casts = [node for node in found.graph.node if node.op_type == "Cast"]
    assert all(node.attribute[0].i == onnx.TensorProto.FLOAT for node in casts)
    rounded = small_unet(weight)  # the same arithmetic on weights of 8 bits of mantissa
    for name, value in rounded.graph.initializers.items():
        if name != "frequency":
            half = value.const_value.numpy().astype(ir.DataType.BFLOAT16.numpy())
            value.const_value = ir.tensor(half.astype(np.float32), name=name)
    (ours,) = onnxruntime.InferenceSession(raw, session_options(1)).run(None, feed)
    np.testing.assert_allclose(ours, run(rounded, feed), atol=1e-6)


def test_without_a_sine_the_timestep_is_like_other_inputs() -> None:
    model = small_unet(normal(64, 32))
    for node in model.graph:
        if node.op_type in ("Sin", "Cos"):
            node.op_type = "Tanh"
    HalfCompute()(model)
    types = {value.name: value.dtype for node in model.graph for value in node.outputs}
    assert types["phase"] == ir.DataType.FLOAT16


def test_weights_beyond_fp16_are_refused_by_name() -> None:
    weight = normal(64, 32)
    weight[3, 4] = 7e4
    with pytest.raises(EdgesdError, match=r"w holds 7e\+04, above fp16's 65504"):
        HalfCompute()(small_unet(weight))


def test_a_graph_is_made_fp16_once() -> None:
    model = small_unet(normal(64, 32))
    HalfCompute()(model)
    with pytest.raises(EdgesdError, match="is a Cast already"):
        HalfCompute()(model)


def test_attention_computes_in_fp16_after_it_was_written_out() -> None:
    feed = {name: normal(2, 5, WIDTH, seed=n) for n, name in enumerate("qkv")}
    model = attention(tokens="5")
    wanted = run(model, feed)
    StandardAttention()(model)
    HalfCompute()(model)
    onnx.checker.check_model(ir.serde.serialize_model(model), full_check=True)
    np.testing.assert_allclose(run(model, feed), wanted, atol=4e-3)
