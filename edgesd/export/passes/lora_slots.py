"""Places for LoRAs: layers whose graph adds (x down) up, of factors that are inputs.

A slot reads the layer's own input, so that it needs to know nothing of what becomes of the layer:
smoothing, codes and branches of quantized ones see another. It is added behind the layer's bias,
where backends fuse the layer with it as in graphs without slots.

Slots are in all linears that see tokens (attention, feed-forward, projections of transformers) and
in convolutions of 1x1, which are the same for pixels: those that LoRAs of Stable Diffusion are of.
Others of 3x3 would cost as much empty as filled, and the timestep's vector isn't worth a slot,
unless a network of its own makes all of it, which runs once for an image.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from edgesd.export.passes import Pass
from edgesd.export.passes.lowering import shared_constant
from edgesd.export.passes.values import input_of, shape_of
from edgesd.export.quantize.layers import Layer, find_layers
from edgesd.spec.lora import LoraSlot, LoraSlots, OtherLayer, slot_inputs
from edgesd.spec.pipeline import Wiring


class AddLoraSlots(Pass):
    """Gives a component's graph slots of up to `rank`, and the inputs for them. fixed: of exactly
    that rank. rows: also in linears of one vector per run. `slots` says which, after the call; None
    where the graph has no layer for one."""

    def __init__(self, component: str, rank: int, fixed: bool, rows: bool = False) -> None:
        self.component, self.rank, self.fixed, self.rows = component, rank, fixed, rows
        self.slots: LoraSlots | None = None

    def call(self, model: ir.Model) -> bool:
        nodes = {node.name: node for node in model.graph}
        found = [la for la in find_layers(self.component, model, 1) if la.kind != "embedding"]
        layers = [layer for layer in found if has_slot(layer, self.rows)]
        for index, layer in enumerate(layers):
            self._add(model, nodes[layer.node], layer, index)
        if layers:
            slots = tuple(LoraSlot(layer.name, layer.columns, layer.rows) for layer in layers)
            others = tuple(OtherLayer(la.name, la.shape) for la in found if la not in layers)
            self.slots = LoraSlots(self.rank, self.fixed, slots, others)
        return bool(layers)

    def _add(self, model: ir.Model, node: ir.Node, layer: Layer, index: int) -> None:
        rank: int | str = self.rank if self.fixed else f"rank.{index}"
        names = slot_inputs(index)
        down = _input(model, names[0], [layer.columns, rank])
        up = _input(model, names[1], [rank, layer.rows])
        last = _with_bias(node, layer)
        nodes = _product(model, node, layer, (down, up))
        out = last.outputs[0]
        total = ir.node("Add", [out, nodes[-1].outputs[0]])
        total.name = f"{layer.name}/lora"
        made = total.outputs[0]
        made.name, made.shape, made.type = total.name, out.shape, out.type
        ir.convenience.replace_all_uses_with(out, made, replace_graph_outputs=True)
        total.replace_input_with(0, out)
        if made in model.graph.outputs:
            made.name, out.name = out.name, f"{out.name}/without_lora"
        model.graph.insert_after(last, [*nodes, total])


def add_slots(
    model: ir.Model, component: str, wiring: Wiring, rank: int | None, fixed: bool
) -> LoraSlots | None:
    """Give a component's graph slots of `rank`, if it has weights that LoRAs are of: those of text
    encoders, the denoiser and its modulation. None where it has none, or no rank is given."""
    if rank is None or not takes_loras(component, wiring):
        return None
    adding = AddLoraSlots(component, rank, fixed, modulates(component, wiring))
    adding(model)
    return adding.slots


def takes_loras(component: str, wiring: Wiring) -> bool:
    """Whether a component gets slots: text encoders, the denoiser and its modulation do."""
    texts = (text.component for text in wiring.texts)
    return component in (*texts, wiring.denoiser.component) or modulates(component, wiring)


def modulates(component: str, wiring: Wiring) -> bool:
    """Whether a component is what makes the denoiser's modulation."""
    return wiring.modulation is not None and wiring.modulation.component == component


def has_slot(layer: Layer, rows: bool = False) -> bool:
    """Whether a layer gets a slot. rows: also where it sees one vector per run."""
    pointwise = layer.kind == "conv" and layer.kernel == (1, 1)
    return (layer.kind == "linear" and (rows or not layer.one_row)) or (
        pointwise and layer.strides == (1, 1) and not any(layer.pads)
    )


def _input(model: ir.Model, name: str, shape: list[int | str]) -> ir.Value:
    value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))
    model.graph.inputs.append(value)
    return value


def _with_bias(node: ir.Node, layer: Layer) -> ir.Node:
    """The node that adds the bias of a linear, where it is a node of its own; else the layer's."""
    uses = list(node.outputs[0].uses())
    if layer.kind == "linear" and len(uses) == 1 and uses[0].node.op_type == "Add":
        after = uses[0].node
        bias = after.inputs[1 - uses[0].idx]
        if bias is not None and bias.is_initializer() and list(bias.shape or ()) == [layer.rows]:
            return after
    return node


def _product(
    model: ir.Model, node: ir.Node, layer: Layer, factors: tuple[ir.Value, ir.Value]
) -> list[ir.Node]:
    """Nodes whose last output is (x down) up of the layer's input x."""
    x, (down, up) = input_of(node, 0), factors
    made: list[ir.Node] = []

    def op(kind: str, inputs: list[ir.Value | None], name: str, **attributes: Any) -> ir.Value:
        new = ir.node(kind, inputs, attributes, name=f"{layer.name}/lora.{name}")
        new.outputs[0].name, new.outputs[0].type = new.name, x.type
        made.append(new)
        return new.outputs[0]

    if layer.kind == "linear":
        low = op("MatMul", [x, down], "low")
        op("MatMul", [low, up], "product").shape = node.outputs[0].shape
        return made
    # Channels come before pixels: up' (down' x), of x [B, C, H * W].
    flat = _constant(model, "flat", [0, 0, -1])
    left, right = (op("Transpose", [f], n, perm=[1, 0]) for f, n in ((down, "down"), (up, "up")))
    low = op("MatMul", [left, op("Reshape", [x, flat], "pixels")], "low")
    product = op("MatMul", [right, low], "rows")
    dims = [dim for dim in shape_of(x) if isinstance(dim, int)]
    if len(dims) == 4:
        size = _constant(model, "size", [dims[0], layer.rows, *dims[2:]])
    else:
        # Not of the layer's own output: who reads that keeps it from being fused with what follows.
        ends = [op("Shape", [x], f"from{i}", start=i, end=end) for i, end in ((0, 1), (2, 4))]
        size = op(
            "Concat", [ends[0], _constant(model, "rows", [layer.rows]), ends[1]], "size", axis=0
        )
        for value in (*ends, size):
            value.type = ir.TensorType(ir.DataType.INT64)
    op("Reshape", [product, size], "product").shape = node.outputs[0].shape
    return made


def _constant(model: ir.Model, name: str, values: list[int]) -> ir.Value:
    name = f"lora:{name}{'x'.join(map(str, values))}"
    return shared_constant(model, name, np.array(values, np.int64))
