"""A checkpoint becomes a folder of ONNX graphs, each checked against its source."""

from __future__ import annotations

import gc
import importlib.metadata
import importlib.util
import logging
import resource
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from edgesd.errors import InputError, MissingDependencyError, UsageError
from edgesd.export.families import Component, ExportSpec
from edgesd.export.source import ModelSource
from edgesd.files import atomic_dir, disk_errors
from edgesd.progress import SILENT, Progress
from edgesd.runtime.chunks import chunked
from edgesd.runtime.tokenizer import PromptTokenizer
from edgesd.spec.base import check_ranges
from edgesd.spec.bundle import Graph, GraphSet, SplitComponent
from edgesd.spec.lora import LoraSlots
from edgesd.spec.pipeline import ImageTask, Wiring
from edgesd.spec.scheme import Precision

if TYPE_CHECKING:
    import onnx_ir as ir

    from edgesd.export.backends.base import Lowering
    from edgesd.export.parity import Case

LICENCE_FOLDER = "licence"
"""Where the model card and the licence files of the weights go."""

_MODULES = (
    "torch",
    "diffusers",
    "transformers",
    "accelerate",
    "onnx",
    "onnx_ir",
    "onnxscript",
    "safetensors",
)
_TOOLS = ("torch", "diffusers", "transformers", "onnx", "onnx-ir", "onnxscript", "onnxruntime")
_log = logging.getLogger(__name__)


def export_pipeline(
    source: ModelSource,
    spec: ExportSpec,
    out_dir: Path,
    precision: Precision = "fp32",
    *,
    lowering: Lowering | None = None,
    progress: Progress = SILENT,
    as_source: bool = False,
    lora_slots: int | None = None,
) -> GraphSet:
    """Export the components of `spec`, read from `source`, to the new (or empty) folder `out_dir`.

    Writes COMPONENT/model.onnx and weights.bin for each component, tokenizer/tokenizer.json and
    tokenizer_spec.json, and licence/. One component is in memory at a time.

    precision: "fp16" stores weights in 16 bits; inputs and outputs stay in fp32. lowering: of the
    backend whose graphs to make; None: of the reference, whose arithmetic stays in fp32. as_source:
    fp32 graphs for quantization to start from (source_graphs.py). lora_slots: the largest rank of
    LoRAs that graphs take (passes/lora_slots.py); None for graphs without slots.

    Raises InputError for a model that can't be read, ParityError when the spec differs from
    diffusers' own pipeline or a graph from its source, ResourceError when the disk is full,
    EdgesdError when the exporter fails, MissingDependencyError without edgesd[build]. `out_dir` is
    left as it was then.
    """
    require_build_tools()
    from edgesd.export.backends import REFERENCE, get_lowering

    lowering = lowering or get_lowering(REFERENCE)
    graphs = {}
    with atomic_dir(out_dir) as root:
        assets = _copy_licence(source, root)
        from edgesd.export.own_pipeline import check_own_pipeline
        from edgesd.export.tokenizer import write_tokenizer

        tokenizers = {}
        for folder, tokenizer in spec.pipeline.wiring.tokenizers.items():
            progress.line(f"{folder}: tokenizer")
            files = write_tokenizer(
                source.folder(folder),
                root / folder,
                tokenizer.max_tokens,
                source.embeddings,
                source.class_of(folder),
            )
            assets += [f"{folder}/{name}" for name in files]
            tokenizers[folder] = PromptTokenizer(*files.values())
        progress.line("pipeline: compare with diffusers' own")
        start = time.perf_counter()
        check_own_pipeline(spec, tokenizers)
        _log.info("pipeline: compared with diffusers' own, %.1f s", time.perf_counter() - start)
        for component in spec.components:
            graphs[component.name] = _export(
                component,
                spec.pipeline.wiring,
                root,
                precision,
                lowering,
                progress,
                as_source,
                lora_slots,
            )
    return GraphSet(
        root=str(out_dir),
        pipeline=spec.pipeline,
        precision=precision,
        graphs=graphs,
        assets=tuple(assets),
        licence=source.licence(LICENCE_FOLDER),
        tools=tool_versions(),
    )


def tool_versions() -> dict[str, str]:
    """Package -> version of what makes the graphs."""
    return {name: importlib.metadata.version(name) for name in _TOOLS}


def export_spec(
    source: ModelSource,
    size: tuple[int, int] | None = None,
    scheduler: str | None = None,
    batch: int = 1,
    chunks: int = 1,
    tasks: Sequence[ImageTask] = (),
) -> ExportSpec:
    """What `source` becomes, from its configs alone; hashes its weights.

    size: (width, height) in pixels for static graphs, whose denoiser takes `batch`, and `chunks` of
    a prompt; None for any of these, and any multiple of the model's granularity. scheduler: another
    sampler than the model's own. tasks: beside text to image. Raises InputError for a model that
    isn't supported, UsageError for a size, a task or --max-tokens that isn't the model's,
    MissingDependencyError without edgesd[build], whose libraries read the configs.
    """
    require_build_tools()
    source.check_configs()
    try:
        spec = source.family.export_spec(source, size, scheduler, batch, chunks, tasks)
    except (TypeError, ValueError, AttributeError, OverflowError) as exc:
        raise InputError(f"{source.name}: its configs hold a value of a wrong type: {exc}") from exc
    if source.max_tokens is not None and chunked(spec.pipeline.wiring):
        raise UsageError(
            f"--max-tokens is for text encoders that take a prompt whole, as T5 in FLUX does, and "
            f"{source.name} has none: leave it out"
        )
    try:
        check_ranges(spec.pipeline)
    except InputError as exc:
        raise InputError(
            f"{source.name}: its configs ask for what can't be generated: {exc}"
        ) from exc
    return spec


def _export(
    component: Component,
    wiring: Wiring,
    root: Path,
    precision: Precision,
    lowering: Lowering,
    progress: Progress,
    as_source: bool,
    lora_slots: int | None,
) -> Graph:
    from edgesd.export.external_data import GRAPH_FILE
    from edgesd.export.parity import check_parity, check_split

    start = time.perf_counter()
    written = _write_graph(
        component,
        wiring,
        root / component.name,
        precision,
        lowering,
        progress,
        as_source,
        lora_slots,
    )
    gc.collect()  # the module is in reference cycles: free it before the graph is loaded
    progress.line(f"{component.name}: check")
    path, cases, split = f"{component.name}/{GRAPH_FILE}", written.cases, written.split
    parity = check_parity(
        root / path,
        component,
        cases,
        precision,
        elsewhere=written.elsewhere,
        slots=written.slots,
    )
    if split is not None:
        check_split(root, split, component, cases, precision)
    _log.info(
        "%s: %.1f s, relative RMS %.1e, peak memory of the process %d MB",
        component.name,
        time.perf_counter() - start,
        parity.rel_rms,
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
    )
    return Graph(component.name, path, precision, parity, split=split, slots=written.slots)


class _Written(NamedTuple):
    """A graph on disk. cases: what its source computes, taken before it was changed. split: the
    split decoder where it is one. elsewhere: weights that its files don't hold, by name. slots:
    places for LoRAs."""

    cases: list[Case]
    split: SplitComponent | None
    elsewhere: Mapping[str, ir.TensorProtocol]
    slots: LoraSlots | None


def _write_graph(
    component: Component,
    wiring: Wiring,
    folder: Path,
    precision: Precision,
    lowering: Lowering,
    progress: Progress,
    as_source: bool,
    lora_slots: int | None,
) -> _Written:
    from edgesd.export.external_data import split_files, write_model
    from edgesd.export.parity import reference_cases
    from edgesd.export.passes.lora_slots import add_slots
    from edgesd.export.passes.split_autoencoder import describe_split, split_component
    from edgesd.export.source_graphs import write_source_graph
    from edgesd.export.to_onnx import graph_from_module

    progress.line(f"{component.name}: load")
    module = component.load()
    cases = reference_cases(module, component)
    progress.line(f"{component.name}: export")
    model = graph_from_module(module, component, "ort-mha")
    splits = lowering.splits_autoencoder and component.name in wiring.autoencoder
    parts = split_component(model) if splits else ()
    slots = add_slots(model, component.name, wiring, lora_slots, lowering.fixed_shapes)
    for each in (model, *parts):
        lowering.lower(each, precision)
    files = split_files(len(parts))
    split = describe_split(component.name, parts, files) if parts else None
    others = dict(zip(files, parts, strict=True))
    elsewhere: Mapping[str, ir.TensorProtocol] = {}
    if as_source:
        elsewhere = write_source_graph(model, folder, others, cases)
    else:
        write_model(model, folder, others)
    return _Written(cases, split, elsewhere, slots)


def _copy_licence(source: ModelSource, root: Path) -> list[str]:
    """Copy the model card and licence files; returns their paths below `root`."""
    folder = root / LICENCE_FOLDER
    papers = source.papers()
    with disk_errors(folder):
        folder.mkdir()
        for name, path in papers.items():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    return [f"{LICENCE_FOLDER}/{name}" for name in papers]


def require_build_tools() -> None:
    """Raise MissingDependencyError unless all packages that building needs are installed."""
    for name in _MODULES:
        if importlib.util.find_spec(name) is None:
            raise MissingDependencyError(
                f"exporting a model needs {name}: pip install 'edgesd[build]'"
            )
