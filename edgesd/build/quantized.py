"""The recipe for a quantized bundle: calibrate, quantize, draw, compare, raise what was too coarse.

The source's fp32 bundle is built first, into the cache; calibration, every quantized layer and the
pictures to compare with are kept there, too, under names that hash what they depend on. A run
that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from edgesd.errors import QualityError, UsageError
from edgesd.evaluate import quality as quality_
from edgesd.files import atomic_write
from edgesd.runtime.bundle import CHECKSUM, MANIFEST, Bundle, GraphFile, open_bundle
from edgesd.runtime.pipeline import Pipeline, Request
from edgesd.runtime.runners.onnxruntime import OnnxRuntimeRunner
from edgesd.spec import METHODS, Graph, GraphSet, LayerRecipe, Quality, QuantRecipe, Scheme

if TYPE_CHECKING:
    from PIL import Image

    from edgesd.evaluate.perceptual import Perceptual
    from edgesd.export.families import Plan
    from edgesd.export.pipeline import Progress
    from edgesd.export.quantize.assign import Choice, Option
    from edgesd.export.quantize.layers import Layer
    from edgesd.export.quantize.store import LayerStore
    from edgesd.export.source import ModelSource

PICTURES = "quality"
"""Folder of a bundle for the pictures that a report shows."""

KEPT_PICTURES = 6
"""Pairs kept in the bundle, the worst ones: for the report."""

_DRAWING = ("text_encoder", "unet", "vae_decoder")
"""Components that draw: others take no part in a picture's quality."""

_LARGE = 100_000_000
_LARGE_PROMPTS, _LARGE_STEPS = 4, 6
"""Calibration of a denoiser with more weights than _LARGE, unless prompts are given."""

_PROBES = 6
"""Prompts that a layer's effect on the picture is measured with."""
_ROUNDS = 8
"""Times that layers are raised and everything is drawn anew, at most."""
_MARGIN = 1.15
"""Raised layers must take this much more error away than is missing."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class QuantOptions:
    """How to quantize, beyond the scheme's name.

    method: rtn, gptq or svdquant. static: recorded activation ranges instead of those at hand.
    calibration_prompts, quality_prompts: None takes the model's own, or general ones.
    steps: of the loop in calibration and comparison; None is the model's default. guidance: same.
    min_psnr: floor in dB for the worst picture. max_size: of the bundle, as a part of the fp32 one.
    max_time: the same for the estimated time of a picture. work: folder for intermediate results.
    lpips: folder with the weights of LPIPS.
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


def cache_folder() -> Path:
    """EDGESD_CACHE, or edgesd in the user's cache folder."""
    given = os.environ.get("EDGESD_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(given) if given else Path(base) / "edgesd"


class QuantizedBuild:
    """One quantized bundle in the making. `root` gets the bundle's files.

    reference: the fp32 bundle (a folder) of the same source and plan. work: folder for what is kept
    between runs.
    """

    def __init__(
        self,
        source: ModelSource,
        plan: Plan,
        reference: Bundle,
        scheme: Scheme,
        options: QuantOptions,
        root: Path,
        work: Path,
        progress: Progress | None,
    ) -> None:
        from edgesd.build import prompts
        from edgesd.export.quantize.quantize import Method

        if options.method not in METHODS:
            raise UsageError(f"unknown method {options.method!r}: valid: {', '.join(METHODS)}")
        self.source, self.plan, self.reference = source, plan, reference
        self.scheme, self.options, self.root, self.work = scheme, options, root, work
        self.report = progress or (lambda stage, component: None)
        self.method = Method(options.method, options.static)
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
        self.raised: dict[Layer, tuple[Choice, str]] = {}
        self.graphs: dict[str, Graph] = {}
        self.assets = self._copy_assets()
        self.store: LayerStore = self._store()
        self.choices: dict[Layer, Choice] = self._planned()

    def run(self, write: Callable[[Path, GraphSet, Quality | None], None]) -> None:
        """Fill `root`. write: makes a manifest of what is in a folder now, and writes it there.

        Raises QualityError, naming the worst layers, when the floor can't be held.
        """
        if self.options.max_size is not None or self.options.max_time is not None:
            self._spend()
        self._write_graphs()
        if not self.prompts:
            write(self.root, self.graph_set(), None)
            return
        from edgesd.evaluate.perceptual import open_perceptual

        perceptual = open_perceptual(self.options.lpips)
        source = self._source_pictures()
        for round_ in range(_ROUNDS):
            write(self.root, self.graph_set(), None)
            ours, measured = self._measure(source, perceptual)
            self.report(
                "quality", f"PSNR {measured.psnr_mean:.1f} dB, least {measured.psnr_min:.1f}"
            )
            floor = self.options.min_psnr
            if floor is None or measured.psnr_min >= floor:
                break
            if round_ + 1 == _ROUNDS or not self._raise(floor, measured):
                raise QualityError(self._failure(measured, floor))
            self._write_graphs()
        quality = self._keep_pictures(source, ours, measured)
        write(self.root, self.graph_set(), quality)

    def recipe(self) -> QuantRecipe:
        """What became of every layer."""
        layers = [self._layer_recipe(layer, choice) for layer, choice in self.choices.items()]
        return QuantRecipe(
            name=str(self.scheme),
            simulated=any(c is not None and c.simulated for c in self.choices.values()),
            layers=tuple(layers),
            calibration=self.store.calibration.spec,
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
        from edgesd.export.external_data import GRAPH_FILE
        from edgesd.export.quantize.layers import find_layers
        from edgesd.export.quantize.store import LayerStore, load_graph
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
        layers = [
            layer
            for component in spec.components
            for layer in find_layers(component, load_graph(graphs / component / GRAPH_FILE))
        ]
        folder = self.work / f"calibration-{calibration_key(how, spec.source_sha256)}"
        tokenizer = PromptTokenizer(
            self.reference.read("tokenizer/tokenizer.json"),
            self.reference.read("tokenizer/tokenizer_spec.json"),
        )

        def progress(component: str, done: int, total: int) -> None:
            if done < total:
                self.report(f"calibrate {done + 1}/{total}", component)

        calibration = calibrate(self.plan, layers, how, tokenizer, folder, progress)
        return LayerStore(graphs, spec.components, calibration, self.method, self.work)

    def _planned(self) -> dict[Layer, Choice]:
        from edgesd.export.quantize.assign import planned

        return planned(self.store.layers, self.scheme)

    # Writing.

    def _write_graphs(self) -> None:
        """All components' graphs as chosen, into `root`, each run once beside its source."""
        from edgesd.export.external_data import GRAPH_FILE
        from edgesd.export.parity import check_parity, graph_cases

        for component in self.plan.components:
            name = component.name
            self.report("quantize", name)
            folder = self.root / name
            shutil.rmtree(folder, ignore_errors=True)
            self.store.write(name, self.choices, folder)
            self.report("check", name)
            cases = graph_cases(self.store.graphs / name / GRAPH_FILE, component)
            parity = check_parity(folder / GRAPH_FILE, component, cases, str(self.scheme))
            self.graphs[name] = Graph(name, f"{name}/{GRAPH_FILE}", str(self.scheme), parity)

    def _layer_recipe(self, layer: Layer, choice: Choice) -> LayerRecipe:
        planned, reason = self.raised.get(layer, (choice, None))
        found = None if choice is None else self.store.get(layer, choice)
        return LayerRecipe(
            name=layer.name,
            component=layer.component,
            kind=layer.kind,
            shape=layer.shape,
            scheme="fp16" if found is None else str(found.scheme),
            method="fp16" if found is None else found.method,
            rank=0 if found is None else found.rank,
            bytes=2 * layer.rows * layer.columns if found is None else found.bytes(),
            error=0.0 if found is None else found.error,
            raised_from=None if planned == choice else str(planned or "fp16"),
            reason=reason,
        )

    # Measuring.

    def _pictures_folder(self) -> Path:
        complete = [msgspec.json.encode(vars(request)) for request in self.requests]
        tools = {**self.reference.manifest.tools, "sha": self.plan.pipeline.source_sha256}
        shape = self.plan.pipeline.shape
        key = hashlib.sha256(repr((complete, sorted(tools.items()), shape)).encode())
        return self.work / f"pictures-{key.hexdigest()[:16]}"

    def _source_pictures(self) -> list[Image.Image]:
        with Pipeline(self.reference) as pipeline:
            return quality_.draw_cached(
                pipeline, self.requests, self._pictures_folder(), self._drawn("source pictures")
            )

    def _drawn(self, what: str) -> quality_.Progress:
        return lambda done, total: self.report(f"{done}/{total}", what)

    def _measure(
        self, source: Sequence[Image.Image], perceptual: Perceptual
    ) -> tuple[list[Image.Image], Quality]:
        with Pipeline(open_bundle(self.root)) as pipeline:
            ours = quality_.draw(pipeline, self.requests, self._drawn("quantized pictures"))
            pairs = quality_.compare(self.requests, source, ours, perceptual)
            measured = quality_.summarise(
                pairs, pipeline, self.requests[0], perceptual, self.options.min_psnr
            )
        return ours, measured

    def _keep_pictures(
        self, source: Sequence[Image.Image], ours: Sequence[Image.Image], measured: Quality
    ) -> Quality:
        """Write the worst pairs into the bundle, for its report; `measured` with their names."""
        order = sorted(
            range(len(source)), key=lambda i: measured.pictures[i].psnr or quality_.EQUAL_DB
        )
        pictures = list(measured.pictures)
        for index in order[:KEPT_PICTURES]:
            names = {}
            for side, picture in (("source", source[index]), ("ours", ours[index])):
                names[side] = f"{PICTURES}/{index:03d}-{side}.webp"
                with atomic_write(self.root / names[side]) as file:
                    picture.save(file, "WEBP", lossless=True, method=6)
            pictures[index] = msgspec.structs.replace(pictures[index], **names)
        return msgspec.structs.replace(measured, pictures=tuple(pictures))

    # Choosing.

    def sensitivities(self) -> dict[Layer, float]:
        """Mean squared error of the picture when that layer alone is quantized as planned.

        Cached: the measurement takes one small drawing per layer.
        """
        planned = self._planned()
        requests = self.requests[:_PROBES]
        key = hashlib.sha256(
            repr((self.store.folder.name, self._pictures_folder().name, _PROBES)).encode()
        ).hexdigest()[:16]
        path = self.work / f"sensitivity-{self.scheme}-{key}.json"
        known: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}
        found: dict[Layer, float] = {}
        with Pipeline(self.reference) as pipeline:
            source = quality_.draw(pipeline, requests, together=True)
            for number, (layer, choice) in enumerate(planned.items()):
                if choice is None or layer.component not in _DRAWING:
                    found[layer] = 0.0
                    continue
                name = f"{layer.component}/{layer.name}"
                if name not in known:
                    self.report(f"sensitivity {number + 1}/{len(planned)}", layer.component)
                    known[name] = self._probe(pipeline, layer, choice, requests, source)
                    with atomic_write(path) as file:
                        file.write(json.dumps(known, indent=0).encode())
                found[layer] = known[name]
        return found

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
        error = quality_.mean_squared_error(
            source, quality_.draw(pipeline, requests, together=True)
        )
        pipeline.restore(component)
        return error

    def _options(self) -> dict[Layer, list[Option]]:
        """Every layer's options, with the squared error each would make in the picture: measured
        for the planned one, and in proportion to the squared error of the layer's output else."""
        from edgesd.export.quantize.assign import Option, options_of, relative_time

        measured = self.sensitivities()
        out: dict[Layer, list[Option]] = {}
        for layer, base in self._planned().items():
            self.report("options", layer.component)
            rows = self.store.rows_per_run(layer)
            known = layer.component in _DRAWING
            unit = 0.0
            if base is not None and known:
                unit = measured[layer] / max(self.store.get(layer, base).error, 1e-9) ** 2
            out[layer] = []
            for choice in options_of(layer, base) if known else [base]:
                found = None if choice is None else self.store.get(layer, choice)
                size = 2 * layer.rows * layer.columns if found is None else found.bytes()
                loss = 0.0 if found is None else unit * found.error**2
                time = relative_time(layer, choice, rows)
                out[layer].append(Option(choice, size, time, loss))
        return out

    def _budget(self) -> tuple[float, float]:
        """Bytes that layers may take altogether, and time, by --max-size and --max-time."""
        from edgesd.export.quantize.assign import relative_time

        max_bytes = max_time = math.inf
        if self.options.max_time is not None:
            whole_time = sum(
                relative_time(layer, None, self.store.rows_per_run(layer)) for layer in self.choices
            )
            max_time = self.options.max_time * whole_time
        if self.options.max_size is None:
            return max_bytes, max_time
        if not self.graphs:
            self._write_graphs()
        # What isn't a layer's: graphs' structure, tokenizer, licences, the manifest, kept pictures.
        chosen = sum(self._layer_recipe(*item).bytes for item in self.choices.items())
        there = sum(
            path.stat().st_size
            for path in self.root.rglob("*")
            if path.is_file() and path.name not in (MANIFEST, CHECKSUM)
        )
        shape = self.plan.pipeline.shape
        kept = 2 * min(KEPT_PICTURES, len(self.prompts)) * shape.height * shape.width
        rest = there - chosen + _MANIFEST_BYTES * len(self.choices) + int(_PICTURE_BYTES * kept)
        return int(self.options.max_size * _bundle_bytes(self.reference)) - rest, max_time

    def _spend(self) -> None:
        """Choose layers' schemes as --max-size and --max-time allow."""
        from edgesd.export.quantize.assign import assign

        max_bytes, max_time = self._budget()
        planned = self._planned()
        # A budget decides on ranks and weights; activations keep the format that was asked for.
        options = {
            layer: [o for o in found if _same_activations(o.choice, planned[layer])]
            for layer, found in self._options().items()
        }
        least = sum(min(option.bytes for option in found) for found in options.values())
        if least > max_bytes:
            whole = _bundle_bytes(self.reference)
            assert self.options.max_size is not None
            limit = self.options.max_size * whole
            raise UsageError(
                f"--max-size {self.options.max_size:g} allows {limit / 1e6:.1f} MB; {self.scheme} "
                f"takes at least {(limit - max_bytes + least) / 1e6:.1f} MB: allow more, or choose "
                "a scheme of fewer bits"
            )
        for layer, option in assign(options, max_bytes, max_time).items():
            self._choose(layer, option.choice, "the best use of the budget")

    def _choose(self, layer: Layer, choice: Choice, reason: str) -> None:
        planned = self._planned()[layer]
        if choice != self.choices[layer]:
            self.choices[layer] = choice
            self.raised.pop(layer, None)
            if choice != planned:
                self.raised[layer] = (planned, reason)

    def _raise(self, floor: float, measured: Quality) -> bool:
        """Give layers better schemes until the error that is too much should be gone, the best gain
        for its cost first. False when nothing is left to raise within the budgets."""
        from edgesd.export.quantize.assign import assign

        max_bytes, max_time = self._budget()
        options = self._options()
        before = dict(self.choices)
        losses = {
            layer: next((o.loss for o in options[layer] if o.choice == choice), 0.0)
            for layer, choice in before.items()
        }
        missing = 10 ** ((floor - measured.psnr_min) / 10) * _MARGIN
        target = sum(losses.values()) / missing
        for layer, option in assign(options, max_bytes, max_time, target, before).items():
            self._choose(
                layer,
                option.choice,
                f"worst picture at {measured.psnr_min:.1f} dB where {floor:g} was asked for; "
                f"alone, it makes a mean squared error of {losses[layer]:.2g} in the picture",
            )
        return before != self.choices

    def _failure(self, measured: Quality, floor: float) -> str:
        sensitive = sorted(self.sensitivities().items(), key=lambda item: -item[1])[:5]
        names = ", ".join(f"{layer.component}/{layer.name}" for layer, _ in sensitive)
        worst = min(measured.pictures, key=lambda p: p.psnr or quality_.EQUAL_DB)
        return (
            f"{self.scheme} reaches {measured.psnr_min:.1f} dB at worst ({worst.prompt!r}), not "
            f"the {floor:g} of --min-psnr, with every layer raised that helps; most sensitive: "
            f"{names}. Ask for less, or choose a scheme of more bits"
        )


def _same_activations(choice: Choice, planned: Choice) -> bool:
    if choice is None or planned is None:
        return choice == planned
    return choice.activation_bits == planned.activation_bits


_MANIFEST_BYTES = 420
"""Bytes of bundle.json per layer, about."""
_PICTURE_BYTES = 0.7
"""Bytes per pixel of a kept picture, about."""


def _bundle_bytes(bundle: Bundle) -> int:
    return sum(entry.bytes for entry in bundle.manifest.files.values())
