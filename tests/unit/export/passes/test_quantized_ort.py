"""Quantized layers in a graph: what ONNX Runtime computes is what the description says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

ir = pytest.importorskip("onnx_ir")
torch = pytest.importorskip("torch")

import onnx  # noqa: E402
import onnxruntime  # noqa: E402
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from edgesd.errors import EdgesdError  # noqa: E402
from edgesd.export.external_data import write_model  # noqa: E402
from edgesd.export.passes.lowering import Timesteps  # noqa: E402
from edgesd.export.passes.quantized_ort import QuantizedOrt  # noqa: E402
from edgesd.export.quantize.layers import (  # noqa: E402
    Layer,
    QuantizedLayer,
    find_layers,
    load_layer,
    matrix_of,
    save_layer,
    spread,
)
from edgesd.export.quantize.methods import get_method  # noqa: E402
from edgesd.export.quantize.quantize import quantize_layer  # noqa: E402
from edgesd.runtime.backends.onnxruntime import session_options  # noqa: E402
from edgesd.spec.scheme import parse_scheme  # noqa: E402
from tests.quantizing import normal, patches, record  # noqa: E402

Array = npt.NDArray[np.float32]
TIMESTEPS = Timesteps("timestep", np.array([900, 500, 20], np.float32))


pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("one_thread")]


@dataclass(frozen=True)
class Kind:
    """A graph of one layer. shape: of the weight as the graph has it; x: shape of an input."""

    op: str
    shape: tuple[int, ...]
    x: tuple[int, ...]
    attributes: dict[str, Any]
    bias: str = "none"
    """none, input (a third input of the node) or add (an Add behind it)."""


KINDS = {
    "linear": Kind("MatMul", (48, 40), (2, 7, 48), {}, "add"),
    "linear of odd width": Kind("MatMul", (36, 48), (1, 5, 36), {}),
    "gemm": Kind("Gemm", (48, 40), (1, 40), {"transB": 1}, "input"),
    "gemm not transposed": Kind("Gemm", (40, 36), (2, 40), {}),
    "conv1x1": Kind("Conv", (48, 40, 1, 1), (2, 40, 6, 5), {}, "input"),
    "conv1x1 of stride 2": Kind("Conv", (33, 36, 1, 1), (1, 36, 6, 5), {"strides": [2, 2]}),
    "conv3x3": Kind("Conv", (40, 36, 3, 3), (2, 36, 6, 5), {"pads": [1, 1, 1, 1]}, "input"),
    "conv3x3 of stride 2": Kind(
        "Conv", (36, 40, 3, 3), (1, 40, 8, 7), {"pads": [0, 0, 1, 1], "strides": [2, 2]}, "input"
    ),
    "conv3x3 without pads": Kind("Conv", (40, 48, 3, 3), (1, 48, 6, 7), {}),
    "embedding": Kind("Gather", (50, 40), (2, 7), {}),
}
SCHEMES = {
    "w8a16": ("w8a16", False, 1),
    "w8a8": ("w8a8", False, 1),
    "w8a8 static": ("w8a8", True, 1),
    "w8a8 by timestep": ("w8a8", True, 3),
    "w4a16": ("w4a16-g32", False, 1),
    "w4a16-g256": ("w4a16-g256", False, 1),
    "w4a8": ("w4a8-g32", False, 1),
    "w4a8 by timestep": ("w4a8-g32", True, 3),
    "w4a4": ("w4a4-g32", False, 1),
}


def graph(kind: Kind, name: str = "mid.block") -> onnx.ModelProto:
    """x -> y; the timestep is an input that nothing reads."""
    weights: dict[str, Array] = {"w": normal(*kind.shape) * np.float32(0.1)}
    inputs = ["w", "x"] if kind.op == "Gather" else ["x", "w"]
    outputs = kind.shape[0] if kind.op == "Conv" or "transB" in kind.attributes else kind.shape[-1]
    if kind.bias == "input":
        inputs.append("b")
    if kind.bias != "none":
        weights["b"] = normal(outputs, seed=9)
    last = "y" if kind.bias != "add" else "product"
    nodes = [helper.make_node(kind.op, inputs, [last], name=f"{name}/{kind.op}", **kind.attributes)]
    if kind.bias == "add":
        nodes.append(helper.make_node("Add", [last, "b"], ["y"], name=f"{name}/Add"))
    of = TensorProto.INT64 if kind.op == "Gather" else TensorProto.FLOAT
    shape: list[int | str] = [f"d{i}" for i in range(len(kind.x))]
    rank = 3 if kind.op == "Gather" else len(kind.x)
    proto = helper.make_graph(
        nodes,
        "unet",
        [
            helper.make_tensor_value_info("x", of, shape),
            helper.make_tensor_value_info("timestep", TensorProto.FLOAT, [1]),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [f"o{i}" for i in range(rank)])],
        [numpy_helper.from_array(array, n) for n, array in weights.items()],
    )
    return helper.make_model(proto, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def example(kind: Kind, seed: int, shape: tuple[int, ...] | None = None) -> npt.NDArray[Any]:
    """An input: rows of the table, or values of uneven channels that aren't centred."""
    shape = shape or kind.x
    if kind.op == "Gather":
        return np.random.default_rng(seed).integers(0, kind.shape[0], shape)
    channels = shape[1] if kind.op == "Conv" else shape[-1]
    size = np.random.default_rng(1).lognormal(0, 0.6, channels).astype(np.float32)
    wide = size[:, None, None] if kind.op == "Conv" else size
    return (normal(*shape, seed=seed) + np.float32(0.3)) * wide


def quantize(
    kind: Kind, proto: onnx.ModelProto, scheme: str, static: bool, steps: int, smooth: bool = False
) -> QuantizedLayer:
    """By the quickest method: the graph is checked against what the description says."""
    model = ir.serde.deserialize_model(proto)
    (layer,) = find_layers("unet", model)
    weight = matrix_of(next(iter(model.graph)), layer)
    stats = None
    if layer.kind != "embedding":
        inputs = [example(kind, seed) * np.float32(2**-seed) for seed in range(steps)]
        stats = record(layer, inputs)
    found = quantize_layer(layer, weight, stats, parse_scheme(scheme), get_method("rtn", static))
    if smooth:
        factors = np.random.default_rng(3).uniform(0.5, 2, layer.channels).astype(np.float32)
        found = replace(found, smooth=factors)
    return found


def lowered(
    proto: onnx.ModelProto,
    layers: dict[str, QuantizedLayer],
    timesteps: Timesteps | None = TIMESTEPS,
) -> onnx.ModelProto:
    model = ir.serde.deserialize_model(proto)
    assert QuantizedOrt(layers, timesteps)(model)
    out = ir.serde.serialize_model(model)
    onnx.checker.check_model(out)
    return out


def session(proto: onnx.ModelProto) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(proto.SerializeToString(), session_options(1))


def run(loaded: onnxruntime.InferenceSession, x: npt.NDArray[Any], timestep: float = 500) -> Array:
    feed = {"x": x, "timestep": np.array([timestep], np.float32)}
    used = {i.name for i in loaded.get_inputs()}
    out: Array = loaded.run(["y"], {n: a for n, a in feed.items() if n in used})[0]
    return out


# The description in plain NumPy.


def affine(x: Array, scale: float, zero: float) -> Array:
    codes = np.clip(np.round(x / np.float32(scale)) + np.float32(zero), 0, 255)
    return (codes - np.float32(zero)) * np.float32(scale)


def by_group(rows: Array, layer: Layer, group: int, bits: int) -> Array:
    high, out = np.float32(2 ** (bits - 1) - 1), rows.copy()
    for tap in range(0, rows.shape[-1], layer.channels):
        for start in range(tap, tap + layer.channels, group):
            part = slice(start, min(start + group, tap + layer.channels))
            scale = np.maximum(np.abs(rows[..., part]).max(-1, keepdims=True) / high, 1e-8)
            out[..., part] = np.round(rows[..., part] / scale) * scale
    return out


def formatted(x: Array, q: QuantizedLayer, step: int) -> Array:
    """Rows of the smoothed input as the layer multiplies them with its codes."""
    act, layer = q.activations, q.layer
    if act.mode == "dynamic":
        low, high = min(x.min(), np.float32(0)), max(x.max(), np.float32(0))
        scale = (high - low) / np.float32(255)
        x = affine(x, scale, np.clip(np.round(-low / scale), 0, 255))
    if act.mode == "static":
        assert act.scale is not None and act.zero_point is not None
        step = step if len(act.scale) > 1 else 0
        x = affine(x, act.scale[step], float(act.zero_point[step]))
    rows = patches(x, layer)
    return by_group(rows, layer, act.group, act.bits) if act.mode == "group" else rows


def expected(
    x: npt.NDArray[Any], q: QuantizedLayer, bias: Array | None, step: int, eight: bool = False
) -> Array:
    """eight: 4-bit weights are rounded once more, to a 127th of their output's largest."""
    layer, residual = q.layer, q.residual().astype(np.float64)
    if layer.kind == "embedding":
        return residual[x].astype(np.float32)
    if eight:
        scale = np.abs(q.residual()).max(1, keepdims=True) / np.float32(127)
        steps = (scale / q.scales.astype(np.float32)).astype(np.float16).astype(np.float32)
        steps = np.repeat(steps, q.group, 1)[:, : layer.columns]
        residual = np.round(q.codes / steps) * scale.astype(np.float64)
    if q.smooth is not None:
        wide = q.smooth[:, None, None] if layer.kind == "conv" else q.smooth
        x = x * (1 / wide).astype(np.float32)
    rows = formatted(x, q, step).astype(np.float64)
    out = rows @ residual.T + patches(x, layer).astype(np.float64) @ q.branch().T
    if bias is not None:
        out = out + bias
    return (out.transpose(0, 3, 1, 2) if layer.kind == "conv" else out).astype(np.float32)


def relative_rms(found: Array, wanted: Array) -> float:
    assert found.shape == wanted.shape and np.isfinite(found).all()
    return float(np.sqrt(((found - wanted) ** 2).mean() / (wanted**2).mean()))


def tolerances(q: QuantizedLayer) -> tuple[float, float]:
    """Relative RMS from the exact kernel's arithmetic, and from the description."""
    act, linear = q.activations, q.layer.kind == "linear"
    if linear and act.mode == "group" and act.bits == 8:
        return 2e-3, 2e-3  # the kernel rounds blocks of the input itself
    if act.mode in ("dynamic", "static"):
        return 2e-4, 2e-4 if q.scheme.weight_bits == 8 else 1e-2
    return (1e-3, 1e-3) if act.mode == "group" else (1e-5, 1e-5)


def bias_of(proto: onnx.ModelProto) -> Array | None:
    return next((numpy_helper.to_array(i) for i in proto.graph.initializer if i.name == "b"), None)


CASES = [
    pytest.param(
        kind, scheme, rank, smooth, id=f"{kind}-{scheme}{'-lr4' * rank}{'-smooth' * smooth}"
    )
    for kind in KINDS
    for scheme in SCHEMES
    for rank in (False, True)
    for smooth in (False, True)
    if (rank or not smooth) and (kind != "embedding" or not rank)
]  # fmt: skip


@pytest.mark.parametrize(("kind", "scheme", "rank", "smooth"), CASES)
def test_a_graph_computes_what_the_description_says(
    kind: str, scheme: str, rank: bool, smooth: bool
) -> None:
    name, static, steps = SCHEMES[scheme]
    shape = KINDS[kind]
    proto = graph(shape)
    q = quantize(shape, proto, name + "-lr4" * rank, static, steps, smooth)
    assert q.rank == (4 if rank else 0)
    loaded = session(lowered(proto, {f"mid.block/{shape.op}": q}))
    exact, loose = tolerances(q)
    eight = q.scheme.weight_bits == 4 and q.activations.mode in ("dynamic", "static")
    for step in range(steps):
        x = example(shape, 10 + step)
        if q.layer.kind != "embedding":
            x = x * np.float32(2**-step)
        out = run(loaded, x, float(TIMESTEPS.recorded[step]) + 3)
        wanted = expected(x, q, bias_of(proto), step)
        assert relative_rms(out, wanted) < loose
        assert relative_rms(out, expected(x, q, bias_of(proto), step, eight)) < exact


@pytest.mark.parametrize("kind", ["linear", "conv1x1", "conv3x3", "conv3x3 of stride 2"])
@pytest.mark.parametrize("scheme", ["w8a8", "w4a16-g32", "w4a8-g32-lr4", "w4a4-g32-lr4"])
def test_a_graph_takes_any_size(kind: str, scheme: str) -> None:
    shape = KINDS[kind]
    proto = graph(shape)
    q = quantize(shape, proto, scheme, False, 1)
    loaded = session(lowered(proto, {f"mid.block/{shape.op}": q}))
    eight = q.scheme.weight_bits == 4 and q.activations.mode == "dynamic"
    sizes = [(1, 3), (3, 11)] if shape.op == "MatMul" else [(1, 3, 3), (3, 4, 12), (1, 9, 5)]
    channels = shape.x[1] if shape.op == "Conv" else shape.x[2]
    for size in sizes:
        full = (*size, channels) if shape.op == "MatMul" else (size[0], channels, *size[1:])
        x = example(shape, 5, full)
        wanted = expected(x, q, bias_of(proto), 0, eight)
        assert relative_rms(run(loaded, x), wanted) < tolerances(q)[0]


@pytest.mark.parametrize("scheme", ["w8a16", "w8a8", "w4a16-g32", "w4a8-g32", "w4a4-g32"])
@pytest.mark.parametrize("shape", [(5, 48), (2, 3, 5, 48)])
def test_a_linear_takes_inputs_of_any_rank(scheme: str, shape: tuple[int, ...]) -> None:
    kind = replace(KINDS["linear"], x=shape)
    proto = graph(kind)
    q = quantize(kind, proto, scheme, False, 1)
    x = example(kind, 5)
    out = run(session(lowered(proto, {"mid.block/MatMul": q})), x)
    assert relative_rms(out, expected(x, q, bias_of(proto), 0)) < tolerances(q)[0]


@pytest.mark.parametrize("kind", ["linear", "conv3x3"])
@pytest.mark.parametrize("scheme", ["w8a8", "w4a8-g32", "w4a4-g32-lr4"])
def test_inputs_of_zeros(kind: str, scheme: str) -> None:
    shape = KINDS[kind]
    proto = graph(shape)
    q = quantize(shape, proto, scheme, False, 1)
    out = run(session(lowered(proto, {f"mid.block/{shape.op}": q})), np.zeros(shape.x, np.float32))
    bias = bias_of(proto)
    assert bias is not None
    axes = (1, -1, 1, 1) if shape.op == "Conv" else (-1,)
    np.testing.assert_allclose(out, np.broadcast_to(bias.reshape(axes), out.shape), atol=1e-5)


@pytest.mark.parametrize(("timestep", "step"), [(999, 0), (701, 0), (699, 1), (261, 1), (0, 2)])
def test_the_nearest_timestep_gives_the_range(timestep: float, step: int) -> None:
    shape = KINDS["linear"]
    proto = graph(shape)
    q = quantize(shape, proto, "w8a8", True, 3)
    assert q.activations.scale is not None and len(set(q.activations.scale.tolist())) == 3
    loaded = session(lowered(proto, {"mid.block/MatMul": q}))
    x = example(shape, 5)
    wanted = [expected(x, q, bias_of(proto), at) for at in range(3)]
    errors = [relative_rms(run(loaded, x, timestep), each) for each in wanted]
    assert errors[step] < 2e-4 and min(e for i, e in enumerate(errors) if i != step) > 1e-3


# Whole graphs and files.


def mixed() -> onnx.ModelProto:
    """conv -> conv of stride 2 -> reshape -> linear -> linear, a gemm of the timestep added."""
    weights: dict[str, npt.NDArray[Any]] = {
        "w0": normal(40, 36, 3, 3) * np.float32(0.1),
        "b0": normal(40),
        "w1": normal(36, 40, 3, 3, seed=1) * np.float32(0.1),
        "w2": normal(36, 48, seed=2),
        "w3": normal(48, 36, seed=3),
        "w4": normal(36, 32, seed=4),
        "shape": np.array([0, 36, -1]),
        "wide": np.ones((1, 32), np.float32),
    }
    nodes = [
        helper.make_node("Conv", ["x", "w0", "b0"], ["a"], name="c0/Conv", pads=[1, 1, 1, 1]),
        helper.make_node(
            "Conv", ["a", "w1"], ["b"], name="c1/Conv", pads=[0, 0, 1, 1], strides=[2, 2]
        ),
        helper.make_node("Reshape", ["b", "shape"], ["c"], name="Reshape"),
        helper.make_node("Transpose", ["c"], ["d"], name="Transpose", perm=[0, 2, 1]),
        helper.make_node("MatMul", ["d", "w2"], ["e"], name="l0/MatMul"),
        helper.make_node("MatMul", ["e", "w3"], ["f"], name="l1/MatMul"),
        helper.make_node("Mul", ["wide", "timestep"], ["t"], name="t/Mul"),
        helper.make_node("Gemm", ["t", "w4"], ["g"], name="t/Gemm", transB=1),
        helper.make_node("Add", ["f", "g"], ["y"], name="Add"),
    ]
    proto = helper.make_graph(
        nodes,
        "unet",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 36, "h", "w"]),
            helper.make_tensor_value_info("timestep", TensorProto.FLOAT, [1]),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", "n", 36])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    return helper.make_model(proto, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def quantize_all(proto: onnx.ModelProto, scheme: str, static: bool) -> dict[str, QuantizedLayer]:
    model = ir.serde.deserialize_model(proto)
    nodes = {node.name: node for node in model.graph}
    found = {}
    for number, layer in enumerate(find_layers("unet", model)):
        shape = (2, layer.channels, 8, 8) if layer.kind == "conv" else (2, 9, layer.channels)
        inputs = [normal(*shape, seed=number + 10 * step) for step in range(3)]
        found[layer.node] = quantize_layer(
            layer,
            matrix_of(nodes[layer.node], layer),
            record(layer, inputs),
            parse_scheme(scheme),
            get_method("svdquant" if "-lr" in scheme else "gptq", static),
        )
    assert len(found) == 5
    return found


@pytest.mark.parametrize(
    ("scheme", "static", "limit"),
    [
        ("w8a16", False, 0.02),
        ("w8a8", False, 0.06),
        ("w4a16-g32-lr4", False, 0.3),
        ("w4a8-g32-lr4", False, 0.3),
        ("w4a4-g32-lr16", False, 0.5),
    ],
)
def test_many_layers_in_one_graph(scheme: str, static: bool, limit: float) -> None:
    proto = mixed()
    out = lowered(proto, quantize_all(proto, scheme, static))
    x = normal(2, 36, 8, 8, seed=50)
    loaded, plain = session(out), session(proto)
    assert relative_rms(run(loaded, x), run(plain, x)) < limit
    assert [i.name for i in loaded.get_inputs()] == ["x", "timestep"]
    assert [o.name for o in loaded.get_outputs()] == ["y"]
    names = [node.name for node in out.graph.node]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8-g32"])
def test_many_layers_share_one_look_up_of_the_timestep(scheme: str) -> None:
    proto = mixed()
    out = lowered(proto, quantize_all(proto, scheme, True))
    assert [node.op_type for node in out.graph.node].count("ArgMin") == 1
    x = normal(2, 36, 8, 8, seed=50)
    assert np.isfinite(run(session(out), x)).all()


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8-g32-lr4"])
def test_two_runs_give_the_same_bytes(scheme: str, tmp_path: Path) -> None:
    files = []
    for folder in (tmp_path / "one", tmp_path / "two"):
        proto = mixed()
        model = ir.serde.deserialize_model(proto)
        QuantizedOrt(quantize_all(proto, scheme, True), TIMESTEPS)(model)
        write_model(model, folder)
        files.append({p.name: p.read_bytes() for p in folder.iterdir()})
    assert files[0] == files[1] and set(files[0]) == {"model.onnx", "weights.bin"}


def initializers(proto: onnx.ModelProto) -> dict[str, int]:
    """Name -> bytes."""
    return {t.name: len(t.raw_data) or t.ByteSize() for t in proto.graph.initializer}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "embedding"])
@pytest.mark.parametrize("scheme", ["w4a16-g32", "w4a8-g32", "w4a4-g32"])
def test_four_bits_are_four_bits_on_disk(kind: str, scheme: str, tmp_path: Path) -> None:
    shape = KINDS[kind]
    proto = graph(shape)
    q = quantize(shape, proto, scheme, False, 1)
    out = lowered(proto, {f"mid.block/{shape.op}": q})
    # A matrix kernel takes whole groups.
    padded = (q.scales.size * q.group if shape.op != "Conv" else q.codes.size) // 2
    (codes,) = (size for name, size in initializers(out).items() if name.endswith(":codes"))
    assert codes == padded
    write_model(ir.serde.deserialize_model(out), tmp_path)
    files = sum(p.stat().st_size for p in tmp_path.iterdir())
    assert files < padded + q.scales.size * 2 + 8 * q.layer.rows + 12_000
    reloaded = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), session_options(1))
    x = example(shape, 5)
    np.testing.assert_array_equal(run(reloaded, x), run(session(out), x))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scheme", ["w8a8", "w4a8-g16", "w4a16-g64"])
def test_a_layer_from_disk_gives_the_same_graph(kind: str, scheme: str, tmp_path: Path) -> None:
    shape = KINDS[kind]
    proto = graph(shape)
    q = quantize(shape, proto, scheme, False, 1)
    save_layer(q, tmp_path / "layer.safetensors")
    kept = load_layer(tmp_path / "layer.safetensors")
    made, again = (lowered(proto, {f"mid.block/{shape.op}": each}) for each in (q, kept))
    assert made.SerializeToString() == again.SerializeToString()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scheme", ["w8a8", "w4a8-g32"])
def test_codes_are_made_when_they_are_read(kind: str, scheme: str) -> None:
    proto = graph(KINDS[kind])
    q = quantize(KINDS[kind], proto, scheme, False, 1)
    model = ir.serde.deserialize_model(proto)
    QuantizedOrt({f"mid.block/{KINDS[kind].op}": q}, TIMESTEPS)(model)
    tensors = model.graph.initializers.items()
    (codes,) = (value.const_value for name, value in tensors if name.endswith(":codes"))
    assert isinstance(codes, ir.LazyTensor)
    assert codes.nbytes == len(codes.tobytes()) and codes.numpy().shape == tuple(codes.shape)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scheme", ["w8a16", "w8a8"])
def test_eight_bits_are_eight_bits_on_disk(kind: str, scheme: str) -> None:
    shape = KINDS[kind]
    proto = graph(shape)
    q = quantize(shape, proto, scheme, False, 1)
    sizes = initializers(lowered(proto, {f"mid.block/{shape.op}": q}))
    (codes,) = (size for name, size in sizes.items() if name.endswith(":codes"))
    assert codes == q.codes.size
    assert sum(sizes.values()) < q.codes.size + 8 * q.layer.rows + 800


@pytest.mark.parametrize("kind", ["linear", "conv1x1", "conv3x3"])
@pytest.mark.parametrize("scheme", ["w8a8-lr4", "w4a8-g32-lr4", "w4a4-g64-lr4"])
def test_the_bytes_of_a_layer_are_those_on_disk(kind: str, scheme: str) -> None:
    shape = KINDS[kind]
    proto = graph(shape)
    q = quantize(shape, proto, scheme, False, 1)
    out = lowered(proto, {f"mid.block/{shape.op}": q})
    names = {"codes", "scales", "steps", "scale", "smooth", "down", "up"}
    size = sum(n for name, n in initializers(out).items() if name.rpartition(":")[2] in names)
    assert size == pytest.approx(q.bytes(), rel=0.05, abs=6 * q.layer.rows)


@pytest.mark.parametrize("kind", ["linear", "gemm", "conv1x1", "conv3x3", "conv3x3 of stride 2"])
@pytest.mark.parametrize("scheme", ["w8a16", "w8a8", "w4a16-g32-lr4", "w4a8-g32-lr4"])
def test_weights_are_unpacked_when_loaded(kind: str, scheme: str, tmp_path: Path) -> None:
    shape = KINDS[kind]
    proto = graph(shape)
    q = quantize(shape, proto, scheme, False, 1)
    out = lowered(proto, {f"mid.block/{shape.op}": q})
    options = session_options()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(out.SerializeToString(), options)
    left = {node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node}
    assert not left & {"Cast", "DequantizeLinear", "QuantizeLinear"}


# What is refused.


def test_a_layer_that_is_not_there() -> None:
    kind = KINDS["linear"]
    proto = graph(kind)
    q = quantize(kind, proto, "w8a8", False, 1)
    with pytest.raises(
        EdgesdError, match=r"^unet: there is no layer mid\.other/MatMul to quantize$"
    ):
        lowered(proto, {"mid.other/MatMul": q})


def test_a_layer_without_a_weight() -> None:
    kind = KINDS["linear"]
    proto = graph(kind)
    q = quantize(kind, proto, "w8a8", False, 1)
    with pytest.raises(EdgesdError, match=r"there is no layer mid\.block/Add"):
        lowered(proto, {"mid.block/Add": q})


def test_codes_of_another_shape() -> None:
    kind = KINDS["linear"]
    q = quantize(kind, graph(kind), "w8a8", False, 1)
    other = replace(kind, shape=(48, 41), bias="none")
    with pytest.raises(EdgesdError, match=r"mid\.block/MatMul has another shape than its codes"):
        lowered(graph(other), {"mid.block/MatMul": q})


def test_ranges_by_timestep_need_timesteps() -> None:
    kind = KINDS["linear"]
    proto = graph(kind)
    q = quantize(kind, proto, "w8a8", True, 3)
    with pytest.raises(EdgesdError, match="has ranges per timestep, and no timestep input"):
        lowered(proto, {"mid.block/MatMul": q}, None)
    del proto.graph.input[1]
    with pytest.raises(EdgesdError, match="has ranges per timestep, and no timestep input"):
        lowered(proto, {"mid.block/MatMul": q})


def _scales(q: QuantizedLayer) -> QuantizedLayer:
    return replace(q, scales=np.full_like(q.scales, np.inf))


def _branch(q: QuantizedLayer) -> QuantizedLayer:
    assert q.up is not None
    return replace(q, up=np.full_like(q.up, np.nan))


@pytest.mark.parametrize("spoil", [_scales, _branch])
@pytest.mark.parametrize("kind", ["linear", "conv3x3"])
def test_values_that_are_not_finite(
    kind: str, spoil: Callable[[QuantizedLayer], QuantizedLayer]
) -> None:
    shape = KINDS[kind]
    proto = graph(shape)
    q = spoil(quantize(shape, proto, "w4a16-g32-lr4", False, 1))
    with pytest.raises(EdgesdError, match="holds NaN or infinite values"):
        lowered(proto, {f"mid.block/{shape.op}": q})


def test_a_weight_that_another_node_needs() -> None:
    kind = replace(KINDS["linear"], bias="none")
    proto = graph(kind)
    q = quantize(kind, proto, "w8a8", False, 1)
    proto.graph.node.append(helper.make_node("Identity", ["w"], ["z"], name="Identity"))
    proto.graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, [48, 40]))
    with pytest.raises(EdgesdError, match="w is still there in fp32"):
        lowered(proto, {"mid.block/MatMul": q})


def test_group_normalization_changed_its_meaning() -> None:
    kind = replace(KINDS["linear"], bias="none")
    proto = graph(kind)
    q = quantize(kind, proto, "w8a8", False, 1)
    proto.graph.node.append(
        helper.make_node("GroupNormalization", ["y", "s", "s"], ["z"], name="n", num_groups=2)
    )
    proto.graph.initializer.append(numpy_helper.from_array(np.ones(2, np.float32), "s"))
    with pytest.raises(EdgesdError, match="GroupNormalization"):
        lowered(proto, {"mid.block/MatMul": q})


def test_nothing_to_do() -> None:
    model = ir.serde.deserialize_model(graph(KINDS["linear"]))
    assert not QuantizedOrt({}, None)(model)
    assert [node.op_type for node in model.graph] == ["MatMul", "Add"]


def test_smoothing_is_applied_to_branch_and_codes() -> None:
    kind = KINDS["linear"]
    proto = graph(kind)
    q = quantize(kind, proto, "w8a16-lr4", False, 1, smooth=True)
    assert q.smooth is not None
    x = example(kind, 5)
    out = run(session(lowered(proto, {"mid.block/MatMul": q})), x)
    total = (q.residual() + q.branch()) / spread(q.smooth, q.layer.columns)
    np.testing.assert_allclose(total, q.effective_weight(), rtol=1e-6)
    np.testing.assert_allclose(out, x @ total.T + bias_of(proto), atol=1e-3)
