"""Checks of TensorRT's graphs before they are shipped: a lint, and a build by TensorRT-RTX."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from typing import NamedTuple

from edgesd.engines.tensorrt import CHECK_MODULE, CHECK_SM, BuildSpec, build_plan, plan_path
from edgesd.errors import ResourceError
from edgesd.export.backends.tensorrt_lint import check_graph
from edgesd.files import private_folder
from edgesd.spec.bundle import Engine, Environment

_log = logging.getLogger(__name__)


class Checked(NamedTuple):
    """What `check_engine` found. words: for an engine's `checked`. built_for: where the plan that
    was kept runs; None if none was."""

    words: str
    built_for: Environment | None = None


def check_engine(root: Path, engine: Engine, sm: str | None) -> Checked:
    """Lint a graph and, where TensorRT-RTX is installed, build it for `sm` or a GPU like it.

    root: the bundle's folder. A plan for `sm` itself is kept, as `plan_path`; one for a GPU like it
    is a check, no more. Raises EdgesdError, naming the node, when either refuses the graph.
    """
    graph, component = root / engine.path, engine.component
    check_graph(graph, component)
    only_linted = Checked("passed edgesd's lint")
    if sm is None or importlib.util.find_spec(CHECK_MODULE) is None:
        return only_linted
    near = CHECK_SM.get(sm, sm)
    with private_folder(graph.parent) as temporary:
        spec = BuildSpec(component, CHECK_MODULE, near)
        try:
            report = build_plan(graph, spec, temporary / "plan")
        except ResourceError as exc:  # this machine's fault, not the graph's
            _log.warning("%s", exc)
            return only_linted
        words = f"built for {near} by {CHECK_MODULE} {report.environment.version}"
        if near != sm:
            return Checked(words)
        kept = root / plan_path(component)
        kept.parent.mkdir(exist_ok=True)
        (temporary / "plan").replace(kept)
    return Checked(words, report.environment)
