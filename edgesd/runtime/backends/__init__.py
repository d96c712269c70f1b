"""What runs a component here: a file per backend, found by its name.

A backend is the module NAME in this folder, with its `BACKEND`, and the module NAME in
edgesd/export/backends, which makes its graphs. A module is imported when its backend is asked for.
"""

from __future__ import annotations

import importlib
import pkgutil

from edgesd.errors import TargetError
from edgesd.runtime.backends.base import Backend


def get_backend(name: str) -> Backend:
    """The backend called `name`. Raises TargetError when this version has none of that name."""
    if name in _module_names() and (backend := _backend(name)):
        return backend
    raise TargetError(
        f"this version has no backend {name!r}: it runs {', '.join(backend_names())}; update "
        "edgesd there, or build the bundle for another"
    )


def backend_names() -> list[str]:
    """Names of all backends, sorted."""
    return [name for name in _module_names() if _backend(name)]


def _module_names() -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def _backend(name: str) -> Backend | None:
    backend = getattr(importlib.import_module(f"{__name__}.{name}"), "BACKEND", None)
    return backend if isinstance(backend, Backend) else None
