"""Finds operators in a graph by patterns of onnxscript.rewriter.

Its matching is used and its rewriting isn't: rules rename nodes and values, fold constants all over
the graph, and of two layers whose sum could be fused into either they don't take the first.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import onnx_ir as ir
from onnxscript.rewriter.pattern import RewriteRule

from edgesd.export.passes.fusions import Pattern

_FARTHEST = 3
"""Nodes from a layer to the end of the longest pattern after it."""


class Match(NamedTuple):
    """Nodes of a pattern, the last one and those before it; and what the pattern's parameters and
    named outputs are, by name."""

    last: ir.Node
    others: tuple[ir.Node, ...]
    values: dict[str, Any]


class Matcher:
    """Finds a pattern. The inputs of Add, Mul and their like may stand in either order.

    What lies between the nodes of a match nothing else reads.
    """

    def __init__(self, pattern: Pattern) -> None:
        # A rule, as only these know how to commute; it is never applied.
        self._rules = RewriteRule(pattern, pattern).commute()

    def ending(self, model: ir.Model, value: ir.Value) -> Iterator[Match]:
        """Matches whose output is `value`."""
        last = value.producer()
        if last is None:
            return
        for rule in self._rules:
            found = rule.match(model, model.graph, last)
            if found:
                others = tuple(node for node in found.nodes if node is not last)
                yield Match(last, others, dict(found.bindings))

    def following(self, model: ir.Model, x: ir.Value) -> Iterator[Match]:
        """Matches whose parameter x is `x`."""
        values = [x]
        for _ in range(_FARTHEST):
            values = [out for value in values for use in value.uses() for out in use.node.outputs]
            for value in dict.fromkeys(values):
                yield from (m for m in self.ending(model, value) if m.values["x"] is x)
