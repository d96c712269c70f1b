"""Gives an exported graph its weights: they stay where the checkpoint has them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
from onnxscript.optimizer import optimize_ir
from torch._subclasses.fake_tensor import FakeTensor

from edgesd.errors import EdgesdError
from edgesd.export.mapped import Edited, Weight
from edgesd.export.passes import Pass

SMALL = 8192
"""Values of a tensor that constants are computed from at the export (onnxscript's own limit)."""


class BoundTensor(ir.LazyTensor):
    """A weight in fp32, made of the checkpoint's tensor whenever it is read, and not kept.

    source: the tensor's name in the network's state dict. transposed: of two dimensions, swapped.
    """

    __slots__ = ("source", "transposed")

    def __init__(self, source: str, tensor: Weight, transposed: bool = False) -> None:
        self.source, self.transposed = source, transposed
        shape = tuple(reversed(tensor.shape)) if transposed else tuple(tensor.shape)

        def read() -> ir.TensorProtocol:
            array = tensor.float().numpy()
            # A view: who quantizes wants it as it was, and turning it takes longer than reading.
            return ir.tensor(array.T if transposed else array)

        super().__init__(read, ir.DataType.FLOAT, ir.Shape(shape), name=source)


class BindWeights(Pass):
    """Takes a graph that was exported of a network without values, and optimizes it as the exporter
    would have. state: the network's weights and buffers. Raises EdgesdError for an initializer that
    is none of them and has no value, either.
    """

    def __init__(self, state: Mapping[str, Weight]) -> None:
        self.state = state

    def call(self, model: ir.Model) -> bool:
        for name, value in model.graph.initializers.items():
            tensor = self.state.get(name)
            if tensor is None:
                if _has_values(value.const_value):
                    continue  # a constant of the network's code
                raise EdgesdError(f"{name} in the graph is no weight of its network")
            if tensor.is_floating_point() and tensor.numel() > SMALL:
                value.const_value = BoundTensor(name, tensor)
            elif isinstance(tensor, Edited) or tensor.is_floating_point():
                value.const_value = ir.tensor(tensor.float().numpy(), name=name)
            else:
                value.const_value = ir.tensor(tensor.numpy(), name=name)
        turned: dict[str, BoundTensor] = {}
        optimize_ir(model, should_fold=lambda node: self._folds(node, turned))
        for name, bound in turned.items():
            model.graph.initializers[name].const_value = bound
        return True

    def _folds(self, node: ir.Node, turned: dict[str, BoundTensor]) -> bool | None:
        """The optimizer takes transposes into weights: let it turn zeros that take no memory, and
        note what stands behind them. None: as it likes."""
        source = node.inputs[0] if node.op_type == "Transpose" else None
        bound = None if source is None else source.const_value
        if source is None or not isinstance(bound, BoundTensor):
            return None
        if len(source.uses()) != 1 or len(bound.shape) != 2:
            return False
        out = node.outputs[0].name or ""
        turned[out] = BoundTensor(bound.source, self.state[bound.source], transposed=True)
        source.const_value = ir.tensor(np.broadcast_to(np.float32(0), bound.shape.numpy()))
        return True


def _has_values(tensor: ir.TensorProtocol | None) -> bool:
    return tensor is not None and not isinstance(getattr(tensor, "raw", None), FakeTensor)
