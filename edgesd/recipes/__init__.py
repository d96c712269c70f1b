"""The recipe: a checkpoint and a target in, a bundle out."""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

import edgesd
from edgesd.device.capabilities import in_gb
from edgesd.device.targets import check_request, get_target
from edgesd.engines.bundle import pack_bundle
from edgesd.errors import BundleError, EdgesdError, UsageError
from edgesd.files import atomic_dir, check_new, check_writable, named_path, private_folder
from edgesd.progress import SILENT, Progress
from edgesd.recipes.demo import demo_judge, demo_model, demo_target
from edgesd.recipes.disk import check_disk, gigabytes, remove_large, work_bytes
from edgesd.recipes.job import Job
from edgesd.recipes.like import Like
from edgesd.recipes.notes import AllInFp32, KeptInFp32, Note, PlansPending
from edgesd.recipes.options import LocalFolders, model_name, model_reference
from edgesd.recipes.shapes import fixed_shape
from edgesd.recipes.writer import BundleWriter, Identity
from edgesd.runtime.backends import get_backend
from edgesd.runtime.bundle import SUFFIX, Bundle, open_bundle
from edgesd.runtime.memory import available_bytes
from edgesd.runtime.prompter import read_prompter
from edgesd.runtime.tokenizer import check_prompt
from edgesd.spec.base import check_ranges
from edgesd.spec.build import (
    DEMO,
    BuildOptions,
    BuildRecord,
    EmbeddingReference,
    LoraReference,
    QuantOptions,
    SideReference,
)
from edgesd.spec.bundle import Engine

__all__ = [
    "DEMO",
    "BuildOptions",
    "Built",
    "LocalFolders",
    "QuantOptions",
    "build",
    "default_output",
    "demo_judge",
    "demo_model",
    "demo_target",
]

if TYPE_CHECKING:
    from edgesd.export.backends.base import Lowering

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Built:
    """What a build made. notes: messages for the user. reference: what a quantized bundle was made
    of, the fp32 graphs of its source as a bundle (export/source_graphs.py). unfinished: why there
    are no plans from the board that was to build them; the bundle is whole without."""

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
    return Path("bundles") / f"{model_name(model)}-{target}-{precision}"


def build(
    model: str,
    options: BuildOptions,
    out: Path,
    folders: LocalFolders | None = None,
    progress: Progress = SILENT,
    warn: Callable[[str], object] | None = None,
    finish: Callable[[Path], object] | None = None,
    like: Like | None = None,
    vae: str | None = None,
) -> Built:
    """Export `model`, check it against its source, and write the bundle `out`.

    model: as `open_model` takes it. An `out` that ends in `.edgesd` is the one-file form. warn:
    called before long work with what may go wrong. finish: adds to the folder of the finished
    bundle, such as plans from a board; what it raises spoils nothing. like: a bundle that this one
    should equal: a warning says where it can't. vae: a model, or an autoencoder alone, which stands
    in for the model's own.
    Nothing is left at `out` on another error: UsageError, InputError, TargetError,
    ParityError, QualityError, ResourceError.
    """
    from edgesd.export.families import AUTOENCODER
    from edgesd.export.pipeline import export_pipeline, require_build_tools, tool_versions

    options.check()
    check_ranges(options)
    require_build_tools()
    from edgesd.recipes.footprints import footprinted
    from edgesd.recipes.quantized import QuantizedBuild

    job = _prepare(model, vae, options, out, folders or LocalFolders(), progress, warn)
    sha256 = job.spec.pipeline.source_sha256
    if like and warn:
        tools = {"edgesd": edgesd.__version__, **tool_versions()}
        for line in like.expected_differences(sha256, tools, job.folders.prompter is not None):
            warn(line)
    other = job.source.others.get(AUTOENCODER)
    record = BuildRecord(
        model_reference(model, sha256),
        job.options,
        model_reference(vae, other.network_sha256(AUTOENCODER)) if vae and other else None,
        tuple(EmbeddingReference(one.token, one.sha256) for one in job.source.embeddings),
        _side_references(job),
        tuple(LoraReference(one.name, one.sha256, one.scale) for one in job.source.loras),
    )
    identity = _identity(model, job)
    one_file = out.suffix == SUFFIX
    reference: Bundle | None = None
    notes: list[Note] = []
    unfinished: EdgesdError | None = None
    attention = False
    kept: tuple[Path, ...] = ()
    with private_folder(out) if one_file else atomic_dir(out) as root:
        writer = BundleWriter(root, identity, record)
        if job.options.quantized:
            reference = _reference(job, identity)
            quantized = QuantizedBuild(job, reference, writer)
            notes += quantized.run()
            kept = quantized.kept
            attention = quantized.attention
        else:
            precision, lowering = job.options.precision, job.lowering
            graphs = export_pipeline(
                job.source,
                job.spec,
                root,
                precision,
                lowering=lowering,
                progress=progress,
                lora_slots=job.options.lora_slots,
            )
            writer.put_graphs(graphs)
        if job.lowering.fp16_arithmetic and job.options.precision not in ("fp32", "bf16"):
            notes += _protect_fp16_overflows(job, writer.write())
        if job.lowering.checks_engines:
            writer.put_engines(_checked_engines(job, writer))
        if job.folders.prompter:
            writer.put_prompter(job.folders.prompter, read_prompter(job.folders.prompter))
        writer.put_engines(footprinted(writer.manifest(), job.spec, attention).engines)
        writer.write()
        job.source.check_unchanged()
        if finish:
            try:
                finish(root)
            except EdgesdError as exc:
                unfinished = exc
        progress.line("bundle: write")
        if one_file:
            pack_bundle(open_bundle(root), out)
    if kept and not job.folders.keep_work and (freed := remove_large(kept)):
        progress.line(
            f"disk: removed {gigabytes(freed)} that the build kept in {job.folders.work}; --work "
            "FOLDER keeps it for other builds of this model"
        )
    bundle = open_bundle(out)
    has_plans = all(engine.plan for engine in bundle.manifest.engines.values())
    if get_backend(job.lowering.name).needs_plans and not has_plans:
        notes.append(PlansPending())
    return Built(bundle, out, tuple(notes), reference, unfinished)


def _prepare(
    model: str,
    vae: str | None,
    options: BuildOptions,
    out: Path,
    folders: LocalFolders,
    progress: Progress,
    warn: Callable[[str], object] | None,
) -> Job:
    """Check everything that can be refused before long work."""
    from edgesd.evaluate.perceptual import STAND_IN
    from edgesd.export.backends import get_lowering
    from edgesd.export.pipeline import export_spec
    from edgesd.export.quantize.methods import check_method, get_method
    from edgesd.recipes.estimate import PlanRequest, check_estimate
    from edgesd.recipes.gates import judging
    from edgesd.recipes.planner import check_prompter, estimate_source
    from edgesd.recipes.quantized import kept_folders
    from edgesd.recipes.sources import open_model

    target = get_target(options.target)
    backend = options.backend or target.backends[0]
    options = msgspec.structs.replace(options, target=target.name, backend=backend)
    check_request(target, options.precision, backend)
    lowering = get_lowering(backend)
    check_new(out)
    check_writable(out)
    quantization = options.quantization
    for prompts in (quantization.calibration_prompts, quantization.quality_prompts):
        for prompt in prompts or ():
            check_prompt(prompt)
    if options.quantized:
        check_method(quantization.method)
        check_writable(folders.work / "work")
    if options.prompt_chunks > 1 and not (options.size or lowering.fixed_shapes):
        raise UsageError(
            "--prompt-chunks is for graphs of fixed shapes, and this bundle takes prompts of any "
            "length: leave it out, or give --size, too"
        )
    if quantization.pool_attention:
        _check_pooling(options, lowering)
    source = open_model(
        model,
        options.variant,
        vae,
        folders.embeddings,
        folders.config,
        folders.loras,
        folders.sides,
    )
    source = replace(source, clip_skip=options.clip_skip, max_tokens=options.max_tokens)
    for embedding in source.embeddings:
        progress.line(f"{embedding.token}: a token of {len(embedding.tokens)} vectors is added")
    if folders.prompter:
        names = read_prompter(folders.prompter).files
        check_prompter(target, ((folders.prompter / name).stat().st_size for name in names))
    asked = PlanRequest(
        options.precision,
        options.size,
        method=quantization.method,
        fixed=options.size is not None,
        batch=options.batch,
        scheduler=options.scheduler,
        prompt_chunks=options.prompt_chunks,
        max_tokens=options.max_tokens,
        tasks=options.tasks,
        lora_slots=options.lora_slots,
    )
    expected = estimate_source(source, model, target, backend, asked)
    check_estimate(expected)
    free = available_bytes()
    if warn and free is not None and expected.build_bytes > free:
        warn(
            f"building takes about {in_gb(expected.build_bytes)} of memory, and {in_gb(free)} are "
            "free here"
        )
    chunks, tasks = options.prompt_chunks, options.tasks
    export = export_spec(source, options.size, options.scheduler, options.batch, chunks, tasks)
    for lora in source.loras:
        layers = "1 layer" if len(lora.updates) == 1 else f"{len(lora.updates)} layers"
        progress.line(f"{lora.name}: merged into {layers} at scale {lora.scale:g}")
    if export.assumed:
        progress.line(export.assumed)
    if lowering.fixed_shapes and export.pipeline.shape.dynamic:
        export = export_spec(source, *fixed_shape(export.pipeline), chunks, tasks)
    # One file is packed of a folder beside it.
    bundle_bytes = expected.bundle_bytes * (2 if out.suffix == SUFFIX else 1)
    judged = None
    if options.quantized and quantization.quality_prompts != ():
        judged = judging(quantization, export.judged_by, folders.lpips)
        if export.judged_by == "lpips" != judged.metric:
            progress.line(
                f"LPIPS judges a model of this family, and its weights aren't here: {STAND_IN} "
                "does instead (--lpips FOLDER)"
            )
    job = Job(source, export, target, lowering, options, folders, progress, judged)
    kept_bytes, kept = 0, tuple[Path, ...]()
    if options.quantized:
        counts = {name: source.parameters(name) for name in source.networks}
        correlates = get_method(quantization.method).correlates
        kept_bytes = work_bytes(expected.bundle_bytes, counts, correlates)
        kept = (_source_folder(job, _identity(model, job)), *kept_folders(job))
    check_disk(out, folders.work, bundle_bytes, kept_bytes, progress, kept)
    return job


def _side_references(job: Job) -> tuple[SideReference, ...]:
    """The ControlNets and adapters that were added."""
    found = []
    for (kind, given), component in zip(job.folders.sides, job.source.sides, strict=True):
        where, name = named_path(given)
        sha256 = job.source.others[component].network_sha256(component)
        found.append(SideReference(kind, name, model_reference(where, sha256)))
    return tuple(found)


def _check_pooling(options: BuildOptions, lowering: Lowering) -> None:
    """Raise UsageError where pooled attention isn't possible, or its loss wouldn't be measured."""
    from edgesd.export.backends import all_lowerings

    reason = None
    if not lowering.pools_attention:
        pooling = " and ".join(each.name for each in all_lowerings() if each.pools_attention)
        reason = f"is for bundles of {pooling}, and this one is for {lowering.name}"
    elif not options.quantized:
        reason = (
            f"is for quantized bundles, and {options.precision} isn't one: choose w8a8 or another"
        )
    elif options.quantization.quality_prompts == ():
        reason = "is kept where images allow it, and none are generated: leave --no-quality out"
    if reason:
        raise UsageError(f"--pool-attention {reason}")


def _protect_fp16_overflows(job: Job, bundle: Bundle) -> list[Note]:
    """Keep layers whose activations overflow fp16 in fp32, and components of which the model says
    so; a note for each component with any."""
    from edgesd.recipes import prompts
    from edgesd.recipes.fp16_ranges import protect_fp16_overflows

    job.progress.line("graphs: checking fp16 ranges")
    chosen = job.options.quantization.calibration_prompts
    prompt = (chosen or job.source.prompts("calibration") or prompts.CALIBRATION)[0]
    exact = {component.name for component in job.spec.components if component.fp32}
    found = protect_fp16_overflows(bundle, prompt, exact)
    return [
        AllInFp32(component)
        if component in exact
        else KeptInFp32(component, len(values), max(values.values()))
        for component, values in found.items()
    ]


def _checked_engines(job: Job, writer: BundleWriter) -> dict[str, Engine]:
    """The engines, each checked by the backend, with plans where they could be built here."""
    engines = {}
    for name, engine in writer.engines.items():
        job.progress.line(f"{name}: compile")
        engines[name] = job.lowering.check_engine(writer.root, engine, job.target)
    return engines


def _identity(model: str, job: Job) -> Identity:
    return Identity(model_name(model), job.target, job.lowering.name)


def _source_folder(job: Job, identity: Identity) -> Path:
    """Where `_reference` keeps its bundle."""
    from edgesd.export import source_graphs
    from edgesd.export.backends import REFERENCE
    from edgesd.export.pipeline import tool_versions

    identity, tools = replace(identity, backend=REFERENCE), sorted(tool_versions().items())
    parts = (source_graphs.VERSION, edgesd.__version__, tools, identity, job.spec.pipeline)
    return job.folders.work / f"source-{hashlib.sha256(repr(parts).encode()).hexdigest()[:16]}"


def _reference(job: Job, identity: Identity) -> Bundle:
    """The fp32 graphs of the same export (see SourceGraphs) as a bundle, from the folder of what is
    kept if it is there."""
    from edgesd.export.backends import REFERENCE
    from edgesd.export.pipeline import export_pipeline

    path, identity = _source_folder(job, identity), replace(identity, backend=REFERENCE)
    if path.exists():
        try:
            kept = open_bundle(path)
            kept.verify()
            return kept
        except BundleError as exc:
            _log.warning("%s: making it anew", exc)
            shutil.rmtree(path)
    with atomic_dir(path) as root:
        writer = BundleWriter(root, identity)
        writer.put_graphs(
            export_pipeline(
                job.source, job.spec, root, "fp32", progress=job.progress, as_source=True
            )
        )
        writer.write()
        job.source.check_unchanged()
    return open_bundle(path)
