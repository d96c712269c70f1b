"""Quantized layers on disk, and the graphs made of them."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Lock

import onnx_ir as ir
import torch

from edgesd.errors import EdgesdError
from edgesd.export.backends.base import Lowering
from edgesd.export.calibrate import Calibration, LayerStats
from edgesd.export.external_data import (
    KERNELS_FILE,
    split_files,
    write_model,
)
from edgesd.export.passes.lora_slots import add_slots
from edgesd.export.passes.lowering import Timesteps
from edgesd.export.passes.no_shapes import NoShapes
from edgesd.export.passes.pooled_attention import PooledAttention
from edgesd.export.passes.split_autoencoder import describe_split, split_component
from edgesd.export.passes.split_concat import SplitConcat
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
from edgesd.export.quantize.method import Method
from edgesd.export.quantize.quantize import joint_smoothing, quantize_layer
from edgesd.export.source_graphs import SourceGraphs
from edgesd.progress import Progress
from edgesd.runtime.arrays import Float
from edgesd.spec.bundle import SplitComponent
from edgesd.spec.lora import LoraSlots
from edgesd.spec.pipeline import Wiring
from edgesd.spec.scheme import Scheme

_log = logging.getLogger(__name__)

_MOST_WORKERS = 4
"""Layers that are quantized at a time. SDXL's, two at a time, took 2.9 GB, libraries included."""


@dataclass(frozen=True)
class GraphForm:
    """Which graphs of a component are made. kernels: besides, those for edgesd's own kernels.
    attention: with these, attention in 8 bits. pooled: the largest self-attention has fewer keys
    and values, where it can have. lora_slots: the largest rank of LoRAs that the graphs take."""

    kernels: bool = False
    attention: bool = False
    pooled: bool = False
    lora_slots: int | None = None


@dataclass(frozen=True)
class Summary:
    """Of a QuantizedLayer: what became of the scheme, bytes on disk, and the error it makes."""

    scheme: Scheme
    method: str
    rank: int
    bytes: int
    error: float


def layers_folder(work: Path, calibration: Path, method: Method) -> Path:
    """Where a LayerStore keeps layers in `work`. calibration: the folder of their statistics."""
    version = quantize.VERSIONS[method.correlates]
    parts = (version, method, torch.__version__, torch.get_num_threads())
    key = hashlib.sha256(repr((calibration.name, parts)).encode()).hexdigest()[:16]
    return work / f"layers-{key}"


class LayerStore:
    """Quantizes layers of the fp32 graphs `graphs`, each once; `folder` keeps them.

    nodes: see `find_nodes`. lowering: of the backend whose graphs are made. wiring: of the pipeline
    that the graphs are of. What is in `folder`
    from an interrupted run is taken as it is: its name says what it depends on.
    """

    def __init__(
        self,
        graphs: SourceGraphs,
        nodes: Mapping[Layer, ir.Node],
        calibration: Calibration,
        method: Method,
        folder: Path,
        lowering: Lowering,
        wiring: Wiring,
    ) -> None:
        self.graphs, self.calibration, self.method = graphs, calibration, method
        self.lowering, self.wiring = lowering, wiring
        self.layers = list(nodes)
        self._nodes = nodes
        self._reading: dict[tuple[str, str], list[Layer]] = {}
        for layer in nodes:
            if layer.source and method.smooths and "joint" in method.measures:
                self._reading.setdefault((layer.component, layer.source), []).append(layer)
        self._smoothings: dict[tuple[str, str, Scheme], Float | None] = {}
        self._searching = Lock()
        self._summaries: dict[tuple[Layer, Scheme], Summary] = {}
        self.folder = layers_folder(folder, calibration.folder, method)

    def quantize(
        self, wanted: Iterable[tuple[Layer, LayerScheme]], progress: Progress, task: str
    ) -> None:
        """Quantize layers that aren't there yet, several at a time: most of what one takes runs on
        one core, whatever torch is given. progress gets `task`, in layers."""
        missing = [
            (layer, scheme)
            for layer, scheme in dict.fromkeys(wanted)
            if scheme is not None and not self._path(layer, scheme).exists()
        ]
        threads = torch.get_num_threads()
        workers = min(threads, _MOST_WORKERS)
        pool = ThreadPoolExecutor(workers, "quantize", torch.set_num_threads, (threads // workers,))
        try:
            for done, _ in enumerate(pool.map(lambda pair: self.get(*pair), missing), 1):
                progress.update(task, done, len(missing))
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(threads)

    def _path(self, layer: Layer, scheme: Scheme) -> Path:
        return self.folder / layer.component / f"{layer.name}.{scheme}.safetensors"

    def get(self, layer: Layer, scheme: Scheme) -> QuantizedLayer:
        """`layer` under `scheme`, mapped: quantized and written, if it isn't there yet."""
        path = self._path(layer, scheme)
        if path.exists():
            try:
                return load_layer(path)
            except EdgesdError as exc:
                _log.warning("%s", exc)
        stats = self.calibration.layer(layer)
        weight = matrix_of(self._nodes[layer], layer)
        shared = None
        if stats is not None and (layer.component, layer.source) in self._reading:
            shared = partial(self._joint_smoothing, layer, stats, scheme)
        quantized = quantize_layer(layer, weight, stats, scheme, self.method, shared)
        self.graphs.check()
        save_layer(quantized, path)
        return load_layer(path)

    def _joint_smoothing(self, layer: Layer, stats: LayerStats, scheme: Scheme) -> Float | None:
        """That of all layers which read what `layer` reads, searched once for all of them."""
        key = layer.component, layer.source, scheme
        with self._searching:  # others of the group, which are quantized beside it, wait for it
            if key not in self._smoothings:
                others = self._reading[layer.component, layer.source]
                weights = (matrix_of(self._nodes[each], each) for each in others)
                found = joint_smoothing(layer, weights, stats, scheme, self.method)
                self._smoothings[key] = found
            return self._smoothings[key]

    def summary(self, layer: Layer, scheme: Scheme) -> Summary:
        """What `get` gives, without its tensors."""
        if (layer, scheme) not in self._summaries:
            q = self.get(layer, scheme)
            summary = Summary(q.scheme, q.method, q.rank, q.bytes(), q.error)
            self._summaries[layer, scheme] = summary
        return self._summaries[layer, scheme]

    def rows_per_run(self, layer: Layer) -> int:
        """Rows of the layer's matrix product in one run of its network."""
        return self.calibration.rows_per_run(layer)

    def write(
        self,
        component: str,
        schemes: Mapping[Layer, LayerScheme],
        folder: Path,
        form: GraphForm,
    ) -> tuple[SplitComponent | None, LoraSlots | None]:
        """Write a component's graph, whose layers have `schemes` (those without one stay in fp32),
        as folder/model.onnx and weights.bin, and beside it what `form` asks for, if there is any.
        For ONNX Runtime also an autoencoder's parts, which it returns, and slots for LoRAs."""
        layers, fp16_weights = self._quantized(component, schemes)
        stock: list[ir.Model] = []
        own: list[ir.Model] = []
        fixed, slots = self.lowering.fixed_shapes, None
        for kernels, models in ((False, stock), (True, own))[: 1 + form.kernels]:
            attention = form.attention if kernels else None
            for model in self._graphs(component, form):
                whole = not models
                if whole:
                    slots = add_slots(model, component, self.wiring, form.lora_slots, fixed)
                nodes = {node.name for node in model.graph}
                inside = layers if whole else {n: q for n, q in layers.items() if n in nodes}
                if not self._lower(model, component, inside, fp16_weights, attention) and whole:
                    break
                models.append(model)
        parts = stock[1:]
        files = split_files(len(parts))
        own_files = split_files(len(parts), kernels=True) if own else ()
        split = describe_split(component, parts, files, own_files) if parts else None
        # In the order of their weights, which follow those of the first graph.
        others = dict(zip((KERNELS_FILE,), own, strict=False))
        others |= dict(zip(files, parts, strict=True))
        others |= dict(zip(own_files, own[1:], strict=True))
        write_model(stock[0], folder, others)
        return split, slots

    def variant(self, component: str, schemes: Mapping[Layer, LayerScheme]) -> bytes:
        """A component's graph as bytes; what isn't quantized refers to the fp32 graph's weights."""
        model = self.graphs.load(component)
        self._lower(model, component, *self._quantized(component, schemes), None)
        serialized: bytes = ir.serde.serialize_model(model).SerializeToString()
        return serialized

    def _quantized(
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

    def _graphs(self, component: str, form: GraphForm) -> Iterator[ir.Model]:
        """The fp32 graphs that layers are put into: the whole one, an autoencoder's parts."""
        model = self.graphs.load(component)
        if form.pooled:
            PooledAttention(self.wiring.input_of(component, "sample"))(model)
        yield model
        if self.lowering.splits_autoencoder and component in self.wiring.autoencoder:
            yield from split_component(self.graphs.load(component))

    def _lower(
        self,
        model: ir.Model,
        component: str,
        layers: Mapping[str, QuantizedLayer],
        fp16_weights: Collection[str],
        attention: bool | None,
    ) -> bool:
        """Put `layers` into a graph; False where edgesd's own kernels have nothing to do in it.

        attention: in 8 bits with these; None for the backend's own operators.
        """
        timesteps = self.timesteps(component)
        used = True
        split = self._split(component, layers, fp16_weights)
        SplitConcat(split.__contains__)(model)
        if attention is None:
            self.lowering.lower_quantized(model, layers, fp16_weights, timesteps)
        else:
            used = self.lowering.lower_to_kernels(model, layers, fp16_weights, timesteps, attention)
        NoShapes()(model)
        return used

    def _split(
        self, component: str, layers: Mapping[str, QuantizedLayer], fp16_weights: Collection[str]
    ) -> set[str]:
        """Modules of which some part is quantized, or in 16 bits."""
        return {
            layer.module
            for layer, node in self._nodes.items()
            if layer.component == component
            and layer.part
            and (layer.node in layers or getattr(weight_of(node), "name", None) in fp16_weights)
        }

    def timesteps(self, component: str) -> Timesteps | None:
        """Timesteps that ranges were recorded at; None for a component that doesn't take them."""
        name = self.wiring.input_of(component, "timestep")
        return None if name is None else Timesteps(name, self.calibration.timesteps())


def find_nodes(models: Mapping[str, ir.Model], split: bool = False) -> dict[Layer, ir.Node]:
    """All layers that can be quantized in fp32 graphs, by component, with their nodes. split: of
    what is split into parts (passes/split_concat.py), the parts: the graphs are changed."""
    layers: dict[Layer, ir.Node] = {}
    for component, model in models.items():
        if split:
            SplitConcat()(model)
        nodes = {node.name: node for node in model.graph}
        layers.update({layer: nodes[layer.node] for layer in find_layers(component, model)})
    return layers


def can_pool(graphs: SourceGraphs, component: str, wiring: Wiring) -> bool:
    """Whether a component's fp32 graph has self-attention that can be pooled."""
    return PooledAttention(wiring.input_of(component, "sample"))(graphs.load(component))
