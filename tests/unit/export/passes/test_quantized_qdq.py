"""Q/DQ graphs for TensorRT, run by ONNX Runtime and compared with their description in NumPy."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

ir = pytest.importorskip("onnx_ir")
pytest.importorskip("torch")

import onnx  # noqa: E402

from edgesd.engines.tensorrt import BuildSpec, build_plan  # noqa: E402
from edgesd.errors import EdgesdError  # noqa: E402
from edgesd.export.external_data import write_model  # noqa: E402
from edgesd.export.passes.quantized_qdq import QuantizedQdq, stored_bytes  # noqa: E402
from edgesd.export.quantize.layers import (  # noqa: E402
    Activations,
    QuantizedLayer,
    find_layers,
    spread,
)
from edgesd.spec.scheme import Scheme, parse_scheme  # noqa: E402
from tests.quantizing import patches  # noqa: E402

pytestmark = pytest.mark.integration

Array = npt.NDArray[Any]

INT4 = onnx.TensorProto.INT4
NODE = "block/layer/op"
N, C = 48, 80  # 80 isn't a multiple of 64
STEP = np.float32(0.03)
GRAPHS = {
    "matmul": ("[2, 5, 80]", "[2, 5, 48]", (C, N), "MatMul(x, w)", (2, 5, C)),
    "wide": ("[2, 3, 400]", "[2, 3, 48]", (400, N), "MatMul(x, w)", (2, 3, 400)),
    "odd": ("[2, 5, 80]", "[2, 5, 47]", (C, 47), "MatMul(x, w)", (2, 5, C)),
    "gemm": ("[2, 80]", "[2, 48]", (N, C), "Gemm <transB = 1> (x, w, b)", (2, C)),
    "gemm_plain": ("[2, 80]", "[2, 48]", (C, N), "Gemm(x, w, b)", (2, C)),
    "conv3x3": (
        "[2, 80, 7, 6]",
        "[2, 48, 4, 3]",
        (N, C, 3, 3),
        "Conv <kernel_shape = [3, 3], strides = [2, 2], pads = [1, 1, 1, 1]> (x, w, b)",
        (2, C, 7, 6),
    ),
    "conv1x1": (
        "[2, 80, 3, 4]",
        "[2, 48, 3, 4]",
        (N, C, 1, 1),
        "Conv <kernel_shape = [1, 1]> (x, w, b)",
        (2, C, 3, 4),
    ),
    "embedding": ("[2, 7]", "[2, 7, 80]", (N, C), "Gather(w, x)", (2, 7)),
}


def graph(name: str, dtype: str = "float") -> ir.Model:
    """One layer, called NODE, between a graph's input x and output y."""
    shape_in, shape_out, shape, call, _ = GRAPHS[name]
    kind_in = "int64" if name == "embedding" else dtype
    proto = onnx.parser.parse_model(f"""
        <ir_version: 10, opset_import: ["" : 20]>
        g ({kind_in}{shape_in} x) => ({dtype}{shape_out} y) {{ y = {call} }}""")
    proto.graph.node[0].name = NODE
    rng = np.random.default_rng(1)
    numpy_type = np.float16 if dtype == "float16" else np.float32
    bias = rng.standard_normal(N).astype(numpy_type)
    for label, array in (("w", np.zeros(shape, numpy_type)), ("b", bias)):
        if label == "w" or "b)" in call:
            proto.graph.initializer.append(onnx.numpy_helper.from_array(array, label))
    return ir.serde.deserialize_model(proto)


def description(name: str, scheme: Scheme, smooth: bool = False) -> QuantizedLayer:
    """A quantized layer of random codes for the graph `name`."""
    layer = find_layers("unet", graph(name))[0]
    rng = np.random.default_rng(2)
    low, high = (-8, 8) if scheme.weight_bits == 4 else (-127, 128)
    group = scheme.group or layer.columns
    scales = rng.uniform(0.5, 1.5, (layer.rows, -(-layer.columns // group))) / high
    smoothing = rng.uniform(0.5, 2, layer.channels).astype(np.float32) if smooth else None
    rank = 0 if layer.kind == "embedding" else scheme.rank
    factors = rng.standard_normal((rank, layer.rows + layer.columns)) * 0.1
    act = Activations()
    if scheme.activation_bits == 8 and layer.kind != "embedding":
        act = Activations("static", 8, 0, STEP[None], np.array([9], np.uint8), STEP[None])
        if scheme.weight_bits == 4 and layer.kind == "linear":
            act = Activations("group", 8, scheme.group)
    return QuantizedLayer(
        layer=layer,
        scheme=scheme,
        method="rtn",
        stored=rng.integers(low, high, (layer.rows, layer.columns)).astype(np.int8),
        scales=scales.astype(np.float16),
        group=group,
        smooth=smoothing,
        down=factors[:, layer.rows :].astype(np.float16) if rank else None,
        up=factors[:, : layer.rows].T.astype(np.float16) if rank else None,
        activations=act,
    )


def example(name: str) -> Array:
    rng = np.random.default_rng(3)
    shape = GRAPHS[name][-1]
    if name == "embedding":
        return rng.integers(0, N, shape)
    return rng.standard_normal(shape).astype(np.float32)


def expected(name: str, q: QuantizedLayer, x: Array, bias: Array) -> Array:
    """The layer's output from its description alone, in float64."""
    weight = q.residual().astype(np.float64)
    if q.scheme.weight_bits == 4 and (q.layer.kind != "linear" or q.layer.rows % 2):
        step = (np.abs(weight).max(1, keepdims=True) / 127).astype(np.float32)
        weight = np.round((weight / step).astype(np.float32)) * step
    if q.layer.kind == "embedding":
        return weight[x]
    rows = patches(x, q.layer).astype(np.float64)
    if q.smooth is not None:
        rows = rows * spread(1 / q.smooth, q.layer.columns)
    low = rows
    if q.activations.mode == "static":
        low = np.clip(np.round(rows.astype(np.float32) / STEP), -128, 127) * STEP
    out = low @ weight.T + rows @ q.branch().T.astype(np.float64)
    if name not in ("matmul", "wide", "odd"):
        out = out + bias
    return np.moveaxis(out, -1, 1) if q.layer.kind == "conv" else out


def run(folder: Path, x: Array) -> Array:
    """The graph as it is written: no operator fused, so that Q/DQ mean what they say."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), options)
    out: Array = session.run(None, {"x": x})[0]
    return out


def lowered(name: str, q: QuantizedLayer, folder: Path, dtype: str = "float") -> onnx.ModelProto:
    """The graph with its layer replaced, written to `folder`, checked, and read again."""
    model = graph(name, dtype)
    assert QuantizedQdq({NODE: q})(model)
    write_model(model, folder)
    onnx.checker.check_model(folder / "model.onnx", full_check=True)
    return onnx.load(folder / "model.onnx")


def rms(value: Array) -> float:
    return float(np.sqrt(np.mean(np.square(value, dtype=np.float64))))


SCHEMES = ("w8a8", "w8a16", "w4a16-g64", "w4a8-g16", "w4a16-g256")


@pytest.mark.parametrize("rank,smooth", [(0, False), (0, True), (8, False), (8, True)])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", [name for name in GRAPHS if name != "embedding"])
def test_computes_its_description(
    name: str, scheme: str, rank: int, smooth: bool, tmp_path: Path
) -> None:
    q = description(name, replace_rank(scheme, rank), smooth)
    proto = lowered(name, q, tmp_path)
    x = example(name)
    bias = np.random.default_rng(1).standard_normal(N).astype(np.float32)
    wanted = expected(name, q, x, bias)
    # A value of x on the edge between two codes may fall on either side.
    limit = 2e-3 if q.activations.mode == "static" else 2e-6
    assert rms(run(tmp_path, x) - wanted) < limit * rms(wanted)
    assert_symmetric(proto)


@pytest.mark.parametrize("scheme", ["w8a16", "w4a16-g64"])
def test_embedding_rows(scheme: str, tmp_path: Path) -> None:
    q = description("embedding", parse_scheme(scheme))
    proto = lowered("embedding", q, tmp_path)
    x = example("embedding")
    wanted = expected("embedding", q, x, np.zeros(0))
    assert rms(run(tmp_path, x) - wanted) < 1e-6 * rms(wanted)
    assert [node.op_type for node in proto.graph.node] == ["DequantizeLinear", "Gather"]


@pytest.mark.parametrize("scheme", ["w8a8", "w4a16-g64"])
@pytest.mark.parametrize("name", ["matmul", "gemm", "conv3x3"])
def test_graph_in_fp16(name: str, scheme: str, tmp_path: Path) -> None:
    q = description(name, replace_rank(scheme, 8), smooth=True)
    proto = lowered(name, q, tmp_path, "float16")
    # The checker inferred all types: scales of another type than the input would have failed.
    types = {tensor.data_type for tensor in proto.graph.initializer}
    assert onnx.TensorProto.FLOAT not in types and onnx.TensorProto.FLOAT16 in types
    x = example(name)
    bias = np.random.default_rng(1).standard_normal(N).astype(np.float16)
    wanted = expected(name, q, x.astype(np.float16), bias)
    assert rms(run(tmp_path, x.astype(np.float16)) - wanted) < 2e-2 * rms(wanted)


@pytest.mark.parametrize(
    "name,scheme,bytes_per_weight",
    [
        ("matmul", "w8a8", 1),
        ("conv3x3", "w8a8", 1),
        ("conv3x3", "w4a16-g64", 1),
        ("matmul", "w4a16-g16", 0.5),
        ("gemm", "w4a16-g16", 0.5),
        ("matmul", "w4a16-g64", 0.5 * 128 / 80),
        ("embedding", "w8a16", 1),
    ],
)
def test_bytes_on_disk(name: str, scheme: str, bytes_per_weight: float, tmp_path: Path) -> None:
    q = description(name, parse_scheme(scheme))
    proto = lowered(name, q, tmp_path)
    codes = next(t for t in proto.graph.initializer if t.name.endswith(":codes"))
    assert len(codes.raw_data) == bytes_per_weight * q.codes.size
    assert not [t.name for t in proto.graph.initializer if t.name == "w"]


def test_opset_rises_for_int4_alone(tmp_path: Path) -> None:
    for name, scheme, opset in (
        ("matmul", "w8a8", 20),
        ("conv3x3", "w4a16-g64", 20),
        ("matmul", "w4a16-g64", 21),
    ):
        proto = lowered(name, description(name, parse_scheme(scheme)), tmp_path)
        assert proto.opset_import[0].version == opset


def test_output_keeps_its_name_and_node_its_layer(tmp_path: Path) -> None:
    proto = lowered("matmul", description("matmul", parse_scheme("w8a8-lr8")), tmp_path)
    assert [value.name for value in proto.graph.output] == ["y"]
    assert proto.graph.node[-1].name == f"{NODE}/w8a8-lr8"


def test_scales_too_small_for_fp16_stay_positive(tmp_path: Path) -> None:
    q = description("conv1x1", parse_scheme("w8a8"))
    tiny = np.array([1e-8], np.float32)
    q = replace(q, activations=replace(q.activations, symmetric_scale=tiny))
    lowered("conv1x1", q, tmp_path, "float16")
    q = description("conv1x1", parse_scheme("w4a16-g64"))
    q.codes[0] = 0
    lowered("conv1x1", q, tmp_path, "float16")


def test_refuses_what_tensorrt_has_not() -> None:
    q = description("matmul", parse_scheme("w4a8-g64"))
    four = replace(q, scheme=parse_scheme("w4a4-g64"), activations=Activations("group", 4, 16))
    with pytest.raises(EdgesdError, match="4-bit activations"):
        QuantizedQdq({NODE: four})(graph("matmul"))
    for act in (
        Activations("dynamic", 8),
        Activations("static", 8, 0, STEP[None], np.array([9], np.uint8)),
    ):
        with pytest.raises(EdgesdError, match="quantize with static ranges"):
            QuantizedQdq({NODE: replace(q, activations=act)})(graph("matmul"))
    with pytest.raises(EdgesdError, match="no layer other"):
        QuantizedQdq({"other": q})(graph("matmul"))
    with pytest.raises(EdgesdError, match="another shape"):
        QuantizedQdq({NODE: q})(graph("conv3x3"))
    q = description("embedding", parse_scheme("w8a16"))
    with pytest.raises(EdgesdError, match="without"):
        QuantizedQdq({NODE: replace(q, down=np.zeros((1, C), np.float16))})(graph("embedding"))


@pytest.mark.parametrize("scheme", ["w8a8", "w8a16", "w4a16-g64", "w4a16-g64-lr8"])
@pytest.mark.parametrize("name", list(GRAPHS))
def test_tensorrt_rtx_builds_it(name: str, scheme: str, tmp_path: Path) -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    lowered(name, description(name, parse_scheme(scheme)), tmp_path)
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    assert parser.parse_from_file(str(tmp_path / "model.onnx")), parser.get_error(0).desc()
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM86, 0)
    assert builder.build_serialized_network(network, config) is not None


@pytest.mark.parametrize("scheme", ["w8a8", "w8a16-lr8", *SCHEMES[2:], "w4a16-g64-lr8"])
@pytest.mark.parametrize("name", list(GRAPHS))
def test_stored_bytes_are_those_of_its_graph(name: str, scheme: str, tmp_path: Path) -> None:
    q = description(name, parse_scheme(scheme))
    proto = lowered(name, q, tmp_path, "float16")
    parts = ("codes", ":scale", "down", "up")
    held = sum(
        len(onnx.numpy_helper.to_array(t).tobytes()) // (2 if t.data_type == INT4 else 1)
        for t in proto.graph.initializer
        if t.name.endswith(parts)
    )
    assert stored_bytes(q.layer, q.scheme) == held


@pytest.mark.parametrize("scheme", ["w8a16", "w4a16-g64-lr8"])
def test_a_plan_holds_codes_as_they_are(scheme: str, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    q = description("matmul", parse_scheme(scheme))
    lowered("matmul", q, tmp_path, "float16")
    spec = BuildSpec("layer", "tensorrt_rtx", "sm_86")
    report = build_plan(tmp_path / "model.onnx", spec, tmp_path / "x.plan")
    assert report.weight_bytes is not None and report.activation_bytes is not None
    # Each tensor begins at a multiple of 256 bytes, or of 512.
    assert 0 <= report.weight_bytes - stored_bytes(q.layer, q.scheme) < 4 * 512


def replace_rank(scheme: str, rank: int) -> Scheme:
    return parse_scheme(f"{scheme}-lr{rank}" if rank else scheme)


def assert_symmetric(proto: onnx.ModelProto) -> None:
    """Codes are int8 or int4 everywhere, and zero points zero."""
    values = {tensor.name: tensor for tensor in proto.graph.initializer}
    for tensor in values.values():
        assert tensor.data_type != onnx.TensorProto.UINT8
    for node in proto.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            if node.op_type == "QuantizeLinear":
                assert len(node.input) == 3  # without a zero point the codes are uint8
            for zero in node.input[2:]:
                array = onnx.numpy_helper.to_array(values[zero])
                assert array.dtype == np.int8 and not array.any()
