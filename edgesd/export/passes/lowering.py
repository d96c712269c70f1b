"""Shared code of the lowerings: finding and replacing nodes.

Of quantized layers it is a pass over the layers to be replaced, and a `LayerLowering` that writes
one of them; of operators that compilers don't have, a pass over them, and a `StandardWriter`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes import common

from edgesd.errors import EdgesdError
from edgesd.export.passes import Pass
from edgesd.export.passes.values import producer_of
from edgesd.export.quantize.layers import Codes, QuantizedLayer, weight_of
from edgesd.runtime.arrays import Array, Float

_SCORE_BIAS = 5
"""The input of a MultiHeadAttention that is added to its scores."""


def score_bias(attention: ir.Node) -> ir.Value | None:
    """What a MultiHeadAttention adds to its scores [1, heads, n, m], if anything."""
    inputs = attention.inputs
    return inputs[_SCORE_BIAS] if len(inputs) > _SCORE_BIAS else None


class Timesteps(NamedTuple):
    """A graph's input of timesteps, and those that static ranges were recorded at [T]."""

    input: str
    recorded: Float


Made = dict[tuple[str, bytes], ir.Value]
"""Values that several layers read: what each was made of, by name, and how -> the value."""


class QuantizedPass(Pass):
    """Replaces the nodes of `layers` (by node name)."""

    def __init__(self, layers: Mapping[str, QuantizedLayer]) -> None:
        self.layers = layers
        self._weights: set[str] = set()
        self.made: Made = {}

    def requires(self, model: ir.Model) -> None:
        """Every layer's node is there, with a weight of the layer's shape."""
        self._weights = set()
        nodes = {node.name: node for node in model.graph}
        for name, quantized in self.layers.items():
            weight = weight_of(nodes[name]) if name in nodes else None
            if weight is None or weight.const_value is None:
                raise EdgesdError(f"{model.graph.name}: there is no layer {name} to quantize")
            if weight.const_value.size != quantized.stored.size:
                raise EdgesdError(f"{model.graph.name}: {name} has another shape than its codes")
            self.check_layer(f"{model.graph.name}: {name}", quantized, weight.const_value)
            self._weights.add(weight.name or "")

    def check_layer(self, name: str, quantized: QuantizedLayer, weight: ir.TensorProtocol) -> None:
        """Raise EdgesdError, which begins with `name`, for a layer that can't be written."""

    def call(self, model: ir.Model) -> bool:
        self.made.clear()
        for number, node in enumerate(list(model.graph)):
            quantized = self.layers.get(node.name or "")
            if quantized is not None:
                # Values get short names: paths would be a good part of a small bundle.
                self.lowering(model, node, quantized, f"q{number}").replace()
        common.RemoveUnusedNodesPass()(model)
        return bool(self.layers)

    @abstractmethod
    def lowering(
        self, model: ir.Model, node: ir.Node, quantized: QuantizedLayer, prefix: str
    ) -> LayerLowering:
        """What writes the layer that `node` was, under names that begin with `prefix`."""

    def ensures(self, model: ir.Model) -> None:
        """No float weight of a quantized layer is left, and all new values are finite."""
        left = set(model.graph.initializers) & self._weights
        if left:
            raise EdgesdError(f"{model.graph.name}: {sorted(left)[0]} is still there in fp32")
        for name, value in model.graph.initializers.items():
            tensor = value.const_value
            if ":" not in name or tensor is None or not tensor.dtype.is_floating_point():
                continue
            if not np.isfinite(np.asarray(tensor.numpy(), np.float32)).all():
                raise EdgesdError(f"initializer {name} holds NaN or infinite values")


class LayerLowering:
    """Writes one layer's nodes in the place of the one it was. made: what layers before it made,
    and what this one adds."""

    def __init__(
        self, model: ir.Model, node: ir.Node, quantized: QuantizedLayer, prefix: str, made: Made
    ) -> None:
        self.model, self.node, self.q, self.prefix = model, node, quantized, prefix
        self.made = made
        self.nodes: list[ir.Node] = []

    def replace(self) -> None:
        """Write the nodes, and let everything that read the old one's output read the new one's."""
        out = self.output()
        producer_of(out).name = f"{self.node.name}/{self.q.scheme}"
        replace_node(self.model.graph, self.node, self.nodes, out)

    @abstractmethod
    def output(self) -> ir.Value:
        """Write the nodes; the layer's output."""

    def ops(
        self,
        op: str,
        inputs: list[ir.Value | None],
        attributes: Mapping[str, Any],
        domain: str = "",
        outputs: int = 1,
    ) -> list[ir.Value]:
        """The outputs of a new node."""
        node = ir.node(op, inputs, attributes, domain=domain, num_outputs=outputs)
        node.name = f"{self.prefix}.{len(self.nodes)}"
        for index, out in enumerate(node.outputs):
            out.name = node.name if outputs == 1 else f"{node.name}.{index}"
        self.nodes.append(node)
        return list(node.outputs)

    def op(
        self, op: str, inputs: list[ir.Value | None], domain: str = "", **attributes: Any
    ) -> ir.Value:
        """The output of a new node that has one."""
        return self.ops(op, inputs, attributes, domain)[0]

    def const(self, name: str, array: Array, dtype: Any = None) -> ir.Value:
        """An initializer of this layer."""
        name = f"{self.prefix}:{name}"
        return shared_constant(self.model, name, np.ascontiguousarray(array), dtype)

    def codes(
        self, name: str, shape: tuple[int, ...], dtype: ir.DataType, make: Callable[[], Array]
    ) -> ir.Value:
        """An initializer of this layer that takes no memory: made whenever it is read, of codes
        that are mapped where they are kept."""
        name = f"{self.prefix}:{name}"

        def made() -> ir.TensorProtocol:
            return ir.tensor(np.ascontiguousarray(make()), dtype=dtype, name=name)

        tensor = ir.LazyTensor(made, dtype=dtype, shape=ir.Shape(shape), name=name)
        return _initializer(self.model, tensor)

    def smoothed(self, x: ir.Value, dtype: npt.DTypeLike = np.float32) -> ir.Value:
        """The input divided by the smoothing, if there is one; once for all layers that read it and
        share their smoothing."""
        if self.q.smooth is None:
            return x
        factor = self.per_channel((1 / self.q.smooth).astype(dtype))
        key = x.name or "", factor.tobytes()
        if key not in self.made:
            self.made[key] = self.op("Mul", [x, self.const("smooth", factor)])
        return self.made[key]

    def matrix(
        self,
        form: Callable[[Codes], Array] = lambda codes: codes,
        dtype: ir.DataType = ir.DataType.INT8,
    ) -> ir.Value:
        """The same of the layer's codes [N, K], as `form` turns or shapes them."""
        shape = form(np.broadcast_to(np.int8(0), self.q.stored.shape)).shape
        return self.codes("codes", shape, dtype, lambda: form(self.q.codes))

    def per_channel(self, values: Array) -> Array:
        """[C] -> the shape in which they meet the layer's input: [C], or [1, C, 1, 1] of a conv."""
        return values.reshape(1, -1, 1, 1) if self.q.layer.kind == "conv" else values

    def kernel(self, matrix: Array) -> Array:
        """The matrix [N, kh * kw * C] of a conv as its kernel [N, C, kh, kw]."""
        shape = (len(matrix), *self.q.layer.kernel, self.q.layer.channels)
        kernel: Array = matrix.reshape(shape).transpose(0, 3, 1, 2)
        return kernel


class StandardWriter:
    """Writes standard operators in the place of a node. prefix: of the names of what they make."""

    def __init__(self, model: ir.Model, node: ir.Node, prefix: str) -> None:
        self.model, self.node, self.prefix = model, node, prefix
        self.nodes: list[ir.Node] = []

    def replace(self, out: ir.Value) -> None:
        """Put what was written in the place of the node, whose output is `out`."""
        replace_node(self.model.graph, self.node, self.nodes, out)

    def op(self, op: str, inputs: list[ir.Value], **attributes: object) -> ir.Value:
        """The output of a new node."""
        node = ir.node(op, inputs, attributes, num_outputs=1)  # type: ignore[arg-type]
        node.name = f"{self.node.name}/{op}{len(self.nodes)}"
        node.outputs[0].name = f"{self.prefix}.{len(self.nodes)}"
        self.nodes.append(node)
        return node.outputs[0]

    def const(self, name: str, array: Array) -> ir.Value:
        """An initializer of the graph, which all writers share."""
        return shared_constant(self.model, name, array)


def replace_node(graph: ir.Graph, node: ir.Node, nodes: Sequence[ir.Node], out: ir.Value) -> None:
    """Put `nodes` in the place of `node`, whose one output is read from `out` then."""
    old = node.outputs[0]
    out.shape, out.type = old.shape, old.type
    graph.insert_before(node, nodes)
    ir.convenience.replace_all_uses_with(old, out, replace_graph_outputs=True)
    name = old.name
    graph.remove(node, safe=True)
    if out in graph.outputs:
        out.name = name


def shared_constant(model: ir.Model, name: str, array: Array, dtype: Any = None) -> ir.Value:
    """An initializer called `name`; the one that is there if it was made before."""
    if name in model.graph.initializers:
        return model.graph.initializers[name]
    return _initializer(model, ir.tensor(array, dtype=dtype, name=name))


def _initializer(model: ir.Model, tensor: ir.TensorProtocol) -> ir.Value:
    value = ir.Value(
        name=tensor.name,
        shape=ir.Shape(tensor.shape.numpy()),
        type=ir.TensorType(tensor.dtype),
        const_value=tensor,
    )
    model.graph.register_initializer(value)
    return value


def check_opset_21(model: ir.Model) -> None:
    """Raise EdgesdError where raising the opset from 20 to 21 changes a meaning, not only types."""
    if any(node.op_type == "GroupNormalization" for node in model.graph):
        raise EdgesdError("GroupNormalization has another meaning since opset 21")
