"""Plans of a bundle on the machine that runs it: built once, kept in a folder, found again.

A plan belongs to this GPU, this TensorRT and this JetPack: its name hashes all of them with the
graph. Beside it lies what its build came to, with its checksum. A bundle may bring plans, too; they
are used where they were built for exactly what is here.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
from collections.abc import Iterable
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
    private_folder,
    sha256_file,
    user_cache,
)
from edgesd.progress import SILENT, Progress
from edgesd.runtime.backends import backend_names, get_backend
from edgesd.runtime.backends.base import LoadedPlan
from edgesd.runtime.bundle import Bundle
from edgesd.runtime.cuda import Gpu, find_gpu
from edgesd.runtime.signature import check_trusted
from edgesd.spec.base import Spec, decode_json
from edgesd.spec.bundle import Environment
from edgesd.spec.target import Machine

_WORKSPACE_PART = 4
"""A layer's workspace may take this part of the GPU's memory, which a Jetson shares."""

_log = logging.getLogger(__name__)

"""Told of a component, a phase of its build, steps done, and of how many."""


class Plan(Spec, frozen=True):
    """A plan in the folder. sha256: of its file; report: what its build came to."""

    component: str
    sha256: str
    report: PlanReport


class Finalized(Spec, frozen=True):
    """What `edgesd finalize --json` tells of a component. path, plan: None where the bundle brings
    the plan."""

    path: str | None
    plan: Plan | None


class Here(Spec, frozen=True):
    """What `edgesd finalize --check --json` tells: this machine, and what plans are built for."""

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


def environment_here(gpu: Gpu | None = None, prefer: str | None = None) -> Environment:
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
    components: Iterable[str] | None = None,
) -> dict[str, Path | None]:
    """The plans of a bundle's components, those that `folder` lacks built first; None for a plan
    that the bundle brings and that was built for this environment.

    components: None for all. Raises UsageError for a bundle of another backend, TargetError and
    MissingDependencyError as `environment_here`, what `build_plan` raises, BundleError when the
    bundle was altered or isn't trusted here.
    """
    require_plans(bundle)
    check_trusted(bundle)
    engines = bundle.manifest.engines
    brought = next((e.built_for for e in engines.values() if e.built_for), None)
    gpu = _gpu()
    here = environment_here(gpu, brought.module if brought else None)
    if brought not in (None, here):
        _log.warning(
            "the bundle's plans were built for %s, and this machine is %s: others are built here",
            brought,
            here,
        )
    workspace = gpu.memory_bytes // _WORKSPACE_PART
    return {
        name: None
        if engines[name].built_for == here
        else _plan(bundle, name, here, workspace, folder, progress)
        for name in (engines if components is None else components)
    }


class Plans:
    """`prepare_plans`, when the first plan is asked for: all are built before any is loaded.

    What went wrong is raised again for every component, without another try.
    """

    def __init__(
        self, bundle: Bundle, folder: Path, progress: Progress, components: Iterable[str]
    ) -> None:
        self._bundle = bundle
        self._prepare = partial(prepare_plans, bundle, folder, progress, components)
        self._found: dict[str, Path | None] | EdgesdError | None = None

    def __call__(self, component: str) -> LoadedPlan:
        """The plan of a component. Raises what `prepare_plans` raises."""
        if self._found is None:
            try:
                self._found = self._prepare()
            except EdgesdError as exc:
                self._found = exc
        if isinstance(self._found, EdgesdError):
            raise self._found
        path = self._found[component]
        if path is not None:
            return LoadedPlan(path.read_bytes(), read_plan(path).report.environment.module)
        engine = self._bundle.manifest.engines[component]
        assert engine.plan and engine.built_for
        return LoadedPlan(self._bundle.read(engine.plan), engine.built_for.module)


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
        kept = Plan(component, sha256_file(temporary / "plan"), report)
        (temporary / "plan").replace(path)
    with atomic_write(path.with_suffix(".json")) as file:  # last: a plan without it is not whole
        file.write(msgspec.json.encode(kept))
    return path


def _key(bundle: Bundle, component: str, spec: BuildSpec, here: Environment) -> str:
    """What a plan depends on: the graph's files (by the manifest's checksums), the spec, here."""
    files = bundle.engine_files(bundle.manifest.engines[component])
    sums = sorted((name, bundle.manifest.files[name].sha256) for name in files)
    # "profiles" had no effect; plans that were built while there were some are found by it.
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


def read_plan(path: Path) -> Plan:
    """What is known of the plan at `path`, which `prepare_plans` gave."""
    return decode_json(path.with_suffix(".json").read_bytes(), Plan)


def _is_whole(path: Path) -> bool:
    try:
        return sha256_file(path) == read_plan(path).sha256
    except (OSError, InputError):
        return False
