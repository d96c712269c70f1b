"""Quantized layers on disk, and the graphs made of them."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch

from edgesd.errors import EdgesdError
from edgesd.export.calibrate import Calibration
from edgesd.export.external_data import GRAPH_FILE, write_model
from edgesd.export.passes.fp16_weights import Fp16Weights
from edgesd.export.passes.quantized_ort import QuantizedOrt
from edgesd.export.quantize import quantize
from edgesd.export.quantize.assign import Choice
from edgesd.export.quantize.layers import (
    Layer,
    QuantizedLayer,
    find_layers,
    load_layer,
    matrix_of,
    save_layer,
    weight_of,
)
from edgesd.export.quantize.quantize import Method, quantize_layer
from edgesd.spec import ComponentSpec, Scheme

_log = logging.getLogger(__name__)


class LayerStore:
    """Quantizes layers of the fp32 graphs below `graphs`, each once; `folder` keeps them.

    graphs: a folder with COMPONENT/model.onnx for each component. What is in `folder` from an
    interrupted run is taken as it is: its name says what it depends on.
    """

    def __init__(
        self, graphs: Path, components: Mapping[str, ComponentSpec], calibration: Calibration,
        method: Method, folder: Path,
    ) -> None:  # fmt: skip
        self.graphs, self.calibration, self.method = graphs, calibration, method
        parts = (quantize.VERSION, method, torch.__version__, torch.get_num_threads())
        key = hashlib.sha256(repr((calibration.folder.name, parts)).encode()).hexdigest()[:16]
        self.folder = folder / f"layers-{key}"
        self.layers: list[Layer] = []
        self._weights: dict[Layer, ir.Value] = {}
        self._nodes: dict[Layer, ir.Node] = {}
        for component in components:
            model = self.model(component)
            nodes = {node.name: node for node in model.graph}
            for layer in find_layers(component, model):
                self.layers.append(layer)
                self._nodes[layer] = nodes[layer.node]

    def model(self, component: str) -> ir.Model:
        """The fp32 graph of a component, its weights mapped and not read."""
        return load_graph(self.graphs / component / GRAPH_FILE)

    def get(self, layer: Layer, scheme: Scheme) -> QuantizedLayer:
        """`layer` under `scheme`: read if it is there, else quantized and written."""
        path = self.folder / layer.component / f"{layer.name}.{scheme}.safetensors"
        if path.exists():
            try:
                return load_layer(path)
            except EdgesdError as exc:
                _log.warning("%s", exc)
        stats = self.calibration.layer(layer)
        weight = matrix_of(self._nodes[layer], layer)
        found = quantize_layer(layer, weight, stats, scheme, self.method)
        save_layer(found, path)
        return found

    def rows_per_run(self, layer: Layer) -> int:
        """Rows of the layer's matrix product in one run of the network."""
        stats = self.calibration.layer(layer)
        return 1 if stats is None else stats.rows_per_run

    def quantized_model(self, component: str, choices: Mapping[Layer, Choice]) -> ir.Model:
        """A component's graph with its layers as chosen; one that isn't named stays fp32."""
        model = self.model(component)
        mine = {layer: choice for layer, choice in choices.items() if layer.component == component}
        layers = {
            layer.node: self.get(layer, choice)
            for layer, choice in mine.items()
            if choice is not None
        }
        halves = {layer.node for layer, choice in mine.items() if choice is None}
        keep = set()
        for node in model.graph:
            weight = weight_of(node)
            if weight is not None and node.name not in halves:
                keep.add(weight.name or "")
        others = {name for name in model.graph.initializers if name not in _weights(model)}
        Fp16Weights(skip=keep | others)(model)
        QuantizedOrt(layers, self.timesteps(component))(model)
        return model

    def write(self, component: str, choices: Mapping[Layer, Choice], folder: Path) -> None:
        """Write a component's graph as folder/model.onnx and weights.bin."""
        write_model(self.quantized_model(component, choices), folder)

    def variant(self, component: str, choices: Mapping[Layer, Choice]) -> bytes:
        """A component's graph as bytes; what isn't quantized refers to the fp32 graph's weights."""
        proto = ir.serde.serialize_model(self.quantized_model(component, choices))
        found: bytes = proto.SerializeToString()
        return found

    def timesteps(self, component: str) -> npt.NDArray[np.float32] | None:
        """Timesteps that ranges were recorded at, for the denoiser; None for other components."""
        return self.calibration.timesteps() if component == "unet" else None


def load_graph(path: Path) -> ir.Model:
    """The graph file at `path`, its weights mapped and not read."""
    return ir.load(path)


def _weights(model: ir.Model) -> set[str]:
    """Names of the weights of all layers."""
    found = (weight_of(node) for node in model.graph)
    return {weight.name or "" for weight in found if weight is not None}
