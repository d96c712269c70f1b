"""Drops types and shapes of inner values, and the repeated ones of weights: loaders infer them."""

from __future__ import annotations

import onnx_ir as ir

from edgesd.export.passes import Pass


class NoShapes(Pass):
    """Leaves the types and shapes of inputs and outputs alone. The last pass of all: beside small
    4-bit weights, the others are a hundredth of a bundle."""

    def call(self, model: ir.Model) -> bool:
        graph = model.graph
        outer = {id(value) for value in (*graph.inputs, *graph.outputs)}
        inner = [value for node in graph for value in node.outputs]
        changed = False
        for value in (*inner, *graph.initializers.values()):
            if id(value) not in outer and (value.shape is not None or value.type is not None):
                value.shape, value.type, changed = None, None, True
        return changed
