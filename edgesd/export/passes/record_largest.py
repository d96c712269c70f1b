"""Adds an output with the largest magnitude of every fp16 value of a graph, run by run."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgesd.export.passes import Pass
from edgesd.export.passes.fp32_region import FP16, FP32, Types
from edgesd.export.passes.lowering import shared_constant
from edgesd.export.passes.values import producer_of

LARGEST = "largest_magnitudes"
"""Name of the output, fp32 [len(names)]."""


class RecordLargest(Pass):
    """names: those of the values, in the order of the output; filled when the pass ran.

    Each value is measured right after the node that makes it: in that order (and not in ONNX
    Runtime's default one) no value has to be kept for it.
    """

    def __init__(self) -> None:
        self.names: list[str] = []

    def call(self, model: ir.Model) -> bool:
        """Add the output, unless the graph has no fp16 values."""
        graph = model.graph
        types = Types(graph)
        values = [out for node in graph for out in node.outputs if types[out] == FP16]
        self.names = [value.name or "" for value in values]
        if not values:
            return False
        one = shared_constant(model, "const:shape1", np.array([1], np.int64))
        parts = []
        for value in values:
            size = ir.node("Abs", [value])
            most = ir.node("ReduceMax", [size.outputs[0]], {"keepdims": 0})
            wide = ir.node("Cast", [most.outputs[0]], {"to": FP32})
            part = ir.node("Reshape", [wide.outputs[0], one])
            graph.insert_after(producer_of(value), [size, most, wide, part])
            parts.append(part.outputs[0])
        joined = ir.node("Concat", parts, {"axis": 0})
        graph.append(joined)
        out = joined.outputs[0]
        out.name = LARGEST
        out.type, out.shape = ir.TensorType(FP32), ir.Shape([len(parts)])
        graph.outputs.append(out)
        return True
