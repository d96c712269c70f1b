"""Quantized layers as ONNX Runtime's CPU kernels run them best.

| layer, scheme           | becomes                                                              |
|-------------------------|----------------------------------------------------------------------|
| linear w8a8             | DynamicQuantizeMatMul, or QuantizeLinear and MatMulIntegerToFloat    |
| linear w4a16, w4a8      | MatMulNBits, accuracy level 1 (fp32) or 4 (int8 per block)           |
| conv w8a8, w4a8         | patches of the u8 input and MatMulIntegerToFloat: outputs stay fp32  |
| conv and linear w8a16, conv w4a16 | codes on disk, turned into fp32 weights when loaded        |
| anything a4             | the input rounded by fp32 operators: a simulation                    |
| embedding               | Gather of codes, times Gather of scales                              |

A branch is two more products of the same (smoothed) input, added. What is computed from constants
alone ONNX Runtime folds when it loads the graph: 4-bit codes of convolutions are 4 bits on disk
and int8 or fp32 in memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes import common

from edgesd.errors import EdgesdError
from edgesd.export.passes import Pass
from edgesd.export.quantize.layers import Activations, QuantizedLayer, weight_of

OPSET = 21
"""The oldest in which Cast takes int4."""

_MICROSOFT = "com.microsoft"
_TIMESTEP = "timestep"
_LEVEL_FP32, _LEVEL_INT8 = 1, 4
_END = np.iinfo(np.int64).max

Array = npt.NDArray[Any]


class QuantizedOrt(Pass):
    """Replaces the nodes of `layers` (by node name). Sets the opset to 21: what changed since 20
    is which types operators take.

    timesteps [T]: those that static ranges were recorded at, if the graph has a timestep input.
    """

    def __init__(
        self, layers: Mapping[str, QuantizedLayer], timesteps: npt.NDArray[np.float32] | None
    ) -> None:
        self.layers, self.timesteps = layers, timesteps
        self._weights: set[str] = set()

    def requires(self, model: ir.Model) -> None:
        """Every layer's node is there, with a weight of the layer's shape."""
        self._weights = set()
        nodes = {node.name: node for node in model.graph}
        for name, quantized in self.layers.items():
            weight = weight_of(nodes[name]) if name in nodes else None
            if weight is None or weight.const_value is None:
                raise EdgesdError(f"{model.graph.name}: there is no layer {name} to quantize")
            if weight.const_value.size != quantized.codes.size:
                raise EdgesdError(f"{model.graph.name}: {name} has another shape than its codes")
            self._weights.add(weight.name or "")
        if any(node.op_type == "GroupNormalization" for node in model.graph):
            raise EdgesdError("GroupNormalization means something else since opset 21")

    def call(self, model: ir.Model) -> bool:
        """See the class."""
        model.graph.opset_imports[""] = OPSET
        model.graph.opset_imports[_MICROSOFT] = 1
        step = None
        if any(_table(q.activations) for q in self.layers.values()):
            step = _step_index(model, self.timesteps)
        for number, node in enumerate(list(model.graph)):
            quantized = self.layers.get(node.name or "")
            if quantized is not None:
                # Values get short names: paths would be a good part of a small bundle.
                _Lowering(model, node, quantized, step, f"q{number}").replace()
        common.RemoveUnusedNodesPass()(model)
        return bool(self.layers)

    def ensures(self, model: ir.Model) -> None:
        """No fp32 weight of a quantized layer is left, and all new values are finite."""
        left = set(model.graph.initializers) & self._weights
        if left:
            raise EdgesdError(f"{model.graph.name}: {sorted(left)[0]} is still there in fp32")
        for name, value in model.graph.initializers.items():
            tensor = value.const_value
            if ":" not in name or tensor is None or not tensor.dtype.is_floating_point():
                continue
            if not np.isfinite(np.asarray(tensor.numpy(), np.float32)).all():
                raise EdgesdError(f"initializer {name} holds NaN or infinite values")


def _table(act: Activations) -> bool:
    return act.mode == "static" and act.scale is not None and len(act.scale) > 1


def _step_index(model: ir.Model, timesteps: npt.NDArray[np.float32] | None) -> ir.Value:
    """The index [1] of the recorded timestep that is nearest to the graph's input."""
    value = next((v for v in model.graph.inputs if v.name == _TIMESTEP), None)
    if value is None or timesteps is None:
        raise EdgesdError(f"{model.graph.name} has ranges per timestep, and no timestep input")
    recorded = _constant(model, "timesteps:recorded", timesteps.astype(np.float32))
    nodes = [
        ir.node("Sub", [recorded, value], name="timesteps/Sub"),
    ]
    nodes.append(ir.node("Abs", nodes[-1].outputs, name="timesteps/Abs"))
    nodes.append(
        ir.node("ArgMin", nodes[-1].outputs, {"axis": 0, "keepdims": 1}, name="timesteps/ArgMin")
    )
    for node in nodes:
        node.outputs[0].name = f"{node.name}:out"
    first = next(iter(model.graph))
    model.graph.insert_before(first, nodes)
    return nodes[-1].outputs[0]


def _constant(model: ir.Model, name: str, array: Array, dtype: Any = None) -> ir.Value:
    """An initializer called `name`; the one that is there if it was made before."""
    if name in model.graph.initializers:
        return model.graph.initializers[name]
    tensor = ir.tensor(array, dtype=dtype, name=name)
    value = ir.Value(
        name=name,
        shape=ir.Shape(tensor.shape.numpy()),
        type=ir.TensorType(tensor.dtype),
        const_value=tensor,
    )
    model.graph.register_initializer(value)
    return value


class _Lowering:
    """Writes one layer's nodes in the place of the one it was."""

    def __init__(
        self,
        model: ir.Model,
        node: ir.Node,
        quantized: QuantizedLayer,
        step: ir.Value | None,
        prefix: str,
    ) -> None:
        self.model, self.node, self.q, self.step = model, node, quantized, step
        self.prefix = prefix
        self.nodes: list[ir.Node] = []

    def replace(self) -> None:
        kind, mode = self.q.layer.kind, self.q.activations.mode
        if kind == "embedding":
            out = self._embedding()
        else:
            source = self.node.inputs[0]
            assert source is not None
            x = self._smoothed(source)
            low = self._simulated(x) if mode == "group" and self._bits() == 4 else x
            out = self._linear(low) if kind == "linear" else self._conv(low)
            if self.q.rank:
                out = self._op("Add", [out, self._branch(x)])
            out = self._biased(out)
        producer = out.producer()
        assert producer is not None
        producer.name = f"{self.node.name}/{self.q.scheme}"
        old = self.node.outputs[0]
        out.shape, out.type = old.shape, old.type
        self.model.graph.insert_before(self.node, self.nodes)
        ir.convenience.replace_all_uses_with(old, out, replace_graph_outputs=True)
        name = old.name
        self.model.graph.remove(self.node, safe=True)
        if out in self.model.graph.outputs:
            out.name = name

    # What is common to all kinds.

    def _op(
        self, op: str, inputs: list[ir.Value | None], domain: str = "", **attributes: Any
    ) -> ir.Value:
        node = ir.node(op, inputs, attributes, domain=domain, num_outputs=1)
        node.name = f"{self.prefix}.{len(self.nodes)}"
        node.outputs[0].name = node.name
        self.nodes.append(node)
        return node.outputs[0]

    def _const(self, name: str, array: Array, dtype: Any = None) -> ir.Value:
        return _constant(self.model, f"{self.prefix}:{name}", np.ascontiguousarray(array), dtype)

    def _shared(self, name: str, values: list[int]) -> ir.Value:
        return _constant(self.model, name, np.array(values, np.int64))

    def _bits(self) -> int:
        return self.q.activations.bits

    def _smoothed(self, x: ir.Value) -> ir.Value:
        if self.q.smooth is None:
            return x
        factor = (1 / self.q.smooth).astype(np.float32)
        if self.q.layer.kind == "conv":
            factor = factor.reshape(1, -1, 1, 1)
        return self._op("Mul", [x, self._const("smooth", factor)])

    def _biased(self, out: ir.Value) -> ir.Value:
        index = {"Conv": 2, "Gemm": 2}.get(self.node.op_type)
        bias = self.node.inputs[index] if index and len(self.node.inputs) > index else None
        if bias is None:
            return out
        if self.q.layer.kind == "conv":
            assert bias.const_value is not None
            bias = self._const("bias", bias.const_value.numpy().reshape(1, -1, 1, 1))
        return self._op("Add", [out, bias])

    def _branch(self, x: ir.Value) -> ir.Value:
        """up (down x)."""
        assert self.q.down is not None and self.q.up is not None
        layer = self.q.layer
        if layer.kind == "linear":
            down = self._half("down", self.q.down.T)
            up = self._half("up", self.q.up.T)
            return self._op("MatMul", [self._op("MatMul", [x, down]), up])
        kernel_h, kernel_w = layer.kernel
        kernel = self.q.down.reshape(-1, kernel_h, kernel_w, layer.channels).transpose(0, 3, 1, 2)
        down, up = self._half("down", kernel), self._half("up", self.q.up[:, :, None, None])
        return self._op("Conv", [self._convolved(x, down), up], kernel_shape=[1, 1])

    def _half(self, name: str, array: Array) -> ir.Value:
        value = self._const(name, array.astype(np.float16))
        return self._op("Cast", [value], to=ir.DataType.FLOAT)

    def _convolved(self, x: ir.Value, weight: ir.Value) -> ir.Value:
        layer = self.q.layer
        return self._op(
            "Conv",
            [x, weight],
            kernel_shape=list(layer.kernel),
            strides=list(layer.strides),
            pads=list(layer.pads),
        )

    # Weights.

    def _codes(self) -> ir.Value:
        """Codes as they lie on disk: int8 [N, K], or int4 [N, G * group]."""
        if self.q.scheme.weight_bits == 8:
            return self._const("codes", self.q.codes)
        return self._const("codes", self._padded().view(np.int8), ir.DataType.INT4)

    def _padded(self) -> npt.NDArray[np.int8]:
        extra = self.q.scales.shape[1] * self.q.group - self.q.codes.shape[1]
        return np.pad(self.q.codes, ((0, 0), (0, extra)))

    def _weight(self) -> ir.Value:
        """Codes times scales as fp32 [N, K]; folded when loaded."""
        codes = self._op("Cast", [self._codes()], to=ir.DataType.FLOAT)
        if self.q.scheme.weight_bits == 8:
            return self._op("Mul", [codes, self._half("scales", self.q.scales)])
        columns = self.q.codes.shape[1]
        count = self.q.scales.shape[1]
        groups = self._op("Reshape", [codes, self._shared(f"shape:0x{count}x-1", [0, count, -1])])
        scaled = self._op("Mul", [groups, self._half("scales", self.q.scales[:, :, None])])
        wide = self._op("Reshape", [scaled, self._shared("shape:0x-1", [0, -1])])
        if count * self.q.group == columns:
            return wide
        ends = [self._shared(f"const:{n}", [n]) for n in (0, columns, 1)]
        return self._op("Slice", [wide, *ends])

    def _int8(self) -> tuple[ir.Value, Array]:
        """The weight as int8 [K, N], and its scales [N]: for 4 bits, each code times its group's
        scale is rounded once more, to a 127th of its output's largest; folded when loaded."""
        if self.q.scheme.weight_bits == 8:
            return self._const("codes", self.q.codes.T), self.q.scales[:, 0].astype(np.float32)
        largest = np.abs(self.q.residual()).max(1)
        scale = np.where(largest > 0, largest / 127, 1).astype(np.float32)
        shape = self._shared("shape:-1x1", [-1, 1])
        column = self._op("Reshape", [self._const("scale", scale), shape])
        ratio = self._op("Div", [self._weight(), column])
        eight = self._op("Cast", [self._op("Round", [ratio])], to=ir.DataType.INT8)
        return self._op("Transpose", [eight], perm=[1, 0]), scale

    # Kinds.

    def _linear(self, x: ir.Value) -> ir.Value:
        act = self.q.activations
        if act.mode in ("dynamic", "static"):
            weight, scale = self._int8()
            scales = self._const("scale", scale)
            if act.mode == "dynamic":
                return self._op("DynamicQuantizeMatMul", [x, weight, scales], _MICROSOFT)
            codes, a_scale, a_zero = self._quantized(x)
            return self._op(
                "MatMulIntegerToFloat", [codes, weight, a_scale, scales, a_zero], _MICROSOFT
            )
        if self.q.scheme.weight_bits == 4:
            return self._nbits(x, _LEVEL_INT8 if act.bits == 8 else _LEVEL_FP32)
        return self._op("MatMul", [x, self._op("Transpose", [self._weight()], perm=[1, 0])])

    def _nbits(self, x: ir.Value, level: int) -> ir.Value:
        rows, columns = self.q.codes.shape
        count = self.q.scales.shape[1]
        shifted = (self._padded().astype(np.int16) + 8).astype(np.uint8)
        packed = (shifted[:, 0::2] | (shifted[:, 1::2] << 4)).reshape(rows, count, -1)
        scales = self._half("scales", self.q.scales)
        return self._op(
            "MatMulNBits",
            [x, self._const("codes", packed), scales],
            _MICROSOFT,
            K=columns,
            N=rows,
            bits=4,
            block_size=self.q.group,
            accuracy_level=level,
        )

    def _conv(self, x: ir.Value) -> ir.Value:
        if self.q.activations.mode not in ("dynamic", "static"):
            kernel_h, kernel_w = self.q.layer.kernel
            shape = [-1, kernel_h, kernel_w, self.q.layer.channels]
            kernel = self._op("Reshape", [self._weight(), self._const("shape", np.array(shape))])
            return self._convolved(x, self._op("Transpose", [kernel], perm=[0, 3, 1, 2]))
        codes, a_scale, a_zero = self._quantized(x)
        patches = self._patches(codes, a_zero)
        weight, scale = self._int8()
        inputs: list[ir.Value | None] = [patches, weight, a_scale, self._const("scale", scale)]
        product = self._op("MatMulIntegerToFloat", [*inputs, a_zero], _MICROSOFT)
        return self._op("Transpose", [product], perm=[0, 3, 1, 2])

    def _quantized(self, x: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
        """u8 codes of the input, scale and zero point (scalars)."""
        act = self.q.activations
        if act.mode == "dynamic":
            node = ir.node("DynamicQuantizeLinear", [x], num_outputs=3)
            node.name = f"{self.prefix}.{len(self.nodes)}"
            for index, out in enumerate(node.outputs):
                out.name = f"{node.name}.{index}"
            self.nodes.append(node)
            return node.outputs[0], node.outputs[1], node.outputs[2]
        assert act.scale is not None and act.zero_point is not None
        if _table(act):
            assert self.step is not None
            none = self._shared("shape:scalar", [])
            scale, zero = (
                self._op("Reshape", [self._op("Gather", [table, self.step], axis=0), none])
                for table in (
                    self._const("act_scale", act.scale),
                    self._const("act_zero", act.zero_point),
                )
            )
        else:
            scale = self._const("act_scale", act.scale.reshape(()))
            zero = self._const("act_zero", act.zero_point.reshape(()))
        return self._op("QuantizeLinear", [x, scale, zero]), scale, zero

    def _patches(self, codes: ir.Value, zero: ir.Value) -> ir.Value:
        """u8 [B, C, H, W] -> [B, H', W', K]: what each output sees, tap by tap (im2col)."""
        layer = self.q.layer
        last = self._op("Transpose", [codes], perm=[0, 2, 3, 1])
        top, left, bottom, right = layer.pads
        if any(layer.pads):
            pads = [0, top, left, 0, 0, bottom, right, 0]
            name = "pads:" + "x".join(map(str, pads))
            last = self._op("Pad", [last, self._shared(name, pads), zero])
        kernel_h, kernel_w = layer.kernel
        if (kernel_h, kernel_w) == (1, 1) and layer.strides == (1, 1):
            return last
        axes, steps = self._shared("axes:1x2", [1, 2]), list(layer.strides)
        taps: list[ir.Value | None] = []
        for i in range(kernel_h):
            for j in range(kernel_w):
                ends = [i - kernel_h + 1 or _END, j - kernel_w + 1 or _END]
                names = (f"start:{i}x{j}", f"end:{kernel_h - i}x{kernel_w - j}")
                name = "steps:" + "x".join(map(str, steps))
                bounds = [self._shared(names[0], [i, j]), self._shared(names[1], ends)]
                taps.append(self._op("Slice", [last, *bounds, axes, self._shared(name, steps)]))
        return taps[0] if len(taps) == 1 and taps[0] else self._op("Concat", taps, axis=3)

    def _simulated(self, x: ir.Value) -> ir.Value:
        """x rounded to 4 bits, a scale per group of channels of each row or pixel."""
        layer, group = self.q.layer, self.q.activations.group
        high = np.float32(2 ** (self._bits() - 1) - 1)
        count = layer.channels // group
        shape = [-1, count, group] if layer.kind == "linear" else [0, count, group, -1]
        axis = 2
        wide = self._op("Reshape", [x, self._shared("shape:" + "x".join(map(str, shape)), shape)])
        largest = self._op(
            "ReduceMax", [self._op("Abs", [wide]), self._shared(f"axis:{axis}", [axis])]
        )
        least = self._op("Max", [largest, _constant(self.model, "const:least", np.float32(1e-7))])
        scale = self._op("Div", [least, _constant(self.model, f"const:{high}", high)])
        rounded = self._op("Mul", [self._op("Round", [self._op("Div", [wide, scale])]), scale])
        return self._op("Reshape", [rounded, self._op("Shape", [x])])

    def _embedding(self) -> ir.Value:
        """Rows of codes times their scales."""
        indices = self.node.inputs[1]
        assert indices is not None
        codes = self._op("Gather", [self._const("codes", self.q.codes), indices], axis=0)
        scales = self._op("Gather", [self._const("scales", self.q.scales), indices], axis=0)
        wide = [self._op("Cast", [part], to=ir.DataType.FLOAT) for part in (codes, scales)]
        return self._op("Mul", [wide[0], wide[1]])
