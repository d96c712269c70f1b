"""Values that onnx-ir's types make optional and that all our graphs have: absence is an error.

Each function raises EdgesdError, naming the value or node, where the graph has no such thing.
"""

from __future__ import annotations

from typing import TypeVar

import onnx_ir as ir

from edgesd.errors import EdgesdError
from edgesd.runtime.arrays import Array

_T = TypeVar("_T")


def input_of(node: ir.Node, index: int) -> ir.Value:
    """The node's input at `index`."""
    return _there(node.inputs[index], node, f"input {index}")


def producer_of(value: ir.Value) -> ir.Node:
    """The node that computes `value`."""
    return _there(value.producer(), value, "producer")


def graph_of(node: ir.Node) -> ir.Graph | ir.Function:
    """The graph that `node` is in."""
    return _there(node.graph, node, "graph")


def shape_of(value: ir.Value) -> ir.Shape:
    """The shape of `value`, whose sizes may be symbolic."""
    return _there(value.shape, value, "shape")


def dtype_of(value: ir.Value) -> ir.DataType:
    """The type of the elements of `value`."""
    return _there(value.dtype, value, "element type")


def tensor_of(value: ir.Value) -> ir.TensorProtocol:
    """The constant that `value` is."""
    return _there(value.const_value, value, "constant")


def array_of(value: ir.Value) -> Array:
    """The constant that `value` is, as an array."""
    return tensor_of(value).numpy()


def _there(found: _T | None, owner: ir.Value | ir.Node, what: str) -> _T:
    if found is None:
        raise EdgesdError(f"{owner.name} in the graph has no {what}")
    return found
