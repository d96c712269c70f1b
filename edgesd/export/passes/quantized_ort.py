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
alone ONNX Runtime folds when it loads the graph (DequantizeLinear only where the session has
"session.disable_quant_qdq"): 4-bit codes of convolutions are 4 bits on disk and int8 or fp32 in
memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import onnx_ir as ir

from edgesd.errors import EdgesdError
from edgesd.export.passes.fp16_weights import MAX_FP16
from edgesd.export.passes.lowering import (
    LayerLowering,
    Made,
    QuantizedPass,
    Timesteps,
    check_opset_21,
    shared_constant,
)
from edgesd.export.passes.values import array_of, input_of
from edgesd.export.quantize.layers import Activations, Codes, PackedCodes, QuantizedLayer, pack_int4
from edgesd.runtime.arrays import Array

OPSET = 21
"""The oldest with int4 and with blocks."""

_MICROSOFT = "com.microsoft"
_LEVEL_FP32, _LEVEL_INT8 = 1, 4
_END = np.iinfo(np.int64).max


class QuantizedOrt(QuantizedPass):
    """Replaces the nodes of `layers` (by node name). Sets the opset to 21: what changed since 20
    is which types operators take.

    timesteps: those that static ranges were recorded at, if the graph has such an input.
    """

    def __init__(self, layers: Mapping[str, QuantizedLayer], timesteps: Timesteps | None) -> None:
        super().__init__(layers)
        self.timesteps = timesteps
        self._step: ir.Value | None = None

    def requires(self, model: ir.Model) -> None:
        super().requires(model)
        check_opset_21(model)

    def call(self, model: ir.Model) -> bool:
        model.graph.opset_imports[""] = OPSET
        model.graph.opset_imports[_MICROSOFT] = 1
        if any(_table(q.activations) for q in self.layers.values()):
            self._step = _step_index(model, self.timesteps)
        return super().call(model)

    def lowering(
        self, model: ir.Model, node: ir.Node, quantized: QuantizedLayer, prefix: str
    ) -> LayerLowering:
        return OrtLowering(model, node, quantized, prefix, self.made, self._step)


def _table(act: Activations) -> bool:
    return act.mode == "static" and act.scale is not None and len(act.scale) > 1


def _step_index(model: ir.Model, timesteps: Timesteps | None) -> ir.Value:
    """The index [1] of the recorded timestep that is nearest to the graph's input."""
    inputs = {value.name: value for value in model.graph.inputs}
    value = None if timesteps is None else inputs.get(timesteps.input)
    if value is None or timesteps is None:
        raise EdgesdError(f"{model.graph.name} has ranges per timestep, and no timestep input")
    recorded = shared_constant(model, "timesteps:recorded", timesteps.recorded.astype(np.float32))
    apart = ir.node("Sub", [recorded, value], name="timesteps/Sub")
    size = ir.node("Abs", apart.outputs, name="timesteps/Abs")
    nearest = ir.node("ArgMin", size.outputs, {"axis": 0, "keepdims": 1}, name="timesteps/ArgMin")
    nodes = [apart, size, nearest]
    for node in nodes:
        node.outputs[0].name = f"{node.name}:out"
    model.graph.insert_before(next(iter(model.graph)), nodes)
    return nearest.outputs[0]


class OrtLowering(LayerLowering):
    """Writes one layer. step: index of the recorded timestep, where ranges depend on it."""

    def __init__(
        self,
        model: ir.Model,
        node: ir.Node,
        quantized: QuantizedLayer,
        prefix: str,
        made: Made,
        step: ir.Value | None,
    ) -> None:
        super().__init__(model, node, quantized, prefix, made)
        self.step = step

    def output(self) -> ir.Value:
        if self.q.layer.kind == "embedding":
            return self._embedding()
        x = self.smoothed(input_of(self.node, 0))
        low = self._simulated(x) if self.q.activations.bits == 4 else x
        out = self._linear(low) if self.q.layer.kind == "linear" else self._conv(low)
        if self.q.rank:
            out = self.op("Add", [out, self.branch(x)])
        return self._biased(out)

    # What is common to all kinds.

    def _shared(self, name: str, values: list[int]) -> ir.Value:
        return shared_constant(self.model, name, np.array(values, np.int64))

    def bias(self) -> ir.Value | None:
        """The node's own bias [N], if it has one: a MatMul's is an Add after it."""
        has = self.node.op_type in ("Conv", "Gemm") and len(self.node.inputs) > 2
        return self.node.inputs[2] if has else None

    def _biased(self, out: ir.Value) -> ir.Value:
        bias = self.bias()
        if bias is None:
            return out
        if self.q.layer.kind == "conv":
            bias = self.const("bias", self.per_channel(array_of(bias)))
        return self.op("Add", [out, bias])

    def branch(self, x: ir.Value) -> ir.Value:
        """up (down x)."""
        low, up = self.branch_factors(x)
        if self.q.layer.kind == "linear":
            return self.op("MatMul", [low, up])
        return self.op("Conv", [low, up], kernel_shape=[1, 1])

    def branch_factors(self, x: ir.Value) -> tuple[ir.Value, ir.Value]:
        """down x, and up."""
        assert self.q.down is not None and self.q.up is not None
        if self.q.layer.kind == "linear":
            low = self.op("MatMul", [x, self.factor("down", self.q.down.T, x)])
            return low, self.factor("up", self.q.up.T, low)
        low = self._convolved(x, self.factor("down", self.kernel(self.q.down), x))
        return low, self.factor("up", self.q.up[:, :, None, None], low)

    def factor(self, name: str, array: Array, after: ir.Value) -> ir.Value:
        """A branch's factor, as fp32, for a product of `after`."""
        return self._fp16(name, array)

    def _fp16(self, name: str, array: Array) -> ir.Value:
        value = self.const(name, array.astype(np.float16))
        return self.op("Cast", [value], to=ir.DataType.FLOAT)

    def _convolved(self, x: ir.Value, weight: ir.Value) -> ir.Value:
        layer = self.q.layer
        return self.op(
            "Conv",
            [x, weight],
            kernel_shape=list(layer.kernel),
            strides=list(layer.strides),
            pads=list(layer.pads),
        )

    # Weights. What ONNX Runtime folds it keeps until all is folded: each weight passes through as
    # few operators as can be, since each leaves a copy behind.

    def _dequantized(self, form: Callable[[Codes], Array], scales: Array, axis: int) -> ir.Value:
        """Codes, of that form, times scales as fp32: scales of outputs along `axis`, or of
        groups."""
        four = self.q.scheme.weight_bits == 4
        values: list[ir.Value | None] = [
            self.matrix(form, ir.DataType.INT4 if four else ir.DataType.INT8),
            self._fp16("scales", scales),
        ]
        attributes = {"axis": axis, "block_size": self.q.group} if four else {"axis": axis}
        return self.ops("DequantizeLinear", values, attributes)[0]

    def _matrix(self) -> ir.Value:
        """The weight [K, N] of a linear in fp32."""
        return self._dequantized(np.transpose, self.q.scales[:, 0], 1)

    def _kernel(self) -> ir.Value:
        """The weight [N, C, kh, kw] of a convolution in fp32."""
        layer, scales = self.q.layer, self.q.scales
        if self.q.scheme.weight_bits == 8:
            return self._dequantized(self.kernel, scales[:, 0], 0)
        if layer.channels % self.q.group == 0:  # no group is of two taps
            wide = scales.reshape(layer.rows, *layer.kernel, -1).transpose(0, 3, 1, 2)
            return self._dequantized(self.kernel, wide, 1)
        rows = self._dequantized(np.asarray, scales, 1)
        taps = self.const("shape", np.array([-1, *layer.kernel, layer.channels]))
        return self.op("Transpose", [self.op("Reshape", [rows, taps])], perm=[0, 3, 1, 2])

    def scale_of_127(self) -> Array:
        """Scales [N] of a weight of int8: a 127th of each output's largest."""
        largest = np.abs(self.q.residual()).max(1)
        scale: Array = np.where(largest > 0, largest / 127, 1).astype(np.float32)
        return scale

    def codes_of_8_bits(self) -> tuple[ir.Value, ir.Value | None, Array]:
        """What makes a weight of int8 [K, N]: codes [K, N], and the scales [N] of its outputs. For
        4 bits each code times its group's scale is rounded once more, to a 127th of its output's
        largest: codes of 4 bits over steps [groups, N] are those of 8."""
        if self.q.scheme.weight_bits == 8:
            return self.matrix(np.transpose), None, self.q.scales[:, 0].astype(np.float32)
        scale = self.scale_of_127()
        with np.errstate(divide="ignore"):
            steps = scale[:, None] / self.q.scales.astype(np.float32)
        # A code that isn't 0 makes at most 127 steps: what is out of range belongs to zeros.
        steps = steps.clip(1 / 256, MAX_FP16).astype(np.float16)
        codes = self.matrix(np.transpose, ir.DataType.INT4)
        return codes, self.const("steps", steps.T), scale

    def _int8(self) -> tuple[ir.Value, Array]:
        """The weight as int8 [K, N], and its scales [N]."""
        codes, steps, scale = self.codes_of_8_bits()
        if steps is None:
            return codes, scale
        eight = self.op(
            "QuantizeLinear",
            [self.op("Cast", [codes], to=ir.DataType.FLOAT16), steps],
            axis=0,
            block_size=self.q.group,
            output_dtype=ir.DataType.INT8,
        )
        return eight, scale

    # Kinds.

    def _linear(self, x: ir.Value) -> ir.Value:
        act = self.q.activations
        if act.mode in ("dynamic", "static"):
            weight, scale = self._int8()
            scales = self.const("scale", scale)
            if act.mode == "dynamic":
                return self.op("DynamicQuantizeMatMul", [x, weight, scales], _MICROSOFT)
            codes, a_scale, a_zero = self._quantized(x)
            return self.op(
                "MatMulIntegerToFloat", [codes, weight, a_scale, scales, a_zero], _MICROSOFT
            )
        if self.q.scheme.weight_bits == 4:
            return self._nbits(x, _LEVEL_INT8 if act.bits == 8 else _LEVEL_FP32)
        return self.op("MatMul", [x, self._matrix()])

    def blocks(self) -> tuple[ir.Value, ir.Value]:
        """A linear's 4-bit weight: bytes [N, groups, group / 2], and scales [N, groups]."""
        rows, columns = self.q.stored.shape
        count, group = self.q.scales.shape[1], self.q.group

        def packed() -> Array:
            # The kernel takes codes from 0 to 15: the sign bit turned over.
            if isinstance(self.q.stored, PackedCodes) and columns == count * group:
                signed = self.q.stored.packed
            else:
                codes = np.pad(self.q.codes, ((0, 0), (0, count * group - columns)))
                signed = pack_int4(codes)
            unsigned: Array = signed ^ np.uint8(0x88)
            return unsigned.reshape(rows, count, -1)

        codes = self.codes("codes", (rows, count, group // 2), ir.DataType.UINT8, packed)
        return codes, self.const("scales", self.q.scales)

    def _nbits(self, x: ir.Value, level: int) -> ir.Value:
        rows, columns = self.q.stored.shape
        codes, scales = self.blocks()
        return self.op(
            "MatMulNBits",
            [x, codes, self.op("Cast", [scales], to=ir.DataType.FLOAT)],
            _MICROSOFT,
            K=columns,
            N=rows,
            bits=4,
            block_size=self.q.group,
            accuracy_level=level,
        )

    def _conv(self, x: ir.Value) -> ir.Value:
        if self.q.activations.mode not in ("dynamic", "static"):
            return self._convolved(x, self._kernel())
        codes, a_scale, a_zero = self._quantized(x)
        patches = self._patches(codes, a_zero)
        weight, scale = self._int8()
        inputs: list[ir.Value | None] = [patches, weight, a_scale, self.const("scale", scale)]
        product = self.op("MatMulIntegerToFloat", [*inputs, a_zero], _MICROSOFT)
        return self.op("Transpose", [product], perm=[0, 3, 1, 2])

    def _quantized(self, x: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
        """u8 codes of the input, scale and zero point (scalars)."""
        act = self.q.activations
        if act.mode == "dynamic":
            codes, scale, zero = self.ops("DynamicQuantizeLinear", [x], {}, outputs=3)
            return codes, scale, zero
        assert act.scale is not None and act.zero_point is not None
        if _table(act):
            assert self.step is not None
            none = self._shared("shape:scalar", [])
            scale, zero = (
                self.op("Reshape", [self.op("Gather", [table, self.step], axis=0), none])
                for table in (
                    self.const("act_scale", act.scale),
                    self.const("act_zero", act.zero_point),
                )
            )
        else:
            scale = self.const("act_scale", act.scale.reshape(()))
            zero = self.const("act_zero", act.zero_point.reshape(()))
        return self.op("QuantizeLinear", [x, scale, zero]), scale, zero

    def _patches(self, codes: ir.Value, zero: ir.Value) -> ir.Value:
        """u8 [B, C, H, W] -> [B, H', W', K]: what each output sees, tap by tap (im2col)."""
        layer = self.q.layer
        last = self.op("Transpose", [codes], perm=[0, 2, 3, 1])
        top, left, bottom, right = layer.pads
        if any(layer.pads):
            pads = [0, top, left, 0, 0, bottom, right, 0]
            name = "pads:" + "x".join(map(str, pads))
            last = self.op("Pad", [last, self._shared(name, pads), zero])
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
                taps.append(self.op("Slice", [last, *bounds, axes, self._shared(name, steps)]))
        return taps[0] if len(taps) == 1 and taps[0] else self.op("Concat", taps, axis=3)

    def _simulated(self, x: ir.Value) -> ir.Value:
        """x rounded to 4 bits, a scale per group of channels of each row or pixel. Where a shift
        makes it positive, codes are unsigned, and the layer's bias would take the shift back."""
        layer, group, shift = self.q.layer, self.q.activations.group, self.q.activations.shift
        if shift is not None:
            offset = self.const("shift", self.per_channel(shift))
            x = self.op("Add", [x, offset])
        count = layer.channels // group
        shape = [-1, count, group] if layer.kind == "linear" else [0, count, group, -1]
        wide = self.op("Reshape", [x, self._shared("shape:" + "x".join(map(str, shape)), shape)])
        largest = self.op("ReduceMax", [self.op("Abs", [wide]), self._shared("axis:2", [2])])
        least = shared_constant(self.model, "const:least", np.float32(1e-7))
        steps = 7.0 if shift is None else 15.0
        high = shared_constant(self.model, f"const:{steps}", np.float32(steps))
        scale = self.op("Div", [self.op("Max", [largest, least]), high])
        rounded = self.op("Mul", [self.op("Round", [self.op("Div", [wide, scale])]), scale])
        out = self.op("Reshape", [rounded, self.op("Shape", [x])])
        return out if shift is None else self.op("Sub", [out, offset])

    def _embedding(self) -> ir.Value:
        """Rows of codes times their scales."""
        indices = input_of(self.node, 1)
        codes = self.op("Gather", [self.matrix(), indices], axis=0)
        scales = self.op("Gather", [self.const("scales", self.q.scales), indices], axis=0)
        wide = [self.op("Cast", [part], to=ir.DataType.FLOAT) for part in (codes, scales)]
        return self.op("Mul", [wide[0], wide[1]])
