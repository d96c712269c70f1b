"""Quantized layers and attention as edgesd's own kernels (edgesd/kernels) run them.

| layer                                  | becomes                                             |
|----------------------------------------|-----------------------------------------------------|
| linear with 8-bit inputs               | QuantLinear: each row of the input has a format     |
| convolution with 8-bit inputs          | QuantConv: each image of the input has a format   |
| attention that isn't causal            | QuantAttention, in 8 bits                           |
| anything else                          | what QuantizedOrt makes of it                       |

Weights lie in the file as QuantizedOrt writes them, so that both graphs of a component share one
file. What follows a layer (bias, residual, the offset of a timestep, GEGLU, ReLU) becomes
part of it: it is added while the output is still in the registers. What comes before a convolution
(group normalization, SiLU, upsampling) is computed while the input is brought to 8 bits.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes import common

from edgesd.export.passes import Pass
from edgesd.export.passes.group_norm import group_norm
from edgesd.export.passes.lowering import LayerLowering, replace_node
from edgesd.export.passes.quantized_ort import OrtLowering, QuantizedOrt
from edgesd.export.quantize.layers import Layer, QuantizedLayer

DOMAIN = "edgesd"
LINEAR, CONV, ATTENTION = "QuantLinear", "QuantConv", "QuantAttention"

MAX_HEAD = 160
"""Widest head that the kernel of attention takes."""

MAX_K = 1 << 16
"""Values of a product of 8 bits whose sum 32 bits hold."""

_ROWS_K_BY_N, _BLOCKS_OF_N = 0, 1
_BIAS, _RESIDUAL, _OFFSET, _GAMMA, _BETA = 4, 5, 6, 7, 8
_INPUTS = {LINEAR: 6, CONV: 9}

PARTS = ("behind", "before", "attention")
"""What else becomes part of the kernels: see OwnKernels."""


def has_kernels(model: ir.Model) -> bool:
    """Whether a graph has operators of our own."""
    return any(node.domain == DOMAIN for node in model.graph)


class OwnKernels(QuantizedOrt):
    """As QuantizedOrt, with kernels of our own where there is one.

    parts: what else becomes part of the kernels, of PARTS. "behind": sums and GEGLU behind layers.
    "before": what a convolution's input goes through. "attention": heads in 8 bits, a further loss.
    """

    def __init__(
        self,
        layers: Mapping[str, QuantizedLayer],
        timesteps: npt.NDArray[np.float32] | None,
        parts: Collection[str] = PARTS,
    ) -> None:
        super().__init__(layers, timesteps)
        self.parts = parts

    def call(self, model: ir.Model) -> bool:
        """See the class."""
        model.graph.opset_imports[DOMAIN] = 1
        super().call(model)
        for part, rewrite in _REWRITES.items():
            if part in self.parts:
                rewrite()(model)
        common.RemoveUnusedNodesPass()(model)
        if not has_kernels(model):
            del model.graph.opset_imports[DOMAIN]
        return True

    def lowering(
        self, model: ir.Model, node: ir.Node, quantized: QuantizedLayer, prefix: str
    ) -> LayerLowering:
        """See QuantizedPass."""
        layer = quantized.layer
        if layer.kind == "embedding" or quantized.activations.bits != 8 or not _in_range(layer):
            return super().lowering(model, node, quantized, prefix)
        return _Kernel(model, node, quantized, prefix, None)


def _in_range(layer: Layer) -> bool:
    """Whether the operators take a layer of this shape (kernels/ops.cpp): all real ones are."""
    pads = zip(layer.pads, 2 * layer.kernel, strict=True) if layer.kind == "conv" else ()
    return layer.columns <= MAX_K and all(pad <= size for pad, size in pads)


class _Kernel(OrtLowering):
    """One layer; its branch is what the kernel adds to its output."""

    def output(self) -> ir.Value:
        q, layer = self.q, self.q.layer
        source = self.node.inputs[0]
        assert source is not None
        x = self.smoothed(source)
        inputs: list[ir.Value | None] = [x, *self._weight(), self.bias()]
        if q.rank:
            inputs.append(self.branch(x))
        blocks = layer.kind == "linear" and q.activations.mode == "group"
        attributes = {
            "bits": q.scheme.weight_bits,
            "group": q.group if q.scheme.weight_bits == 4 else layer.columns,
            "layout": _BLOCKS_OF_N if blocks else _ROWS_K_BY_N,
            "N": layer.rows,
            "K": layer.columns,
        }
        if layer.kind == "linear":
            return self.op(LINEAR, inputs, DOMAIN, gated=0, **attributes)
        return self.op(
            CONV,
            inputs,
            DOMAIN,
            kernel_shape=list(layer.kernel),
            strides=list(layer.strides),
            pads=list(layer.pads),
            groups=1,
            epsilon=0.0,
            silu=0,
            relu=0,
            upsample=1,
            **attributes,
        )

    def _weight(self) -> list[ir.Value | None]:
        """Codes, scale and steps, as QuantizedOrt has them."""
        if self.q.layer.kind == "linear" and self.q.activations.mode == "group":
            codes, steps = self.blocks()
            return [codes, self.const("scale", self.scale_of_127()), steps]
        codes, steps_or_none, scale = self.codes_of_8_bits()
        return [codes, self.const("scale", scale), steps_or_none]


class _Behind(Pass):
    """Sums behind our layers, GEGLU and ReLU become inputs and attributes of the layers."""

    def call(self, model: ir.Model) -> bool:
        """See the class."""
        changed = False
        for node in list(model.graph):
            if node.domain == DOMAIN and node.op_type in _INPUTS:
                while (after := self._sum(model, node)) is not None:
                    node, changed = after, True
                changed |= self._gate(model, node)
                changed |= node.op_type == CONV and self._relu(model, node)
        return changed

    def _relu(self, model: ir.Model, node: ir.Node) -> bool:
        """A Relu that alone reads a convolution."""
        out = node.outputs[0]
        uses = list(out.uses())
        if len(uses) != 1 or uses[0].node.op_type != "Relu" or out.is_graph_output():
            return False
        _replace(model, uses[0].node, node, list(node.inputs), {"relu": 1})
        return True

    def _sum(self, model: ir.Model, node: ir.Node) -> ir.Node | None:
        """The layer with the sum behind it as an input of its own; None where there is none."""
        out = node.outputs[0]
        uses = list(out.uses())
        if len(uses) != 1 or uses[0].node.op_type != "Add" or out in model.graph.outputs:
            return None
        add = uses[0].node
        other = next((v for v in add.inputs if v is not out), None)
        if other is None:
            return None
        place = _place(node, out, other)
        inputs = list(node.inputs) + [None] * (_INPUTS[node.op_type] - len(node.inputs))
        if place is None or inputs[place] is not None:
            return None
        inputs[place] = other
        return _replace(model, add, node, inputs, {})

    def _gate(self, model: ir.Model, node: ir.Node) -> bool:
        """GEGLU: the halves of a linear's outputs, left * gelu(right)."""
        out = node.outputs[0]
        uses = list(out.uses())
        if node.op_type != LINEAR or len(uses) != 1 or uses[0].node.op_type != "Split":
            return False
        split = uses[0].node
        if len(split.outputs) != 2 or (len(node.inputs) > _RESIDUAL and node.inputs[_RESIDUAL]):
            return False
        left, right = split.outputs
        gelus, products = list(right.uses()), list(left.uses())
        if len(gelus) != 1 or len(products) != 1:
            return False
        gelu, product = gelus[0].node, products[0].node
        if gelu.op_type != "Gelu" or product.op_type != "Mul":
            return False
        exact = gelu.attributes.get("approximate")
        if exact is not None and exact.as_string() != "none":
            return False
        if gelu.outputs[0] not in product.inputs or len(gelu.outputs[0].uses()) != 1:
            return False
        _replace(model, product, node, list(node.inputs), {"gated": 1})
        return True


class _Before(Pass):
    """What only a convolution of ours reads, it computes."""

    def call(self, model: ir.Model) -> bool:
        """See the class."""
        convs = [node for node in model.graph if (node.domain, node.op_type) == (DOMAIN, CONV)]
        changed = [_fuse_before(node) for node in convs]
        return any(changed)


def _fuse_before(conv: ir.Node) -> bool:
    """Let a convolution do what its input alone goes through: upsampling by 2, SiLU and group
    normalization, as far as they are there in this order."""
    before = conv.inputs[0]
    resize = _only(before, "Resize")
    if resize is not None and _doubles(resize):
        conv.attributes["upsample"] = ir.AttrInt64("upsample", 2)
        _take(conv, resize.inputs[0], [resize])
    gated = _only(conv.inputs[0], "Mul")
    value, sigmoid = (None, None) if gated is None else _gate_of(gated)
    if gated is not None and value is not None and sigmoid is not None:
        conv.attributes["silu"] = ir.AttrInt64("silu", 1)
        _take(conv, value, [gated, sigmoid])
    _normalize(conv)
    return conv.inputs[0] is not before


def _take(conv: ir.Node, value: ir.Value | None, gone: list[ir.Node]) -> None:
    """Let a convolution read `value`, and remove what lay between: it would count as a reader."""
    conv.replace_input_with(0, value)
    for node in gone:
        assert node.graph is not None
        node.graph.remove(node, safe=True)


def _normalize(conv: ir.Node) -> None:
    """Let a convolution normalize, if it alone reads a group normalization."""
    value = conv.inputs[0]
    if value is None or len(list(value.uses())) != 1 or value.is_graph_output():
        return
    norm = group_norm(value.producer())
    if norm is None:
        return
    inputs = list(conv.inputs) + [None] * (_INPUTS[CONV] - len(conv.inputs))
    conv.resize_inputs(len(inputs))
    conv.replace_input_with(0, norm.source)
    conv.replace_input_with(_GAMMA, norm.gamma)
    conv.replace_input_with(_BETA, norm.beta)
    conv.attributes["groups"] = ir.AttrInt64("groups", norm.groups)
    conv.attributes["epsilon"] = ir.AttrFloat32("epsilon", norm.epsilon)


def _only(value: ir.Value | None, op: str) -> ir.Node | None:
    """The node of type `op` that makes `value`, if it has no other reader than one."""
    node = None if value is None else value.producer()
    if node is None or node.op_type != op or value is None or value.is_graph_output():
        return None
    if len(list(value.uses())) != 1:
        return None
    return node


def _doubles(resize: ir.Node) -> bool:
    """Whether a Resize makes four equal pixels of each."""
    scales = resize.inputs[2] if len(resize.inputs) > 2 else None
    wanted = {
        "mode": "nearest",
        "coordinate_transformation_mode": "asymmetric",
        "nearest_mode": "floor",
    }
    return (
        scales is not None
        and scales.const_value is not None
        and scales.const_value.numpy().tolist() == [1, 1, 2, 2]
        and all(
            key in resize.attributes and resize.attributes[key].as_string() == text
            for key, text in wanted.items()
        )
    )


def _gate_of(product: ir.Node) -> tuple[ir.Value | None, ir.Node | None]:
    """x, and the Sigmoid, of x * sigmoid(x)."""
    for value, other in (product.inputs[:2], product.inputs[1::-1]):
        sigmoid = _only(other, "Sigmoid")
        if sigmoid is not None and sigmoid.inputs[0] is value:
            return value, sigmoid
    return None, None


def _place(node: ir.Node, out: ir.Value, other: ir.Value) -> int | None:
    """Which input of a layer `other` becomes when it is added to the layer's output."""
    shape, n = other.shape, node.attributes["N"].as_int()
    if shape is None:
        return None
    dims = list(shape)
    if node.op_type == LINEAR and other.is_initializer() and dims == [n]:
        return _BIAS
    if node.op_type == CONV and len(dims) == 4 and dims[1:] == [n, 1, 1]:
        return _OFFSET
    if len(dims) == (3 if node.op_type == LINEAR else 4) and not other.is_initializer():
        channels = dims[-1] if node.op_type == LINEAR else dims[1]
        if channels == n and out.shape is not None and not _broadcasts(dims):
            return _RESIDUAL
    return None


def _broadcasts(dims: list[int | ir.SymbolicDim]) -> bool:
    return any(dim == 1 for dim in dims[1:])


def _replace(
    model: ir.Model,
    last: ir.Node,
    node: ir.Node,
    inputs: list[ir.Value | None],
    attributes: dict[str, int],
) -> ir.Node:
    """The layer `node` with other inputs and attributes, in the place of `last`."""
    changed = {name: value for name, value in node.attributes.items() if name not in attributes}
    made = ir.node(
        node.op_type, inputs, {**changed, **attributes}, domain=DOMAIN, name=node.name or ""
    )
    made.outputs[0].name = f"{node.outputs[0].name}+"
    replace_node(model.graph, last, [made], made.outputs[0])
    if not list(node.outputs[0].uses()):
        model.graph.remove(node, safe=True)  # it would count as a reader of its inputs
    return made


class _AttentionIn8Bits(Pass):
    """MultiHeadAttention that isn't causal becomes QuantAttention."""

    def call(self, model: ir.Model) -> bool:
        """See the class."""
        changed = False
        for node in list(model.graph):
            if node.op_type != "MultiHeadAttention" or node.attributes["unidirectional"].as_int():
                continue
            heads = node.attributes["num_heads"].as_int()
            query = node.inputs[0]
            width = query.shape[-1] if query is not None and query.shape is not None else None
            if not isinstance(width, int) or width > heads * MAX_HEAD:
                continue
            made = ir.node(
                ATTENTION,
                node.inputs[:3],
                {"num_heads": heads, "scale": node.attributes["scale"].as_float()},
                domain=DOMAIN,
                name=node.name or "",
            )
            made.outputs[0].name = f"{node.outputs[0].name}:8"
            replace_node(model.graph, node, [made], made.outputs[0])
            changed = True
        return changed


_REWRITES: dict[str, type[Pass]] = {
    "behind": _Behind,
    "before": _Before,
    "attention": _AttentionIn8Bits,
}
