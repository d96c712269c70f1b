"""The recipe for a quantized bundle: calibrate, quantize, generate, compare, promote layers.

The source's fp32 graphs are made first, in the cache; calibration, every quantized layer and the
images to compare with are kept there, too, under names that hash what they depend on. A run
that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from edgesd.engines.kernels import ensure_library
from edgesd.errors import ParityError, QualityError, UsageError
from edgesd.evaluate import quality as quality_
from edgesd.export.calibrate import CalibrationSettings, calibrate, calibration_key
from edgesd.export.quantize.assign import planned
from edgesd.export.quantize.layers import Layer
from edgesd.export.quantize.method import Method
from edgesd.export.quantize.methods import get_method
from edgesd.export.quantize.store import (
    GraphForm,
    LayerStore,
    can_pool,
    find_nodes,
    layers_folder,
)
from edgesd.export.source_graphs import SourceGraphs
from edgesd.files import atomic_write
from edgesd.recipes import gates as gates_
from edgesd.recipes import prompts
from edgesd.recipes.comparison import (
    ENTRY_BYTES,
    KEPT_IMAGES,
    Comparison,
    Measured,
    worst_places,
)
from edgesd.recipes.drawings import DRAWINGS, drawing, drawn_controls
from edgesd.recipes.gates import Shortfall, WorstImages
from edgesd.recipes.graph_files import GraphFiles
from edgesd.recipes.job import Job
from edgesd.recipes.notes import Note, PoolingFailed, PoolingMeasured
from edgesd.recipes.search import Assignment, Budget, Probes, SchemeSearch
from edgesd.recipes.sensitivity import Sensitivities, layer_name
from edgesd.recipes.writer import BundleWriter
from edgesd.runtime.bundle import Bundle, open_bundle
from edgesd.runtime.flow import flow_of
from edgesd.runtime.requests import control_names
from edgesd.runtime.tokenizer import tokenizer_of
from edgesd.spec.bundle import GraphSet, QuantRecipe
from edgesd.spec.pipeline import PipelineSpec
from edgesd.spec.quality import ImageQuality, Metric, Quality
from edgesd.spec.scheme import parse_scheme

_LARGE = 100_000_000
_LARGE_PROMPTS, _LARGE_STEPS = 4, 6
"""Calibration of a denoiser with more weights than _LARGE, unless prompts are given."""

_HUGE = 1_500_000_000
_HUGE_IMAGES, _HUGE_STEPS = 4, 8
"""Images that are compared, and their steps, of a denoiser with more weights than _HUGE, unless
prompts (or steps) are given: on two cores a step of 1024x1024 pixels takes a minute."""

_ROUNDS = 8
"""Times that layers are promoted and everything is generated anew, at most."""

_IMAGE_BYTES = 0.7
"""Bytes per pixel of a kept image, about: what --max-size sets aside."""


class QuantizedBuild:
    """One quantized bundle in the making, in the folder of `writer`.

    reference: the fp32 graphs of the same source and export, as a bundle (a folder).
    """

    def __init__(self, job: Job, reference: Bundle, writer: BundleWriter) -> None:
        options, wiring = job.options.quantization, job.spec.pipeline.wiring
        self.graphs = SourceGraphs(reference.path, job.spec.components, job.source.check_unchanged)
        if options.pool_attention and not any(
            can_pool(self.graphs, component.name, wiring) for component in job.spec.components
        ):
            raise UsageError(
                f"--pool-attention: {job.source.name} has no self-attention whose height and width "
                "are always even: leave it out"
            )
        self.pipeline, self.options, self.reference = job.spec.pipeline, options, reference
        self.scheme, self.lowering = parse_scheme(job.options.precision), job.lowering
        self.root, self.writer = writer.root, writer
        self.progress = job.progress
        self.attention = False  # of the graphs that are there: in 8 bits
        self.comparison = _comparison(job, reference)
        self.assets = _copy_assets(reference, self.root)
        self.store = _store(job, reference, self.graphs)
        flow, measures, work = flow_of(self.pipeline), self.store.method.measures, job.folders.work
        once = flow.once if "once" in measures else ()
        layers = planned(self.store.layers, self.scheme, "ends" in measures, once)
        measure = _no_images
        if self.comparison is not None:
            measure = Sensitivities(
                self.comparison, self.store, layers, self.scheme, work, self.progress
            ).measure
        self.search = SchemeSearch(
            self.scheme, layers, self.store, measure, flow.components, self.progress
        )
        self.files = GraphFiles(
            self.root,
            self.store,
            job.spec.components,
            str(self.scheme),
            self.progress,
            job.options.lora_slots,
        )

    @property
    def kept(self) -> tuple[Path, ...]:
        """Folders of what was made on the way."""
        return self.store.calibration.folder, self.store.folder

    def run(self) -> list[Note]:
        """Fill `root`; notes for the user. Raises QualityError, naming the worst layers,
        when the floor can't be held, and UsageError when the budgets can't."""
        form, assignment = self._form(), Assignment(self.search.planned)
        if self.options.max_size is not None or self.options.max_time is not None:
            budget = self._budget(assignment, form)
            assignment = self.search.spend(budget, self._first_probes())
        bundle = self._write(assignment, form)
        if self.comparison is None:
            return []
        assignment, measured = self._reach_floor(self.comparison, bundle, assignment, form)
        notes: list[Note] = []
        if self.options.pool_attention:
            form, measured, note = self._try_pooling(self.comparison, assignment, form, measured)
            notes.append(note)
        form = self._try_kernels(self.comparison, assignment, form, measured)
        self._keep_images(self.comparison, assignment, form, measured)
        return notes

    def _form(self) -> GraphForm:
        """The graphs that are tried first. Attention in 8 bits stays where images show that it
        may."""
        own = self.lowering.own_kernels and ensure_library(self.progress) is not None
        return GraphForm(kernels=own, attention=own and self.comparison is not None)

    def _reach_floor(
        self, comparison: Comparison, bundle: Bundle, assignment: Assignment, form: GraphForm
    ) -> tuple[Assignment, Measured]:
        """Promote layers until the worst image is good enough."""
        gates, probes = comparison.judging.gates, Probes()
        for left in reversed(range(_ROUNDS)):
            measured = comparison.measure(bundle)
            images = measured.quality.images
            worst = ", ".join(_figures(images, gate.metric) for gate in gates)
            self.progress.line(f"quality: of the worst images the mean {worst}")
            missed = gates_.shortfall(gates, images)
            if missed is None:
                break
            probes = probes or tuple(sorted(worst_places(measured, [missed.gate])))
            before = assignment
            if left:
                budget = self._budget(before, form)
                assignment = self.search.promote(before, missed, budget, probes)
            if assignment.schemes == before.schemes:
                raise QualityError(self._failure(images, missed, probes))
            bundle = self._write(assignment, form)
        return assignment, measured

    def _try_pooling(
        self, comparison: Comparison, assignment: Assignment, form: GraphForm, before: Measured
    ) -> tuple[GraphForm, Measured, Note]:
        """Pool the largest self-attention if images allow."""
        gates, pooled = comparison.judging.gates, replace(form, pooled=True)
        note: Note
        try:
            bundle = self._write(assignment, pooled)
        except ParityError as exc:
            note = PoolingFailed(str(exc))
        else:
            after = comparison.measure(bundle)
            pairs = before.quality.images, after.quality.images
            accepted = gates_.accept_pooling(*pairs, gates)
            plain, now = (WorstImages.of(images, comparison.judging.metric) for images in pairs)
            note = PoolingMeasured(accepted, plain, now, gates)
            self.progress.line(f"pooled attention: {note.figures}")
            if accepted:
                return pooled, after, note
        self._write(assignment, form)
        return form, before, note

    def _try_kernels(
        self, comparison: Comparison, assignment: Assignment, form: GraphForm, measured: Measured
    ) -> GraphForm:
        """Keep the graphs for edgesd's own kernels if images allow; else without attention in 8
        bits, or else not at all."""
        gates, before = comparison.judging.gates, measured.quality.images
        metric, places = comparison.judging.metric, worst_places(measured, gates)
        while any(graph.kernels for graph in self.files.graphs.values()):
            after = comparison.by_kernels(open_bundle(self.root), places)
            found = _figures(after, metric)
            self.progress.line(f"kernels: {found}; {WorstImages.of(before, metric)} without")
            if gates_.accept_kernels(before, after, gates):
                break
            form = replace(form, kernels=form.attention, attention=False)
            self._write(assignment, form)
        return form

    def _keep_images(
        self, comparison: Comparison, assignment: Assignment, form: GraphForm, measured: Measured
    ) -> None:
        """Write images for the report, as many as there is room for, and the final manifest."""
        # What room is left for images the manifest decides.
        bundle = self._write(assignment, form, measured.quality)
        room = self._limit() - bundle.disk_bytes()
        quality = comparison.keep_images(measured, self.root, room)
        size = self._write(assignment, form, quality).disk_bytes()
        if size > self._limit():
            raise UsageError(
                f"--max-size {self.options.max_size:g} allows {self._limit() / 1e6:.1f} MB; the "
                f"bundle takes {size / 1e6:.1f} MB: allow more"
            )

    def _write(
        self, assignment: Assignment, form: GraphForm, quality: Quality | None = None
    ) -> Bundle:
        """The bundle in `root`, with graphs as chosen."""
        self.files.write(assignment.schemes, form)
        self.attention = form.attention
        manifest = self.reference.manifest
        recipe = QuantRecipe(
            name=str(self.scheme),
            simulated=any(s is not None and s.simulated for s in assignment.schemes.values()),
            layers=self.search.recipes(assignment),
            calibration=self.store.calibration.spec,
            pooled_attention=form.pooled,
        )
        graphs = GraphSet(
            root=str(self.root),
            pipeline=self.pipeline,
            precision=str(self.scheme),
            graphs=dict(self.files.graphs),
            assets=self.assets,
            licence=manifest.licence,
            tools={k: v for k, v in manifest.tools.items() if k not in ("edgesd", "python")},
            recipe=recipe,
        )
        self.writer.put_graphs(graphs, quality)
        return self.writer.write()

    def _limit(self) -> float:
        """Bytes that --max-size allows the bundle; infinite without it."""
        ratio = self.options.max_size
        return math.inf if ratio is None else int(ratio * self._source_bytes())

    def _source_bytes(self) -> int:
        """Size of the source as a bundle in fp32."""
        return self.reference.disk_bytes() + self.graphs.extra_bytes()

    def _budget(self, assignment: Assignment, form: GraphForm) -> Budget:
        """The limits of all layers together, by --max-size and --max-time."""
        ratio, max_time = self.options.max_size, self.options.max_time
        time = math.inf if max_time is None else max_time * self.search.source_time()
        if ratio is None:
            return Budget(time=time, max_time=max_time)
        room = self._limit() - self._write(assignment, form).disk_bytes()
        # What isn't a layer's is in `root`, but for images, their figures, and layers' reasons.
        shape, count = self.pipeline.shape, self._count()
        pixels = 2 * min(KEPT_IMAGES, count) * shape.height * shape.width
        later = int(_IMAGE_BYTES * pixels) + ENTRY_BYTES * (count + len(assignment.schemes))
        chosen = self.search.total_bytes(assignment)
        return Budget(room + chosen - later, time, ratio, max_time, self._limit())

    def _count(self) -> int:
        """Number of images that are compared."""
        return 0 if self.comparison is None else self.comparison.count

    def _first_probes(self) -> Probes:
        return () if self.comparison is None else self.comparison.probes

    def _failure(self, images: Sequence[ImageQuality], missed: Shortfall, probes: Probes) -> str:
        names = ", ".join(map(layer_name, self.search.most_sensitive(probes)))
        metric = missed.gate.metric
        worst = images[quality_.worst_first(images, metric)[0]]
        return (
            f"{self.scheme} reaches {quality_.shown(metric, missed.worst)} at worst "
            f"({worst.prompt!r}), not the {missed.limit:g} of {missed.option}, with every layer "
            f"promoted that helps; most sensitive: {names}. Ask for less, or choose a scheme of "
            "more bits"
        )


def _figures(images: Sequence[ImageQuality], metric: Metric) -> str:
    return f"{quality_.METRIC_NAMES[metric]} {WorstImages.of(images, metric)}"


def _no_images(probes: Probes) -> Mapping[Layer, float]:
    raise UsageError("budgets and floors are checked on images: give prompts for them")


def _comparison(job: Job, reference: Bundle) -> Comparison | None:
    """What images are compared with; None if no images are wanted."""
    options, folders = job.options.quantization, job.folders
    quality_prompts = options.quality_prompts
    if job.judging is None:
        return None
    if quality_prompts is None:
        quality_prompts = job.source.prompts("quality") or prompts.QUALITY
    steps = options.steps
    if options.quality_prompts is None and _weights(job) > _HUGE:
        quality_prompts = quality_prompts[:_HUGE_IMAGES]
        steps = steps or min(job.spec.pipeline.num_inference_steps, _HUGE_STEPS)
    requests = quality_.requests_for(
        quality_prompts,
        num_inference_steps=steps,
        guidance_scale=options.guidance,
        controls=drawn_controls(job.spec.pipeline),
    )
    return Comparison(
        job.spec.components, reference, requests, job.judging, folders.work, job.progress
    )


def _copy_assets(reference: Bundle, root: Path) -> tuple[str, ...]:
    """Copy what isn't a graph (tokenizer, licences) from the source's bundle."""
    manifest = reference.manifest
    folders = tuple(f"{component}/" for component in manifest.engines)
    names = tuple(name for name in manifest.files if not name.startswith(folders))
    for name in names:
        with atomic_write(root / name) as file:
            file.write(reference.read(name))
    return names


def _store(job: Job, reference: Bundle, graphs: SourceGraphs) -> LayerStore:
    """Calibrated layers of the source's graphs."""
    spec, work = job.spec.pipeline, job.folders.work
    method = _method(job)
    settings = _calibration(job, method.correlates)
    folder = _calibration_folder(job, settings)
    tokenizers = {
        text.tokenizer: tokenizer_of(reference, text.tokenizer) for text in spec.wiring.texts
    }
    models = {name: graphs.load(name) for name in spec.components}
    whole = list(find_nodes(models))
    calibration = calibrate(job.spec, whole, settings, tokenizers, folder, job.progress)
    nodes = find_nodes(models, split="split" in method.measures)
    return LayerStore(graphs, nodes, calibration, method, work, job.lowering, spec.wiring)


def kept_folders(job: Job) -> tuple[Path, Path]:
    """Where a build keeps statistics, and quantized layers."""
    method = _method(job)
    calibration = _calibration_folder(job, _calibration(job, method.correlates))
    return calibration, layers_folder(job.folders.work, calibration, method)


def _method(job: Job) -> Method:
    options = job.options.quantization
    static = options.static or job.lowering.static_ranges
    return get_method(options.method, static, options.measures)


def _calibration_folder(job: Job, settings: CalibrationSettings) -> Path:
    key = calibration_key(settings, job.spec.pipeline.source_sha256)
    return job.folders.work / f"calibration-{key}"


def _weights(job: Job) -> int:
    """How many the denoiser has."""
    return job.source.parameters(flow_of(job.spec.pipeline).denoiser.component)


def _calibration(job: Job, covariance: bool) -> CalibrationSettings:
    """The prompts and settings that activations are recorded with. covariance: with that."""
    spec, options, source = job.spec.pipeline, job.options.quantization, job.source
    chosen: Sequence[str] = (
        options.calibration_prompts or source.prompts("calibration") or prompts.CALIBRATION
    )
    steps = options.steps or spec.num_inference_steps
    if options.calibration_prompts is None and _weights(job) > _LARGE:
        # A run of the network takes seconds: what is recorded hardly changes after a few.
        chosen, steps = chosen[:_LARGE_PROMPTS], min(steps, _LARGE_STEPS)
    return CalibrationSettings(
        prompts=tuple(chosen),
        num_inference_steps=steps,
        guidance_scale=spec.guidance_scale if options.guidance is None else options.guidance,
        scheduler=spec.scheduler.name,
        height=spec.shape.height,
        width=spec.shape.width,
        covariance=covariance,
        sides=tuple(side.name for side in spec.wiring.sides),
        pictures=tuple(drawing(spec, seed) for seed in range(_drawings(spec))),
    )


def _drawings(spec: PipelineSpec) -> int:
    """How many a calibration shows."""
    if control_names(spec):
        return DRAWINGS
    return int(bool(spec.wiring.denoiser.concat))  # of an image that is painted in, the first
