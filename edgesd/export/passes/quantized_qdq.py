"""Quantized layers as TensorRT takes them: explicit, symmetric Q/DQ in a strongly typed graph.

| layer, scheme           | becomes                                                              |
|-------------------------|----------------------------------------------------------------------|
| conv and linear w8a8    | Q and DQ of the input, DQ of int8 weights per output                 |
| conv and linear w8a16   | DQ of int8 weights per output                                        |
| linear w4a16, w4a8      | DQ of int4 weights in blocks along K; the input isn't quantized      |
| the same, odd outputs   | as w8a16: each code times its scale is rounded again, to 8 bits      |
| conv w4a8, w4a16        | as w8a8, w8a16, rounded again likewise                               |
| embedding               | DQ of int8 rows, then the Gather as it was                           |
| anything a4             | refused                                                              |

Behind its DQs each node stays what it was, with its bias. A branch is two more products of the
same (smoothed, unquantized) input, added.

What TensorRT asks for, in the words of its parser and builder: zero points of zero and int8 or int4
codes; positive scales; whole blocks, along one of the last two axes, so that convs have none; an
even last dimension for int4; nothing but a DQ after a quantized constant. INT4 is for weights only
("Working with Quantized Types" of its documentation). A DQ's scale has the activations' type:
TensorRT issue 4832. Opset 21 is newer than what TensorRT 10.3 names as its newest; the parser of
10.1 has int4 and blocks already and refuses no opset for being new (onnx-tensorrt 10.1-GA,
onnxOpImporters.cpp and ModelImporter.cpp).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from edgesd.errors import EdgesdError
from edgesd.export.passes.lowering import (
    LayerLowering,
    Made,
    QuantizedPass,
    check_opset_21,
    shared_constant,
)
from edgesd.export.passes.values import input_of, tensor_of
from edgesd.export.quantize.layers import Layer, QuantizedLayer, weight_of
from edgesd.runtime.arrays import Array
from edgesd.spec.scheme import Scheme

OPSET_INT4 = 21
"""The oldest in which DequantizeLinear takes int4 and blocks."""

MAX_BLOCK = 128
"""Larger groups are divided: blocks of 16 to 128 are known to build."""

_TYPES = {ir.DataType.FLOAT: np.float32, ir.DataType.FLOAT16: np.float16}


class QuantizedQdq(QuantizedPass):
    """Replaces the weights and inputs of the nodes of `layers` (by node name).

    Scales and branches are of the type that the layer's weight had, fp32 or fp16, which is that of
    its input. Sets the opset to 21 if a weight is int4, and leaves it otherwise.
    """

    def requires(self, model: ir.Model) -> None:
        super().requires(model)
        if _any_int4(self.layers):
            check_opset_21(model)

    def check_layer(self, name: str, quantized: QuantizedLayer, weight: ir.TensorProtocol) -> None:
        """The weight is of a float type, and the input has a range if it needs one."""
        if weight.dtype not in _TYPES:
            raise EdgesdError(
                f"{name.partition(': ')[0]}: the weight of {name.partition(': ')[2]} is "
                f"{weight.dtype}: expected FLOAT or FLOAT16"
            )
        _check_inputs(name, quantized)

    def call(self, model: ir.Model) -> bool:
        if _any_int4(self.layers):
            opset = model.graph.opset_imports.get("", 0)
            model.graph.opset_imports[""] = max(opset, OPSET_INT4)
        return super().call(model)

    def lowering(
        self, model: ir.Model, node: ir.Node, quantized: QuantizedLayer, prefix: str
    ) -> LayerLowering:
        return _Lowering(model, node, quantized, prefix, self.made)

    def ensures(self, model: ir.Model) -> None:
        """No float weight of a quantized layer is left; new values are finite, scales positive."""
        super().ensures(model)
        for name, value in model.graph.initializers.items():
            if ":" not in name or not name.endswith("scale") or value.const_value is None:
                continue
            if not (value.const_value.numpy() > 0).all():
                raise EdgesdError(f"initializer {name} holds values that are out of range")


def _check_inputs(name: str, quantized: QuantizedLayer) -> None:
    act = quantized.activations
    if act.bits == 4:
        raise EdgesdError(
            f"{name} has 4-bit activations ({quantized.scheme}), which TensorRT doesn't have: "
            "expected w8a8, w8a16, w4a16 or w4a8"
        )
    if act.mode == "dynamic" or (act.mode == "static" and act.symmetric_scale is None):
        raise EdgesdError(
            f"{name} has no symmetric range of its input (mode {act.mode}), and TensorRT takes "
            "nothing else: quantize with static ranges"
        )
    if quantized.rank and quantized.layer.kind == "embedding":
        raise EdgesdError(f"{name} is an embedding with a branch: expected one without")


def stored_bytes(layer: Layer, scheme: Scheme) -> int:
    """Bytes of a layer's codes, scales and branch in its graph, arithmetic in 16 bits."""
    codes = layer.rows * layer.columns + 2 * layer.rows
    if _int4(layer, scheme):
        block = _block(scheme.group)
        count = -(-layer.columns // block)
        codes = layer.rows * count * block // 2 + 2 * layer.rows * count
    rank = 0 if layer.kind == "embedding" else min(scheme.rank, layer.rows, layer.columns)
    return codes + 2 * rank * (layer.rows + layer.columns)


def _int4(layer: Layer, scheme: Scheme) -> bool:
    """Whether the weight stays in 4 bits."""
    return scheme.weight_bits == 4 and layer.kind == "linear" and layer.rows % 2 == 0


def _block(group: int) -> int:
    """Columns that share a scale of 4-bit codes."""
    return min(group, MAX_BLOCK)


def _any_int4(layers: Mapping[str, QuantizedLayer]) -> bool:
    return any(_int4(quantized.layer, quantized.scheme) for quantized in layers.values())


class _Lowering(LayerLowering):
    def __init__(
        self, model: ir.Model, node: ir.Node, quantized: QuantizedLayer, prefix: str, made: Made
    ) -> None:
        super().__init__(model, node, quantized, prefix, made)
        weight = weight_of(node)
        assert weight is not None
        self.weight, self.dtype = weight, _TYPES[tensor_of(weight).dtype]

    def output(self) -> ir.Value:
        source = input_of(self.node, 0)
        weight, inputs = self._weight(), list(self.node.inputs)
        inputs[inputs.index(self.weight)] = weight
        x = source
        if self.q.layer.kind != "embedding":  # its input 0 is the weight
            x = self.smoothed(source, self.dtype)
            inputs[0] = self._quantized(x)
        (out,) = self.ops(self.node.op_type, inputs, self.node.attributes)
        return self.op("Add", [out, self._branch(x)]) if self.q.rank else out

    def _float(self, name: str, array: Array) -> ir.Value:
        return self.const(name, array.astype(self.dtype))

    # The input.

    def _quantized(self, x: ir.Value) -> ir.Value:
        """What the product takes: x, of whole blocks for int4, rounded to 8 bits if static."""
        if _int4(self.q.layer, self.q.scheme):
            columns = self.q.layer.columns
            return self._padded(x, -columns % _block(self.q.group))
        if self.q.activations.mode != "static":
            return x
        assert self.q.activations.symmetric_scale is not None
        least = np.finfo(self.dtype).smallest_subnormal
        step = np.maximum(self.q.activations.symmetric_scale.reshape(()).astype(self.dtype), least)
        scale = self.const("act_scale", np.asarray(step))
        # The zero point makes the codes int8: without one they would be uint8.
        zero = shared_constant(self.model, "const:zero8", np.array(0, np.int8))
        codes = self.op("QuantizeLinear", [x, scale, zero])
        return self.op("DequantizeLinear", [codes, scale, zero])

    def _padded(self, x: ir.Value, extra: int) -> ir.Value:
        """x [..., K] -> [..., K + extra]. Padding x leaves the DQ next to the product."""
        if not extra:
            return x
        pads = shared_constant(self.model, f"pads:{extra}", np.array([0, extra], np.int64))
        axes = shared_constant(self.model, "axes:-1", np.array([-1], np.int64))
        return self.op("Pad", [x, pads, None, axes])

    # The weight.

    def _weight(self) -> ir.Value:
        """The dequantized weight in the node's layout."""
        if _int4(self.q.layer, self.q.scheme):
            return self._blocks()
        codes, scale = self._int8()
        layer = self.q.layer
        if layer.kind == "conv":
            codes = self.kernel(codes)
        axis = 1 if self._transposed() else 0
        codes = codes.T if self._transposed() else codes
        inputs: list[ir.Value | None] = [
            self.codes("codes", codes.shape, ir.DataType.INT8, lambda: codes),
            self._float("scale", scale),
        ]
        return self.op("DequantizeLinear", inputs, axis=axis)

    def _transposed(self) -> bool:
        """Whether the node has its weight as [K, N]."""
        if self.node.op_type == "Gemm":
            return "transB" not in self.node.attributes or not self.node.attributes["transB"].value
        return self.node.op_type == "MatMul"

    def _int8(self) -> tuple[Array, Array]:
        """Codes int8 [N, K] and scales [N]: for 4 bits, each code times its group's scale is
        rounded once more, to a 127th of its output's largest."""
        if self.q.scheme.weight_bits == 8:
            return self.q.codes, self.q.scales[:, 0]
        residual = self.q.residual()
        scale = (np.abs(residual).max(1) / 127).astype(self.dtype)
        scale = np.where(scale > 0, scale, self.dtype(1))
        ratio = np.round(residual / scale.astype(np.float32)[:, None])
        return np.clip(ratio, -127, 127).astype(np.int8), scale

    def _blocks(self) -> ir.Value:
        """int4 codes [K', N] and scales [K' / block, N], or both transposed; K' is K padded."""
        block, columns = _block(self.q.group), self.q.layer.columns
        count = -(-columns // block)
        turned = self._transposed()

        def padded() -> Array:
            codes = np.pad(self.q.codes, ((0, 0), (0, count * block - columns)))
            return codes.T if turned else codes

        shape = (self.q.layer.rows, count * block)
        scales = np.repeat(self.q.scales, self.q.group // block, axis=1)[:, :count]
        inputs: list[ir.Value | None] = [
            self.codes("codes", shape[::-1] if turned else shape, ir.DataType.INT4, padded),
            self._float("scale", scales.T if turned else scales),
        ]
        axis = 0 if turned else 1
        return self.op("DequantizeLinear", inputs, axis=axis, block_size=block)

    # The branch.

    def _branch(self, x: ir.Value) -> ir.Value:
        """up (down x)."""
        assert self.q.down is not None and self.q.up is not None
        if self.q.layer.kind == "linear":
            low = self.op("MatMul", [x, self._float("down", self.q.down.T)])
            return self.op("MatMul", [low, self._float("up", self.q.up.T)])
        down = self._float("down", self.kernel(self.q.down))
        (low,) = self.ops("Conv", [x, down], self.node.attributes)
        up = self._float("up", self.q.up[:, :, None, None])
        return self.op("Conv", [low, up], kernel_shape=[1, 1])
