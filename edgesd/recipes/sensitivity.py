"""Measures the effect of quantizing one layer alone on the image, by generating."""

from __future__ import annotations

import hashlib
import logging
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from edgesd.errors import InputError
from edgesd.evaluate import quality as quality_
from edgesd.evaluate.psnr import mean_squared_error
from edgesd.export.quantize.assign import LayerScheme
from edgesd.export.quantize.layers import Layer
from edgesd.export.quantize.store import LayerStore
from edgesd.files import atomic_write
from edgesd.progress import Progress
from edgesd.recipes.comparison import Comparison
from edgesd.recipes.search import Probes
from edgesd.runtime.backends.onnxruntime import OnnxRuntimeRunner
from edgesd.runtime.bundle import GraphFile
from edgesd.runtime.flow import flow_of
from edgesd.runtime.pipeline import Pipeline
from edgesd.runtime.requests import Request
from edgesd.spec.base import decode_json
from edgesd.spec.scheme import Scheme

if TYPE_CHECKING:
    from PIL import Image

_log = logging.getLogger(__name__)


class Sensitivities:
    """Sensitivities of the layers in `planned`; they are kept below `work`: that takes generating a
    few small images per layer. scheme: what was asked for, for the file's name.

    Of a large model that would take weeks, and a copy in fp32 for each layer: there the squared
    error of a layer's own output, relative to it, stands in for what it does to an image.
    """

    def __init__(
        self,
        comparison: Comparison,
        store: LayerStore,
        planned: Mapping[Layer, LayerScheme],
        scheme: Scheme,
        work: Path,
        progress: Progress,
    ) -> None:
        self.comparison, self.store, self.planned = comparison, store, planned
        self._scheme, self._work, self._progress = scheme, work, progress

    def measure(self, probes: Probes) -> dict[Layer, float]:
        """Mean squared error of the images at the places `probes` when that layer alone is
        quantized as planned (or what stands in for it); 0 for layers that no image depends on."""
        path = self._work / f"sensitivity-{self._scheme}-{self._key(probes)}.json"
        known = _read_figures(path)
        flow = flow_of(self.comparison.reference.manifest.pipeline)
        components = flow.components if self.comparison.encodes(probes) else flow.from_prompts
        generating = {
            layer: scheme
            for layer, scheme in self.planned.items()
            if scheme is not None and layer.component in components
        }
        if not self.store.graphs.whole():
            found = {
                la: self.store.summary(la, scheme).error ** 2 for la, scheme in generating.items()
            }
            return {layer: found.get(layer, 0.0) for layer in self.planned}
        names = {  # the file's name has the scheme that was asked for
            layer: layer_name(layer) + ("" if scheme == self._scheme else f" {scheme}")
            for layer, scheme in generating.items()
        }
        unknown = [layer for layer in generating if names[layer] not in known]
        if unknown:
            requests = [self.comparison.requests[index] for index in probes]
            source = [self.comparison.source_images[index] for index in probes]
            with self.comparison.source_pipeline() as pipeline:
                for number, layer in enumerate(unknown):
                    self._progress.update(
                        f"{layer.component}: sensitivity", number + 1, len(unknown)
                    )
                    images = self._images_with(layer, generating[layer], pipeline, requests)
                    errors = map(mean_squared_error, source, images)
                    known[names[layer]] = statistics.fmean(errors)
                    with atomic_write(path) as file:
                        file.write(msgspec.json.encode(known))
        return {
            layer: known[names[layer]] if layer in generating else 0.0 for layer in self.planned
        }

    def _images_with(
        self, layer: Layer, scheme: Scheme, pipeline: Pipeline, requests: Sequence[Request]
    ) -> list[Image.Image]:
        """Images of the source with one layer quantized."""
        component = layer.component
        spec = self.comparison.reference.manifest.pipeline.components[component]
        graph = GraphFile(
            self.store.variant(component, {layer: scheme}), self.store.graphs.folder / component
        )
        pipeline.replace(component, OnnxRuntimeRunner(spec, graph))
        images = quality_.generate(pipeline, requests, together=True)
        pipeline.restore(component)
        return images

    def _key(self, probes: Probes) -> str:
        parts = (self.store.folder.name, self.comparison.folder.name, probes)
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def layer_name(layer: Layer) -> str:
    """A layer's name in a pipeline: unet/mid_block.resnets.0.conv1."""
    return f"{layer.component}/{layer.name}"


def _read_figures(path: Path) -> dict[str, float]:
    """What an earlier run has measured; nothing where the file is damaged."""
    if not path.exists():
        return {}
    try:
        return decode_json(path.read_bytes(), dict[str, float])
    except InputError as exc:
        _log.warning("%s is damaged (%s): measuring again", path, exc)
        return {}
