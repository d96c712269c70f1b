"""Group normalizations in graphs that torch exports."""

from __future__ import annotations

from typing import NamedTuple

import onnx_ir as ir

from edgesd.export.passes.fusions import groups_of, normalized_groups
from edgesd.export.passes.matching import Matcher

_MATCHER = Matcher(normalized_groups)


class GroupNorm(NamedTuple):
    """source [B, C, H, W]; gamma, beta: constants [C, 1, 1], by which it is scaled and moved."""

    source: ir.Value
    gamma: ir.Value
    beta: ir.Value
    groups: int
    epsilon: float


def group_norm(model: ir.Model, last: ir.Node) -> GroupNorm | None:
    """The group normalization of images whose last node is `last`. None for anything else, and
    where another node reads what lies between."""
    for match in _MATCHER.ending(model, last.outputs[0]):
        found = groups_of(match.values)
        if found is not None:
            source, gamma, beta = (match.values[name] for name in ("x", "gamma", "beta"))
            return GroupNorm(source, gamma, beta, int(found["groups"]), found["epsilon"])
    return None
