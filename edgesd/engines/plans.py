"""Plans of a bundle on the machine that runs it: built once, and kept in a folder.

A plan belongs to this GPU, this TensorRT and this JetPack: its name hashes all of them with the
graph. Beside it lies the report of its build, with its checksum. A bundle may include plans, too;
they are used on machines of exactly the environment that they were built for.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
from functools import partial
from pathlib import Path

import msgspec

from edgesd.device.detect import detect_machine
from edgesd.engines.tensorrt import (
    MODULES,
    PLAN_SUFFIX,
    BuildSpec,
    PlanReport,
    build_plan,
)
from edgesd.errors import (
    EdgesdError,
    InputError,
    MissingDependencyError,
    TargetError,
    UsageError,
)
from edgesd.files import (
    atomic_write,
    environment_folder,
    mapped,
    private_folder,
    sha256_file,
    user_cache,
)
from edgesd.progress import SILENT, Progress
from edgesd.runtime.backends import backend_names, get_backend
from edgesd.runtime.backends.base import LoadedPlan
from edgesd.runtime.bundle import Bundle
from edgesd.runtime.cuda import Gpu, find_gpu
from edgesd.runtime.flow import flow_of
from edgesd.runtime.networks import check_networks
from edgesd.runtime.signature import check_trusted
from edgesd.spec.base import Spec, decode_json
from edgesd.spec.bundle import Environment
from edgesd.spec.target import Machine

_WORKSPACE_PART = 4
"""A layer's workspace may take this part of the GPU's memory, which a Jetson shares."""

_BF16_FROM = 80
"""Compute capability of the first GPUs (Ampere) that compute in bf16."""

_log = logging.getLogger(__name__)


class CachedPlan(Spec, frozen=True):
    """A plan in the folder of plans. sha256: of its file; report: of its build."""

    component: str
    sha256: str
    report: PlanReport


class Finalized(Spec, frozen=True):
    """A component in the answer of `edgesd finalize --json`. path, plan: None where the plan is
    included in the bundle."""

    path: str | None
    plan: CachedPlan | None


class FinalizeCheck(Spec, frozen=True):
    """The answer of `edgesd finalize --check --json`: this machine, and what plans are built for on
    it."""

    machine: Machine
    environment: Environment


def plans_folder() -> Path:
    """EDGESD_PLANS, or edgesd/plans in the user's cache folder."""
    return environment_folder("EDGESD_PLANS") or user_cache() / "plans"


def _gpu() -> Gpu:
    gpu = find_gpu()
    if isinstance(gpu, str):
        raise TargetError(gpu)
    return gpu


def plan_environment(gpu: Gpu | None = None, prefer: str | None = None) -> Environment:
    """This machine's TensorRT, GPU (`gpu`, if it is known already) and JetPack.

    prefer: the one of MODULES to take where several are installed. Raises TargetError without a
    driver or a GPU, MissingDependencyError without TensorRT. The driver is asked first: without one
    TensorRT crashes.
    """
    gpu = gpu or _gpu()
    for module in sorted(MODULES, key=lambda name: name != prefer):
        if importlib.util.find_spec(module) is None:
            continue
        try:
            version = str(importlib.import_module(module).__version__)
        except ImportError as exc:
            raise MissingDependencyError(
                f"{module} can't be imported ({exc}): install it anew, with JetPack on a Jetson"
            ) from exc
        return Environment(module, version, gpu.sm, detect_machine().l4t)
    raise MissingDependencyError(
        "there is no TensorRT: on a Jetson it comes with JetPack (a virtual environment needs "
        "--system-site-packages), on a PC with pip install tensorrt-rtx"
    )


def require_plans(bundle: Bundle) -> None:
    """Raise UsageError for a bundle of a backend that has no plans."""
    backend = get_backend(bundle.manifest.backend)
    if not backend.needs_plans:
        others = [name for name in backend_names() if get_backend(name).needs_plans]
        raise UsageError(
            f"{bundle.path} is a bundle for {backend.name}, which needs no plans: they are for "
            f"bundles of {' and '.join(others)}"
        )


def prepare_plans(
    bundle: Bundle,
    folder: Path,
    progress: Progress = SILENT,
) -> dict[str, Path | None]:
    """The plans of the components that generate images, those that `folder` lacks built first; None
    for a plan that is included in the bundle and was built for this environment.

    Raises UsageError for a bundle of a backend without plans, TargetError and
    MissingDependencyError as `plan_environment`, what `build_plan` raises, BundleError when the
    bundle was altered, isn't trusted here, or isn't one that generates images.
    """
    require_plans(bundle)
    check_trusted(bundle)
    check_networks(bundle.manifest)
    engines = bundle.manifest.engines
    included = next((e.built_for for e in engines.values() if e.built_for), None)
    gpu = _gpu()
    here = plan_environment(gpu, included.module if included else None)
    if included not in (None, here):
        _log.warning(
            "the bundle's plans were built for %s, and this machine is %s: new ones are built here",
            included,
            here,
        )
    for name, engine in engines.items():
        if engine.precision == "bf16" and int(gpu.sm.removeprefix("sm_")) < _BF16_FROM:
            raise TargetError(
                f"{name} computes in bf16, which GPUs have from sm_{_BF16_FROM} on, and {gpu.name} "
                f"is {gpu.sm}: build the bundle in fp16"
            )
    workspace = gpu.memory_bytes // _WORKSPACE_PART
    return {
        name: None
        if engines[name].built_for == here
        else _plan(bundle, name, here, workspace, folder, progress)
        for name in flow_of(bundle.manifest.pipeline).components
    }


class Plans:
    """`prepare_plans`, when the first plan is asked for: all are built before any is loaded.

    A failure is raised again for every component, without another try.
    """

    def __init__(self, bundle: Bundle, folder: Path, progress: Progress = SILENT) -> None:
        self._bundle = bundle
        self._prepare = partial(prepare_plans, bundle, folder, progress)
        self._prepared: dict[str, Path | None] | EdgesdError | None = None

    def __call__(self, component: str) -> LoadedPlan:
        """The plan of a component. Raises what `prepare_plans` raises."""
        if self._prepared is None:
            try:
                self._prepared = self._prepare()
            except EdgesdError as exc:
                self._prepared = exc
        if isinstance(self._prepared, EdgesdError):
            raise self._prepared
        path = self._prepared[component]
        if path is not None:
            with path.open("rb") as file:
                data = mapped(file.fileno(), 0, os.fstat(file.fileno()).st_size)
            return LoadedPlan(data, read_plan(path).report.environment.module)
        engine = self._bundle.manifest.engines[component]
        assert engine.plan and engine.built_for
        return LoadedPlan(self._bundle.map(engine.plan), engine.built_for.module)


def _plan(
    bundle: Bundle,
    component: str,
    here: Environment,
    workspace: int,
    folder: Path,
    progress: Progress,
) -> Path:
    spec = BuildSpec(component, here.module, workspace_bytes=workspace)
    path = folder / f"{_key(bundle, component, spec, here)}{PLAN_SUFFIX}"
    if _is_whole(path):
        return path

    graph = bundle.graph_file(component)
    progress.line(f"building the plan of {component} for this machine, once: minutes")
    progress.update(f"{component}: read", 0, 1)
    with private_folder(path) as temporary:
        model = temporary / "model.onnx"
        model.write_bytes(graph.model)
        opened = [file.fileno() for file in graph.files]
        report = build_plan(model, spec, temporary / "plan", progress, graph.folder, opened)
        cached = CachedPlan(component, sha256_file(temporary / "plan"), report)
        (temporary / "plan").replace(path)
    with atomic_write(path.with_suffix(".json")) as file:  # last: a plan without it is not whole
        file.write(msgspec.json.encode(cached))
    return path


def _key(bundle: Bundle, component: str, spec: BuildSpec, here: Environment) -> str:
    """What a plan depends on: the graph's files (by the manifest's checksums), the spec, here."""
    files = bundle.engine_files(bundle.manifest.engines[component])
    sums = sorted((name, bundle.manifest.files[name].sha256) for name in files)
    # "profiles" had no effect: with it, plans of earlier versions are still found.
    described = {
        "component": spec.component,
        "module": spec.module,
        "sm": spec.sm,
        "profiles": (),
        "workspace_bytes": spec.workspace_bytes,
        "optimization_level": spec.optimization_level,
    }
    raw = msgspec.json.encode((sums, described, here))
    return hashlib.sha256(raw).hexdigest()[:32]


def read_plan(path: Path) -> CachedPlan:
    """The description of the plan at `path`, which `prepare_plans` gave."""
    return decode_json(path.with_suffix(".json").read_bytes(), CachedPlan)


def _is_whole(path: Path) -> bool:
    try:
        return sha256_file(path) == read_plan(path).sha256
    except (OSError, InputError):
        return False
