"""Quantized layers on disk, and the graphs made of them."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch

from edgesd.errors import EdgesdError
from edgesd.export.backends import ONNXRUNTIME, lower_quantized, lower_to_kernels
from edgesd.export.calibrate import Calibration
from edgesd.export.external_data import (
    GRAPH_FILE,
    KERNELS_FILE,
    KERNELS_SPLIT_FILES,
    SPLIT_FILES,
    write_model,
)
from edgesd.export.passes.no_shapes import NoShapes
from edgesd.export.passes.own_kernels import PARTS
from edgesd.export.passes.pooled_attention import PooledAttention
from edgesd.export.passes.tiled_decoder import COMPONENT, describe_split, split_decoder
from edgesd.export.quantize import quantize
from edgesd.export.quantize.assign import LayerScheme
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
from edgesd.spec.bundle import SplitDecoder
from edgesd.spec.scheme import Scheme

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Summary:
    """Of a QuantizedLayer: what became of the scheme, bytes on disk, and the error it makes."""

    scheme: Scheme
    method: str
    rank: int
    bytes: int
    error: float


class LayerStore:
    """Quantizes layers of the fp32 graphs below `graphs`, each once; `folder` keeps them.

    nodes: see `find_nodes`. backend: whose graphs `quantized_model` makes. What is in `folder` from
    an interrupted run is taken as it is: its name says what it depends on. pooled: whether graphs
    made from now on have pooled attention, where it can be.
    """

    def __init__(
        self,
        graphs: Path,
        nodes: Mapping[Layer, ir.Node],
        calibration: Calibration,
        method: Method,
        folder: Path,
        backend: str = ONNXRUNTIME,
    ) -> None:
        self.graphs, self.calibration, self.method = graphs, calibration, method
        self.backend, self.pooled = backend, False
        self.layers = list(nodes)
        self._nodes = nodes
        self._summaries: dict[tuple[Layer, Scheme], Summary] = {}
        parts = (quantize.VERSION, method, torch.__version__, torch.get_num_threads())
        key = hashlib.sha256(repr((calibration.folder.name, parts)).encode()).hexdigest()[:16]
        self.folder = folder / f"layers-{key}"

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

    def summary(self, layer: Layer, scheme: Scheme) -> Summary:
        """What `get` gives, without its tensors."""
        if (layer, scheme) not in self._summaries:
            q = self.get(layer, scheme)
            found = Summary(q.scheme, q.method, q.rank, q.bytes(), q.error)
            self._summaries[layer, scheme] = found
        return self._summaries[layer, scheme]

    def quantized_model(self, component: str, schemes: Mapping[Layer, LayerScheme]) -> ir.Model:
        """A component's graph with its layers as chosen; one that isn't named stays fp32."""
        model = self._model(component)
        layers, fp16_weights = self._chosen(component, schemes)
        lower_quantized(model, layers, fp16_weights, self.timesteps(component), self.backend)
        NoShapes()(model)
        return model

    def kernels_model(
        self, component: str, schemes: Mapping[Layer, LayerScheme], attention: bool
    ) -> ir.Model | None:
        """The same for edgesd's own kernels; None where they have nothing to do. attention: in 8
        bits, too."""
        model = self._model(component)
        layers, fp16_weights = self._chosen(component, schemes)
        timesteps = self.timesteps(component)
        if not lower_to_kernels(model, layers, fp16_weights, timesteps, _parts(attention)):
            return None
        NoShapes()(model)
        return model

    def _model(self, component: str) -> ir.Model:
        """The fp32 graph that layers are put into."""
        model = _load(self.graphs, component)
        if self.pooled:
            PooledAttention()(model)
        return model

    def _chosen(
        self, component: str, schemes: Mapping[Layer, LayerScheme]
    ) -> tuple[dict[str, QuantizedLayer], set[str]]:
        """Quantized layers by node, and names of the weights that stay in 16 bits."""
        mine = {layer: scheme for layer, scheme in schemes.items() if layer.component == component}
        layers = {
            layer.node: self.get(layer, scheme)
            for layer, scheme in mine.items()
            if scheme is not None
        }
        weights = [
            weight_of(self._nodes[layer]) for layer, scheme in mine.items() if scheme is None
        ]
        return layers, {weight.name for weight in weights if weight and weight.name}

    def write(
        self,
        component: str,
        schemes: Mapping[Layer, LayerScheme],
        folder: Path,
        kernels: bool = False,
        attention: bool = False,
    ) -> SplitDecoder | None:
        """Write a component's graph as folder/model.onnx and weights.bin; with `kernels` also its
        kernels.onnx, if it has one. For ONNX Runtime also a decoder's head and tail, which are
        returned."""
        own = self.kernels_model(component, schemes, attention) if kernels else None
        others = {} if own is None else {KERNELS_FILE: own}
        splits = component == COMPONENT and self.backend == ONNXRUNTIME
        stock = self._split_graphs(component, schemes, None) if splits else ()
        split: SplitDecoder | None = None
        if stock:
            others |= zip(SPLIT_FILES, stock, strict=True)
            if own is not None:
                ours = self._split_graphs(component, schemes, _parts(attention))
                others |= zip(KERNELS_SPLIT_FILES, ours, strict=True)
            names = () if own is None else KERNELS_SPLIT_FILES
            split = describe_split(component, stock, SPLIT_FILES, names)
        write_model(self.quantized_model(component, schemes), folder, others)
        return split

    def _split_graphs(
        self, component: str, schemes: Mapping[Layer, LayerScheme], parts: Collection[str] | None
    ) -> tuple[ir.Model, ...]:
        """Head and tail of a decoder, with layers as chosen; nothing where it can't be split.
        parts: of edgesd's own kernels (OwnKernels); None for ONNX Runtime's operators."""
        found = split_decoder(_load(self.graphs, component)) or ()
        layers, fp16_weights = self._chosen(component, schemes)
        for model in found:
            nodes = {node.name for node in model.graph}
            mine = {name: layer for name, layer in layers.items() if name in nodes}
            if parts is None:
                lower_quantized(model, mine, fp16_weights, None, self.backend)
            else:
                lower_to_kernels(model, mine, fp16_weights, None, parts)
            NoShapes()(model)
        return found

    def variant(self, component: str, schemes: Mapping[Layer, LayerScheme]) -> bytes:
        """A component's graph as bytes; what isn't quantized refers to the fp32 graph's weights."""
        proto = ir.serde.serialize_model(self.quantized_model(component, schemes))
        found: bytes = proto.SerializeToString()
        return found

    def timesteps(self, component: str) -> npt.NDArray[np.float32] | None:
        """Timesteps that ranges were recorded at, for the denoiser; None for other components."""
        return self.calibration.timesteps() if component == "unet" else None


def _parts(attention: bool) -> list[str]:
    """Parts of edgesd's own kernels, with attention in 8 bits or without."""
    return [part for part in PARTS if part != "attention" or attention]


def find_nodes(graphs: Path, components: Iterable[str]) -> dict[Layer, ir.Node]:
    """All layers that can be quantized, with their nodes, in the graphs COMPONENT/model.onnx below
    the folder `graphs`."""
    found: dict[Layer, ir.Node] = {}
    for component in components:
        model = _load(graphs, component)
        nodes = {node.name: node for node in model.graph}
        found.update({layer: nodes[layer.node] for layer in find_layers(component, model)})
    return found


def can_pool(graphs: Path, component: str) -> bool:
    """Whether a component's fp32 graph has self-attention that can be pooled."""
    return PooledAttention()(_load(graphs, component))


def _load(graphs: Path, component: str) -> ir.Model:
    """The fp32 graph of a component, its weights mapped and not read."""
    return ir.load(graphs / component / GRAPH_FILE)
