"""Where in a schedule denoising begins and ends, as in diffusers' pipelines: a picture's strength,
and the timestep at which a base model stops and a refiner goes on (denoising_end and
denoising_start of Stable Diffusion XL)."""

from __future__ import annotations

from edgesd.errors import UsageError
from edgesd.runtime.schedulers import Scheduler
from edgesd.runtime.schedulers.flow_euler import FlowEuler
from edgesd.runtime.schedulers.schedule import steps_within
from edgesd.spec.pipeline import PipelineSpec

_TRAIN_TIMESTEPS = 1000
"""diffusers' default."""


def steps_of_base(spec: PipelineSpec, scheduler: Scheduler, at: float) -> int:
    """How many entries of the sampler's timesteps a base model takes. at: between 0 and 1.

    Raises UsageError where that is none, or all.
    """
    count = int((scheduler.timesteps >= _cutoff(spec, at)).sum())
    return _checked(count, scheduler, at)


def taken_by_base(
    spec: PipelineSpec, scheduler: Scheduler, at: float, strength: float | None
) -> range:
    """The indices of the timesteps that a base model takes. strength: where it begins with a
    picture, None without one.

    Raises UsageError where there are none, or all.
    """
    first = 0 if strength is None else first_of_picture(scheduler, strength)
    last = steps_of_base(spec, scheduler, at)
    if first >= last:
        raise UsageError(
            f"strength {strength:g} begins where the refiner goes on (denoising_end {at:g}): take "
            "more --strength, or a larger --denoising-end"
        )
    return range(first, last)


def first_of_refiner(spec: PipelineSpec, scheduler: Scheduler, at: float) -> int:
    """The index of the timestep that a refiner begins with. Raises UsageError where it has none, or
    all."""
    left = int((scheduler.timesteps < _cutoff(spec, at)).sum())
    if scheduler.order == 2 and left % 2 == 0:
        left += 1  # every timestep but the first is there twice: not in the middle of a step
    return _checked(len(scheduler.timesteps) - left, scheduler, at)


def first_of_picture(scheduler: Scheduler, strength: float) -> int:
    """The index of the timestep that denoising begins with where a picture is given. strength: the
    share of the steps that is taken, above 0 to 1; the first, where the sampler's steps were all
    placed within it. A step that lies partly within it is left out, but taken in flow matching.

    Raises UsageError where that is less than one.
    """
    if scheduler.strength < 1:
        return 0
    steps = scheduler.num_inference_steps
    skipped = steps - steps_within(steps, strength)
    if scheduler.process == FlowEuler.process:  # diffusers rounds here, and there the steps taken
        skipped = int(steps - steps * strength)
    first = skipped * scheduler.order
    if first >= len(scheduler.timesteps):
        raise UsageError(
            f"strength {strength:g} leaves no step: scheduler {scheduler.name} has "
            f"{len(scheduler.timesteps)} of {steps} in this configuration; take more"
        )
    return first


def _cutoff(spec: PipelineSpec, at: float) -> int:
    """The timestep that divides both."""
    given = spec.scheduler.config.get("num_train_timesteps")
    train = given if isinstance(given, int) else _TRAIN_TIMESTEPS
    return round(train - at * train)


def _checked(index: int, scheduler: Scheduler, at: float) -> int:
    count = len(scheduler.timesteps)
    if 0 < index < count:
        return index
    which = "refiner" if index >= count else "base model"
    raise UsageError(
        f"denoising_end {at:g} leaves no step of {count} to the {which}: take more --steps, or "
        "another --denoising-end"
    )
