"""Rewrites exported graphs for each backend: a file per backend, found by its name.

The module NAME in this folder has the backend's `LOWERING`; what runs its graphs is the module
NAME in edgesd/runtime/backends.
"""

from __future__ import annotations

import importlib
import pkgutil

from edgesd.errors import UsageError, unknown_name
from edgesd.export.backends.base import Lowering

REFERENCE = "onnxruntime"
"""The backend that runs on every machine; others are compared and calibrated with it."""


def get_lowering(name: str) -> Lowering:
    """The lowering of the backend called `name`. Raises UsageError when there is none."""
    if name in _module_names() and (lowering := _lowering(name)):
        return lowering
    raise UsageError(unknown_name("backend", name, [each.name for each in all_lowerings()]))


def all_lowerings() -> list[Lowering]:
    """The lowerings of all backends, by name."""
    return [lowering for name in _module_names() if (lowering := _lowering(name))]


def _module_names() -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def _lowering(name: str) -> Lowering | None:
    lowering = getattr(importlib.import_module(f"{__name__}.{name}"), "LOWERING", None)
    return lowering if isinstance(lowering, Lowering) else None
