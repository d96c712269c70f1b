"""Finds what must stay in fp32 in a graph that computes in fp16, by generating an image with it.

On a CPU, ONNX Runtime computes most of these graphs in fp32, and an overflow on the GPU might not
show in its images. So the largest magnitude of every fp16 value is recorded while the pipeline's
own loop generates; where one comes near fp16's limit, the nodes that make and read it are kept in
fp32.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

import msgspec
import numpy as np
import onnx
import onnx_ir as ir

from edgesd.export import examples
from edgesd.export.external_data import write_model
from edgesd.export.passes.fp16_weights import MAX_FP16
from edgesd.export.passes.fp32_region import Fp32Region
from edgesd.export.passes.record_largest import LARGEST, RecordLargest
from edgesd.export.pieces import PIECE_BYTES, run_model_in_pieces
from edgesd.recipes.drawings import drawn_controls
from edgesd.runtime.arrays import Array
from edgesd.runtime.backends.base import BoundRunner, Runner
from edgesd.runtime.backends.onnxruntime import OnnxRuntimeRunner
from edgesd.runtime.bundle import Bundle, GraphFile
from edgesd.runtime.onnx_wire import fp16_in_fp32
from edgesd.runtime.pipeline import Pipeline
from edgesd.runtime.requests import Request, painted_whole
from edgesd.runtime.settings import Settings
from edgesd.spec.lora import LoraSlots
from edgesd.spec.pipeline import ComponentSpec, TensorSpec

LIMIT = MAX_FP16 / 2
"""Other prompts and seeds reach larger values: a factor of 2 is left for them."""

STEPS = 4
"""They span the schedule from its first timestep to its last."""

WHOLE_BYTES = 1 << 30
"""A graph of more weights than this is run piece by piece: a CPU computes with them in fp32."""

Largest = dict[str, dict[str, float]]
"""Component -> value -> largest magnitude."""


def protect_fp16_overflows(bundle: Bundle, prompt: str, exact: Collection[str] = ()) -> Largest:
    """Rewrite the graphs of a bundle folder whose values exceed `LIMIT` in an image of `prompt`;
    those values, and how large they were. exact: components all of whose values become fp32.

    The folder isn't visible to others yet; its manifest must be written anew.
    """
    largest = record(bundle, prompt)
    beyond: Largest = {}
    for component, values in largest.items():
        found = {
            name: size for name, size in values.items() if component in exact or not size <= LIMIT
        }
        if not found:
            continue
        beyond[component] = found
        path = bundle.path / bundle.manifest.engines[component].path
        model = ir.load(path)
        Fp32Region(found)(model)
        write_model(model, path.parent)
    return beyond


def record(bundle: Bundle, prompt: str) -> Largest:
    """Largest magnitudes of all fp16 values while an image of `prompt` is generated, and then of
    that image by each task that begins with one."""
    largest: Largest = {}

    def recorder(component: str) -> Runner:
        spec = bundle.manifest.pipeline.components[component]
        kept = largest.setdefault(component, {})
        whole = bundle.weight_bytes(component) <= WHOLE_BYTES
        slots = bundle.manifest.engines[component].slots
        return _recorder(spec, bundle.graph_file(component), kept, whole, slots)

    settings = Settings(memory="balanced", made_here=True)
    with Pipeline(bundle, settings, recorder) as pipeline:
        spec = bundle.manifest.pipeline
        steps = min(STEPS, spec.num_inference_steps)
        asked = Request(prompt, 0, num_inference_steps=steps, controls=drawn_controls(spec))
        first = painted_whole(spec, asked)
        count = pipeline.images_per_run(first)
        images = pipeline.generate([replace(first, seed=seed) for seed in range(count)])
        further = examples.further_tasks(spec, 1)
        for request in examples.with_images(spec, [first], images, further):
            pipeline.generate([request] * count)
    return largest


def _recorder(
    spec: ComponentSpec,
    graph: GraphFile,
    kept: dict[str, float],
    whole: bool,
    slots: LoraSlots | None,
) -> Runner:
    written, names = measuring(ir.serde.deserialize_model(onnx.load_model_from_string(graph.model)))
    if names:
        output = TensorSpec(LARGEST, "float32", (len(names),))
        spec = msgspec.structs.replace(spec, outputs=(*spec.outputs, output))
    if not whole:
        proto = onnx.load_model_from_string(written)
        return _PieceRecorder(spec, proto, graph, names, kept, slots)
    return _RangeRecorder(spec, graph._replace(model=written), names, kept, slots)


def measuring(model: ir.Model) -> tuple[bytes, list[str]]:
    """The graph with an output of the largest magnitudes of its fp16 values, and these values'
    names. It computes in fp32: else one value that fp16 can't hold makes all behind it NaN, and
    nothing would be left in fp16."""
    recorded = RecordLargest()
    recorded(model)
    raw: bytes = ir.serde.serialize_model(model).SerializeToString()
    return fp16_in_fp32(raw), recorded.names


class _RangeRecorder(OnnxRuntimeRunner):
    def __init__(
        self,
        spec: ComponentSpec,
        graph: GraphFile,
        names: list[str],
        kept: dict[str, float],
        slots: LoraSlots | None,
    ) -> None:
        super().__init__(spec, graph, as_written=True, slots=slots)
        self._names, self._kept = names, kept
        self._largest: Array = np.zeros(0, np.float32)

    def run(self) -> None:
        super().run()
        if LARGEST in self.outputs:  # after the first run; the array stays bound
            self._largest = self.outputs.pop(LARGEST)
        _note(self._kept, self._names, self._largest)


class _PieceRecorder(BoundRunner):
    """The same for a graph that is run piece by piece."""

    def __init__(
        self,
        spec: ComponentSpec,
        model: onnx.ModelProto,
        graph: GraphFile,
        names: list[str],
        kept: dict[str, float],
        slots: LoraSlots | None,
    ) -> None:
        super().__init__(spec, slots)
        # Its files stay open as long as pieces are read from them.
        self._model, self._graph, self._names, self._kept = model, graph, names, kept

    def run(self) -> None:
        (found,) = run_model_in_pieces(
            self._model,
            self._graph.folder,
            [{**self.inputs, **self.factors}],
            piece_bytes=PIECE_BYTES,
        )
        made = {tensor.name: found[tensor.name] for tensor in self.spec.outputs}
        _note(self._kept, self._names, made.pop(LARGEST, np.zeros(0, np.float32)))
        self.outputs = made


def _note(kept: dict[str, float], names: Sequence[str], largest: Array) -> None:
    """Keep the largest magnitudes so far of the values `names`."""
    sizes = np.nan_to_num(largest, nan=np.inf, posinf=np.inf)
    for name, size in zip(names, sizes, strict=True):
        kept[name] = max(float(size), kept.get(name, 0.0))
