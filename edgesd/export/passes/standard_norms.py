"""Writes RMS norms and rotary embeddings out in standard operators, for compilers that have no
others (export/attention.py makes the operators)."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgesd.errors import EdgesdError
from edgesd.export.passes import Pass
from edgesd.export.passes.lowering import StandardWriter
from edgesd.export.passes.values import dtype_of, input_of, shape_of

NORM = ("", "SimplifiedLayerNormalization")
_ROTARY = ("com.microsoft", "RotaryEmbedding")


class StandardNorms(Pass):
    """Every SimplifiedLayerNormalization over the last axis becomes x / sqrt(mean(x^2) + epsilon)
    times its weight. Where x has 16 bits, all but the last product is in fp32: a square of 256
    exceeds fp16."""

    def requires(self, model: ir.Model) -> None:
        """They are over the last axis."""
        for node in _found(model, NORM):
            if node.attributes["axis"].as_int() != -1:
                raise EdgesdError(f"{node.name} isn't over the last axis")

    def call(self, model: ir.Model) -> bool:
        found = _found(model, NORM)
        for number, node in enumerate(found):
            writer = _Writer(model, node, f"norm{number}")
            writer.replace(writer.norm())
        return bool(found)

    def ensures(self, model: ir.Model) -> None:
        """None of them is left."""
        for node in _found(model, NORM):
            raise EdgesdError(f"{node.name} is still a {node.op_type}: not standard")


class StandardRotary(Pass):
    """Every RotaryEmbedding becomes a sum of products of its input's pairs."""

    def requires(self, model: ir.Model) -> None:
        """They rotate neighbouring pairs from the first position on, by tables of a known
        width."""
        for node in _found(model, _ROTARY):
            first = ir.convenience.get_const_tensor(input_of(node, 1))
            if first is None or first.numpy().any() or not node.attributes["interleaved"].as_int():
                raise EdgesdError(f"{node.name} doesn't rotate pairs from the first position on")
            if not isinstance(shape_of(input_of(node, 2))[-1], int):
                raise EdgesdError(f"{node.name}: the width of its tables isn't known")

    def call(self, model: ir.Model) -> bool:
        found = _found(model, _ROTARY)
        for number, node in enumerate(found):
            writer = _Writer(model, node, f"rotary{number}")
            writer.replace(writer.rotated())
        return bool(found)

    def ensures(self, model: ir.Model) -> None:
        """None of them is left."""
        for node in _found(model, _ROTARY):
            raise EdgesdError(f"{node.name} is still a {node.op_type}: not standard")


def _found(model: ir.Model, operator: tuple[str, str]) -> list[ir.Node]:
    return [node for node in model.graph if (node.domain, node.op_type) == operator]


class _Writer(StandardWriter):
    def norm(self) -> ir.Value:
        """The node's output, where it is a norm."""
        hidden, weight = (input_of(self.node, index) for index in range(2))
        dtype, exact = dtype_of(hidden), ir.DataType.FLOAT
        if dtype != exact:
            hidden = self.op("Cast", [hidden], to=exact)
        epsilon = np.array(self.node.attributes["epsilon"].as_float(), np.float32)
        last = self.const("axes:last", np.array([-1], np.int64))
        mean = self.op("ReduceMean", [self.op("Mul", [hidden, hidden]), last], keepdims=1)
        added = self.op("Add", [mean, self.const(f"epsilon:{epsilon}", epsilon)])
        normed = self.op("Div", [hidden, self.op("Sqrt", [added])])
        if dtype != exact:
            normed = self.op("Cast", [normed], to=dtype)
        return self.op("Mul", [normed, weight])

    def rotated(self) -> ir.Value:
        """[batch, n, heads * d], of pairs x, y: x cos - y sin, y cos + x sin."""
        hidden, cos, sin = (input_of(self.node, index) for index in (0, 2, 3))
        half = shape_of(cos)[-1]
        assert isinstance(half, int)  # see `requires`
        pairs = self._reshaped(hidden, (0, 0, -1, half, 2))
        last = self.const("axes:last", np.array([-1], np.int64))
        x, y = (
            self.op("Gather", [pairs, self.const(f"place:{at}", np.array([at], np.int64))], axis=4)
            for at in (0, 1)
        )
        cos, sin = (
            self.op("Unsqueeze", [self._reshaped(t, (-1, 1, half)), last]) for t in (cos, sin)
        )
        even = self.op("Sub", [self.op("Mul", [x, cos]), self.op("Mul", [y, sin])])
        odd = self.op("Add", [self.op("Mul", [y, cos]), self.op("Mul", [x, sin])])
        joined = self.op("Concat", [even, odd], axis=-1)
        return self._reshaped(joined, (0, 0, -1))

    def _reshaped(self, value: ir.Value, shape: tuple[int, ...]) -> ir.Value:
        name = "shape:" + "x".join(map(str, shape))
        return self.op("Reshape", [value, self.const(name, np.array(shape, np.int64))])
