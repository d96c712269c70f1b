"""Quantization methods: one file each, found by its name.

A file NAME.py has the class METHOD, a configuration and what it does with a weight (method.py).
Their names are known without torch, for commands that list them.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable
from typing import TYPE_CHECKING

from edgesd.errors import UsageError, unknown_name
from edgesd.spec.build import DEFAULT_METHOD, MEASURES

if TYPE_CHECKING:
    from edgesd.export.quantize.method import Method


def method_names() -> list[str]:
    """Of all methods. Imports none of them."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def check_method(name: str) -> None:
    """Raise UsageError where no method is called `name`. Imports none of them."""
    if name not in method_names():
        raise UsageError(unknown_name("method", name, method_names()))


def get_method(
    name: str = DEFAULT_METHOD, static: bool = False, measures: Iterable[str] | None = None
) -> Method:
    """The method called `name`. static, measures: see Method; None is all of them. Raises
    UsageError when there is none."""
    check_method(name)
    made: Method = importlib.import_module(f"{__name__}.{name}").METHOD(
        static, frozenset(MEASURES if measures is None else measures)
    )
    return made
