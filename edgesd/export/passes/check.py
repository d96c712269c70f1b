"""What every exported graph must satisfy before it is written."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx_ir as ir

from edgesd.errors import EdgesdError
from edgesd.export.attention import Lowering
from edgesd.export.passes import Pass

OPSET = 20
"""The oldest with Gelu; the newest that TensorRT 10.3 (JetPack 6) parses."""

MAX_IR_VERSION = 10
"""The newest that ONNX Runtime 1.20 loads."""


class CheckGraph(Pass):
    """Changes nothing; raises EdgesdError when the graph isn't one that boards can load and run.

    With lowering "ort-mha" there is one MultiHeadAttention for each of `attentions` modules, and
    no Softmax is left. All weights are named and finite.
    """

    def __init__(self, attentions: int, lowering: Lowering) -> None:
        self.attentions, self.lowering = attentions, lowering

    def call(self, model: ir.Model) -> bool:
        return False

    def ensures(self, model: ir.Model) -> None:
        if model.ir_version > MAX_IR_VERSION or model.graph.opset_imports.get("") != OPSET:
            raise EdgesdError(
                f"the graph has IR version {model.ir_version} and {dict(model.graph.opset_imports)}"
                f": expected at most {MAX_IR_VERSION}, and opset {OPSET}"
            )
        if model.functions:
            raise EdgesdError(f"the graph calls functions: {[str(f) for f in model.functions]}")
        counts = Counter(node.op_type for node in model.graph)
        fused = self.attentions if self.lowering == "ort-mha" else 0
        if counts["MultiHeadAttention"] != fused or (fused and counts["Softmax"]):
            raise EdgesdError(
                f"the graph has {counts['MultiHeadAttention']} MultiHeadAttention and "
                f"{counts['Softmax']} Softmax nodes: expected {fused} and none"
            )
        for name, value in model.graph.initializers.items():
            tensor = value.const_value
            if not name or tensor is None:
                raise EdgesdError(f"initializer {name!r} has no name or no value")
            if tensor.dtype.is_floating_point() and not np.isfinite(tensor.numpy()).all():
                raise EdgesdError(f"initializer {name} holds NaN or infinite values")
