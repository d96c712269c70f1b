"""Quantized layers and attention as edgesd's own kernels (edgesd/kernels) run them.

| layer                                  | becomes                                             |
|----------------------------------------|-----------------------------------------------------|
| linear with 8-bit inputs               | QuantLinear: each row of the input has a format     |
| linear of one row                      | QuantRows: the input stays as it is                 |
| convolution with 8-bit inputs          | QuantConv: each image of the input has a format     |
| attention that isn't causal            | QuantAttention, in 8 bits                           |
| factors of low-rank branches           | Widen: fp16 in their file, fp32 while they are read |
| anything else                          | what QuantizedOrt makes of it                       |

Weights lie in the file as QuantizedOrt writes them, so that both graphs of a component share one
file. What follows a layer (bias, residual, offset or gate of a timestep, GELU, GEGLU, ReLU) becomes
part of it: it is computed while the output is still in the registers. What comes before a
convolution (group normalization, SiLU, upsampling) is computed while the input is rounded to 8
bits, and so is what comes before attention (normalization of heads, rotation, the joining of two
tensors' tokens).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from edgesd.export.passes import Pass
from edgesd.export.passes.fusions import (
    FUSIONS,
    LORA,
    Fusion,
    Kind,
    Operand,
    attention_taken,
    kernel_takes,
    rows_taken,
)
from edgesd.export.passes.lowering import LayerLowering, Timesteps, replace_node, score_bias
from edgesd.export.passes.matching import Match, Matcher
from edgesd.export.passes.quantized_ort import OrtLowering, QuantizedOrt
from edgesd.export.passes.values import input_of
from edgesd.export.quantize.layers import QuantizedLayer
from edgesd.runtime.arrays import Array

DOMAIN = "edgesd"
LINEAR, CONV, ATTENTION, WIDEN = "QuantLinear", "QuantConv", "QuantAttention", "Widen"
ROWS = "QuantRows"

INPUTS = {
    LINEAR: ("x", "codes", "scale", "steps", "bias", "residual", "low", "up", "gate"),
    CONV: ("x", "codes", "scale", "steps", "bias", "residual", "offset", "gamma", "beta"),
}
"""Names of the operators' inputs, in order."""

_KINDS: dict[str, Kind] = {LINEAR: "linear", CONV: "conv"}
_ROWS_K_BY_N, _BLOCKS_OF_N = 0, 1


def has_kernels(model: ir.Model) -> bool:
    """Whether a graph has operators of our own."""
    return any(node.domain == DOMAIN for node in model.graph)


class OwnKernels(QuantizedOrt):
    """As QuantizedOrt, with kernels of our own where there is one.

    attention: heads in 8 bits, a further loss. fusions: what becomes part of the layers' kernels.
    """

    def __init__(
        self,
        layers: Mapping[str, QuantizedLayer],
        timesteps: Timesteps | None,
        attention: bool = True,
        fusions: Iterable[Fusion] = FUSIONS,
    ) -> None:
        super().__init__(layers, timesteps)
        self.rewrites: list[Pass] = [FuseEpilogue((LORA, *fusions)), FusePrologue(fusions)]
        if attention:
            self.rewrites.append(AttentionIn8Bits())

    def call(self, model: ir.Model) -> bool:
        model.graph.opset_imports[DOMAIN] = 1
        super().call(model)
        for rewrite in self.rewrites:
            rewrite(model)
        common.RemoveUnusedNodesPass()(model)
        if not has_kernels(model):
            del model.graph.opset_imports[DOMAIN]
        return True

    def lowering(
        self, model: ir.Model, node: ir.Node, quantized: QuantizedLayer, prefix: str
    ) -> LayerLowering:
        layer = quantized.layer
        if rows_taken(layer):
            return _Rows(model, node, quantized, prefix, self.made, None)
        if quantized.activations.bits != 8 or not kernel_takes(layer):
            return super().lowering(model, node, quantized, prefix)
        return _Kernel(model, node, quantized, prefix, self.made, None)


class _Own(OrtLowering):
    """A layer in a kernel of ours, which reads its weights where they are mapped."""

    def factor(self, name: str, array: Array, after: ir.Value) -> ir.Value:
        """As fp32 while it is read: Cast would be computed once, and stay."""
        value = self.const(name, array.astype(np.float16))
        return self.op(WIDEN, [value, after], DOMAIN, values=array.size)

    def weight_format(self, blocks: bool) -> dict[str, int]:
        """What a kernel is told of the weight. blocks: its codes lie in blocks of outputs."""
        bits = self.q.scheme.weight_bits
        return {
            "bits": bits,
            "group": self.q.group if bits == 4 else self.q.layer.columns,
            "layout": _BLOCKS_OF_N if blocks else _ROWS_K_BY_N,
            "N": self.q.layer.rows,
            "K": self.q.layer.columns,
        }


class _Rows(_Own):
    """A layer that sees a few vectors, which stay as they are."""

    def _linear(self, x: ir.Value) -> ir.Value:
        four = self.q.scheme.weight_bits == 4
        if four:
            codes, scales = self.blocks()
        else:
            codes = self.matrix(np.transpose)
            scales = self.const("scales", self.q.scales[:, 0].astype(np.float16))
        return self.op(ROWS, [x, codes, scales], DOMAIN, **self.weight_format(four))


class _Kernel(_Own):
    """One layer. The kernel adds its branch: a linear's in the registers, a convolution's where
    another branch's values would come in."""

    def output(self) -> ir.Value:
        q, layer = self.q, self.q.layer
        x = self.smoothed(input_of(self.node, 0))
        inputs: list[ir.Value | None] = [x, *self._weight(), self.bias()]
        if q.rank and layer.kind == "linear":
            inputs += [None, *self.branch_factors(x)]
        elif q.rank:
            inputs.append(self.branch(x))
        attributes = self.weight_format(layer.kind == "linear" and q.activations.mode == "group")
        if layer.kind == "linear":
            return self.op(LINEAR, inputs, DOMAIN, gated=0, gelu=0, **attributes)
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


class FuseEpilogue(Pass):
    """Fuses the only readers of a layer's output into its kernel, as inputs and attributes.

    fusions: of passes/fusions.py; those of the other side are left out.
    """

    def __init__(self, fusions: Iterable[Fusion]) -> None:
        self._matchers = _matchers(fusions, "epilogue")

    def call(self, model: ir.Model) -> bool:
        changed = False
        for node in list(model.graph):
            more = _kind(node) is not None
            while more and (after := self._fuse(model, node)) is not None:
                node, more = after
                changed = True
        return changed

    def _fuse(self, model: ir.Model, node: ir.Node) -> tuple[ir.Node, bool] | None:
        """The layer with one fusion more, and whether others may follow; None where there is
        none."""
        out = node.outputs[0]
        if not _read_once(out):
            return None
        for fusion, matcher in self._matchers:
            used = set(fusion.inputs).difference(fusion.joined).union(fusion.excludes)
            if _kind(node) not in fusion.layers or not _free(node, *used):
                continue
            for match in matcher.following(model, out):
                attributes = fusion.read(match.values)
                if attributes is None or not _adds(fusion, node, match):
                    continue
                attributes = {**fusion.attributes, **attributes}
                inputs = _with_inputs(model, node, fusion, match)
                return _replaced(model, node, match, inputs, attributes), not fusion.last
        return None


class FusePrologue(Pass):
    """Fuses operators that only a layer reads into its kernel. fusions: as FuseEpilogue's."""

    def __init__(self, fusions: Iterable[Fusion]) -> None:
        self._matchers = _matchers(fusions, "prologue")

    def call(self, model: ir.Model) -> bool:
        layers = [node for node in model.graph if _kind(node) is not None]
        changed = [self._fuse(model, node, *each) for node in layers for each in self._matchers]
        return any(changed)

    def _fuse(self, model: ir.Model, node: ir.Node, fusion: Fusion, matcher: Matcher) -> bool:
        value = node.inputs[0]
        if _kind(node) not in fusion.layers or value is None or not _read_once(value):
            return False
        match = next(matcher.ending(model, value), None)
        attributes = None if match is None else fusion.read(match.values)
        if match is None or attributes is None:
            return False
        inputs = _with_inputs(model, node, fusion, match)
        inputs[0] = match.values["x"]
        node.resize_inputs(len(inputs))
        for place, given in enumerate(inputs):
            node.replace_input_with(place, given)
        for name, number in {**fusion.attributes, **attributes}.items():
            node.attributes[name] = ir.convenience.convert_attribute(name, number)
        # They would count as readers of their inputs.
        model.graph.remove([match.last, *match.others], safe=True)
        return True


def _matchers(
    fusions: Iterable[Fusion], side: Literal["prologue", "epilogue"]
) -> list[tuple[Fusion, Matcher]]:
    return [(fusion, Matcher(fusion.exported)) for fusion in fusions if fusion.side == side]


def _kind(node: ir.Node) -> Kind | None:
    """Which kind of layer a kernel of ours computes; None for other nodes."""
    return _KINDS.get(node.op_type) if node.domain == DOMAIN else None


def _read_once(value: ir.Value) -> bool:
    return len(list(value.uses())) == 1 and not value.is_graph_output()


def _free(node: ir.Node, *names: str) -> bool:
    """Whether none of these inputs is taken."""
    given = dict(zip(INPUTS[node.op_type], node.inputs, strict=False))
    return all(given.get(name) is None for name in names)


def _with_inputs(
    model: ir.Model, node: ir.Node, fusion: Fusion, match: Match
) -> list[ir.Value | None]:
    """A layer's inputs with those of a fusion."""
    names, inputs = INPUTS[node.op_type], list(node.inputs)
    if fusion.inputs:
        inputs += [None] * (len(names) - len(inputs))
    for name in fusion.inputs:
        place, value = names.index(name), match.values[name]
        if (there := inputs[place]) is not None:
            both = ir.node("Concat", [there, value], {"axis": fusion.joined[name]})
            both.name = both.outputs[0].name = f"{node.name}:{name}"
            model.graph.insert_before(match.last, both)
            value = both.outputs[0]
        inputs[place] = value
    return inputs


def _adds(fusion: Fusion, node: ir.Node, match: Match) -> bool:
    """Whether what a fusion adds to a layer's output has the shape that it must have."""
    operands = zip(fusion.inputs, fusion.operands, strict=False)
    return all(_fits(node, match.values[name], operand) for name, operand in operands)


def _fits(node: ir.Node, other: ir.Value, operand: Operand) -> bool:
    n, conv = node.attributes["N"].as_int(), node.op_type == CONV
    if other.shape is None:
        return False
    dims, rank = list(other.shape), 4 if conv else 3
    if operand == "constant":
        return other.is_initializer() and dims == [n]
    if operand == "image":
        return len(dims) == rank and dims[1:] == ([n, 1, 1] if conv else [1, n])
    return (
        len(dims) == rank
        and not other.is_initializer()
        and dims[1 if conv else -1] == n
        and node.outputs[0].shape is not None
        and all(dim != 1 for dim in dims[1:])
    )


def _replaced(
    model: ir.Model,
    node: ir.Node,
    match: Match,
    inputs: list[ir.Value | None],
    attributes: Mapping[str, int | float],
) -> ir.Node:
    """The layer `node` with other inputs and attributes, in the place of what became part of it."""
    changed = {name: value for name, value in node.attributes.items() if name not in attributes}
    made = ir.node(
        node.op_type, inputs, {**changed, **attributes}, domain=DOMAIN, name=node.name or ""
    )
    made.outputs[0].name = f"{node.outputs[0].name}+"
    replace_node(model.graph, match.last, [made], made.outputs[0])
    # They would count as readers of their inputs.
    model.graph.remove([node, *match.others], safe=True)
    return made


class AttentionIn8Bits(Pass):
    """MultiHeadAttention that isn't causal, and whose scores have no bias, becomes
    QuantAttention."""

    def call(self, model: ir.Model) -> bool:
        changed = False
        for node in list(model.graph):
            if node.op_type != "MultiHeadAttention":
                continue
            biased = score_bias(node) is not None
            causal = bool(node.attributes["unidirectional"].as_int())
            heads = node.attributes["num_heads"].as_int()
            query = node.inputs[0]
            width = query.shape[-1] if query is not None and query.shape is not None else None
            if not isinstance(width, int) or not attention_taken(width // heads, causal, biased):
                continue
            inputs, epsilon = _unprepared(node, heads, width)
            made = ir.node(
                ATTENTION,
                inputs,
                {
                    "num_heads": heads,
                    "scale": node.attributes["scale"].as_float(),
                    "epsilon": epsilon,
                },
                domain=DOMAIN,
                name=node.name or "",
            )
            made.outputs[0].name = f"{node.outputs[0].name}:8"
            replace_node(model.graph, node, [made], made.outputs[0])
            changed = True
        return changed


class _Tokens(NamedTuple):
    """Queries, keys or values of some tokens, before each head is normalized by `weight`."""

    value: ir.Value | None
    weight: ir.Value | None = None
    epsilon: float = 0.0


_NONE = _Tokens(None)


def _unprepared(attention: ir.Node, heads: int, width: int) -> tuple[list[ir.Value | None], float]:
    """The inputs of the kernel, and its epsilon: of an attention whose queries and keys are
    normalized head by head and then rotated, and whose tokens may come from two tensors each, what
    they are before that; of any other what it has."""
    plain = list(attention.inputs[:3])
    turns = [_rotation(plain[0], heads, width), _rotation(plain[1], heads, width)]
    if turns[0].tables != turns[1].tables:
        return plain, 0.0
    parts = [_joined(value) for value in (turns[0].value, turns[1].value, plain[2])]
    if any([_shape(v) for v in each] != [_shape(v) for v in parts[0]] for each in parts):
        return plain, 0.0  # tokens that attend to others
    q, k = ([_normed(value, heads, width) for value in each] for each in parts[:2])
    v = [_Tokens(value) for value in parts[2]]
    epsilons = {each.epsilon for each in (*q, *k) if each.weight is not None}
    if len(epsilons) > 1:
        return plain, 0.0
    tables = turns[0].tables or (None, None)
    first = (q[0], k[0], v[0]) if len(q) > 1 else (_NONE,) * 3
    inputs = [q[-1].value, k[-1].value, v[-1].value, q[-1].weight, k[-1].weight, *tables]
    inputs += [*(each.value for each in first), first[0].weight, first[1].weight]
    while inputs[-1] is None:
        inputs.pop()
    return inputs, epsilons.pop() if epsilons else 0.0


class _Rotation(NamedTuple):
    """A value before its pairs are rotated, and by which cosines and sines; none if they aren't."""

    value: ir.Value | None
    tables: tuple[ir.Value, ir.Value] | None = None


def _rotation(value: ir.Value | None, heads: int, width: int) -> _Rotation:
    node = value.producer() if value is not None else None
    if node is None or node.op_type != "RotaryEmbedding" or len(node.inputs) != 4:
        return _Rotation(value)
    x, positions, cos, sin = node.inputs
    if x is None or positions is None or cos is None or sin is None:
        return _Rotation(value)
    start, pairs = ir.convenience.get_const_tensor(positions), width // heads // 2
    whole = (
        _attribute(node, "interleaved") == 1
        and _attribute(node, "rotary_embedding_dim") in (0, 2 * pairs)
        and _attribute(node, "num_heads") in (0, heads)
        and x.shape is not None
        and len(x.shape) == 3
        and all(t.shape is not None and t.shape[-1] == pairs for t in (cos, sin))
        and start is not None
        and start.size == 1
        and not start.numpy().any()
    )
    return _Rotation(x, (cos, sin)) if whole else _Rotation(value)


def _joined(value: ir.Value | None) -> list[ir.Value | None]:
    """The two values [B, tokens, W] that one is made of; itself where it isn't."""
    node = value.producer() if value is not None else None
    if node is None or node.op_type != "Concat" or len(node.inputs) != 2:
        return [value]
    ranks = [v is not None and v.shape is not None and len(v.shape) for v in node.inputs]
    along_tokens = ranks == [3, 3] and _attribute(node, "axis") in (1, -2)
    return list(node.inputs) if along_tokens else [value]


def _normed(value: ir.Value | None, heads: int, width: int) -> _Tokens:
    """What a value [B, tokens, W] is before each head is normalized."""
    flat = value.producer() if value is not None else None
    norm = _read(flat, "Reshape")
    heads_of = _read(norm, "SimplifiedLayerNormalization")
    x = heads_of.inputs[0] if heads_of is not None else None
    if norm is None or heads_of is None or heads_of.op_type != "Reshape" or x is None:
        return _Tokens(value)
    weight, split = norm.inputs[1], heads_of.outputs[0].shape
    d = width // heads
    whole = (
        split is not None
        and list(split[2:]) == [heads, d]
        and x.shape is not None
        and len(x.shape) == 3
        and x.shape[-1] == width
        and _attribute(norm, "axis", -1) in (-1, 3)
        and weight is not None
        and weight.shape is not None
        and list(weight.shape) == [d]
    )
    if not whole:
        return _Tokens(value)
    epsilon = norm.attributes.get("epsilon")
    return _Tokens(x, weight, 1e-5 if epsilon is None else epsilon.as_float())


def _shape(value: ir.Value | None) -> list[int | ir.SymbolicDim] | None:
    return None if value is None or value.shape is None else list(value.shape)


def _read(node: ir.Node | None, op_type: str) -> ir.Node | None:
    """What makes the first input of a node of this type; None for others."""
    if node is None or node.op_type != op_type or node.inputs[0] is None:
        return None
    return node.inputs[0].producer()


def _attribute(node: ir.Node, name: str, default: int = 0) -> int:
    found = node.attributes.get(name)
    return default if found is None else found.as_int()
