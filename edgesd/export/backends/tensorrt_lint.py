"""Finds what TensorRT refuses, or crashes on, before it is run: names the node and the remedy.

Each rule is a refusal that was seen (`benchmarks/tensorrt_refusals.py` shows TensorRT-RTX's own
words for the same graphs), or one that NVIDIA documents for a version that can't be asked here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import onnx_ir as ir

from edgesd.errors import EdgesdError

_FP8 = {
    ir.DataType.FLOAT8E4M3FN,
    ir.DataType.FLOAT8E5M2,
    ir.DataType.FLOAT8E4M3FNUZ,
    ir.DataType.FLOAT8E5M2FNUZ,
}
_CODES = {ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.INT4, ir.DataType.UINT4, *_FP8}
_FOUR = {ir.DataType.INT4, ir.DataType.UINT4}
_FLOATS = {
    ir.DataType.FLOAT,
    ir.DataType.FLOAT16,
    ir.DataType.BFLOAT16,
    ir.DataType.DOUBLE,
}
_OPSET = 21
"""The newest whose operators TensorRT 10.3 takes (passes/quantized_qdq.py)."""
_QDQ = ("QuantizeLinear", "DequantizeLinear")
_SAME_TYPES = ("Add", "Sub", "Mul", "Div", "MatMul", "Gemm", "Conv", "Concat", "Pow", "Where")
_INTEGER_OPS = (
    *("DynamicQuantizeLinear", "MatMulInteger", "ConvInteger"),
    *("QLinearMatMul", "QLinearConv"),
)


class Finding(NamedTuple):
    """Something that TensorRT refuses. rule: a short name; node: the ONNX node it is about."""

    rule: str
    node: str
    message: str

    def __str__(self) -> str:
        return f"{self.node}: {self.message}"


class _Graph(NamedTuple):
    model: ir.Model
    types: dict[str, ir.DataType]

    def type_of(self, value: ir.Value | None) -> ir.DataType | None:
        if value is None:
            return None
        if value.const_value is not None:
            return value.const_value.dtype
        return value.dtype or self.types.get(value.name or "")


Rule = Callable[[_Graph, ir.Node], Iterator[str]]


def lint(graph: Path) -> list[Finding]:
    """The nodes of the ONNX file `graph` that TensorRT would refuse; weights beside it are read.
    Raises EdgesdError when the file can't be read.
    """
    try:
        proto = onnx.shape_inference.infer_shapes(onnx.load(graph, load_external_data=False))
        model = ir.load(graph)
    except Exception as exc:  # onnx and onnx_ir raise errors of several libraries
        raise EdgesdError(f"{graph} can't be read: {exc}") from exc
    types = {
        info.name: ir.DataType(info.type.tensor_type.elem_type)
        for info in (*proto.graph.value_info, *proto.graph.input, *proto.graph.output)
    }
    view = _Graph(model, types)
    findings = [Finding("shapes", name, words) for name, words in _open_shapes(view)]
    for node in model.graph:
        name = node.name or f"{node.op_type} of {node.outputs[0].name}"
        for rule, check in RULES.items():
            findings += [Finding(rule, name, words) for words in check(view, node)]
    return findings


def check_graph(graph: Path, component: str) -> None:
    """Raise EdgesdError, which names the nodes, for a graph that TensorRT would refuse."""
    findings = lint(graph)
    if findings:
        more = f" (and {len(findings) - 3} more)" if len(findings) > 3 else ""
        listed = "; ".join(map(str, findings[:3]))
        raise EdgesdError(f"{component}: TensorRT would refuse the graph: {listed}{more}")


def _open_shapes(view: _Graph) -> Iterator[tuple[str, str]]:
    for value in view.model.graph.inputs:
        fixed = value.shape is not None and all(isinstance(dim, int) for dim in value.shape)
        if not fixed:
            yield value.name or "", "has no fixed shape: fix the size"


def _standard(view: _Graph, node: ir.Node) -> Iterator[str]:
    if node.domain not in ("", "ai.onnx"):
        yield f"{node.op_type} of {node.domain} isn't a standard operator"


def _attention(view: _Graph, node: ir.Node) -> Iterator[str]:
    if node.domain == "" and node.op_type == "Attention":
        yield (
            "Attention is of opset 23, which TensorRT 10.3 doesn't parse and TensorRT-RTX 1.7 "
            "crashes on: write it out as MatMul, Softmax, MatMul"
        )


def _newer(view: _Graph, node: ir.Node) -> Iterator[str]:
    """Operators that TensorRT 10.3 doesn't parse, and TensorRT-RTX 1.7 does: norms and rotary
    embeddings, as ONNX Runtime and opset 23 have them."""
    if node.domain not in ("", "ai.onnx") or node.op_type == "Attention":
        return
    since = _first_opsets().get(node.op_type)
    if since is None or since > _OPSET:
        what = "isn't an operator of ONNX" if since is None else f"is of opset {since}"
        yield f"{node.op_type} {what}, which TensorRT 10.3 doesn't parse: write it out"


@cache
def _first_opsets() -> dict[str, int]:
    """Operator of ONNX -> the opset that it came with."""
    found: dict[str, int] = {}
    for schema in onnx.defs.get_all_schemas_with_history():
        if schema.domain == "":
            found[schema.name] = min(schema.since_version, found.get(schema.name, 1 << 30))
    return found


def _integer(view: _Graph, node: ir.Node) -> Iterator[str]:
    if node.domain == "" and node.op_type in _INTEGER_OPS:
        yield f"{node.op_type} isn't supported: use QuantizeLinear and DequantizeLinear"


def _codes(view: _Graph, node: ir.Node) -> Iterator[str]:
    """Types of codes: signed int8, and int4 for weights."""
    if node.op_type not in _QDQ:
        return
    index = 0 if node.op_type == "DequantizeLinear" else 2
    value = node.inputs[index] if len(node.inputs) > index else None
    dtype = view.type_of(value)
    if index == 2 and value is None:
        chosen = (
            node.attributes["output_dtype"].as_int() if "output_dtype" in node.attributes else 0
        )
        dtype = ir.DataType(chosen) if chosen else ir.DataType.UINT8
    if dtype in (ir.DataType.UINT8, ir.DataType.UINT4):
        yield f"codes are {dtype.name}: expected INT8, or INT4 for weights"
    elif dtype in _FP8:
        yield f"codes are {dtype.name}, which neither sm_86 nor sm_87 computes with: expected INT8"
    elif dtype in _FOUR and (index == 2 or value is None or value.const_value is None):
        yield "INT4 is for weights: activations take INT8"


def _zero_point(view: _Graph, node: ir.Node) -> Iterator[str]:
    zero = node.inputs[2] if node.op_type in _QDQ and len(node.inputs) > 2 else None
    if zero is None:
        return
    if zero.const_value is None:
        yield "the zero point isn't a constant: expected 0"
    elif np.asarray(zero.const_value.numpy()).astype(np.int32).any():
        yield "the zero point isn't 0: quantize symmetrically"


def _scale(view: _Graph, node: ir.Node) -> Iterator[str]:
    scale = node.inputs[1] if node.op_type in _QDQ else None
    if scale is None or scale.const_value is None:
        return
    values = np.asarray(scale.const_value.numpy(), np.float32)
    if not (np.isfinite(values) & (values > 0)).all():
        yield "scales must be positive and finite"


def _blocks(view: _Graph, node: ir.Node) -> Iterator[str]:
    block = node.attributes.get("block_size")
    if node.op_type not in _QDQ or block is None or not block.as_int():
        return
    scale = node.inputs[1]
    rank = len(scale.const_value.shape) if scale is not None and scale.const_value else 2
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 1
    if axis % rank < rank - 2:
        yield (
            f"blocks lie along axis {axis} of {rank}: they must be along the last or second to "
            "last, so a convolution has none"
        )


def _constant_codes(view: _Graph, node: ir.Node) -> Iterator[str]:
    """Codes that are constants are dequantized first."""
    for index, value in enumerate(node.inputs):
        if value is None or value.const_value is None or value.const_value.dtype not in _CODES:
            continue
        if node.op_type in _QDQ and index in (0, 2):
            continue
        yield f"reads the quantized constant {value.name}: only DequantizeLinear may"


def _types(view: _Graph, node: ir.Node) -> Iterator[str]:
    """Strongly typed: both sides of an operator have one type. A scale's is the activations'."""
    if node.domain != "" or node.op_type not in _SAME_TYPES:
        return
    known = [view.type_of(value) for value in node.inputs if value is not None]
    floats = list(dict.fromkeys(dtype for dtype in known if dtype in _FLOATS))
    if len(floats) > 1:
        names = " and ".join(dtype.name for dtype in floats if dtype)
        yield f"{node.op_type} of {names}: all must be of one type, scales of quantization too"


def _finite(view: _Graph, node: ir.Node) -> Iterator[str]:
    """TensorRT accepts NaN without a warning."""
    for value in node.inputs:
        tensor = None if value is None else value.const_value
        if tensor is None or tensor.dtype not in _FLOATS:
            continue
        if not np.isfinite(np.asarray(tensor.numpy(), np.float32)).all():
            yield f"the constant {value.name if value else ''} holds NaN or infinite values"


RULES: dict[str, Rule] = {
    "standard": _standard,
    "attention": _attention,
    "newer": _newer,
    "integer": _integer,
    "codes": _codes,
    "zero-point": _zero_point,
    "scale": _scale,
    "blocks": _blocks,
    "constant-codes": _constant_codes,
    "types": _types,
    "finite": _finite,
}
"""Name -> what it checks of a node. "shapes", of the graph's inputs, is apart."""
