"""A full autoencoder's decoder as a head and a tail, so that the tail can be run in tiles.

| part | graph                                                                                 |
|------|---------------------------------------------------------------------------------------|
| head | latents -> features: all before the first upsampling, attention included              |
| tail | features, statistics, own, core -> image, moments: convolutions and upsampling        |

A group normalization sees the whole image. In the tail each takes the mean and the mean square of
its groups from `statistics` [norms, 2, groups], to which `own` [1] times those of its own input are
added: `moments`, as large, of the input within `core` (top, left, bottom, right in features). What
is left sees a few features around.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from edgesd.errors import EdgesdError
from edgesd.export.external_data import weight_bytes
from edgesd.export.passes import Pass
from edgesd.export.passes.group_norm import GroupNorm, group_norm
from edgesd.export.passes.lowering import replace_node, shared_constant
from edgesd.export.passes.values import array_of, dtype_of, graph_of, shape_of, tensor_of
from edgesd.spec.bundle import DecoderPart, SplitDecoder
from edgesd.spec.pipeline import ComponentSpec, TensorSpec

FEATURES, STATISTICS, OWN, CORE, MOMENTS = "features", "statistics", "own", "core", "moments"

_LOCAL = {"Sigmoid", "Mul", "Add"}
"""Operators whose output at a place depends on that place only."""


class DecoderHead(Pass):
    """Ends a decoder where its first upsampling begins. See the module."""

    def requires(self, model: ir.Model) -> None:
        """There is an upsampling."""
        _cut(model)

    def call(self, model: ir.Model) -> bool:
        cut = _cut(model)
        cut.name = FEATURES
        cut.shape = ir.Shape([1, (cut.shape or [None, None])[1], "height", "width"])
        for value in model.graph.inputs:
            _one_row(value)
        model.graph.outputs[:] = [cut]
        common.RemoveUnusedNodesPass()(model)
        model.graph.name = f"{model.graph.name}.head"
        return True


class DecoderTail(Pass):
    """Begins a decoder where its first upsampling begins, and lets its group normalizations take
    their statistics from outside. See the module."""

    def requires(self, model: ir.Model) -> None:
        """There is an upsampling; all nodes after it depend on its input alone, and see only so far
        but for group normalizations, which have as many groups each."""
        cut = _cut(model)
        behind = _behind(cut)
        inside = {id(out) for node in behind for out in node.outputs}
        norms = [(node, norm) for node in behind if (norm := group_norm(model, node)) is not None]
        if len({norm.groups for _, norm in norms}) != 1:
            raise EdgesdError("the decoder has no group normalization after its first upsampling")
        parts = {id(part) for node, norm in norms for part in _nodes_of(node, norm)}
        for node in behind:
            if id(node) in parts:
                continue
            if not _is_local(node):
                raise EdgesdError(f"the decoder's {node.name} sees the whole image")
            for value in node.inputs:
                known = value is None or value is cut or value.const_value is not None
                if not known and id(value) not in inside:
                    raise EdgesdError(f"the decoder's {node.name} takes more than the features")

    def call(self, model: ir.Model) -> bool:
        cut = _cut(model)
        scales = _scales(cut)
        behind = _behind(cut)
        norms = [(node, norm) for node in behind if (norm := group_norm(model, node)) is not None]
        groups = norms[0][1].groups
        channels = (cut.shape or [None, None])[1]
        features = _value(FEATURES, ir.DataType.FLOAT, [1, channels, "height", "width"])
        shape = [len(norms), 2, groups]
        statistics = _value(STATISTICS, ir.DataType.FLOAT, shape)
        own = _value(OWN, ir.DataType.FLOAT, [1])
        core = _value(CORE, ir.DataType.INT64, [4])
        ir.convenience.replace_all_uses_with(cut, features)
        model.graph.inputs[:] = [features, statistics, own, core]
        writer = _Statistics(model, statistics, own, core)
        moments = []
        for index, (node, norm) in enumerate(norms):
            source = features if norm.source is cut else norm.source
            moments.append(writer.write(index, node, norm._replace(source=source), scales))
        for value in model.graph.outputs:
            _one_row(value)
        out = _value(MOMENTS, ir.DataType.FLOAT, shape)
        model.graph.append(ir.node("Concat", moments, {"axis": 0}, outputs=[out], name=MOMENTS))
        model.graph.outputs.append(out)
        common.RemoveUnusedNodesPass()(model)
        model.graph.name = f"{model.graph.name}.tail"
        return True


def split_decoder(model: ir.Model) -> tuple[ir.Model, ir.Model] | None:
    """Head and tail of an exported decoder, which is left as it is; weights are shared.

    None where it can't be split: AutoencoderTiny's, which has no group normalization, those with
    attention after an upsampling, and graphs of one size.
    """
    dims = [dim for value in model.graph.inputs for dim in value.shape or ()]
    if all(isinstance(dim, int) for dim in dims):
        return None
    head, tail = model.clone(), model.clone()
    try:
        DecoderTail()(tail)
    except EdgesdError:
        return None
    DecoderHead()(head)
    return head, tail


def describe_split(
    folder: str, parts: Sequence[ir.Model], files: Sequence[str], kernels: Sequence[str] = ()
) -> SplitDecoder:
    """The two parts as a manifest describes them, once they are lowered. files, kernels: their
    names in `folder`, those of the graphs for edgesd's own kernels where there are some."""
    head, tail = (
        DecoderPart(
            f"{folder}/{files[index]}",
            _spec(part),
            weight_bytes(part),
            f"{folder}/{kernels[index]}" if kernels else None,
        )
        for index, part in enumerate(parts)
    )
    return SplitDecoder(head, tail)


class _Statistics:
    """Writes group normalizations that take their statistics from outside."""

    def __init__(
        self, model: ir.Model, statistics: ir.Value, own: ir.Value, core: ir.Value
    ) -> None:
        self.model, self.statistics, self.own, self.core = model, statistics, own, core
        self.nodes: list[ir.Node] = []
        self.prefix = ""

    def write(self, index: int, node: ir.Node, norm: GroupNorm, scales: dict[int, int]) -> ir.Value:
        """Put number `index` in the place of `norm`, which ends with `node`; its moments
        [1, 2, groups]."""
        self.prefix, self.nodes = f"norm{index}", []
        x, groups = norm.source, norm.groups
        channels = tensor_of(norm.gamma).size
        corners = self.op("Mul", [self.core, self.ints(scales.get(id(x), 1))])
        begin = self.op("Slice", [corners, self.ints(0), self.ints(2)])
        end = self.op("Slice", [corners, self.ints(2), self.ints(4)])
        seen = self.op("Slice", [x, begin, end, self.ints(2, 3)])
        # One axis after the other: the fp32 sum of a million values would be off by 1e-4.
        width = self.op("Cast", [self.op("Shape", [seen], start=3)], to=ir.DataType.FLOAT)
        mean, squares = (
            self.mean_of_groups(self.op(kind, [seen, self.ints(3)], keepdims=0), groups)
            for kind in ("ReduceMean", "ReduceSumSquare")
        )
        square = self.op("Div", [squares, width])
        both = self.op("Concat", [mean, square], axis=0)
        moments = self.op("Unsqueeze", [both, self.ints(0)])
        # The reductions come before the normalization whatever `own` is: `x` isn't kept for them.
        given = self.op("Slice", [self.statistics, self.ints(index), self.ints(index + 1)])
        used = self.op("Add", [self.op("Mul", [self.own, moments]), given])
        wide = self.op(
            "Expand",
            [
                self.op("Reshape", [used, self.ints(2, groups, 1)]),
                self.ints(2, groups, channels // groups),
            ],
        )
        means, means_of_squares = (
            self.op("Reshape", [self.op("Slice", [wide, self.ints(k), self.ints(k + 1)]), flat])
            for flat in (self.ints(channels),)
            for k in (0, 1)
        )
        spread = self.op("Sub", [means_of_squares, self.op("Mul", [means, means])])
        variance = self.op("Max", [spread, self.const("zero", np.zeros(1, np.float32))])
        out = self.op(
            "BatchNormalization",
            [x, self.flat(norm.gamma), self.flat(norm.beta), means, variance],
            epsilon=norm.epsilon,
        )
        replace_node(self.model.graph, node, self.nodes, out)
        return moments

    def op(self, op: str, inputs: list[ir.Value | None], **attributes: Any) -> ir.Value:
        """The output of a new node."""
        node = ir.node(op, inputs, attributes, name=f"{self.prefix}.{len(self.nodes)}")
        out: ir.Value = node.outputs[0]
        out.name = node.name
        self.nodes.append(node)
        return out

    def mean_of_groups(self, rows: ir.Value, groups: int) -> ir.Value:
        """Of values [1, C, h], for each group of channels [1, groups]."""
        channels = self.op("ReduceMean", [rows, self.ints(2)], keepdims=0)
        grouped = self.op("Reshape", [channels, self.ints(1, groups, -1)])
        return self.op("ReduceMean", [grouped, self.ints(2)], keepdims=0)

    def const(self, name: str, array: Any) -> ir.Value:
        """An initializer, which all share."""
        return shared_constant(self.model, f"tiles:{name}", array)

    def ints(self, *values: int) -> ir.Value:
        """An initializer of int64."""
        return self.const("x".join(map(str, values)), np.array(values, np.int64))

    def flat(self, value: ir.Value) -> ir.Value:
        """A constant [C, 1, 1] as one [C]."""
        return self.const(f"{value.name}", array_of(value).reshape(-1))


def _cut(model: ir.Model) -> ir.Value:
    """The input of the first upsampling."""
    resize = next((node for node in model.graph if node.op_type == "Resize"), None)
    cut = None if resize is None else resize.inputs[0]
    if cut is None:
        raise EdgesdError(f"{model.graph.name} has no upsampling to split it at")
    return cut


def _behind(cut: ir.Value) -> list[ir.Node]:
    """All nodes that depend on `cut`, in the graph's order."""
    found = {id(cut)}
    nodes = []
    for node in graph_of(next(iter(cut.uses())).node):
        if any(id(value) in found for value in node.inputs):
            found.update(id(out) for out in node.outputs)
            nodes.append(node)
    return nodes


def _nodes_of(add: ir.Node, norm: GroupNorm) -> list[ir.Node]:
    """The nodes of the group normalization that ends with `add`."""
    parts, open_ = [], [add]
    while open_:
        node = open_.pop()
        parts.append(node)
        producers = [v.producer() for v in node.inputs if v is not None and v is not norm.source]
        open_ += [before for before in producers if before is not None]
    return parts


def _is_local(node: ir.Node) -> bool:
    """Whether a node's output at a place depends on a few places around it only."""
    if node.op_type == "Conv":
        strides = node.attributes.get("strides")
        return strides is None or set(strides.as_ints()) == {1}
    if node.op_type == "Resize":
        scales = node.inputs[2] if len(node.inputs) > 2 else None
        return (
            scales is not None
            and scales.const_value is not None
            and scales.const_value.numpy().tolist() == [1, 1, 2, 2]
        )
    return node.op_type in _LOCAL


def _scales(cut: ir.Value) -> dict[int, int]:
    """How much larger than the features each later value is, by id."""
    scales = {id(cut): 1}
    for node in _behind(cut):
        known = [scales[id(value)] for value in node.inputs if id(value) in scales]
        for out in node.outputs:
            scales[id(out)] = max(known) * (2 if node.op_type == "Resize" else 1)
    return scales


def _one_row(value: ir.Value) -> None:
    """Images are decoded one at a time."""
    if value.shape is not None:
        value.shape = ir.Shape([1, *value.shape.dims[1:]])


def _value(name: str, dtype: ir.DataType, shape: Iterable[Any]) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))


def _spec(model: ir.Model) -> ComponentSpec:
    def tensor(value: ir.Value) -> TensorSpec:
        dims = tuple(dim if isinstance(dim, int) else str(dim.value) for dim in shape_of(value))
        return TensorSpec(value.name or "", dtype_of(value).numpy().name, dims)

    return ComponentSpec(
        model.graph.name or "",
        tuple(tensor(value) for value in model.graph.inputs),
        tuple(tensor(value) for value in model.graph.outputs),
    )
