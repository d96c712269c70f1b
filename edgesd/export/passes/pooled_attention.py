"""Averages the input of keys and values of the largest self-attention over 2x2 latents.

After "ToDo: Token Downsampling for Efficient Generation of High-Resolution Images" (arXiv
2402.13573), which takes every second token of each row and column and not the mean.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgesd.errors import EdgesdError
from edgesd.export.passes import Pass
from edgesd.export.passes.lowering import score_bias, shared_constant
from edgesd.export.passes.values import producer_of, shape_of
from edgesd.export.quantize.layers import weight_of


@dataclass(frozen=True)
class _SelfAttention:
    """An attention whose query, key and value are linears of one `source` [B, tokens, C].

    key, value: the linears' outputs and, where there is a bias after them, its output.
    """

    node: ir.Node
    source: ir.Value
    linears: tuple[ir.Node, ir.Node]
    behind: tuple[ir.Value, ...]


class PooledAttention(Pass):
    """to_k and to_v of the largest self-attention read the means of 2x2 tokens, to_q reads all.

    source [B, h * w, C], row by row -> [B, h/2, 2, w/2, 2, C] -> means [B, h/2 * w/2, C].
    sample: name of the input [B, C, H, W] whose tokens are counted. The largest are those with as
    many tokens as it has latents, where it is seen by self-attention at that size, else those of
    the next size that is. A graph without such an input, or whose largest self-attention may have
    an odd number of rows, is left as it is. Names of layers stay. pooled: names of the attention
    nodes that were changed, filled when the pass ran.
    """

    def __init__(self, sample: str | None) -> None:
        self.sample = sample
        self.pooled: tuple[str, ...] = ()

    def call(self, model: ir.Model) -> bool:
        sample = next((value for value in model.graph.inputs if value.name == self.sample), None)
        if sample is None:
            return False
        wide = _latents_per_token(model, sample)
        found = [(wide[a.source], a) for a in _self_attentions(model) if a.source in wide]
        level = min((size for size, _ in found), default=0)
        # The size of an image is a multiple of the deepest level's (families/parts/unet.py); or it
        # is any, and upsampling follows the sizes of what it is joined with.
        if level == 0 or max(wide.values()) % (2 * level):
            return False
        if not _is_even(model, sample, 2 * level):
            return False
        shape = _split_shape(model, sample, 2 * level)
        attentions = [attention for size, attention in found if size == level]
        for attention in attentions:
            _pool(model, attention, shape)
        self.pooled = tuple(attention.node.name or "" for attention in attentions)
        return True

    def ensures(self, model: ir.Model) -> None:
        """Keys and values of each attention that was changed have one source, and queries
        another."""
        nodes = {node.name: node for node in model.graph}
        for name in self.pooled:
            sources = [_linear(value) for value in nodes[name].inputs[:3]]
            query, key, value = (node.inputs[0] if node else None for node, _ in sources)
            if key is None or key is not value or key is query:
                raise EdgesdError(f"{name}: its keys and values aren't pooled")


def _latents_per_token(model: ir.Model, sample: ir.Value) -> dict[ir.Value, int]:
    """How many latents wide a pixel or token is, of every value that comes from `sample`: strides
    of convolutions multiply it, upsampling divides it."""
    wide = {sample: 1}
    for node in model.graph:
        if node.op_type == "Shape":  # sizes aren't images
            continue
        size = next((wide[v] for v in node.inputs if v is not None and v in wide), None)
        if size is None:
            continue
        if node.op_type == "Conv" and "strides" in node.attributes:
            size *= node.attributes["strides"].as_ints()[0]
        elif node.op_type == "Resize" and len(node.inputs) > 2:
            scales = node.inputs[2]
            if scales is None or scales.const_value is None:
                continue
            size = int(size / scales.const_value.numpy()[2])
        wide.update(dict.fromkeys(node.outputs, size))
    return wide


def _is_even(model: ir.Model, sample: ir.Value, size: int) -> bool:
    """Whether the sample's height and width are multiples of `size` wherever they are known, and
    no upsampling is to a size that isn't twice its own."""
    sides = [side for side in tuple(shape_of(sample))[2:] if isinstance(side, int)]
    resizes = [node for node in model.graph if node.op_type == "Resize"]
    doubled = all(len(node.inputs) < 4 or node.inputs[3] is None for node in resizes)
    return doubled and not any(side % size for side in sides)


def _self_attentions(model: ir.Model) -> list[_SelfAttention]:
    found = []
    for node in model.graph:
        if node.op_type != "MultiHeadAttention" or node.attributes["unidirectional"].as_int():
            continue
        if score_bias(node) is not None:
            continue
        (query, _), (key, after), (value, behind) = (_linear(v) for v in node.inputs[:3])
        if query is None or key is None or value is None:
            continue
        source = query.inputs[0]
        if source is not None and key.inputs[0] is source and value.inputs[0] is source:
            found.append(_SelfAttention(node, source, (key, value), (*after, *behind)))
    return found


def _linear(value: ir.Value | None) -> tuple[ir.Node | None, tuple[ir.Value, ...]]:
    """The MatMul with a weight that computes `value`, perhaps with a bias, and all its outputs."""
    node = None if value is None else value.producer()
    given = () if value is None else (value,)
    if node is not None and node.op_type == "Add":
        inner = [v for v in node.inputs if v is not None and not v.is_initializer()]
        node = inner[0].producer() if len(inner) == 1 else None
        given = (*given, *inner)
    if node is None or node.op_type != "MatMul" or weight_of(node) is None:
        return None, ()
    return node, given


def _split_shape(model: ir.Model, sample: ir.Value, size: int) -> ir.Value:
    """The shape [0, h/2, 2, w/2, 2, -1] of tokens, two of which are `size` latents wide; computed
    in the graph where the image's size isn't known."""
    height, width = tuple(shape_of(sample))[2:]
    if isinstance(height, int) and isinstance(width, int):
        fixed = np.array([0, height // size, 2, width // size, 2, -1], np.int64)
        return shared_constant(model, "pooled:shape", fixed)
    parts = {
        name: shared_constant(model, f"pooled:{name}", np.array([number], np.int64))
        for name, number in {"batch": 0, "two": 2, "channels": -1, "latents": size}.items()
    }
    nodes = []
    for name, axis in (("height", 2), ("width", 3)):
        whole = ir.node("Shape", [sample], {"start": axis, "end": axis + 1})
        pairs = ir.node("Div", [whole.outputs[0], parts["latents"]])
        nodes += [whole, pairs]
        parts[name] = pairs.outputs[0]
    order = ("batch", "height", "two", "width", "two", "channels")
    nodes.append(ir.node("Concat", [parts[name] for name in order], {"axis": 0}))
    for number, node in enumerate(nodes):
        node.name = f"pooled/{node.op_type}.{number}"
        node.outputs[0].name = f"pooled.{number}"
    model.graph.insert_before(next(iter(model.graph)), nodes)
    return nodes[-1].outputs[0]


def _pool(model: ir.Model, attention: _SelfAttention, shape: ir.Value) -> None:
    source, producer = attention.source, producer_of(attention.source)
    batch, tokens, channels = shape_of(source)
    flat = shared_constant(model, f"pooled:flat{channels}", np.array([0, -1, channels], np.int64))
    rows, columns = (
        shared_constant(model, f"pooled:axis{axis}", np.array([axis], np.int64)) for axis in (2, 3)
    )
    # One axis after the other: ONNX Runtime takes a third of the time of both at once.
    split = ir.node("Reshape", [source, shape])
    lines = ir.node("ReduceMean", [split.outputs[0], rows], {"keepdims": 0})
    means = ir.node("ReduceMean", [lines.outputs[0], columns], {"keepdims": 0})
    joined = ir.node("Reshape", [means.outputs[0], flat])
    path = (attention.node.name or "").rpartition("/")[0]
    nodes = [split, lines, means, joined]
    for number, node in enumerate(nodes):
        node.name = f"{path}/pooled.{number}"
        node.outputs[0].name = f"{source.name}/pooled.{number}"
        node.outputs[0].type = source.type
    fewer = tokens // 4 if isinstance(tokens, int) else None
    joined.outputs[0].shape = ir.Shape([batch, fewer, channels])
    model.graph.insert_after(producer, nodes)
    for linear in attention.linears:
        linear.replace_input_with(0, joined.outputs[0])
    for value in attention.behind:
        if value.shape is not None:
            value.shape = ir.Shape([value.shape[0], fewer, value.shape[-1]])
