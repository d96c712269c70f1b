"""The recipe for a quantized bundle: calibrate, quantize, generate, compare, raise what was too
coarse.

The source's fp32 bundle is built first, into the cache; calibration, every quantized layer and the
images to compare with are kept there, too, under names that hash what they depend on. A run
that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import io
import logging
import math
import shutil
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import msgspec

from edgesd.engines import onnxruntime
from edgesd.engines.kernels import ensure_library
from edgesd.errors import InputError, ParityError, QualityError, UsageError
from edgesd.evaluate import quality as quality_
from edgesd.evaluate.psnr import mean_squared_error, psnr
from edgesd.export.quantize.methods import METHODS
from edgesd.files import atomic_write, environment_folder, user_cache
from edgesd.runtime import kernels
from edgesd.runtime.backends.onnxruntime import OnnxRuntimeRunner
from edgesd.runtime.bundle import Bundle, GraphFile, open_bundle
from edgesd.runtime.pipeline import DRAWING, Pipeline, Request, Settings
from edgesd.spec.base import decode_json
from edgesd.spec.bundle import Graph, GraphSet, LayerRecipe, QuantRecipe
from edgesd.spec.quality import Quality
from edgesd.spec.scheme import Scheme

if TYPE_CHECKING:
    from PIL import Image

    from edgesd.evaluate.perceptual import Perceptual
    from edgesd.export.families import ExportSpec
    from edgesd.export.parity import Case
    from edgesd.export.pipeline import Progress
    from edgesd.export.quantize.assign import LayerScheme, Option
    from edgesd.export.quantize.layers import Layer
    from edgesd.export.quantize.store import LayerStore
    from edgesd.export.source import ModelSource

IMAGES = "quality"
"""Folder of a bundle for the images that a report shows."""

KEPT_IMAGES = 6
"""Pairs kept in the bundle, the worst ones: for the report."""

_LARGE = 100_000_000
_LARGE_PROMPTS, _LARGE_STEPS = 4, 6
"""Calibration of a denoiser with more weights than _LARGE, unless prompts are given."""

Probes = tuple[int, ...]
"""Places of requests."""

_PROBES = 6
"""Prompts that a layer's effect on the image is measured with."""
_ROUNDS = 8
"""Times that layers are raised and everything is generated anew, at most."""
_MARGIN = 1.15
"""Raised layers must take this much more error away than is missing."""

_KERNELS_LOSS = 1.0
"""What the worst images may lose by edgesd's own kernels, in dB of their mean PSNR."""

_POOLING_LOSS = 1.0
"""What the worst images may lose by pooled attention, in dB of their mean PSNR."""
_POOLED = "unet"
"""The component whose attention can be pooled."""

_IMAGE_BYTES = 0.7
"""Bytes per pixel of a kept image, about: what --max-size sets aside."""
_ENTRY_BYTES = 200
"""Bytes in the manifest of a kept image's file, of an image's figures, of a layer's reason."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class QuantOptions:
    """How to quantize, beyond the scheme's name.

    method: rtn, gptq or svdquant. static: recorded activation ranges instead of those at hand.
    calibration_prompts, quality_prompts: None takes the model's own, or general ones.
    steps: of the loop in calibration and comparison; None is the model's default. guidance: same.
    min_psnr: floor in dB for the worst image. max_size: of the bundle, as a part of the fp32 one.
    max_time: the same for the estimated time of an image. work: folder for intermediate results.
    lpips: folder with the weights of LPIPS. pool_attention: fewer keys and values in the largest
    self-attention, where images allow.
    """

    method: str = "svdquant"
    static: bool = False
    calibration_prompts: tuple[str, ...] | None = None
    quality_prompts: tuple[str, ...] | None = None
    steps: int | None = None
    guidance: float | None = None
    min_psnr: float | None = None
    max_size: float | None = None
    max_time: float | None = None
    work: Path | None = None
    lpips: Path | None = None
    pool_attention: bool = False


def cache_folder() -> Path:
    """EDGESD_CACHE, or edgesd in the user's cache folder."""
    return environment_folder("EDGESD_CACHE") or user_cache()


class ManifestWriter(Protocol):
    """Makes a manifest of what is in a folder now, and writes it there, for one backend."""

    @property
    def backend(self) -> str:
        """Whose engines the manifest names."""

    def write(self, root: Path, graphs: GraphSet, quality: Quality | None = None) -> None: ...


class QuantizedBuild:
    """One quantized bundle in the making. `root` gets the bundle's files.

    reference: the fp32 bundle (a folder) of the same source and plan. work: folder for what is kept
    between runs. writer: makes manifests, and knows whose graphs are wanted. notes: lines that the
    user should know of, filled by `run`.
    """

    def __init__(
        self,
        source: ModelSource,
        plan: ExportSpec,
        reference: Bundle,
        scheme: Scheme,
        options: QuantOptions,
        root: Path,
        work: Path,
        writer: ManifestWriter,
        progress: Progress | None,
    ) -> None:
        from edgesd.evaluate.perceptual import open_perceptual
        from edgesd.export.backends import needs_static_ranges
        from edgesd.export.quantize.assign import planned
        from edgesd.export.quantize.quantize import Method
        from edgesd.export.quantize.store import can_pool
        from edgesd.recipes import prompts

        if options.method not in METHODS:
            raise UsageError(f"unknown method {options.method!r}: valid: {', '.join(METHODS)}")
        if options.pool_attention and not can_pool(reference.path, _POOLED):
            raise UsageError(
                f"--pool-attention: {source.name} has no self-attention whose rows and columns are "
                "always even: leave it out"
            )
        self.source, self.plan, self.reference = source, plan, reference
        self.scheme, self.options, self.root, self.work = scheme, options, root, work
        self._write_manifest, self.backend = writer.write, writer.backend
        self.report = progress or (lambda stage, component: None)
        static = options.static or needs_static_ranges(self.backend)
        self.method = Method(options.method, static)
        calibration = options.calibration_prompts or source.prompts("calibration")
        self.calibration_prompts = calibration or prompts.CALIBRATION
        self.calibration_steps = options.steps or plan.pipeline.num_inference_steps
        if source.parameters("unet") > _LARGE and options.calibration_prompts is None:
            # A run of the network takes seconds: what is recorded hardly changes after a few.
            self.calibration_prompts = self.calibration_prompts[:_LARGE_PROMPTS]
            self.calibration_steps = min(self.calibration_steps, _LARGE_STEPS)
        if options.quality_prompts is not None:
            self.prompts = options.quality_prompts
        else:
            self.prompts = source.prompts("quality") or prompts.QUALITY
        settings = {"num_inference_steps": options.steps, "guidance_scale": options.guidance}
        self.requests = quality_.requests_for(self.prompts, **settings)
        # What is missing for the comparison is said before the hour of quantizing.
        self.perceptual = open_perceptual(options.lpips) if self.prompts else None
        self.raised: dict[Layer, tuple[LayerScheme, str]] = {}
        self.graphs: dict[str, Graph] = {}
        self.assets = self._copy_assets()
        self.notes: list[str] = []
        self.store: LayerStore = self._store()
        self.planned: dict[Layer, LayerScheme] = planned(self.store.layers, scheme)
        self.choices = dict(self.planned)
        self._written: dict[str, dict[Layer, LayerScheme]] = {}
        self._cases: dict[str, list[Case]] = {}
        self._worst: Probes = ()
        self._kernels = self.backend == onnxruntime.BACKEND and (
            ensure_library(lambda part: self.report(f"compile {part}", "kernels")) is not None
        )
        # Attention in 8 bits is kept where images show that it may be.
        self._attention = self._kernels and self.perceptual is not None

    def run(self) -> None:
        """Fill `root`. Raises QualityError, naming the worst layers, when the floor can't be held,
        and UsageError when the budgets can't."""
        if self.options.max_size is not None or self.options.max_time is not None:
            self._spend()
        self._write()
        if self.perceptual is None:
            return
        source = self._source_images()
        for round_ in range(_ROUNDS):
            ours, measured = self._measure(source, self.perceptual)
            self.report(
                "quality", f"PSNR {measured.psnr_mean:.1f} dB, least {measured.psnr_min:.1f}"
            )
            floor = self.options.min_psnr
            if floor is None or measured.psnr_min >= floor:
                break
            if round_ + 1 == _ROUNDS or not self._raise(floor, measured):
                raise QualityError(self._failure(measured, floor))
            self._write()
        if self.options.pool_attention:
            ours, measured = self._gate_pooling(source, ours, measured, self.perceptual)
        self._gate_kernels(source, measured)
        if self.options.max_size is not None:  # what room is left for images the manifest decides
            self._write_manifest(self.root, self.graph_set(), measured)
        quality = self._keep_images(source, ours, measured)
        self._write_manifest(self.root, self.graph_set(), quality)
        if self._room() < 0:
            raise UsageError(
                f"--max-size {self.options.max_size:g} allows {self._limit() / 1e6:.1f} MB; the "
                f"bundle came to {(self._limit() - self._room()) / 1e6:.1f} MB: allow more"
            )

    def recipe(self) -> QuantRecipe:
        """What became of every layer."""
        layers = [self._layer_recipe(layer, choice) for layer, choice in self.choices.items()]
        return QuantRecipe(
            name=str(self.scheme),
            simulated=any(c is not None and c.simulated for c in self.choices.values()),
            layers=tuple(layers),
            calibration=self.store.calibration.spec,
            pooled_attention=self.store.pooled,
        )

    def graph_set(self) -> GraphSet:
        """The graphs that are in `root` now."""
        manifest = self.reference.manifest
        return GraphSet(
            root=str(self.root),
            pipeline=self.plan.pipeline,
            precision=str(self.scheme),
            graphs=dict(self.graphs),
            assets=self.assets,
            licence=manifest.licence,
            tools={k: v for k, v in manifest.tools.items() if k not in ("edgesd", "python")},
            recipe=self.recipe(),
        )

    # Preparation.

    def _copy_assets(self) -> tuple[str, ...]:
        """Copy what isn't a graph (tokenizer, licences) from the source's bundle."""
        manifest = self.reference.manifest
        folders = tuple(f"{component}/" for component in manifest.engines)
        names = tuple(name for name in manifest.files if not name.startswith(folders))
        for name in names:
            with atomic_write(self.root / name) as file:
                file.write(self.reference.read(name))
        return names

    def _store(self) -> LayerStore:
        from edgesd.export.calibrate import CalibrationPlan, calibrate, calibration_key
        from edgesd.export.quantize.store import LayerStore, find_nodes
        from edgesd.runtime.tokenizer import PromptTokenizer

        spec = self.plan.pipeline
        how = CalibrationPlan(
            prompts=self.calibration_prompts,
            num_inference_steps=self.calibration_steps,
            guidance_scale=self.options.guidance or spec.guidance_scale,
            scheduler=spec.scheduler.name,
            height=spec.shape.height,
            width=spec.shape.width,
        )
        graphs = self.reference.path
        nodes = find_nodes(graphs, spec.components)
        folder = self.work / f"calibration-{calibration_key(how, spec.source_sha256)}"
        tokenizer = PromptTokenizer(
            self.reference.read("tokenizer/tokenizer.json"),
            self.reference.read("tokenizer/tokenizer_spec.json"),
        )

        def progress(component: str, done: int, total: int) -> None:
            if done < total:
                self.report(f"calibrate {done + 1}/{total}", component)

        calibration = calibrate(self.plan, list(nodes), how, tokenizer, folder, progress)
        return LayerStore(graphs, nodes, calibration, self.method, self.work, self.backend)

    # Writing.

    def _write(self) -> None:
        """All components' graphs as chosen, into `root`, each run once beside its source; and the
        manifest of a bundle whose images weren't measured."""
        from edgesd.export.external_data import GRAPH_FILE, KERNELS_FILE
        from edgesd.export.parity import check_parity, check_split, graph_cases

        changed = False
        for component in self.plan.components:
            name = component.name
            mine = {la: choice for la, choice in self.choices.items() if la.component == name}
            if self._written.get(name) == mine:
                continue
            self.report("quantize", name)
            folder = self.root / name
            shutil.rmtree(folder, ignore_errors=True)
            own = self._kernels and kernels.usable(str(choice) for choice in mine.values())
            split = self.store.write(name, mine, folder, own, self._attention)
            self.report("check", name)
            if name not in self._cases:
                self._cases[name] = graph_cases(self.store.graphs / name / GRAPH_FILE, component)
            cases, precision = self._cases[name], str(self.scheme)
            parity = check_parity(folder / GRAPH_FILE, component, cases, precision)
            second = folder / KERNELS_FILE
            if second.exists():
                check_parity(second, component, cases, precision, kernels.library())
            if split is not None:
                check_split(self.root, split, component, cases, precision)
                if second.exists():
                    library = kernels.library()
                    check_split(self.root, split, component, cases, precision, library)
            self.graphs[name] = Graph(
                component=name,
                path=f"{name}/{GRAPH_FILE}",
                precision=precision,
                parity=parity,
                kernels=f"{name}/{KERNELS_FILE}" if second.exists() else None,
                split=split,
            )
            self._written[name], changed = mine, True
        if changed:
            self._write_manifest(self.root, self.graph_set(), None)

    def _layer_recipe(self, layer: Layer, choice: LayerScheme) -> LayerRecipe:
        planned, reason = self.raised.get(layer, (choice, None))
        found = None if choice is None else self.store.summary(layer, choice)
        return LayerRecipe(
            name=layer.name,
            component=layer.component,
            kind=layer.kind,
            shape=layer.shape,
            scheme="fp16" if found is None else str(found.scheme),
            method="fp16" if found is None else found.method,
            rank=0 if found is None else found.rank,
            bytes=2 * layer.rows * layer.columns if found is None else found.bytes,
            error=0.0 if found is None else found.error,
            planned_scheme=None if planned == choice else str(planned or "fp16"),
            reason=reason,
        )

    # Measuring.

    def _images_folder(self) -> Path:
        complete = [msgspec.json.encode(vars(request)) for request in self.requests]
        tools = {**self.reference.manifest.tools, "sha": self.plan.pipeline.source_sha256}
        shape = self.plan.pipeline.shape
        key = hashlib.sha256(repr((complete, sorted(tools.items()), shape)).encode())
        return self.work / f"images-{key.hexdigest()[:16]}"

    def _source_images(self) -> list[Image.Image]:
        with Pipeline(self.reference, Settings(made_here=True)) as pipeline:
            return quality_.generate_cached(
                pipeline, self.requests, self._images_folder(), self._generated("source images")
            )

    def _generated(self, what: str) -> quality_.Progress:
        return lambda done, total: self.report(f"{done}/{total}", what)

    def _measure(
        self, source: Sequence[Image.Image], perceptual: Perceptual
    ) -> tuple[list[Image.Image], Quality]:
        own = Settings(kernels=False, made_here=True)
        with Pipeline(open_bundle(self.root), own) as pipeline:
            ours = quality_.generate(pipeline, self.requests, self._generated("quantized images"))
            pairs = quality_.compare(self.requests, source, ours, perceptual)
            measured = quality_.summarise(
                pairs, pipeline, self.requests[0], perceptual, self.options.min_psnr
            )
        return ours, measured

    def _gate_pooling(
        self,
        source: Sequence[Image.Image],
        ours: list[Image.Image],
        measured: Quality,
        perceptual: Perceptual,
    ) -> tuple[list[Image.Image], Quality]:
        """Pool the largest self-attention if the worst images, whichever they are then, lose
        little by it and the floor holds. Images and figures of the graphs that are kept."""
        floor, without = self.options.min_psnr, _worst_mean(measured)
        try:
            self._pool(True)
        except ParityError as exc:
            self.notes.append(f"attention isn't pooled: {exc}")
        else:
            pooled, found = self._measure(source, perceptual)
            figures = (
                f"the worst images have a mean PSNR of {_worst_mean(found):.1f} dB (least "
                f"{found.psnr_min:.1f}) with it, {without:.1f} ({measured.psnr_min:.1f}) without"
            )
            self.report("pooled attention", figures)
            kept = _worst_mean(found) >= without - _POOLING_LOSS
            if kept and (floor is None or found.psnr_min >= floor):
                self.notes.append(f"attention is pooled: {figures}")
                return pooled, found
            held = "" if floor is None else f", and --min-psnr {floor:g} must hold"
            self.notes.append(
                f"attention isn't pooled: {figures}; {_POOLING_LOSS:g} dB may be lost{held}"
            )
        self._pool(False)
        return ours, measured

    def _pool(self, pooled: bool) -> None:
        """Write the graph whose attention can be pooled anew, pooled or not."""
        self.store.pooled = pooled
        self._written.pop(_POOLED, None)
        self._write()

    def _gate_kernels(self, source: Sequence[Image.Image], measured: Quality) -> None:
        """Keep the graphs for edgesd's own kernels if the worst images are as near the source's
        with them; else without attention in 8 bits, or else not at all."""
        worst = quality_.worst_first(measured.images)[:_PROBES]
        without = [quality_.decibels(measured.images[index]) for index in worst]
        least = statistics.mean(without) - _KERNELS_LOSS
        while any(graph.kernels for graph in self.graphs.values()):
            with Pipeline(open_bundle(self.root), Settings(made_here=True)) as pipeline:
                generated = quality_.generate(
                    pipeline,
                    [self.requests[i] for i in worst],
                    self._generated("images by kernels"),
                )
            found = [
                min(psnr(source[index], image), quality_.EQUAL_DB)
                for index, image in zip(worst, generated, strict=True)
            ]
            self.report(
                "kernels",
                f"PSNR {statistics.mean(found):.1f} dB, {statistics.mean(without):.1f} without",
            )
            floor = self.options.min_psnr
            if statistics.mean(found) >= least and (floor is None or min(found) >= floor):
                return
            self._kernels, self._attention = self._attention, False
            self._written.clear()
            self._write()

    def _keep_images(
        self, source: Sequence[Image.Image], ours: Sequence[Image.Image], measured: Quality
    ) -> Quality:
        """Write the worst pairs, as many as --max-size has room for, into the bundle, for its
        report; `measured` with their names."""
        room = self._room()
        images = list(measured.images)
        for index in quality_.worst_first(images)[:KEPT_IMAGES]:
            files: dict[str, bytes] = {}
            for side, image in (("source", source[index]), ("ours", ours[index])):
                encoded = io.BytesIO()
                image.save(encoded, "WEBP", lossless=True, method=6)
                files[side] = encoded.getvalue()
            room -= sum(len(data) + _ENTRY_BYTES for data in files.values())
            if room < 0:
                break
            names = {side: f"{IMAGES}/{index:03d}-{side}.webp" for side in files}
            for side, data in files.items():
                with atomic_write(self.root / names[side]) as file:
                    file.write(data)
            images[index] = msgspec.structs.replace(images[index], **names)
        return msgspec.structs.replace(measured, images=tuple(images))

    def _room(self) -> float:
        """Bytes that --max-size leaves beside what is in `root`; infinite without it."""
        return self._limit() - open_bundle(self.root).disk_bytes()

    def _limit(self) -> float:
        """Bytes that --max-size allows the bundle; infinite without it."""
        if self.options.max_size is None:
            return math.inf
        return int(self.options.max_size * self.reference.disk_bytes())

    # Choosing.

    def sensitivities(self, probes: Probes) -> dict[Layer, float]:
        """Mean squared error of images when that layer alone is quantized as planned.

        probes: which of `requests`. Kept on disk: that takes one small drawing per layer.
        """
        requests = [self.requests[index] for index in probes]
        key = hashlib.sha256(
            repr((self.store.folder.name, self._images_folder().name, probes)).encode()
        ).hexdigest()[:16]
        path = self.work / f"sensitivity-{self.scheme}-{key}.json"
        known = _read_figures(path)
        drawing = {
            layer: choice
            for layer, choice in self.planned.items()
            if choice is not None and layer.component in DRAWING
        }
        unknown = [layer for layer in drawing if _name(layer) not in known]
        if unknown:
            images = self._source_images()
            source = [images[index] for index in probes]
            with Pipeline(self.reference, Settings(made_here=True)) as pipeline:
                for number, layer in enumerate(unknown):
                    self.report(f"sensitivity {number + 1}/{len(unknown)}", layer.component)
                    known[_name(layer)] = self._probe(
                        pipeline, layer, drawing[layer], requests, source
                    )
                    with atomic_write(path) as file:
                        file.write(msgspec.json.encode(known))
        return {layer: known[_name(layer)] if layer in drawing else 0.0 for layer in self.planned}

    def _probe(
        self,
        pipeline: Pipeline,
        layer: Layer,
        choice: Scheme,
        requests: Sequence[Request],
        source: Sequence[Image.Image],
    ) -> float:
        component = layer.component
        spec = self.plan.pipeline.components[component]
        graph = GraphFile(
            self.store.variant(component, {layer: choice}), self.store.graphs / component
        )
        pipeline.replace(component, OnnxRuntimeRunner(spec, graph))
        ours = quality_.generate(pipeline, requests, together=True)
        pipeline.restore(component)
        return statistics.fmean(map(mean_squared_error, source, ours))

    def layer_options(self, probes: Probes) -> dict[Layer, list[Option]]:
        """Every layer's options, with the squared error each would make in the image: measured
        for the planned one, and in proportion to the squared error of the layer's output else."""
        from edgesd.export.cost.times import relative_time
        from edgesd.export.quantize.assign import Option, options_of

        measured = self.sensitivities(probes)
        out: dict[Layer, list[Option]] = {}
        for layer, base in self.planned.items():
            self.report("options", layer.component)
            rows = self.store.calibration.rows_per_run(layer)
            known = layer.component in DRAWING
            unit = 0.0
            if base is not None and known:
                unit = measured[layer] / max(self.store.summary(layer, base).error, 1e-9) ** 2
            out[layer] = []
            # What doesn't generate has nothing to gain from a branch, which others need.
            plain = base and Scheme(base.weight_bits, base.activation_bits, base.group)
            for choice in options_of(layer, base) if known else [plain, base]:
                found = None if choice is None else self.store.summary(layer, choice)
                size = 2 * layer.rows * layer.columns if found is None else found.bytes
                loss = 0.0 if found is None else unit * found.error**2
                time = relative_time(layer, choice, rows)
                out[layer].append(Option(choice, size, time, loss))
        return out

    def _first_probes(self) -> Probes:
        return tuple(range(min(_PROBES, len(self.requests))))

    def _budget(self) -> tuple[float, float]:
        """Bytes that layers may take altogether, and time, by --max-size and --max-time."""
        from edgesd.export.cost.times import relative_time

        max_bytes = max_time = math.inf
        if self.options.max_time is not None:
            runs = self.store.calibration.rows_per_run
            max_time = self.options.max_time * sum(
                relative_time(layer, None, runs(layer)) for layer in self.planned
            )
        if self.options.max_size is None:
            return max_bytes, max_time
        self._write()
        chosen = sum(self._layer_recipe(*item).bytes for item in self.choices.items())
        # What isn't a layer's is in `root`, but for images, their figures, and layers' reasons.
        shape = self.plan.pipeline.shape
        kept = 2 * min(KEPT_IMAGES, len(self.prompts)) * shape.height * shape.width
        later = int(_IMAGE_BYTES * kept) + _ENTRY_BYTES * (len(self.prompts) + len(self.choices))
        return self._room() + chosen - later, max_time

    def _spend(self) -> None:
        """Choose layers' schemes as --max-size and --max-time allow."""
        from edgesd.export.quantize.assign import assign, within

        max_bytes, max_time = self._budget()
        # A budget decides on ranks and weights; activations keep the format that was asked for.
        options = {
            layer: [o for o in found if _same_activations(o.scheme, self.planned[layer])]
            for layer, found in self.layer_options(self._first_probes()).items()
        }
        least = sum(min(option.bytes for option in found) for found in options.values())
        if least > max_bytes:
            limit = self._limit()
            raise UsageError(
                f"--max-size {self.options.max_size:g} allows {limit / 1e6:.1f} MB; {self.scheme} "
                f"takes at least {(limit - max_bytes + least) / 1e6:.1f} MB: allow more, or choose "
                "a scheme of fewer bits"
            )
        fastest = sum(min(option.time for option in found) for found in options.values())
        if fastest > max_time:
            assert self.options.max_time is not None
            raise UsageError(
                f"--max-time {self.options.max_time:g}: {self.scheme} takes at least "
                f"{self.options.max_time * fastest / max_time:.2f} of the source's time as "
                "estimated: allow more, or choose another scheme"
            )
        chosen = assign(options, max_bytes, max_time)
        if not within(chosen, max_bytes, max_time):
            raise UsageError(
                f"no choice of layers' schemes keeps both --max-size {self.options.max_size:g} and "
                f"--max-time {self.options.max_time:g}: allow more of one"
            )
        for layer, option in chosen.items():
            self._choose(layer, option.scheme, "the best use of the budget")

    def _choose(self, layer: Layer, choice: LayerScheme, reason: str) -> None:
        planned = self.planned[layer]
        if choice != self.choices[layer]:
            self.choices[layer] = choice
            self.raised.pop(layer, None)
            if choice != planned:
                self.raised[layer] = (planned, reason)

    def _raise(self, floor: float, measured: Quality) -> bool:
        """Give layers better schemes until the error that is too much should be gone, the best gain
        for its cost first. False when nothing is left to raise within the budgets.

        What counts is the error in the images that were worst at first. Where the budgets leave
        too little to raise, layers that matter less to them may pay.
        """
        from edgesd.export.quantize.assign import assign, total_loss

        if not self._worst:
            self._worst = tuple(sorted(quality_.worst_first(measured.images)[:_PROBES]))
        max_bytes, max_time = self._budget()
        options = self.layer_options(self._worst)
        before = dict(self.choices)
        losses = {
            layer: next((o.loss for o in options[layer] if o.scheme == choice), 0.0)
            for layer, choice in before.items()
        }
        missing = 10 ** ((floor - measured.psnr_min) / 10) * _MARGIN
        target = sum(losses.values()) / missing
        chosen = assign(options, max_bytes, max_time, target, before)
        if total_loss(chosen) > target:
            chosen = min(chosen, assign(options, max_bytes, max_time, target), key=total_loss)
        for layer, option in chosen.items():
            self._choose(
                layer,
                option.scheme,
                f"worst image at {measured.psnr_min:.1f} dB where {floor:g} was asked for; "
                f"alone, it makes a mean squared error of {losses[layer]:.2g} in the image",
            )
        return before != self.choices

    def _failure(self, measured: Quality, floor: float) -> str:
        probes = self._worst or self._first_probes()
        sensitive = sorted(self.sensitivities(probes).items(), key=lambda item: -item[1])[:5]
        names = ", ".join(_name(layer) for layer, _ in sensitive)
        worst = measured.images[quality_.worst_first(measured.images)[0]]
        return (
            f"{self.scheme} reaches {measured.psnr_min:.1f} dB at worst ({worst.prompt!r}), not "
            f"the {floor:g} of --min-psnr, with every layer raised that helps; most sensitive: "
            f"{names}. Ask for less, or choose a scheme of more bits"
        )


def _name(layer: Layer) -> str:
    return f"{layer.component}/{layer.name}"


def _worst_mean(measured: Quality) -> float:
    """Mean PSNR in dB of the worst images."""
    values = sorted(map(quality_.decibels, measured.images))
    return statistics.mean(values[:_PROBES])


def _same_activations(choice: LayerScheme, planned: LayerScheme) -> bool:
    if choice is None or planned is None:
        return choice == planned
    return choice.activation_bits == planned.activation_bits


def _read_figures(path: Path) -> dict[str, float]:
    """What an earlier run has measured; nothing where the file is damaged."""
    if not path.exists():
        return {}
    try:
        return decode_json(path.read_bytes(), dict[str, float])
    except InputError as exc:
        _log.warning("%s is damaged (%s): measuring again", path, exc)
        return {}
