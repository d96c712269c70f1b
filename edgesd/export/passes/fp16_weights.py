"""Stores weights in 16 bits and computes in 32: half the file, the speed of fp32 on a CPU.

CPU backends have few fp16 kernels; ONNX Runtime turns the weights back into fp32 when it loads
the graph (constant folding of Cast).
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx_ir as ir

from edgesd.export.passes import Pass

MIN_ELEMENTS = 1024
"""Smaller tensors stay in fp32: they save nothing."""

MAX_FP16 = float(np.finfo(np.float16).max)


class Fp16Weights(Pass):
    """Every fp32 weight of two or more dimensions becomes an fp16 one with a Cast after it.

    Norms and biases stay in fp32, as does a tensor with a value above 65504, the largest fp16.
    `kept` names those after the call. only: names of the weights to take; None for all. Inputs,
    outputs and arithmetic stay in fp32.
    """

    def __init__(self, only: Collection[str] | None = None) -> None:
        self.only = only
        self.kept: tuple[str, ...] = ()

    def call(self, model: ir.Model) -> bool:
        kept, casts = [], []
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
            casts.append(_store_fp16(value, tensor))
        first = next(iter(model.graph), None)
        if first is not None:
            model.graph.insert_before(first, casts)
        self.kept = tuple(kept)
        return bool(casts)


def _store_fp16(value: ir.Value, tensor: ir.TensorProtocol) -> ir.Node:
    """Make `value` an fp16 initializer; returns the Cast that gives its fp32 users theirs."""
    name = value.name or ""
    cast = ir.node(
        "Cast", [value], {"to": ir.DataType.FLOAT}, num_outputs=1, name=f"{name}/to_fp32"
    )
    out = cast.outputs[0]
    out.name, out.shape, out.type = f"{name}/fp32", value.shape, ir.TensorType(ir.DataType.FLOAT)
    for node, index in list(value.uses()):
        if node is not cast:
            node.replace_input_with(index, out)
    value.dtype = ir.DataType.FLOAT16
    value.const_value = half_tensor(tensor, name)
    return cast


def half_tensor(
    tensor: ir.TensorProtocol, name: str, dtype: ir.DataType = ir.DataType.FLOAT16
) -> ir.LazyTensor:
    """`tensor` in fp16, or another 16-bit `dtype`, made when it is read."""

    def converted() -> ir.TensorProtocol:
        return ir.tensor(tensor.numpy().astype(dtype.numpy()), name=name)

    shape = ir.Shape(tensor.shape.numpy())
    return ir.LazyTensor(converted, dtype=dtype, shape=shape, name=name)
