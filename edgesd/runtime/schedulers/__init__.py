"""The samplers, by the name that the command line and a bundle use."""

from __future__ import annotations

import logging
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
    "sampler_class",
    "sampler_of",
]

_log = logging.getLogger(__name__)

SCHEDULERS: dict[str, type[Scheduler]] = {
    cls.name: cls for cls in (DDIM, Euler, EulerAncestral, DPMSolverPlusPlus, PNDM, LCM, FlowEuler)
}
"""Name -> sampler."""

DIFFUSERS_CLASSES: dict[str, str] = {cls.diffusers_class: name for name, cls in SCHEDULERS.items()}
"""`_class_name` of a scheduler_config.json -> name."""


_NEAREST = {
    "DEISMultistepScheduler": ("dpmpp-2m", "euler"),
    "DPMSolverSinglestepScheduler": ("dpmpp-2m", "euler"),
    "UniPCMultistepScheduler": ("dpmpp-2m", "euler"),
    "DDIMParallelScheduler": ("ddim",),
    "DDPMScheduler": ("euler-a",),
    "DPMSolverSDEScheduler": ("euler-a",),
    "HeunDiscreteScheduler": ("euler",),
    "KDPM2AncestralDiscreteScheduler": ("euler-a",),
    "KDPM2DiscreteScheduler": ("euler",),
    "LMSDiscreteScheduler": ("euler",),
}
"""diffusers class that there is no sampler for -> those that solve the same equation nearly as it
does, the nearest first."""


def name_from_class(class_name: str) -> str:
    """Our name of a diffusers scheduler class. Raises InputError, which names those that may be
    chosen, when there is none."""
    try:
        return DIFFUSERS_CLASSES[class_name]
    except KeyError:
        raise InputError(
            f"there is no sampler for {class_name[:80]!r}: choose one, {_choice()}"
        ) from None


def _choice() -> str:
    return f"--scheduler takes {', '.join(sorted(SCHEDULERS))}"


def sampler_of(class_name: str, config: Mapping[str, Any]) -> str:
    """The name of the sampler for a model whose scheduler is the diffusers class `class_name`, with
    its options: its own, or the nearest that takes them, with a warning.

    Raises InputError where there is neither; it names those that may be chosen.
    """
    for name in _NEAREST.get(class_name, ()):
        try:
            create_scheduler(name, config)
        except InputError:
            continue
        _log.warning(
            "the model asks for %s, which edgesd doesn't have: %s, the nearest, is used. Images "
            "show the same subjects as diffusers' and differ in details; %s",
            class_name,
            name,
            _choice(),
        )
        return name
    return name_from_class(class_name)


def sampler_class(name: str) -> str:
    """The diffusers class of one of our names. Raises UsageError for an unknown one."""
    if name not in SCHEDULERS:
        raise UsageError(unknown_name("scheduler", name, SCHEDULERS))
    return SCHEDULERS[name].diffusers_class


def create_scheduler(name: str, config: Mapping[str, Any]) -> Scheduler:
    """The sampler `name` with the options of a diffusers scheduler_config.json, which may belong
    to another class: then it is read as diffusers' from_config would.

    Raises UsageError for an unknown name, InputError for an option or value that isn't supported,
    and when a flow-matching schedule would be mixed with the model of a discrete diffusion process,
    or the reverse.
    """
    source = config.get("_class_name")
    if source == sampler_class(name):  # its own options hold, whether its model gives them or not
        config = {key: value for key, value in config.items() if key != "_use_default_values"}
    if isinstance(source, str) and (name == FlowEuler.name) != source.startswith("FlowMatch"):
        raise InputError(
            f"scheduler {name} doesn't fit a model made for {source}: flow-euler samples "
            "flow-matching models and only those"
        )
    return SCHEDULERS[name](config)  # type: ignore[call-arg]
