"""The samplers, by the name that the command line and a bundle use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgesd.errors import InputError, UsageError, unknown_name
from edgesd.runtime.schedulers.base import Noise, Scheduler
from edgesd.runtime.schedulers.ddim import DDIM
from edgesd.runtime.schedulers.dpmpp_2m import DPMSolverPlusPlus
from edgesd.runtime.schedulers.euler import Euler
from edgesd.runtime.schedulers.euler_ancestral import EulerAncestral
from edgesd.runtime.schedulers.flow_euler import FlowEuler
from edgesd.runtime.schedulers.lcm import LCM
from edgesd.runtime.schedulers.pndm import PNDM

__all__ = [
    "DIFFUSERS_CLASSES",
    "SCHEDULERS",
    "Noise",
    "Scheduler",
    "create_scheduler",
    "name_from_class",
]

SCHEDULERS: dict[str, type[Scheduler]] = {
    cls.name: cls for cls in (DDIM, Euler, EulerAncestral, DPMSolverPlusPlus, PNDM, LCM, FlowEuler)
}
"""Name -> sampler."""

DIFFUSERS_CLASSES: dict[str, str] = {cls.diffusers_class: name for name, cls in SCHEDULERS.items()}
"""`_class_name` of a scheduler_config.json -> name."""


def name_from_class(class_name: str) -> str:
    """Our name of a diffusers scheduler class. Raises InputError when there is none."""
    try:
        return DIFFUSERS_CLASSES[class_name]
    except KeyError:
        message = unknown_name("scheduler class", class_name, DIFFUSERS_CLASSES)
        raise InputError(f"{message}; choose another sampler with --scheduler NAME") from None


def create_scheduler(name: str, config: Mapping[str, Any], *, eta: float = 0.0) -> Scheduler:
    """The sampler `name` with the options of a diffusers scheduler_config.json, which may belong
    to another class: then it is read as diffusers' from_config would.

    eta: amount of noise that ddim adds (0 to 1). Raises UsageError for an unknown name or eta,
    InputError for an option or value that isn't supported, and when a flow-matching schedule
    would be mixed with the model of a discrete diffusion process, or the reverse.
    """
    if name not in SCHEDULERS:
        raise UsageError(unknown_name("scheduler", name, SCHEDULERS))
    source = config.get("_class_name")
    if isinstance(source, str) and (name == FlowEuler.name) != source.startswith("FlowMatch"):
        raise InputError(
            f"scheduler {name} doesn't fit a model made for {source}: flow-euler samples "
            "flow-matching models and only those"
        )
    if name == DDIM.name:
        return DDIM(config, eta)
    if eta:
        raise UsageError(f"eta is {eta}: scheduler {name} has none, only ddim does")
    return SCHEDULERS[name](config)  # type: ignore[call-arg]
