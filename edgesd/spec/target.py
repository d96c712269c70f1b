"""Boards and computers."""

from __future__ import annotations

from edgesd.spec.base import Bytes, Count, Spec
from edgesd.spec.scheme import CPU_PRECISIONS, Precision


class Machine(Spec, frozen=True):
    """What a computer reports about itself.

    memory_bytes: RAM that this process may use at most (0: can't be read). target: the nearest
    registered one, or None. l4t: release of the Jetson's Linux (36.4.3), or None.
    """

    arch: str
    model: str
    target: str | None
    memory_bytes: Bytes
    cpu_count: Count
    capabilities: tuple[str, ...]
    l4t: str | None = None


class Target(Spec, frozen=True):
    """A board (or computer) that a bundle is built for.

    memory_bytes: RAM that the smallest such board has, shared with a GPU where there is one.
    memory_options: RAM of the other boards sold under this name; each makes a target NAME-8gb.
    capabilities: CPU or GPU features that a bundle may count on (dotprod, sm_87 ...).
    backends: engine backends, best first. families: names that stand for the smallest of their
    members. models, module_ids: how the board is recognised (starts of the device-tree model;
    p3767-0003). No models: any machine of `arch`.
    """

    name: str
    title: str
    arch: str
    backends: tuple[str, ...]
    memory_bytes: int
    cpu_count: int
    precisions: tuple[Precision, ...] = CPU_PRECISIONS
    capabilities: tuple[str, ...] = ()
    memory_options: tuple[int, ...] = ()
    families: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    module_ids: tuple[str, ...] = ()
