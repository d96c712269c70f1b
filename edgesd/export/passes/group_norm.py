"""What a group normalization looks like in graphs that torch exports."""

from __future__ import annotations

from typing import NamedTuple

import onnx_ir as ir


class GroupNorm(NamedTuple):
    """source [B, C, H, W]; gamma, beta: constants [C, 1, 1], by which it is scaled and moved."""

    source: ir.Value
    gamma: ir.Value
    beta: ir.Value
    groups: int
    epsilon: float


def group_norm(last: ir.Node | None) -> GroupNorm | None:
    """The group normalization of images whose last node is `last`: Reshape,
    InstanceNormalization of ones and zeros, Reshape, Mul, Add. None for anything else, and where
    another node reads what lies between."""
    scaled, beta = _with_constant(last, "Add")
    if scaled is None or beta is None or len(list(scaled.uses())) != 1:
        return None
    back, gamma = _with_constant(scaled.producer(), "Mul")
    reshape = None if back is None else back.producer()
    if gamma is None or reshape is None or reshape.op_type != "Reshape":
        return None
    inner = reshape.inputs[0]
    norm = None if inner is None else inner.producer()
    if norm is None or norm.op_type != "InstanceNormalization":
        return None
    ones, zeros = (v.const_value if v is not None else None for v in norm.inputs[1:3])
    flat = norm.inputs[0].producer() if norm.inputs[0] is not None else None
    if ones is None or zeros is None or flat is None or flat.op_type != "Reshape":
        return None
    source = flat.inputs[0]
    if source is None or (ones.numpy() != 1).any() or zeros.numpy().any():
        return None
    epsilon = norm.attributes["epsilon"].as_float() if "epsilon" in norm.attributes else 1e-5
    return GroupNorm(source, gamma, beta, int(ones.size), epsilon)


def _with_constant(node: ir.Node | None, op: str) -> tuple[ir.Value | None, ir.Value | None]:
    """What a node of type `op` takes, and the constant of a value per channel beside it."""
    if node is None or node.op_type != op:
        return None, None
    constants = [v for v in node.inputs if v is not None and v.const_value is not None]
    others = [v for v in node.inputs if v is not None and v.const_value is None]
    if len(constants) != 1 or len(others) != 1 or constants[0].const_value is None:
        return None, None
    dims = list(constants[0].const_value.shape.numpy())
    fits = len(dims) == 3 and dims[1:] == [1, 1]
    return (others[0], constants[0]) if fits else (None, None)
