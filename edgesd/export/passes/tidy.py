"""Removes nodes that compute nothing: identities, repeated subexpressions, unused nodes."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from edgesd.export.passes import Pass

_NEUTRAL = {"Mul": 1.0, "Div": 1.0, "Add": 0.0, "Sub": 0.0}
"""The second operand that makes an operator a no-op."""


class Tidy(Pass):
    """Takes any model. Constants become initializers, so that all weights are in one place."""

    def call(self, model: ir.Model) -> bool:
        changed = _skip_neutral(model)
        for rewrite in (
            common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
            common.IdentityEliminationPass(),
            common.CommonSubexpressionEliminationPass(),
            common.RemoveUnusedNodesPass(),
            common.RemoveUnusedOpsetsPass(),
        ):
            changed = rewrite(model).modified or changed
        return changed


def _skip_neutral(model: ir.Model) -> bool:
    """Replace x * 1, x / 1, x + 0 and x - 0 (scalar constants, same shape and type) by x."""
    changed = False
    for node in list(model.graph):
        neutral = _NEUTRAL.get(node.op_type)
        if neutral is None or node.domain != "" or len(node.inputs) != 2:
            continue
        kept, constant = node.inputs
        tensor = ir.convenience.get_const_tensor(constant) if constant is not None else None
        if kept is None or tensor is None or tensor.size != 1 or len(tensor.shape) > 1:
            continue
        if kept.shape is None or len(kept.shape) < len(tensor.shape):
            continue
        out = node.outputs[0]
        if float(np.asarray(tensor.numpy()).item()) != neutral or out in model.graph.outputs:
            continue
        ir.convenience.replace_all_uses_with(out, kept)
        model.graph.remove(node, safe=True)
        changed = True
    return changed
