"""Finds sums that exceed fp16: those of a transformer's layers, which RMS norms alone bound.

In T5 they grow beyond 65504 by what is added behind a gate, a product of two activations;
transformers keeps T5's `wo` in fp32 for that reason.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir

from edgesd.export.passes.standard_norms import NORM
from edgesd.export.quantize.layers import weight_of

Sums = Mapping[ir.Node, Sequence[int]]
"""An Add -> which of its inputs are as wide as itself."""


def wide_sums(model: ir.Model) -> Sums:
    """Every sum of computed values that an RMS norm reads, with what a linear behind a gate
    adds."""
    found: dict[ir.Node, list[int]] = {}
    for node in model.graph:
        value = node.inputs[0] if (node.domain, node.op_type) == NORM else None
        add = None if value is None else value.producer()
        if add is not None and add.op_type == "Add" and _computed(add):
            found[add] = [at for at, term in enumerate(add.inputs) if _behind_gate(term)]
    return found


def values_of(sums: Sums) -> set[str]:
    """Names of the sums and of these terms, which a quantized layer may have replaced since."""
    values = [add.outputs[0] for add in sums]
    values += [value for add, places in sums.items() for at in places if (value := add.inputs[at])]
    return {value.name or "" for value in values}


def _computed(node: ir.Node) -> bool:
    return all(value is not None and value.producer() is not None for value in node.inputs)


def _behind_gate(value: ir.Value | None) -> bool:
    node = None if value is None else value.producer()
    if node is None or weight_of(node) is None or node.inputs[0] is None:
        return False
    gate = node.inputs[0].producer()
    return gate is not None and gate.op_type == "Mul" and _computed(gate)
