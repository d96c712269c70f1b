"""Kinds of a model that its weights can't tell: base models, and those distilled to few steps.

Steps, guidance, sampler and schedule of a model follow from its kind. What tells the kind are the
user (`edgesd build --variant`), the model's edgesd.json, the class of its pipeline, and its
scheduler; names of files tell nothing. Where nothing does, it is taken for a base model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from edgesd.export.families.checkpoint import Checkpoint
from edgesd.runtime.schedulers import DIFFUSERS_CLASSES, name_from_class
from edgesd.spec.build import VARIANTS, Variant

SCHEDULER_CONFIG = "scheduler/scheduler_config.json"

_OFF = 1.0
"""A guidance scale that needs no negative prompt."""


@dataclass(frozen=True)
class _Kind:
    """How models of a kind are sampled. guidance: None for their pipeline's own default, which an
    LCM that takes guidance as an input has in any case. samplers: those that fit, the best first;
    () for any. options: of the scheduler, in place of the model's own, if its kind isn't what its
    scheduler tells."""

    steps: int
    guidance: float | None
    samplers: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)


_TRAILING = {"timestep_spacing": "trailing", "rescale_betas_zero_snr": False}
_KINDS: Mapping[Variant, _Kind] = {
    "base": _Kind(20, None),
    # Sauer et al. 2023, arXiv 2311.17042: from the last timestep; 1 to 4 steps predict the noise.
    "turbo": _Kind(4, _OFF, ("euler", "euler-a"), {**_TRAILING, "prediction_type": "epsilon"}),
    # Lin et al. 2024, arXiv 2402.13929; Hyper-SD (arXiv 2404.13686) is sampled by DDIM or TCD, too.
    "lightning": _Kind(4, _OFF, ("euler", "euler-a", "ddim", "tcd"), _TRAILING),
    # Luo et al. 2023, arXiv 2310.04378 and 2311.05556 (as a LoRA, which has no guidance inside).
    "lcm": _Kind(4, _OFF, ("lcm",)),
}

_TOLD_BY: Mapping[str, Variant] = {
    "LatentConsistencyModelPipeline": "lcm",
    "LCMScheduler": "lcm",
    "TCDScheduler": "lightning",
}
"""Class of a pipeline or a scheduler -> kind of the models that have it."""

_EULER = ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler")


@dataclass(frozen=True)
class Defaults:
    """What a model is sampled with where nobody says otherwise. options: of its scheduler, in the
    place of its own. assumed: a line on what wasn't said by anyone; empty where all was."""

    sampler: str
    options: Mapping[str, Any]
    steps: int
    guidance: float
    assumed: str = ""


class _Told(NamedTuple):
    """A kind, and what tells it; None where nothing does. said: by the user or edgesd.json."""

    variant: Variant
    why: str | None
    said: bool = False


def defaults_of(
    source: Checkpoint, scheduler: str | None, own_guidance: float, guidance_input: bool
) -> Defaults:
    """How a model is sampled. scheduler: the sampler that the user asks for, None for the model's.
    own_guidance: its pipeline's default. guidance_input: whether the denoiser takes the scale.

    Raises InputError for a scheduler that there is no sampler for.
    """
    config, class_name = source.config(SCHEDULER_CONFIG), source.class_of("scheduler")
    hints, told = source.hints(), _told(source, class_name, config)
    kind = _KINDS[told.variant]
    sampler = scheduler
    if sampler is None and told.said and kind.samplers:
        own = DIFFUSERS_CLASSES.get(class_name)
        sampler = own if own in kind.samplers else kind.samplers[0]
    guidance = own_guidance if kind.guidance is None or guidance_input else kind.guidance
    found = Defaults(
        sampler or name_from_class(class_name),
        kind.options if told.said else {},
        int(hints.get("num_inference_steps", kind.steps)),
        float(hints.get("guidance_scale", guidance)),
    )
    if {"num_inference_steps", "guidance_scale"} <= hints.keys():
        return found
    return replace(found, assumed=_line(found, told))


def _told(source: Checkpoint, class_name: str, config: Mapping[str, Any]) -> _Told:
    if said := source.hints().get("variant"):
        return _Told(said, "was said", said=True)
    for name in (str(source.index.get("_class_name")), class_name):
        if name in _TOLD_BY:
            return _Told(_TOLD_BY[name], f"it has a {name}")
    if (
        class_name in _EULER
        and config.get("timestep_spacing") == "trailing"
        and config.get("prediction_type", "epsilon") == "epsilon"
        and not config.get("rescale_betas_zero_snr")
    ):
        return _Told("turbo", f"its {class_name} begins with the last timestep")
    return _Told("base", None)


def _line(found: Defaults, told: _Told) -> str:
    how = f"{found.steps} steps, " + (
        "no guidance" if found.guidance <= 1 else f"guidance {found.guidance:g}"
    )
    others = "|".join(name for name in VARIANTS if name != told.variant)
    why = told.why or "nothing says otherwise"
    change = f"--variant {others} says otherwise"
    if told.said:
        change = "--steps and --guidance of `edgesd generate` change them"
    elif told.why is None:
        change = f"if it was distilled to few steps, give --variant {others}"
    return f"kind of the model: {told.variant}, as {why}: {how}; {change}"
