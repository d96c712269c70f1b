"""Computes in 16 bits, for strongly typed compilers: every type stands in the graph.

What goes in and out stays fp32, with a Cast at the boundary: a device's loop is the same for all
precisions. What is computed from the timestep alone stays in fp32, too, until it is a sine and a
cosine: 999 * frequency has no digits left in 16 bits. The same holds for a guidance scale.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import onnx_ir as ir

from edgesd.errors import EdgesdError
from edgesd.export.passes import Pass
from edgesd.export.passes.fp16_weights import MAX_FP16, half_tensor

_LAST_EXACT = ("Sin", "Cos")
"""Operators whose results fit 16 bits again."""
_FP32_INPUTS = {("Resize", 2)}
"""Operators and their inputs that are fp32 whatever they compute in: the scales of a Resize."""


class HalfCompute(Pass):
    """Every fp32 value of the graph becomes fp16, but for inputs, outputs and the timestep's phase.

    Values of inputs of one number a row, timesteps and guidance, keep fp32 up to the first Sin or
    Cos. dtype: BFLOAT16 instead, which holds whatever fp32 does, with fewer digits. ONNX allows
    Conv and InstanceNormalization in bf16 from opset 22 on; TensorRT takes them in older ones.
    Raises EdgesdError for a weight beyond 65504, which fp16 can't hold, and for a graph that casts
    by itself.
    """

    def __init__(self, dtype: ir.DataType = ir.DataType.FLOAT16) -> None:
        self.dtype = dtype
        self._word = "bf16" if dtype == ir.DataType.BFLOAT16 else "fp16"

    def requires(self, model: ir.Model) -> None:
        """Every weight fits, and all casts are this pass's own."""
        if self.dtype == ir.DataType.FLOAT16:
            self._check_weights(model)
        for node in model.graph:
            if node.op_type in ("Cast", "CastLike"):
                raise EdgesdError(f"{model.graph.name}: {node.name} is a {node.op_type} already")

    def _check_weights(self, model: ir.Model) -> None:
        for name, value in model.graph.initializers.items():
            tensor = value.const_value
            if tensor is None or tensor.dtype != ir.DataType.FLOAT or not tensor.size:
                continue
            largest = float(np.abs(tensor.numpy()).max())
            if not largest <= MAX_FP16:
                raise EdgesdError(
                    f"{model.graph.name}: {name} holds {largest:.3g}, above fp16's "
                    f"{MAX_FP16:.0f}: build it in fp32"
                )

    def call(self, model: ir.Model) -> bool:
        graph = model.graph
        phase = self._phase(graph)
        for value in list(graph.initializers.values()):
            self._convert_weight(value, phase)
        for node in graph:
            if node in phase:
                continue
            for out in node.outputs:
                if out.dtype == ir.DataType.FLOAT:
                    out.dtype = self.dtype
        for value in list(graph.inputs):
            if value.dtype == ir.DataType.FLOAT:
                users = [(user, index) for user, index in value.uses() if user not in phase]
                self._cast(graph, value, users, None)
        for node in list(phase):
            for out in node.outputs:
                if out.dtype == ir.DataType.FLOAT:
                    users = [(user, index) for user, index in out.uses() if user not in phase]
                    self._cast(graph, out, users, node)
        for index, value in enumerate(list(graph.outputs)):
            if value.dtype == self.dtype:
                self._cast_output(graph, index, value)
        return True

    def ensures(self, model: ir.Model) -> None:
        """Inputs and outputs are of the types they were."""
        for value in (*model.graph.inputs, *model.graph.outputs):
            if value.dtype == self.dtype:
                raise EdgesdError(f"{value.name} is {self._word}: expected fp32 at the boundary")

    def _phase(self, graph: ir.Graph) -> dict[ir.Node, None]:
        """The nodes from a timestep to the first sine or cosine, these included, in order."""
        reached = {value for value in graph.inputs if _is_row(value)}
        found: dict[ir.Node, None] = {}
        for node in graph:
            if any(value in reached for value in node.inputs if value is not None):
                found[node] = None
                if node.op_type not in _LAST_EXACT:
                    reached.update(node.outputs)
        return found if any(node.op_type in _LAST_EXACT for node in found) else {}

    def _convert_weight(self, value: ir.Value, phase: Collection[ir.Node]) -> None:
        tensor = value.const_value
        if tensor is None or tensor.dtype != ir.DataType.FLOAT:
            return
        uses = list(value.uses())
        exact = [user for user, at in uses if user in phase or (user.op_type, at) in _FP32_INPUTS]
        if exact and len(exact) < len(uses):
            raise EdgesdError(
                f"{value.name} is read in fp32 by {exact[0].name}, in {self._word} by others"
            )
        if exact:
            return
        value.dtype = self.dtype
        value.const_value = half_tensor(tensor, value.name or "", self.dtype)

    def _cast(
        self,
        graph: ir.Graph,
        value: ir.Value,
        users: Sequence[tuple[ir.Node, int]],
        after: ir.Node | None,
    ) -> None:
        if not users:
            return
        cast = ir.node("Cast", [value], {"to": self.dtype}, num_outputs=1)
        cast.name = f"{value.name}/to_{self._word}"
        out = cast.outputs[0]
        out.name, out.shape = cast.name, value.shape
        out.type = ir.TensorType(self.dtype)
        for user, index in users:
            user.replace_input_with(index, out)
        if after is not None:
            graph.insert_after(after, cast)
        else:
            graph.insert_before(graph[0], cast)

    def _cast_output(self, graph: ir.Graph, index: int, value: ir.Value) -> None:
        name = value.name
        value.name = f"{name}/{self._word}"
        cast = ir.node("Cast", [value], {"to": ir.DataType.FLOAT}, num_outputs=1)
        cast.name = f"{name}/to_fp32"
        out = cast.outputs[0]
        out.name, out.shape, out.type = name, value.shape, ir.TensorType(ir.DataType.FLOAT)
        graph.append(cast)
        graph.outputs[index] = out


def _is_row(value: ir.Value) -> bool:
    floats = value.dtype == ir.DataType.FLOAT
    return floats and value.shape is not None and len(value.shape) == 1
