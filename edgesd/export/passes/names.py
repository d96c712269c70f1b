"""Gives nodes and weights the names that they have in the torch module."""

from __future__ import annotations

import ast

import onnx_ir as ir

from edgesd.errors import EdgesdError
from edgesd.export.passes import Pass

_SCOPES = "pkg.torch.onnx.name_scopes"
_WRAPPER = "net"


class StableNames(Pass):
    """Names that quantization recipes and profiles can refer to, whatever the exporter's version.

    Node: `mid_block.attentions.0.proj_in/Conv`, numbered when a module has several of a kind.
    Weight: as in the state dict; a folded transpose of `to_q.weight` is `to_q.weight_t`.
    Takes and removes the exporter's metadata, which holds stack traces.
    """

    def call(self, model: ir.Model) -> bool:
        ends = (*model.graph.inputs, *model.graph.outputs)
        taken: set[str] = {value.name or "" for value in ends}
        for value in list(model.graph.initializers.values()):
            if value.name and value.name.startswith(f"{_WRAPPER}."):
                _rename(value, value.name.removeprefix(f"{_WRAPPER}."), taken)
            else:
                _rename(value, _folded_name(value), taken)
        nodes: set[str] = set()
        for node in model.graph:
            node.name = _unique(f"{_module(node)}/{node.op_type}".lstrip("/"), nodes)
        ir.passes.common.ClearMetadataAndDocStringPass()(model)
        for value in _values(model):
            value.metadata_props.clear()
        return True

    def ensures(self, model: ir.Model) -> None:
        """All nodes and initializers are named, and no metadata is left."""
        for node in model.graph:
            if not node.name or node.metadata_props or node.doc_string:
                raise EdgesdError(f"node {node.name!r} is unnamed or holds metadata")
        for name, value in model.graph.initializers.items():
            if not name or value.name != name:
                raise EdgesdError(f"initializer {name!r} is badly named")


def _values(model: ir.Model) -> list[ir.Value]:
    out = [*model.graph.inputs, *model.graph.initializers.values()]
    for node in model.graph:
        out += node.outputs
    return out


def _module(node: ir.Node) -> str:
    """The path of the torch module that a node comes from; "" for the top."""
    try:
        scopes = ast.literal_eval(node.metadata_props.get(_SCOPES, "[]"))
    except (ValueError, SyntaxError):
        return ""
    inside = [scope for scope in scopes[:-1] if scope.startswith(f"{_WRAPPER}.")]
    return inside[-1].removeprefix(f"{_WRAPPER}.") if inside else ""


def _folded_name(value: ir.Value) -> str:
    """A name for a constant that the exporter computed: from the module that uses it."""
    for node, index in value.uses():
        if not (path := _module(node)):
            continue
        if node.op_type in ("MatMul", "Gemm") and index == 1:
            return f"{path}.weight_t"
        return f"{path}/{node.op_type}.{index}"
    return f"constant.{value.name}"


def _rename(value: ir.Value, name: str, taken: set[str]) -> None:
    value.name = _unique(name, taken)


def _unique(name: str, taken: set[str]) -> str:
    number, unique = 1, name
    while unique in taken:
        number += 1
        unique = f"{name}_{number}"
    taken.add(unique)
    return unique
