"""What tests of quantized layers share."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from edgesd.export.calibrate import LayerStats
from edgesd.export.passes.fusions import FUSIONS
from edgesd.export.passes.own_kernels import CONV, DOMAIN, INPUTS
from edgesd.export.quantize.assign import planned
from edgesd.export.quantize.layers import Layer, QuantizedLayer, find_layers, matrix_of
from edgesd.export.quantize.methods import get_method
from edgesd.export.quantize.quantize import quantize_layer
from edgesd.runtime.backends.onnxruntime import session_options
from edgesd.spec.scheme import parse_scheme

Array = npt.NDArray[np.float32]
Fused = dict[str, set[str]]
"""Name of a layer -> names of the fusions that became part of it."""

_KINDS = {"QuantConv": "conv", "QuantLinear": "linear"}


def normal(*shape: int, seed: int = 0) -> Array:
    """Normally distributed values, the same each time."""
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def patches(x: npt.NDArray[Any], layer: Layer) -> Array:
    """im2col by loops: [B, C, H, W] -> [B, H', W', K], tap by tap. Rows for others."""
    if layer.kind != "conv":
        return x
    top, left, bottom, right = layer.pads
    padded = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)))
    (kernel_h, kernel_w), (step_h, step_w) = layer.kernel, layer.strides
    height = (padded.shape[2] - kernel_h) // step_h + 1
    width = (padded.shape[3] - kernel_w) // step_w + 1
    out = np.empty((len(x), height, width, layer.columns), np.float32)
    for row in range(height):
        for column in range(width):
            part = padded[:, :, row * step_h :, column * step_w :][:, :, :kernel_h, :kernel_w]
            out[:, row, column] = part.transpose(0, 2, 3, 1).reshape(len(x), -1)
    return out


def record(layer: Layer, inputs: list[Array]) -> LayerStats:
    """Statistics of one input for each timestep."""
    rows = [patches(x, layer).reshape(-1, layer.columns) for x in inputs]
    axes = (0, 2, 3) if layer.kind == "conv" else tuple(range(inputs[0].ndim - 1))
    every = np.concatenate(rows)
    return LayerStats(
        low=np.stack([x.min(axes) for x in inputs]).astype(np.float32),
        high=np.stack([x.max(axes) for x in inputs]).astype(np.float32),
        blocks=(every.T @ every,),
        count=len(every),
        rows=every.astype(np.float16),
        row_steps=np.repeat(np.arange(len(rows)), [len(r) for r in rows]).astype(np.int64),
    )


def rounded_layers(
    model: ir.Model, inputs: Mapping[str, npt.NDArray[Any]], scheme: str, static: bool = False
) -> dict[str, QuantizedLayer]:
    """Layers of the graph, by their nodes, rounded to nearest as `scheme` plans them, and
    calibrated on one run of it."""
    nodes = {node.name: node for node in model.graph}
    layers = find_layers(model.graph.name or "network", model)
    fed = {la: nodes[la.node].inputs[0] for la in layers if la.kind != "embedding"}
    names = sorted({value.name or "" for value in fed.values() if value is not None} - {*inputs})
    recorded = {**inputs, **dict(zip(names, run_graph(model, inputs, names), strict=True))}
    schemes, method = planned(layers, parse_scheme(scheme)), get_method("rtn", static)
    found = {}
    for layer in layers:
        value, chosen = fed.get(layer), schemes[layer]
        if chosen is not None:
            stats = None if value is None else record(layer, [recorded[value.name or ""]])
            weight = matrix_of(nodes[layer.node], layer)
            found[layer.node] = quantize_layer(layer, weight, stats, chosen, method)
    return found


def run_graph(
    model: ir.Model, inputs: Mapping[str, npt.NDArray[Any]], names: list[str]
) -> list[npt.NDArray[Any]]:
    """Values of the graph, by their names, as ONNX Runtime computes them."""
    seen = ir.from_proto(ir.to_proto(model))
    outputs = {value.name for value in seen.graph.outputs}
    seen.graph.outputs.extend(
        out for node in seen.graph for out in node.outputs if out.name in {*names} - outputs
    )
    session = onnxruntime.InferenceSession(
        ir.to_proto(seen).SerializeToString(), session_options(1)
    )
    found: list[npt.NDArray[Any]] = session.run(names, dict(inputs))
    return found


class LayerNormalization(OpRun):
    """With sums in fp32, as its stash_type says and the reference doesn't do."""

    def _run(self, x: Any, scale: Any, bias: Any = None, **attributes: Any) -> tuple[Any]:
        wide = x.astype(np.float32)
        centred = wide - wide.mean(-1, keepdims=True)
        spread = np.sqrt((centred**2).mean(-1, keepdims=True) + attributes["epsilon"])
        normed = (centred / spread).astype(x.dtype) * scale
        return (normed if bias is None else normed + bias,)


def evaluate(model: ir.Model, inputs: Mapping[str, npt.NDArray[Any]]) -> list[npt.NDArray[Any]]:
    """The outputs, each value computed in its own type, as a GPU does."""
    reference = ReferenceEvaluator(ir.to_proto(model), new_ops=[LayerNormalization])
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        found: list[npt.NDArray[Any]] = reference.run(None, dict(inputs))
    return found


def fused_in(graph: ir.Graph, branches: bool = False) -> Fused:
    """What became part of each of edgesd's layers, read off inputs and attributes. branches: they
    have low-rank ones, those of convolutions in the place of another branch's values."""
    found: Fused = {}
    for node in graph:
        if node.domain != DOMAIN or node.op_type not in INPUTS:
            continue
        names = INPUTS[node.op_type]
        given = {name for name, v in zip(names, node.inputs, strict=False) if v is not None}
        found[re.sub("/(Conv|MatMul)/.*", "", node.name or "")] = {
            fusion.name
            for fusion in FUSIONS
            if _KINDS[node.op_type] in fusion.layers
            and given >= set(fusion.inputs)
            and all(node.attributes[k].as_int() == v for k, v in fusion.attributes.items())
            and not (fusion.name == "residual" and branches and node.op_type == CONV)
            and not (fusion.name == "residual" and "gate" in given)
        }
    return found
