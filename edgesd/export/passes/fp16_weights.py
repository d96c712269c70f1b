"""Stores weights in 16 bits and computes in 32: half the file, the speed of fp32 on a CPU.

CPU backends have few fp16 kernels; ONNX Runtime turns the weights back into fp32 when it loads
the graph (constant folding of Cast).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

import numpy as np
import onnx_ir as ir

from edgesd.export.passes import Pass
from edgesd.export.passes.lowering import replace_node

MIN_ELEMENTS = 1024
"""Smaller tensors stay in fp32: they save nothing."""

MAX_FP16 = float(np.finfo(np.float16).max)


class Fp16Weights(Pass):
    """Every fp32 weight of two or more dimensions becomes an fp16 one with a Cast after it; of a
    table of embeddings, with a Cast after the rows that are read, as no other is wanted.

    Norms and biases stay in fp32, as does a tensor with a value above 65504, the largest fp16.
    `kept` names those after the call. only: names of the weights to take; None for all. Inputs,
    outputs and arithmetic stay in fp32.
    """

    def __init__(self, only: Collection[str] | None = None) -> None:
        self.only = only
        self.kept: tuple[str, ...] = ()

    def call(self, model: ir.Model) -> bool:
        kept, casts, stored = [], [], False
        for name, value in list(model.graph.initializers.items()):
            tensor = value.const_value
            if tensor is None or tensor.dtype != ir.DataType.FLOAT:
                continue
            if self.only is not None and name not in self.only:
                continue
            if len(tensor.shape) < 2 or tensor.size < MIN_ELEMENTS:
                continue
            array = tensor.numpy()  # read once: it may be mapped, and made fp32
            if max(abs(float(array.max())), abs(float(array.min()))) > MAX_FP16:
                kept.append(name)
                continue
            stored = True
            value.dtype = ir.DataType.FLOAT16
            value.const_value = half_tensor(tensor, name)
            readers = list(value.uses())
            rows = [node for node, at in readers if at == 0 and _reads_rows(node)]
            for node in rows:
                _cast_rows(model.graph, node)
            if others := [(node, at) for node, at in readers if node not in rows]:
                casts.append(_cast(value, others))
        first = next(iter(model.graph), None)
        if first is not None:
            model.graph.insert_before(first, casts)
        self.kept = tuple(kept)
        return stored


def _cast(value: ir.Value, readers: Iterable[tuple[ir.Node, int]]) -> ir.Node:
    """The Cast that gives readers of an fp16 initializer what they read in fp32."""
    name = value.name or ""
    cast = ir.node(
        "Cast", [value], {"to": ir.DataType.FLOAT}, num_outputs=1, name=f"{name}/to_fp32"
    )
    out = cast.outputs[0]
    out.name, out.shape, out.type = f"{name}/fp32", value.shape, ir.TensorType(ir.DataType.FLOAT)
    for node, index in readers:
        node.replace_input_with(index, out)
    return cast


def _reads_rows(node: ir.Node) -> bool:
    axis = node.attributes.get("axis")
    return node.op_type == "Gather" and (axis is None or axis.as_int() == 0)


def _cast_rows(graph: ir.Graph, gather: ir.Node) -> None:
    """Let a Gather read rows in fp16, and its readers have them in fp32."""
    rows = ir.node("Gather", gather.inputs, {"axis": 0}, num_outputs=1, name=gather.name)
    out = rows.outputs[0]
    out.name, out.shape = f"{gather.name}/fp16", gather.outputs[0].shape
    out.type = ir.TensorType(ir.DataType.FLOAT16)
    cast = ir.node("Cast", [out], {"to": ir.DataType.FLOAT}, name=f"{gather.name}/to_fp32")
    cast.outputs[0].name = f"{gather.name}/fp32"
    replace_node(graph, gather, [rows, cast], cast.outputs[0])


def half_tensor(
    tensor: ir.TensorProtocol, name: str, dtype: ir.DataType = ir.DataType.FLOAT16
) -> ir.LazyTensor:
    """`tensor` in fp16, or another 16-bit `dtype`, made when it is read."""

    def converted() -> ir.TensorProtocol:
        return ir.tensor(tensor.numpy().astype(dtype.numpy()), name=name)

    shape = ir.Shape(tensor.shape.numpy())
    return ir.LazyTensor(converted, dtype=dtype, shape=shape, name=name)
