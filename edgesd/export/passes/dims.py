"""Names the symbolic dimensions of a graph's inputs and outputs."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from edgesd.errors import EdgesdError
from edgesd.export.passes import Pass
from edgesd.export.passes.values import shape_of
from edgesd.spec.pipeline import ComponentSpec, TensorSpec


class NameDims(Pass):
    """Sets the shapes of inputs and outputs as the component's spec has them.

    An output whose size differs from the input's dimension of that name (a decoder's image, in
    pixels, against latents) gets a name of its own, e.g. image_height: equal names promise equal
    sizes. Symbolic sizes in between are dropped: they are expressions of the exporter's own.
    """

    def __init__(self, spec: ComponentSpec) -> None:
        self.spec = spec

    def requires(self, model: ir.Model) -> None:
        """Inputs and outputs are those of the spec, in order, with its fixed sizes and types."""
        for values, tensors in (
            (model.graph.inputs, self.spec.inputs),
            (model.graph.outputs, self.spec.outputs),
        ):
            if [value.name for value in values] != [tensor.name for tensor in tensors]:
                raise EdgesdError(
                    f"{self.spec.name}: the graph has {[v.name for v in values]}, "
                    f"expected {[t.name for t in tensors]}"
                )
            for value, tensor in zip(values, tensors, strict=True):
                _check(self.spec.name, value, tensor)

    def call(self, model: ir.Model) -> bool:
        sizes: dict[str, str] = {}
        for value, tensor in zip(model.graph.inputs, self.spec.inputs, strict=True):
            for dim, name in zip(shape_of(value), tensor.shape, strict=True):
                if isinstance(name, str):
                    sizes.setdefault(name, str(dim))
        known = {id(value) for value in (*model.graph.inputs, *model.graph.outputs)}
        for node in model.graph:
            for value in node.outputs:
                if id(value) not in known and value.shape is not None:
                    value.shape = ir.Shape([d if isinstance(d, int) else None for d in value.shape])
        for value, tensor in zip(model.graph.outputs, self.spec.outputs, strict=True):
            value.shape = ir.Shape(
                f"{tensor.name}_{name}"
                if isinstance(name, str) and sizes.get(name) != str(dim)
                else name
                for dim, name in zip(shape_of(value), tensor.shape, strict=True)
            )
        for value, tensor in zip(model.graph.inputs, self.spec.inputs, strict=True):
            value.shape = ir.Shape(tensor.shape)
        return True


def _check(component: str, value: ir.Value, tensor: TensorSpec) -> None:
    shape = value.shape
    same = shape is not None and len(shape) == len(tensor.shape)
    same = same and all(
        found == wanted if isinstance(wanted, int) else not isinstance(found, int)
        for found, wanted in zip(shape or (), tensor.shape, strict=False)
    )
    if not same or value.dtype != ir.DataType.from_numpy(_dtype(tensor)):
        raise EdgesdError(
            f"{component}: {tensor.name} became {value.dtype} {shape}, "
            f"expected {tensor.dtype} {list(tensor.shape)}"
        )


def _dtype(tensor: TensorSpec) -> Any:
    return np.dtype(tensor.dtype)
