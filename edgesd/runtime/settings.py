"""How a pipeline is run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from edgesd.runtime.backends.base import LoadedPlan
from edgesd.runtime.flow import GuidanceMode
from edgesd.runtime.memory import MemoryMode


@dataclass(frozen=True)
class Settings:
    """How to run. memory, guidance_mode: None decides by the memory that is free.

    max_memory: bytes that the process may take, mapped weights included; None for what is free.
    threads: per operator, 0 for all cores. plan_of: component -> its plan for TensorRT on this
    machine, built if need be (engines.plans). fallback: a bundle for TensorRT is generated on the
    CPU where there is no plan, or it fails. kernels: edgesd's own, where the bundle and this
    machine have them. made_here: the bundle was just built by this program, so that nobody needs to
    have signed it.
    """

    threads: int = 0
    memory: MemoryMode | None = None
    guidance_mode: GuidanceMode | None = None
    plan_of: Callable[[str], LoadedPlan] | None = None
    fallback: bool = True
    kernels: bool = True
    max_memory: int | None = None
    made_here: bool = False
