"""The samplers, by the name that the command line and a bundle use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgesd.errors import InputError, UsageError, unknown_name
from edgesd.runtime.schedulers.base import Noise, Scheduler
from edgesd.runtime.schedulers.ddim import DDIM
from edgesd.runtime.schedulers.ddpm import DDPM
from edgesd.runtime.schedulers.deis import DEIS
from edgesd.runtime.schedulers.dpm2 import DPM2, DPM2Ancestral
from edgesd.runtime.schedulers.dpmpp_2m import DPMSolverPlusPlus
from edgesd.runtime.schedulers.dpmpp_sde import DPMSolverSDE
from edgesd.runtime.schedulers.dpmpp_single import DPMSolverSinglestep
from edgesd.runtime.schedulers.edm import EDMScheduler
from edgesd.runtime.schedulers.edm_dpmpp_2m import EDMDPMSolver
from edgesd.runtime.schedulers.edm_euler import EDMEuler
from edgesd.runtime.schedulers.euler import Euler
from edgesd.runtime.schedulers.euler_ancestral import EulerAncestral
from edgesd.runtime.schedulers.flow_euler import FlowEuler
from edgesd.runtime.schedulers.heun import Heun
from edgesd.runtime.schedulers.lcm import LCM
from edgesd.runtime.schedulers.lms import LMS
from edgesd.runtime.schedulers.pndm import PNDM
from edgesd.runtime.schedulers.sigmas import SPREADS, option_of
from edgesd.runtime.schedulers.tcd import TCD
from edgesd.runtime.schedulers.unipc import UniPC

__all__ = [
    "DIFFUSERS_CLASSES",
    "SCHEDULERS",
    "SIGMA_KINDS",
    "Noise",
    "Scheduler",
    "create_scheduler",
    "name_from_class",
    "preset",
    "sampler_class",
    "spread_options",
    "with_options",
]

_CLASSES: tuple[type[Scheduler], ...] = (
    DDIM,
    DDPM,
    DEIS,
    DPM2,
    DPM2Ancestral,
    DPMSolverPlusPlus,
    DPMSolverSDE,
    DPMSolverSinglestep,
    EDMDPMSolver,
    EDMEuler,
    Euler,
    EulerAncestral,
    FlowEuler,
    Heun,
    LCM,
    LMS,
    PNDM,
    TCD,
    UniPC,
)

_SDE = {"algorithm_type": "sde-dpmsolver++"}
_PRESETS: dict[str, tuple[type[Scheduler], Mapping[str, Any]]] = {
    "dpmpp-2m-sde": (DPMSolverPlusPlus, _SDE | {"solver_order": 2}),
    "dpmpp-3m-sde": (DPMSolverPlusPlus, _SDE | {"solver_order": 3}),
}
"""Names by which users know a class with some of its options."""

SCHEDULERS: dict[str, type[Scheduler]] = {cls.name: cls for cls in _CLASSES} | {
    name: cls for name, (cls, _) in _PRESETS.items()
}
"""Name -> sampler."""

DIFFUSERS_CLASSES: dict[str, str] = {cls.diffusers_class: cls.name for cls in _CLASSES}
"""`_class_name` of a scheduler_config.json -> name."""

_SAME = {"DDIMParallelScheduler": DDIM.name, "DDPMParallelScheduler": DDPM.name}
"""diffusers classes that compute what another does, for many steps at a time -> its name."""

SIGMA_KINDS = ("normal", *SPREADS)
"""What --sigmas takes: how noise levels are spread. normal: as the timesteps are."""


def name_from_class(class_name: str) -> str:
    """Our name of a diffusers scheduler class. Raises InputError, which names those that may be
    chosen, when there is none."""
    try:
        return (_SAME | DIFFUSERS_CLASSES)[class_name]
    except KeyError:
        raise InputError(
            f"there is no sampler for {class_name[:80]!r}: choose one, --scheduler takes "
            f"{', '.join(sorted(SCHEDULERS))}"
        ) from None


def sampler_class(name: str) -> str:
    """The diffusers class of one of our names. Raises UsageError for an unknown one."""
    if name not in SCHEDULERS:
        raise UsageError(unknown_name("scheduler", name, SCHEDULERS))
    return SCHEDULERS[name].diffusers_class


def _process_of(class_name: str) -> str:
    """The process that a diffusers class is for."""
    prefixes = {"FlowMatch": FlowEuler.process, "EDM": EDMScheduler.process}
    return next((p for start, p in prefixes.items() if class_name.startswith(start)), DDIM.process)


def with_options(config: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """A scheduler_config.json with these options, said as if its model gave them."""
    unsaid = config.get("_use_default_values")
    said = {**config, **options}
    if isinstance(unsaid, list):
        said["_use_default_values"] = [key for key in unsaid if key not in options]
    return said


def preset(name: str) -> dict[str, Any]:
    """The options of the diffusers class that a name stands for, whatever a model's are."""
    return dict(_PRESETS[name][1]) if name in _PRESETS else {}


def spread_options(name: str, kind: str) -> dict[str, bool]:
    """The options that spread a sampler's noise levels as one of SIGMA_KINDS. Raises UsageError for
    another kind, and for a sampler that has no such options."""
    if kind not in SIGMA_KINDS:
        raise UsageError(unknown_name("kind of sigmas", kind, SIGMA_KINDS))
    sampler_class(name)
    if not SCHEDULERS[name].spreads:
        able = [each for each, cls in sorted(SCHEDULERS.items()) if cls.spreads]
        raise UsageError(f"scheduler {name} has no {kind} sigmas; these have: {', '.join(able)}")
    return {option_of(each): each == kind for each in SPREADS}


def create_scheduler(name: str, config: Mapping[str, Any], eta: float | None = None) -> Scheduler:
    """The sampler `name` with the options of a diffusers scheduler_config.json, which may belong
    to another class: then it is read as diffusers' from_config would. eta: of samplers that have
    it; None for their default.

    Raises UsageError for an unknown name, InputError for an option or value that isn't supported,
    and for a model that was trained on another process than the sampler is for.
    """
    source = config.get("_class_name")
    if source == sampler_class(name):  # its own options hold, whether its model gives them or not
        config = {key: value for key, value in config.items() if key != "_use_default_values"}
    if isinstance(source, str) and SCHEDULERS[name].process != _process_of(source):
        fitting = [each for each, cls in SCHEDULERS.items() if cls.process == _process_of(source)]
        raise InputError(
            f"scheduler {name} doesn't fit a model made for {source[:80]}: expected "
            f"{', '.join(sorted(fitting))}"
        )
    scheduler = SCHEDULERS[name](with_options(config, preset(name)))  # type: ignore[call-arg]
    if eta is not None:
        if not scheduler.draws_by_eta:
            able = [each for each in sorted(SCHEDULERS) if SCHEDULERS[each].draws_by_eta]
            raise UsageError(f"scheduler {name} has no eta; these have: {', '.join(able)}")
        if not 0 <= eta <= 1:
            raise UsageError(f"eta is {eta}: expected 0 to 1")
        scheduler.eta = eta
    return scheduler
