"""What tests of quantized layers share."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from edgesd.export.passes.fusions import FUSIONS
from edgesd.export.passes.own_kernels import CONV, DOMAIN, INPUTS
from edgesd.export.quantize.layers import Layer

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
