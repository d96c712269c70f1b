"""The recipe: a checkpoint and a target in, a bundle out."""

from __future__ import annotations

import hashlib
import logging
import platform
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

import edgesd
from edgesd.device.capabilities import in_gb
from edgesd.device.detect import detect_machine, explain_machine, runnable_targets
from edgesd.device.targets import check_request, get_target
from edgesd.engines.bundle import (
    engine_from_graph,
    file_entries,
    pack_bundle,
    update_manifest,
    write_manifest,
)
from edgesd.errors import BundleError, EdgesdError, InputError, TargetError, UsageError
from edgesd.files import atomic_dir, atomic_write, check_new, check_writable, private_folder
from edgesd.progress import SILENT, Progress
from edgesd.recipes.notes import KeptInFp32, Note, PlansPending
from edgesd.recipes.options import QuantOptions, cache_folder
from edgesd.runtime.backends import get_backend
from edgesd.runtime.bundle import CHECKSUM, MANIFEST, SUFFIX, Bundle, open_bundle
from edgesd.runtime.memory import available_bytes
from edgesd.runtime.prompter import read_prompter
from edgesd.spec.bundle import SCHEMA_VERSION, BundleManifest, GraphSet, PrompterSpec
from edgesd.spec.pipeline import PipelineSpec
from edgesd.spec.quality import Quality
from edgesd.spec.scheme import Precision, number_format, parse_scheme
from edgesd.spec.target import Target

if TYPE_CHECKING:
    from edgesd.export.backends.base import Lowering
    from edgesd.export.families import ExportSpec
    from edgesd.export.source import ModelSource

__all__ = ["DEMO", "Built", "QuantOptions", "build", "default_output", "demo_judge", "demo_model"]

DEMO = "demo"
_MODELS = Path(edgesd.__file__).resolve().parent.parent / "models"
"""Name of the embedded pipeline, where a model is asked for."""

_log = logging.getLogger(__name__)

PROMPTER = "prompter"
"""Folder of a bundle that holds its prompter."""


@dataclass(frozen=True)
class Built:
    """What a build made. notes: what the user should know of. reference: the fp32 bundle of the
    same source that a quantized one was compared with. unfinished: why there are no plans from the
    board that was to build them; the bundle is whole without."""

    bundle: Bundle
    path: Path
    notes: tuple[Note, ...] = ()
    reference: Bundle | None = None
    unfinished: EdgesdError | None = None

    @property
    def note(self) -> str | None:
        """The notes in one line; None where there are none."""
        return "; ".join(map(str, self.notes)) or None


def default_output(model: str, target: str, precision: str) -> Path:
    """Where a build goes without -o: bundles/MODEL-TARGET-PRECISION."""
    return Path("bundles") / f"{_name(model)}-{target}-{precision}"


def _name(model: str) -> str:
    return DEMO if model == DEMO else Path(model).resolve().name or "model"


def demo_judge() -> Path | None:
    """Folder of the judge of the embedded pipeline's images, or None outside a checkout."""
    folder = _MODELS / "emoji-judge"
    return folder if folder.is_dir() else None


def demo_model() -> Path:
    """Folder of the embedded pipeline. Raises InputError where it isn't at hand."""
    folder = _MODELS / "emoji"
    if not (folder / "model_index.json").is_file():
        raise InputError(
            "the embedded pipeline is part of the source checkout, not of the installed package: "
            "clone edgesd and run there, or give the folder of a diffusers pipeline"
        )
    return folder


def demo_sha256() -> str:
    """Hash of the embedded pipeline, as its bundles carry it. Raises InputError."""
    from edgesd.export.source import resolve_source

    return resolve_source(demo_model()).sha256()


def demo_target() -> str:
    """The target that this machine is, or the plainest one of its architecture.

    Raises TargetError on a machine that no target fits.
    """
    machine = detect_machine()
    if machine.target:
        return machine.target
    runnable = runnable_targets(machine)
    if not runnable:
        raise TargetError(explain_machine(machine))
    return runnable[0].name


def build(
    model: str,
    target_name: str,
    precision: Precision,
    out: Path,
    size: tuple[int, int] | None = None,
    scheduler: str | None = None,
    batch: int = 1,
    progress: Progress = SILENT,
    quantization: QuantOptions | None = None,
    backend: str | None = None,
    finish: Callable[[Path], object] | None = None,
    prompter: Path | None = None,
    warn: Callable[[str], object] | None = None,
) -> Built:
    """Export `model`, check it against its source, and write the bundle `out`.

    model: "demo", a diffusers folder, or a hub id. size: (width, height) in pixels for static
    graphs, whose denoiser takes `batch` rows; None exports graphs for any size and batch (of
    TensorRT: for one image of the model's own size). scheduler: the bundle's default sampler, if
    not the model's own. An `out` that ends in `.edgesd` is the one-file form. quantization: for a
    precision that is a scheme. backend: whose graphs to make; None takes the target's best.
    prompter: folder of an exported prompter that the bundle is to bring.
    finish: adds to the folder of the finished bundle, such as plans from a board; what it raises
    spoils nothing. warn: told before long work of what may go wrong.
    Nothing is left at `out` on another error: UsageError, InputError, TargetError,
    ParityError, QualityError, ResourceError.
    """
    from edgesd.export.pipeline import export_pipeline, export_spec, require_build_tools

    number_format(precision)
    require_build_tools()
    from edgesd.export.backends import REFERENCE, get_lowering
    from edgesd.export.source import resolve_source
    from edgesd.recipes.footprints import write_footprints
    from edgesd.recipes.planner import (
        PlanRequest,
        check_estimate,
        check_prompter,
        estimate_source,
    )
    from edgesd.recipes.quantized import QuantizedBuild

    target = get_target(target_name)
    backend = target.backends[0] if backend is None else backend
    check_request(target, precision, backend)
    lowering = get_lowering(backend)
    one_file = out.suffix == SUFFIX
    check_new(out)
    check_writable(out)
    if quantization and precision not in ("fp32", "fp16"):
        check_writable((quantization.work or cache_folder()) / "work")
    if quantization and quantization.pool_attention:
        _check_pooling(quantization, precision, lowering)
    source = resolve_source(str(demo_model()) if model == DEMO else model)
    tuned = None if prompter is None else read_prompter(prompter)
    if prompter and tuned:
        check_prompter(target, ((prompter / name).stat().st_size for name in tuned.files))
    method = (quantization or QuantOptions()).method
    asked = PlanRequest(
        precision, size, method=method, fixed=size is not None, batch=batch, scheduler=scheduler
    )
    expected = estimate_source(source, model, target, backend, asked)
    check_estimate(expected)
    free = available_bytes()
    if warn and free is not None and expected.build_bytes > free:
        warn(
            f"building takes about {in_gb(expected.build_bytes)} of memory, and {in_gb(free)} are "
            "free here"
        )
    plan = export_spec(source, size, scheduler, batch)
    if lowering.fixed_shapes and plan.pipeline.shape.dynamic:
        plan = export_spec(source, *fixed_shape(plan.pipeline))
    if precision in ("fp32", "fp16"):
        weights = sum(source.parameters(component) for component in source.family.weights)
        check_writable(out, weights * (4 if precision == "fp32" else 2))
    writer = _Writer(_name(model), target, backend)
    reference: Bundle | None = None
    notes: list[Note] = []
    plans_pending = False
    unfinished: EdgesdError | None = None
    with private_folder(out) if one_file else atomic_dir(out) as root:
        if precision in ("fp32", "fp16"):
            graphs = export_pipeline(
                source, plan, root, precision, lowering=lowering, progress=progress
            )
            writer.write(root, graphs)
        else:
            options = quantization or QuantOptions()
            work = options.work or cache_folder()
            drawing = replace(writer, backend=REFERENCE)
            reference = _reference(drawing, source, plan, work, progress)
            scheme = parse_scheme(precision)
            quantized = QuantizedBuild(
                source, plan, reference, scheme, options, root, work, writer, progress
            )
            notes += quantized.run()
        if lowering.fp16_arithmetic and precision != "fp32":
            notes += _keep_in_fp32(root, source, quantization, progress)
        if lowering.checks_engines:
            _check_engines(root, lowering, target, progress)
        plans_pending = get_backend(backend).needs_plans and not _has_plans(root)
        write_footprints(root, plan)
        if prompter and tuned:
            _add_prompter(root, prompter, tuned)
        if finish:
            try:
                finish(root)
                plans_pending = False
            except EdgesdError as exc:
                unfinished = exc
        progress.line("bundle: write")
        if one_file:
            pack_bundle(open_bundle(root), out)
    if plans_pending:
        notes.append(PlansPending())
    return Built(open_bundle(out), out, tuple(notes), reference, unfinished)


def _check_pooling(options: QuantOptions, precision: Precision, lowering: Lowering) -> None:
    """Raise UsageError where pooled attention can't be had, or nobody would see what it loses."""
    from edgesd.export.backends import all_lowerings

    reason = None
    if not lowering.pools_attention:
        pooling = " and ".join(each.name for each in all_lowerings() if each.pools_attention)
        reason = f"is for bundles of {pooling}, and this one is for {lowering.name}"
    elif precision in ("fp32", "fp16"):
        reason = f"is for quantized bundles, and {precision} isn't one: choose w8a8 or another"
    elif options.quality_prompts == ():
        reason = "is kept where images allow it, and none are generated: leave --no-quality out"
    if reason:
        raise UsageError(f"--pool-attention {reason}")


@dataclass(frozen=True)
class _Writer:
    """Makes manifests of bundles called `name`, for one target and backend."""

    name: str
    target: Target
    backend: str

    def write(self, root: Path, graphs: GraphSet, quality: Quality | None = None) -> None:
        """Write the manifest of what is in `root` now."""
        from edgesd.export.backends import get_lowering

        engines = {
            name: engine_from_graph(graph, self.backend) for name, graph in graphs.graphs.items()
        }
        for name, content in get_lowering(self.backend).files(engines).items():
            with atomic_write(root / name) as file:
                file.write(content)
        manifest = BundleManifest(
            schema_version=SCHEMA_VERSION,
            name=self.name,
            target=self.target.name,
            arch=self.target.arch,
            backend=self.backend,
            precision=graphs.precision,
            pipeline=graphs.pipeline,
            engines=engines,
            licence=graphs.licence,
            tools={
                "edgesd": edgesd.__version__,
                "python": platform.python_version(),
                **graphs.tools,
            },
            files=file_entries(root, leave_out=(MANIFEST, CHECKSUM)),
            recipe=graphs.recipe,
            quality=quality,
        )
        write_manifest(root, manifest)


def _add_prompter(root: Path, folder: Path, spec: PrompterSpec) -> None:
    """Copy an exported prompter into the bundle folder `root`, and say so in its manifest."""
    manifest = open_bundle(root).manifest
    names = {name: f"{PROMPTER}/{name}" for name in spec.files}
    (root / PROMPTER).mkdir()
    for name, there in names.items():
        shutil.copyfile(folder / name, root / there)
    inside = msgspec.structs.replace(
        spec,
        base=names[spec.base],
        adapter=names.get(spec.adapter or ""),
        grammar=names.get(spec.grammar or ""),
    )
    changed = msgspec.structs.replace(manifest, prompter=inside)
    update_manifest(root, changed, names.values())


def _keep_in_fp32(
    root: Path, source: ModelSource, options: QuantOptions | None, progress: Progress
) -> list[Note]:
    """Let what exceeds fp16 compute in fp32; a note for each component that has such values."""
    from edgesd.recipes import prompts
    from edgesd.recipes.fp16_ranges import keep_in_fp32

    progress.line("graphs: checking fp16 ranges")
    given = options.calibration_prompts if options else None
    prompt = (given or source.prompts("calibration") or prompts.CALIBRATION)[0]
    return [
        KeptInFp32(component, len(values), max(values.values()))
        for component, values in keep_in_fp32(root, prompt).items()
    ]


def _check_engines(root: Path, lowering: Lowering, target: Target, progress: Progress) -> None:
    """Check the engines of the bundle folder `root`, and keep what was found in its manifest."""
    manifest = open_bundle(root).manifest
    engines = {}
    for name, engine in manifest.engines.items():
        progress.line(f"{name}: compile")
        engines[name] = lowering.check_engine(root, engine, target)
    plans = [engine.plan for engine in engines.values() if engine.plan]
    update_manifest(root, msgspec.structs.replace(manifest, engines=engines), plans)


def _has_plans(root: Path) -> bool:
    """Whether each engine of the bundle folder `root` has a plan."""
    return all(engine.plan for engine in open_bundle(root).manifest.engines.values())


def _reference(
    writer: _Writer, source: ModelSource, plan: ExportSpec, work: Path, progress: Progress
) -> Bundle:
    """The fp32 bundle of the same plan, from the folder of what is kept if it is there."""
    from edgesd.export.pipeline import export_pipeline, tool_versions

    parts = (edgesd.__version__, sorted(tool_versions().items()), writer, plan.pipeline)
    path = work / f"source-{hashlib.sha256(repr(parts).encode()).hexdigest()[:16]}"
    if path.exists():
        try:
            found = open_bundle(path)
            found.verify()
            return found
        except BundleError as exc:
            _log.warning("%s: making it anew", exc)
            shutil.rmtree(path)
    with atomic_dir(path) as root:
        writer.write(root, export_pipeline(source, plan, root, "fp32", progress=progress))
    return open_bundle(path)


def fixed_shape(pipeline: PipelineSpec) -> tuple[tuple[int, int], str, int]:
    """Size, scheduler and rows of the same pipeline with fixed shapes: its own size, one image.

    A plan of fixed shapes needs least memory, to be built and to run.
    """
    guided = pipeline.guidance_scale > 1
    distilled = pipeline.components["unet"].input("timestep_cond") is not None
    shape = pipeline.shape
    rows = 2 if guided and not distilled else 1
    return (shape.width, shape.height), pipeline.scheduler.name, rows
