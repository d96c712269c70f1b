"""The boards that bundles are built for. Each module here declares some in `TARGETS`.

Adding a board touches one module: it is found by itself. A target is named after its board; where
a board is sold with more than one size of RAM under one name, NAME is the smallest of them and
NAME-8gb says which one is meant. A family name (jetson-orin) picks its smallest member.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable
from functools import cache

import msgspec

from edgesd.device.capabilities import GB
from edgesd.errors import TargetError, UsageError, unknown_name
from edgesd.spec.scheme import Precision, number_format
from edgesd.spec.target import Target

OS_BYTES = 128 * 2**20
"""RAM that a headless operating system holds, whatever the board."""


@cache
def list_targets() -> tuple[Target, ...]:
    """All boards, ordered by name of module and then as the module lists them (small to large)."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    modules = [importlib.import_module(f"{__name__}.{name}") for name in names]
    return tuple(target for module in modules for target in module.TARGETS)


@cache
def all_targets() -> tuple[Target, ...]:
    """`list_targets()` and, after each board, the same board with its other sizes of RAM."""
    return tuple(
        variant
        for board in list_targets()
        for variant in (board, *(_with_memory(board, size) for size in board.memory_options))
    )


def families() -> dict[str, str]:
    """Family name -> the target it picks: the member with the least RAM, the first on a tie."""
    picked: dict[str, Target] = {}
    for target in list_targets():
        for family in target.families:
            if family not in picked or target.memory_bytes < picked[family].memory_bytes:
                picked[family] = target
    return {family: target.name for family, target in sorted(picked.items())}


def get_target(name: str) -> Target:
    """The target called `name`: a board, a board with its RAM (raspberry-pi-5-8gb), or a family.

    Raises UsageError, with the nearest valid name, when there is none.
    """
    by_name = {target.name: target for target in all_targets()}
    # The smallest size may be said aloud: raspberry-pi-5-2gb is raspberry-pi-5.
    explicit = {_memory_name(t, t.memory_bytes): t for t in list_targets() if t.memory_options}
    picked = {family: by_name[member] for family, member in families().items()}
    found = {**explicit, **picked, **by_name}.get(name)
    if found is None:
        raise UsageError(unknown_name("target", name, {*by_name, *picked}, "edgesd targets"))
    return found


def usable_bytes(target: Target) -> int:
    """RAM in bytes that a bundle may fill on `target`.

    An eighth goes to firmware, kernel and display (an Orin Nano 8 GB shows 7.3 to 7.6 of its 8),
    and `OS_BYTES` to the operating system.
    """
    return target.memory_bytes * 7 // 8 - OS_BYTES


def check_request(target: Target, precision: str, backend: str | None = None) -> None:
    """Refuse a precision or an engine backend that `target` can't run.

    Raises UsageError for a name that nothing knows, TargetError for one that only other targets
    can run; the message names what this one runs and the nearest target that fits the request.
    """
    backends = {name for known in list_targets() for name in known.backends}
    asked_format = number_format(precision)
    if backend is not None and backend not in backends:
        raise UsageError(unknown_name("backend", backend, backends))
    runs = target.backends
    if backend is not None and backend not in target.backends:
        asked = f"backend {backend}"
    elif asked_format not in (runs := _precisions(target, backend)):
        asked = f"precision {precision}"
        if asked_format in _precisions(target):
            asked += f" by {backend}"
    else:
        return
    others = [each for each in all_targets() if asked_format in _precisions(each)]
    able = [
        each
        for each in all_targets()
        if (backend is None or backend in each.backends)
        and asked_format in _precisions(each, backend)
    ]
    near = _nearest(target, able or [each for each in others if each.name != target.name])
    advice = f"use one of these, or --target {near.name}" if near else "use one of these"
    raise TargetError(f"{target.name} can't run {asked}, it runs {', '.join(runs)}: {advice}")


def _precisions(target: Target, backend: str | None = None) -> tuple[Precision, ...]:
    """What `target` runs by a backend, its best if none is given."""
    from edgesd.runtime.backends import get_backend  # numpy, which describing a machine needs not

    able = get_backend(backend or target.backends[0]).precisions
    return tuple(name for name in target.precisions if name in able)


def _with_memory(board: Target, size_bytes: int) -> Target:
    return msgspec.structs.replace(
        board, name=_memory_name(board, size_bytes), memory_bytes=size_bytes, memory_options=()
    )


def _memory_name(board: Target, size_bytes: int) -> str:
    return f"{board.name}-{size_bytes // GB}gb"


def _nearest(target: Target, others: Iterable[Target]) -> Target | None:
    """The most similar: same board, then architecture, backends and RAM."""
    return min(
        others,
        key=lambda other: (
            other.models != target.models,
            other.arch != target.arch,
            other.backends != target.backends,
            abs(other.memory_bytes - target.memory_bytes),
        ),
        default=None,
    )
