"""Writes fused attention out in standard operators, for compilers that fuse it themselves."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgesd.errors import EdgesdError
from edgesd.export.passes import Pass
from edgesd.export.passes.lowering import StandardWriter, score_bias
from edgesd.export.passes.values import dtype_of, input_of, shape_of

MASKED = -1e4
"""Added to a masked score: exact in fp16, and its exponential is 0 in fp32."""

_DOMAIN, _OP = "com.microsoft", "MultiHeadAttention"


class StandardAttention(Pass):
    """Every MultiHeadAttention becomes softmax(scale query key^T + bias) value in standard
    operators.

    query, key, value [batch, n, heads * d] are split into heads by Reshape and Transpose. The query
    is scaled before the product, so that scores of fp16 don't overflow. Where attention is causal,
    the number of tokens must be fixed: the mask is a constant.
    """

    def requires(self, model: ir.Model) -> None:
        """Widths of all inputs are known, and numbers of tokens where attention is causal."""
        for node in _attentions(model):
            for value in node.inputs[:3]:
                if value is None or value.shape is None or not isinstance(value.shape[-1], int):
                    raise EdgesdError(f"{node.name}: the width of its inputs isn't known")
            value = node.inputs[2]
            if _causal(node) and not (value and value.shape and isinstance(value.shape[1], int)):
                raise EdgesdError(f"{node.name} is causal over an unknown number of tokens")

    def call(self, model: ir.Model) -> bool:
        found = _attentions(model)
        for number, node in enumerate(found):
            writer = _Writer(model, node, f"attention{number}")
            writer.replace(writer.mixed())
        if found:
            del model.graph.opset_imports[_DOMAIN]
        return bool(found)

    def ensures(self, model: ir.Model) -> None:
        """No operator is left that isn't standard."""
        for node in model.graph:
            if node.domain == _DOMAIN:
                raise EdgesdError(f"{node.name} is a {node.op_type} of {node.domain}: not standard")


def _attentions(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph if (node.domain, node.op_type) == (_DOMAIN, _OP)]


def _causal(node: ir.Node) -> bool:
    return "unidirectional" in node.attributes and bool(node.attributes["unidirectional"].as_int())


class _Writer(StandardWriter):
    def mixed(self) -> ir.Value:
        """The node's output."""
        query, key, value = (input_of(self.node, index) for index in range(3))
        dtype = dtype_of(query).numpy()
        heads = self.node.attributes["num_heads"].as_int()
        scale = np.array(self.node.attributes["scale"].as_float(), dtype)
        query = self.op("Mul", [query, self.const(f"scale:{scale}:{dtype}", scale)])
        scores = self.op(
            "MatMul",
            [self._heads(query, heads, (0, 2, 1, 3)), self._heads(key, heads, (0, 2, 3, 1))],
        )
        if _causal(self.node):
            tokens = shape_of(value).numpy()[1]
            mask = np.triu(np.full((tokens, tokens), MASKED, dtype), 1)
            scores = self.op("Add", [scores, self.const(f"causal:{tokens}:{dtype}", mask)])
        bias = score_bias(self.node)
        if bias is not None:
            scores = self.op("Add", [scores, bias])
        weights = self.op("Softmax", [scores], axis=-1)
        mixed = self.op("MatMul", [weights, self._heads(value, heads, (0, 2, 1, 3))])
        rows = self.op("Transpose", [mixed], perm=(0, 2, 1, 3))
        flat = self.const("shape:flat", np.array([0, 0, -1], np.int64))
        return self.op("Reshape", [rows, flat])

    def _heads(self, value: ir.Value, heads: int, order: tuple[int, ...]) -> ir.Value:
        """[batch, n, heads * d] -> [batch, n, heads, d], its axes in another order."""
        shape = self.const(f"shape:heads{heads}", np.array([0, 0, heads, -1], np.int64))
        return self.op("Transpose", [self.op("Reshape", [value, shape])], perm=order)
