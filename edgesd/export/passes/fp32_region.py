"""Keeps nodes in fp32 within a graph that computes in fp16, where values exceed what fp16 holds."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import onnx_ir as ir

from edgesd.errors import EdgesdError
from edgesd.export.passes import Pass
from edgesd.export.passes.lowering import replace_node
from edgesd.export.passes.values import tensor_of

FP16, FP32 = ir.DataType.FLOAT16, ir.DataType.FLOAT


class Types:
    """Types of a graph's values; those that were not written down follow from their nodes."""

    def __init__(self, graph: ir.Graph) -> None:
        self._found: dict[ir.Value, ir.DataType | None] = {}
        for node in graph:
            for out in node.outputs:
                self._found[out] = out.dtype or self._infer(node)

    def __getitem__(self, value: ir.Value) -> ir.DataType | None:
        return self._found.get(value, value.dtype)

    def _infer(self, node: ir.Node) -> ir.DataType | None:
        if node.op_type == "Cast":
            return ir.DataType(node.attributes["to"].as_int())
        if node.op_type == "QuantizeLinear":
            return None  # codes
        value = node.inputs[1 if node.op_type == "DequantizeLinear" else 0]
        return None if value is None else self[value]


class Fp32Region(Pass):
    """Every fp16 value in `values` (by name) becomes fp32: what makes it and what reads it computes
    in fp32, with Casts where the region ends.

    A DequantizeLinear in front of the region joins it, and the QuantizeLinear in front of that:
    their scales become fp32, and the quantized layer stays one. Raises EdgesdError for a value that
    isn't there.
    """

    def __init__(self, values: Collection[str]) -> None:
        self.values = frozenset(values)

    def requires(self, model: ir.Model) -> None:
        """The values are there."""
        there = {out.name for node in model.graph for out in node.outputs}
        if missing := sorted(self.values - there):
            raise EdgesdError(f"{model.graph.name}: there is no value {missing[0]}")

    def call(self, model: ir.Model) -> bool:
        graph = model.graph
        types = Types(graph)
        region = self._region(graph)
        fp16_values = {value for node in region for value in node.outputs if types[value] == FP16}
        for value in {v: None for node in region for v in node.inputs if v is not None}:
            if value in fp16_values or types[value] != FP16:
                continue
            users = [(user, at) for user, at in value.uses() if user in region]
            if value.const_value is not None:
                self._constant(graph, value, users)
            else:
                self._cast(graph, value, users, FP32)
        for value in fp16_values:
            value.type = ir.TensorType(FP32)
            users = [(user, at) for user, at in value.uses() if user not in region]
            self._cast(graph, value, users, FP16)
        for node in region:
            if node.op_type == "Cast" and ir.DataType(node.attributes["to"].as_int()) in _FLOATS:
                same = ir.node("Identity", [node.inputs[0]], name=node.name)
                replace_node(graph, node, [same], same.outputs[0])
        return bool(region)

    def _region(self, graph: ir.Graph) -> dict[ir.Node, None]:
        found: dict[ir.Node, None] = {}
        for node in graph:
            for out in node.outputs:
                if out.name in self.values:
                    found[node] = None
                    found.update(dict.fromkeys(user for user, _ in out.uses()))
        for kind in ("DequantizeLinear", "QuantizeLinear"):
            for node in list(found):
                before = (value.producer() for value in node.inputs if value is not None)
                found.update({n: None for n in before if n is not None and n.op_type == kind})
        return found

    def _constant(
        self, graph: ir.Graph, value: ir.Value, users: Iterable[tuple[ir.Node, int]]
    ) -> None:
        name = f"{value.name}/fp32"
        half = tensor_of(value)

        def widened() -> ir.TensorProtocol:
            return ir.tensor(half.numpy().astype("float32"), name=name)

        shape = ir.Shape(half.shape.numpy())
        tensor = ir.LazyTensor(widened, dtype=FP32, shape=shape, name=name)
        exact = ir.Value(name=name, shape=value.shape, type=ir.TensorType(FP32), const_value=tensor)
        graph.initializers.add(exact)
        for user, at in users:
            user.replace_input_with(at, exact)
        if not value.uses():
            del graph.initializers[value.name or ""]

    def _cast(
        self,
        graph: ir.Graph,
        value: ir.Value,
        users: Collection[tuple[ir.Node, int]],
        to: ir.DataType,
    ) -> None:
        if not users:
            return
        cast = ir.node("Cast", [value], {"to": to})
        cast.name = f"{value.name}/{'to_fp32' if to == FP32 else 'to_fp16'}/region"
        out = cast.outputs[0]
        out.name, out.shape, out.type = cast.name, value.shape, ir.TensorType(to)
        for user, at in users:
            user.replace_input_with(at, out)
        producer = value.producer()
        if producer is not None:
            graph.insert_after(producer, cast)
        else:
            graph.insert_before(graph[0], cast)


_FLOATS = (FP16, FP32)
