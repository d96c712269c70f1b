"""Makes edgesd/runtime/probes.zip: the graphs that `edgesd profile` times.

    python scripts/make_probes.py

Products, attention and what lies between them, at sizes of Stable Diffusion's networks, each as the
passes of a bundle write it. Weights refer to a file that is made where they are measured.
"""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence

import msgspec
import numpy as np
import onnx_ir as ir

from edgesd.export.backends.onnxruntime import LOWERING
from edgesd.export.passes.check import MAX_IR_VERSION, OPSET
from edgesd.export.passes.no_shapes import NoShapes
from edgesd.export.quantize.layers import find_layers, matrix_of
from edgesd.export.quantize.quantize import rounded_layer
from edgesd.runtime.rates import INDEX, PROBES, WEIGHTS, Probe
from edgesd.spec.pipeline import TensorSpec
from edgesd.spec.scheme import parse_scheme

FORMS: dict[str, tuple[str | None, bool]] = {
    "fp32": (None, False),
    "int8": ("w8a8", False),
    "matmul_nbits": ("w4a8-g64", False),
    "edgesd_int8": ("w8a8", True),
    "edgesd_int4": ("w4a8-g64", True),
}
"""Form -> the scheme of its layer, and whether it is for edgesd's own kernels."""

CONVS = (
    (320, 320, 64, 3),
    (640, 640, 32, 3),
    (1280, 1280, 16, 3),
    (1280, 1280, 8, 3),
    (64, 64, 256, 3),
    (64, 64, 64, 3),
    (192, 192, 32, 3),
    (128, 128, 256, 3),
    (512, 512, 64, 3),
    (320, 320, 64, 1),
    (1280, 1280, 16, 1),
)
"""Channels in and out, side in pixels, taps of a side."""

LINEARS = (
    (4096, 320, 320),
    (4096, 320, 2560),
    (1024, 640, 640),
    (1024, 2560, 640),
    (256, 1280, 1280),
    (256, 1280, 10240),
    (64, 1280, 1280),
    (1024, 192, 192),
    (77, 768, 320),
    (77, 768, 3072),
    (1, 1280, 1280),
)
"""Rows, K, N."""

ATTENTIONS = (
    (8, 4096, 4096, 40),
    (8, 1024, 1024, 80),
    (8, 256, 256, 160),
    (8, 1024, 1024, 24),
    (8, 4096, 77, 40),
    (8, 1024, 77, 80),
    (12, 77, 77, 64),
)
"""Heads, queries, keys, width of a head."""

SHAPES = ((1, 320, 16, 16), (1, 320, 64, 64), (1, 64, 256, 256))
"""Of what elementwise operations take: [1, C, H, W]."""

_LARGE = 1024


def main() -> None:
    """Write the file; equal graphs, equal bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        probes = []
        for probe, graph in make_probes():
            probes.append(probe)
            file.writestr(zipfile.ZipInfo(probe.graph), graph)
        file.writestr(zipfile.ZipInfo(INDEX), msgspec.json.encode(probes))
    PROBES.write_bytes(buffer.getvalue())
    print(f"{PROBES}: {len(probes)} probes, {len(buffer.getvalue())} bytes")


def make_probes() -> Iterator[tuple[Probe, bytes]]:
    """Every probe with its graph, the smallest first."""
    for kind, make in _ELEMENTWISE.items():
        for shape in SHAPES:
            model = _model([shape] * (2 if kind in ("add", "mul", "concat") else 1), make)
            yield _probe(kind, "", None, model)
    for form, (scheme, own) in FORMS.items():
        for c_in, c_out, side, taps in CONVS:
            if form == "matmul_nbits":
                continue
            model = _conv(c_in, c_out, side, taps, own)
            yield _probe("conv", form, (side * side, c_in * taps * taps, c_out), model, scheme, own)
        for rows, columns, outputs in LINEARS:
            model = _linear(rows, columns, outputs)
            yield _probe("linear", form, (rows, columns, outputs), model, scheme, own)
        if scheme is None:
            for size in ATTENTIONS:
                yield _probe("attention", form, size, _attention(*size))
                # The kernel for it runs wherever any of ours does, and so do 4-bit weights.
                yield _probe(
                    "attention",
                    "edgesd_int8",
                    size,
                    _attention(*size),
                    FORMS["edgesd_int4"][0],
                    True,
                )


Body = Callable[..., ir.Value]


def _model(shapes: Sequence[Sequence[int]], body: Body) -> ir.Model:
    """A graph of inputs of these shapes, body(graph, *inputs) being its output."""
    inputs = [ir.val(f"x{i}", ir.DataType.FLOAT, ir.Shape(shape)) for i, shape in enumerate(shapes)]
    graph = ir.Graph(
        inputs, [], nodes=[], opset_imports={"": OPSET, "com.microsoft": 1}, name="probe"
    )
    out = body(graph, *inputs)
    out.name, out.dtype = "y", ir.DataType.FLOAT
    graph.outputs.append(out)
    return ir.Model(graph, ir_version=MAX_IR_VERSION)


def _op(
    graph: ir.Graph,
    kind: str,
    inputs: Sequence[ir.Value | None],
    shape: Sequence[int],
    attributes: Mapping[str, object] | None = None,
    domain: str = "",
    outputs: int = 1,
) -> list[ir.Value]:
    """Append a node, named like a layer; its outputs, the first of which has `shape`."""
    node = ir.node(
        kind,
        inputs,
        dict(attributes or {}),  # type: ignore[arg-type]
        domain=domain,
        num_outputs=outputs,
        name=f"layer/{kind}_{len(graph)}",
    )
    for place, value in enumerate(node.outputs):
        value.name, value.dtype = f"{node.name}:{place}", ir.DataType.FLOAT
    node.outputs[0].shape = ir.Shape(shape)
    graph.append(node)
    return list(node.outputs)


def _shape(value: ir.Value) -> list[int]:
    """A static shape."""
    assert value.shape is not None
    return [int(str(dim)) for dim in value.shape]


def _const(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    value = ir.val(name, const_value=ir.tensor(array, name=name))
    graph.register_initializer(value)
    return value


def _conv(c_in: int, c_out: int, side: int, taps: int, own: bool) -> ir.Model:
    """A convolution; for our kernels as in a residual block, whose group normalization, SiLU and
    sum they take in."""

    def body(graph: ir.Graph, x: ir.Value, *other: ir.Value) -> ir.Value:
        shape, out = (1, c_in, side, side), (1, c_out, side, side)
        value = _group_norm(graph, x) if own and taps > 1 else x
        if own and taps > 1:
            gate = _op(graph, "Sigmoid", [value], shape)[0]
            value = _op(graph, "Mul", [value, gate], shape)[0]
        weight = _random(graph, "weight", (c_out, c_in, taps, taps))
        bias = _const(graph, "bias", np.zeros(c_out, np.float32))
        pads = [taps // 2] * 4
        attributes = {"kernel_shape": [taps, taps], "pads": pads, "strides": [1, 1]}
        value = _op(graph, "Conv", [value, weight, bias], out, attributes)[0]
        return _op(graph, "Add", [value, *other], out)[0] if other else value

    shapes = [(1, c_in, side, side), *([(1, c_out, side, side)] if own else [])]
    return _model(shapes, body)


def _linear(rows: int, columns: int, outputs: int) -> ir.Model:
    def body(graph: ir.Graph, x: ir.Value) -> ir.Value:
        weight = _random(graph, "weight", (columns, outputs))
        return _op(graph, "MatMul", [x, weight], (1, rows, outputs))[0]

    return _model([(1, rows, columns)], body)


def _attention(heads: int, queries: int, keys: int, width: int) -> ir.Model:
    def body(graph: ir.Graph, *values: ir.Value) -> ir.Value:
        attributes = {"num_heads": heads, "scale": width**-0.5, "unidirectional": 0}
        shape = (1, queries, heads * width)
        domain = "com.microsoft"
        return _op(graph, "MultiHeadAttention", values, shape, attributes, domain)[0]

    wide = heads * width
    return _model([(1, queries, wide), (1, keys, wide), (1, keys, wide)], body)


def _random(graph: ir.Graph, name: str, shape: tuple[int, ...]) -> ir.Value:
    values = np.random.default_rng(0).standard_normal(shape, np.float32)
    return _const(graph, name, values)


def _group_norm(graph: ir.Graph, x: ir.Value) -> ir.Value:
    """As torch exports it."""
    shape = _shape(x)
    channels = shape[1]
    flat = _const(graph, "flat", np.array([0, 32, -1], np.int64))
    back = _const(graph, "back", np.array(shape, np.int64))
    one = _const(graph, "one", np.ones(32, np.float32))
    zero = _const(graph, "zero", np.zeros(32, np.float32))
    gamma = _const(graph, "gamma", np.ones((channels, 1, 1), np.float32))
    beta = _const(graph, "beta", np.zeros((channels, 1, 1), np.float32))
    inner = [1, 32, channels * shape[2] * shape[3] // 32]
    value = _op(graph, "Reshape", [x, flat], inner)[0]
    value = _op(graph, "InstanceNormalization", [value, one, zero], inner)[0]
    value = _op(graph, "Reshape", [value, back], shape)[0]
    value = _op(graph, "Mul", [value, gamma], shape)[0]
    return _op(graph, "Add", [value, beta], shape)[0]


def _layer_norm(graph: ir.Graph, x: ir.Value) -> ir.Value:
    """Over channels, of [1, tokens, C]."""
    _, channels, height, width = _shape(x)
    tokens = _const(graph, "tokens", np.array([1, height * width, channels], np.int64))
    back = _const(graph, "back", np.array([1, channels, height, width], np.int64))
    gamma = _const(graph, "gamma", np.ones(channels, np.float32))
    shape = [1, height * width, channels]
    value = _op(graph, "Reshape", [x, tokens], shape)[0]
    value = _op(graph, "LayerNormalization", [value, gamma, gamma], shape, {"axis": -1})[0]
    return _op(graph, "Reshape", [value, back], [1, channels, height, width])[0]


def _simple(kind: str, attributes: Mapping[str, object] | None = None) -> Body:
    def body(graph: ir.Graph, *values: ir.Value) -> ir.Value:
        shape = _shape(values[0])
        if kind == "Transpose":
            shape = [shape[0], shape[2], shape[3], shape[1]]
        if kind == "Concat":
            shape[1] *= 2
        return _op(graph, kind, values, shape, attributes)[0]

    return body


def _silu(graph: ir.Graph, x: ir.Value) -> ir.Value:
    shape = _shape(x)
    gate = _op(graph, "Sigmoid", [x], shape)[0]
    return _op(graph, "Mul", [x, gate], shape)[0]


def _resize(graph: ir.Graph, x: ir.Value) -> ir.Value:
    batch, channels, height, width = _shape(x)
    scales = _const(graph, "scales", np.array([1, 1, 2, 2], np.float32))
    attributes = {
        "mode": "nearest",
        "coordinate_transformation_mode": "asymmetric",
        "nearest_mode": "floor",
    }
    shape = (batch, channels, 2 * height, 2 * width)
    return _op(graph, "Resize", [x, None, scales], shape, attributes)[0]


_ELEMENTWISE: dict[str, Body] = {
    "add": _simple("Add"),
    "relu": _simple("Relu"),
    "gelu": _simple("Gelu"),
    "silu": _silu,
    "layer_norm": _layer_norm,
    "group_norm": _group_norm,
    "copy": _simple("Transpose", {"perm": [0, 2, 3, 1]}),
    "concat": _simple("Concat", {"axis": 1}),
    "resize": _resize,
}


def _probe(
    kind: str,
    form: str,
    size: tuple[int, ...] | None,
    model: ir.Model,
    scheme: str | None = None,
    own: bool = False,
) -> tuple[Probe, bytes]:
    """Lower a graph as a bundle's, and let its weights refer to the file."""
    graph = model.graph
    if size is None:
        size = (math.prod(_shape(graph.outputs[0])),)
    if scheme:
        nodes = {node.name: node for node in graph}
        layers = {
            la.node: rounded_layer(la, matrix_of(nodes[la.node], la), parse_scheme(scheme))
            for la in find_layers("probe", model)
        }
        if own:
            LOWERING.lower_to_kernels(model, layers, set(), None)
        else:
            LOWERING.lower_quantized(model, layers, set(), None)
    largest = 0
    for value in graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and tensor.nbytes >= _LARGE:
            largest = max(largest, tensor.nbytes)
            value.const_value = ir.ExternalTensor(
                WEIGHTS,
                0,
                tensor.nbytes,
                tensor.dtype,
                shape=ir.Shape(tensor.shape.numpy()),
                name=value.name or "",
            )
    specs = [
        tuple(TensorSpec(value.name or "", "float32", tuple(_shape(value))) for value in values)
        for values in (graph.inputs, graph.outputs)
    ]
    NoShapes()(model)
    name = "-".join([kind, *([form] if form else []), "x".join(map(str, size))])
    probe = Probe(
        name, kind, form, size, f"{name}.onnx", specs[0], specs[1], largest, scheme if own else None
    )
    return probe, ir.serde.serialize_model(model).SerializeToString()


if __name__ == "__main__":
    main()
