"""Splits linears that read several values side by side into a linear for each of them.

FLUX's single blocks end in one: of what attention gives and of what follows GELU. Their ranges and
outliers have nothing in common, so that parts are quantized better each on its own, and the values
side by side need not be written.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from edgesd.errors import EdgesdError
from edgesd.export.passes import Pass
from edgesd.export.passes.lowering import replace_node
from edgesd.export.passes.values import input_of, producer_of, tensor_of
from edgesd.export.quantize.layers import PART, weight_of


class SplitConcat(Pass):
    """W [a, b] becomes W1 a + W2 b: a MatMul by a weight, of values that are joined along their
    last axis. Parts are named after the layer, with a number behind. wanted: by a layer's name,
    whether it is split.
    """

    def __init__(self, wanted: Callable[[str], bool] = lambda name: True) -> None:
        self.wanted = wanted

    def call(self, model: ir.Model) -> bool:
        changed = False
        for node in list(model.graph):
            sizes = self._sizes(node)
            if sizes:
                _split(model, node, sizes)
                changed = True
        return changed

    def ensures(self, model: ir.Model) -> None:
        """No such layer is left whole."""
        for node in model.graph:
            if self._sizes(node):
                raise EdgesdError(f"{model.graph.name}: {node.name} isn't split")

    def _sizes(self, node: ir.Node) -> list[int]:
        """Columns of each part; none where the node isn't to be split."""
        weight = weight_of(node) if node.op_type == "MatMul" else None
        name, _, _ = (node.name or "").rpartition("/")
        if weight is None or weight.const_value is None or len(weight.uses()) != 1 or not name:
            return []
        x = node.inputs[0]
        joined = None if x is None else x.producer()
        if joined is None or joined.op_type != "Concat" or not self.wanted(name):
            return []
        shapes = [None if value is None else value.shape for value in joined.inputs]
        if len(shapes) < 2 or any(shape is None for shape in shapes):
            return []
        known = [shape for shape in shapes if shape is not None]
        if joined.attributes["axis"].as_int() not in (-1, len(known[0]) - 1):
            return []
        sizes = [shape[-1] for shape in known]
        whole = [size for size in sizes if isinstance(size, int)]
        return whole if sum(whole) == weight.const_value.shape[0] and whole == sizes else []


def _split(model: ir.Model, node: ir.Node, sizes: list[int]) -> None:
    name, _, kind = (node.name or "").rpartition("/")
    weight, joined, out = weight_of(node), producer_of(input_of(node, 0)), node.outputs[0]
    assert weight is not None
    nodes: list[ir.Node] = []

    def op(op_type: str, inputs: list[ir.Value | None], node_name: str) -> ir.Value:
        made = ir.node(op_type, inputs, name=node_name)
        nodes.append(made)
        value = made.outputs[0]
        value.name, value.type, value.shape = node_name, out.type, out.shape
        return value

    ends = np.cumsum(sizes).tolist()
    products: list[ir.Value] = []
    for index, (size, end) in enumerate(zip(sizes, ends, strict=True)):
        part = _part_of(model, weight, index, end - size, end)
        products.append(op("MatMul", [joined.inputs[index], part], f"{name}.{index}/{kind}"))
        nodes[-1].meta[PART] = (end - size, end)
    total = products[0]
    for index, product in enumerate(products[1:], 1):
        total = op("Add", [total, product], f"{name}/Sum.{index}")
    replace_node(model.graph, node, nodes, total)
    if not joined.outputs[0].uses() and not joined.outputs[0].is_graph_output():
        model.graph.remove(joined, safe=True)
    del model.graph.initializers[weight.name or ""]


def _part_of(model: ir.Model, weight: ir.Value, index: int, start: int, stop: int) -> ir.Value:
    """Rows of a weight [K, N], read from it whenever they are asked for."""
    whole, name = tensor_of(weight), f"{weight.name}.{index}"
    shape = ir.Shape([stop - start, whole.shape.numpy()[1]])

    def rows() -> ir.TensorProtocol:
        return ir.tensor(np.ascontiguousarray(whole.numpy()[start:stop]), name=name)

    value = ir.Value(
        name=name,
        shape=shape,
        type=ir.TensorType(whole.dtype),
        const_value=ir.LazyTensor(rows, whole.dtype, shape, name=name),
    )
    model.graph.register_initializer(value)
    return value
