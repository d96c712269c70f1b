"""A full autoencoder's decoder or encoder as parts, of which those next to the image can be run
in tiles.

| part              | graph                                                                     |
|-------------------|---------------------------------------------------------------------------|
| decoder's head    | latents -> features: all before the first upsampling, attention included  |
| its tail          | features, statistics, own, core -> image, moments, in tiles               |
| encoder's head    | image, statistics, own, core -> features, moments, in tiles: up to the    |
|                   | first downsampling                                                        |
| each middle of it | features, statistics, own, core -> coarse, moments, in tiles: up to the   |
|                   | next downsampling                                                         |
| its tail          | features -> mean and std: attention included                              |

A group normalization sees the whole image. In a part that is run in tiles each takes the mean and
the mean square of its groups from `statistics` [norms, 2, groups], to which `own` [1] times those
of its own input are added: `moments`, as large, of the input within `core`: top, left, bottom and
right, in pixels of the smaller of what the part takes and makes. What is left sees a few pixels
around.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from edgesd.errors import EdgesdError
from edgesd.export.external_data import weight_bytes
from edgesd.export.passes import Pass
from edgesd.export.passes.group_norm import GroupNorm, group_norm
from edgesd.export.passes.lowering import replace_node, shared_constant
from edgesd.export.passes.values import array_of, dtype_of, graph_of, input_of, shape_of, tensor_of
from edgesd.spec.bundle import MOST_MARGIN, ComponentPart, SplitComponent, split_of
from edgesd.spec.pipeline import ComponentSpec, TensorSpec

FEATURES, COARSE = "features", "coarse"
STATISTICS, OWN, CORE, MOMENTS = "statistics", "own", "core", "moments"

_MARGINS = "margins"
"""Where a part keeps its reach, once it is known to have one."""

_LOCAL = {"Sigmoid", "Mul", "Add"}
"""Operators whose output at a place depends on that place only."""


class EndAt(Pass):
    """Lets a graph end with the value that is called `cut`, as its output `name`."""

    def __init__(self, cut: str, name: str) -> None:
        self.cut, self.name = cut, name

    def requires(self, model: ir.Model) -> None:
        """The value is there."""
        _value_called(model, self.cut)

    def call(self, model: ir.Model) -> bool:
        cut = _value_called(model, self.cut)
        cut.name = self.name
        cut.shape = ir.Shape([1, _channels(cut), "out_height", "out_width"])
        for value in model.graph.inputs:
            _one_row(value)
        model.graph.outputs[:] = [cut]
        common.RemoveUnusedNodesPass()(model)
        return True


class BeginAt(Pass):
    """Lets a graph begin with the value that is called `cut`, as its input `features`."""

    def __init__(self, cut: str) -> None:
        self.cut = cut

    def requires(self, model: ir.Model) -> None:
        """The value is there."""
        _value_called(model, self.cut)

    def call(self, model: ir.Model) -> bool:
        cut = _value_called(model, self.cut)
        (whole,) = model.graph.inputs
        shape = [1, _channels(cut), "height", "width"]
        features = _value(FEATURES, ir.DataType.FLOAT, shape)
        scales = _scales(whole)
        larger = scales[id(whole)] // scales[id(cut)]
        for use in list(whole.uses()):
            if use.node.op_type == "Shape":
                _read_sizes(model, use.node, features, larger)
        ir.convenience.replace_all_uses_with(cut, features)
        model.graph.inputs[:] = [features]
        for value in model.graph.outputs:
            _one_row(value)
        common.RemoveUnusedNodesPass()(model)
        return True

    def ensures(self, model: ir.Model) -> None:
        """Nothing is read but the features."""
        known = {id(value) for value in model.graph.inputs}
        for node in model.graph:
            for value in node.inputs:
                if value is not None and value.const_value is None and id(value) not in known:
                    raise EdgesdError(f"{model.graph.name}: {node.name} takes more than features")
            known.update(id(out) for out in node.outputs)


class TiledNorms(Pass):
    """Lets the group normalizations of a part take their statistics from outside. See the
    module."""

    def requires(self, model: ir.Model) -> None:
        """All nodes see only so far but for group normalizations, which have as many groups
        each."""
        norms = _norms(model)
        if len({norm.groups for _, norm in norms}) != 1:
            raise EdgesdError(f"{model.graph.name} has no group normalization, or unlike ones")
        parts = {id(part) for node, norm in norms for part in _nodes_of(node, norm)}
        for node in model.graph:
            if id(node) not in parts and not _is_local(node):
                raise EdgesdError(f"{model.graph.name}: {node.name} sees the whole image")

    def call(self, model: ir.Model) -> bool:
        (source,) = model.graph.inputs
        scales = _scales(source)
        norms = _norms(model)
        shape = [len(norms), 2, norms[0][1].groups]
        statistics = _value(STATISTICS, ir.DataType.FLOAT, shape)
        own = _value(OWN, ir.DataType.FLOAT, [1])
        core = _value(CORE, ir.DataType.INT64, [4])
        model.graph.inputs.extend([statistics, own, core])
        writer = _Statistics(model, statistics, own, core)
        moments = [
            writer.write(index, node, norm, scales[id(norm.source)])
            for index, (node, norm) in enumerate(norms)
        ]
        out = _value(MOMENTS, ir.DataType.FLOAT, shape)
        model.graph.append(ir.node("Concat", moments, {"axis": 0}, outputs=[out], name=MOMENTS))
        model.graph.outputs.append(out)
        common.RemoveUnusedNodesPass()(model)
        return True


def split_component(model: ir.Model) -> tuple[ir.Model, ...]:
    """The parts of an exported decoder or encoder, which is left as it is; weights are shared.

    None of them where it can't be split: AutoencoderTiny's, which has no group normalization, those
    with attention where the image is larger than the latents, and graphs of one size.
    """
    dims = [dim for value in model.graph.inputs for dim in value.shape or ()]
    if all(isinstance(dim, int) for dim in dims):
        return ()
    try:
        return tuple(_parts(model))
    except EdgesdError:
        return ()


def _parts(model: ir.Model) -> Iterator[ir.Model]:
    """As `split_component`. Raises EdgesdError."""
    decodes = any(node.op_type == "Resize" for node in model.graph)
    cuts = _cuts(model)
    for index in range(len(cuts) + 1):
        part = model.clone()
        first, last = index == 0, index == len(cuts)
        if not first:
            BeginAt(cuts[index - 1])(part)
        if not last:
            EndAt(cuts[index], FEATURES if first else COARSE)(part)
        part.graph.name = f"{model.graph.name}.{'head' if first else 'tail' if last else index}"
        if last if decodes else not last:
            margins = None if decodes else reach(part)
            if margins and max(margins) > MOST_MARGIN:
                raise EdgesdError(f"{part.graph.name} sees {max(margins)} pixels around")
            part.meta[_MARGINS] = margins
            TiledNorms()(part)
        yield part


def reach(model: ir.Model) -> tuple[int, int]:
    """How much further up (or left) and down (or right) a part sees, normalizations apart, than it
    makes, in pixels of the smaller of the two: margins of tiles that lose nothing.

    Each pixel needs those that a convolution with its kernel, stride and padding reads for it.
    """
    (source, *_) = model.graph.inputs
    scales = _scales(source)
    (made, *_) = model.graph.outputs
    needed = {id(made): (0, 0)}
    for node in reversed(list(model.graph)):
        seen = [needed[id(out)] for out in node.outputs if id(out) in needed]
        if not seen:
            continue
        up, down = (max(each) for each in zip(*seen, strict=True))
        if node.op_type == "Conv":
            kernel, pads, strides = (
                node.attributes[name].as_ints() for name in ("kernel_shape", "pads", "strides")
            )
            up, down = max(
                (stride * up + pad, stride * down + size - stride - pad)
                for size, pad, stride in zip(kernel, pads, strides, strict=False)
            )
        elif node.op_type == "Resize":
            up, down = -(-up // 2), -(-down // 2)
        for value in node.inputs:
            if value is not None and id(value) in scales:
                before = needed.get(id(value), (0, 0))
                needed[id(value)] = max(before[0], up), max(before[1], down)
    unit = scales[id(source)]
    up, down = (-(-pixels // unit) for pixels in needed[id(source)])
    return up, down


def describe_split(
    folder: str, parts: Sequence[ir.Model], files: Sequence[str], kernels: Sequence[str] = ()
) -> SplitComponent:
    """The parts as a manifest describes them, once they are lowered. files, kernels: their names
    in `folder`, those of the graphs for edgesd's own kernels where there are some."""
    return split_of(
        ComponentPart(
            f"{folder}/{files[index]}",
            _spec(part),
            weight_bytes(part),
            f"{folder}/{kernels[index]}" if kernels else None,
            margins=part.meta.get(_MARGINS),
        )
        for index, part in enumerate(parts)
    )


class _Statistics:
    """Writes group normalizations that take their statistics from outside."""

    def __init__(
        self, model: ir.Model, statistics: ir.Value, own: ir.Value, core: ir.Value
    ) -> None:
        self.model, self.statistics, self.own, self.core = model, statistics, own, core
        self.nodes: list[ir.Node] = []
        self.prefix = ""

    def write(self, index: int, node: ir.Node, norm: GroupNorm, scale: int) -> ir.Value:
        """Put number `index` in the place of `norm`, which ends with `node`; its moments
        [1, 2, groups]. scale: pixels of its input for one of `core`."""
        self.prefix, self.nodes = f"norm{index}", []
        x, groups = norm.source, norm.groups
        channels = tensor_of(norm.gamma).size
        corners = self.op("Mul", [self.core, self.ints(scale)])
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


def _cuts(model: ir.Model) -> list[str]:
    """Names of the values between parts: the input of a decoder's first upsampling, or the outputs
    of an encoder's downsamplings."""
    for node in model.graph:
        if node.op_type == "Resize":
            return [input_of(node, 0).name or ""]
    found = [node.outputs[0].name or "" for node in model.graph if _stride(node) > 1]
    if not found:
        raise EdgesdError(f"{model.graph.name} has no upsampling or downsampling to split it at")
    return found


def _value_called(model: ir.Model, name: str) -> ir.Value:
    values = (out for node in model.graph for out in node.outputs)
    found = next((value for value in values if value.name == name), None)
    if found is None:
        raise EdgesdError(f"{model.graph.name} has no value {name} to split it at")
    return found


def _stride(node: ir.Node) -> int:
    """Of a convolution, in each direction; 1 for all else."""
    strides = node.attributes.get("strides") if node.op_type == "Conv" else None
    return 1 if strides is None else int(max(strides.as_ints()))


def _read_sizes(model: ir.Model, node: ir.Node, features: ir.Value, larger: int) -> None:
    """Let a Shape node of the image read the features' shape, whose height and width are a
    `larger`th."""
    start, end = (
        node.attributes[name].as_int() if name in node.attributes else default
        for name, default in (("start", 0), ("end", 4))
    )
    if start <= 1 < end:  # the features have more channels
        return
    factors = np.array([1, 1, larger, larger][start:end], np.int64)
    shape = ir.node("Shape", [features], {"start": start, "end": end}, name=f"{node.name}.features")
    factor = shared_constant(model, f"sizes:{'x'.join(map(str, factors))}", factors)
    sizes = ir.node("Mul", [shape.outputs[0], factor], name=f"{node.name}.sizes")
    replace_node(model.graph, node, [shape, sizes], sizes.outputs[0])


def _norms(model: ir.Model) -> list[tuple[ir.Node, GroupNorm]]:
    """All group normalizations, with the node that each ends with."""
    found = ((node, group_norm(model, node)) for node in model.graph)
    return [(node, norm) for node, norm in found if norm is not None]


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
    if node.op_type == "Resize":
        scales = node.inputs[2] if len(node.inputs) > 2 else None
        return (
            scales is not None
            and scales.const_value is not None
            and scales.const_value.numpy().tolist() == [1, 1, 2, 2]
        )
    return node.op_type == "Conv" or node.op_type in _LOCAL


def _scales(source: ir.Value) -> dict[int, int]:
    """By id, how many pixels of each value that depends on `source` there are for one of the
    smallest, in each direction."""
    scales = {id(source): Fraction(1)}
    smallest = Fraction(1)
    for node in graph_of(next(iter(source.uses())).node):
        known = [scales[id(value)] for value in node.inputs if id(value) in scales]
        for out in node.outputs if known else ():
            scales[id(out)] = max(known) * (2 if node.op_type == "Resize" else 1) / _stride(node)
            smallest = min(smallest, scales[id(out)])
    return {value: int(scale / smallest) for value, scale in scales.items()}


def _channels(value: ir.Value) -> Any:
    return (value.shape or [None, None])[1]


def _one_row(value: ir.Value) -> None:
    """Images are made and read one at a time."""
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
