"""What a denoiser is told of timesteps, where a network of its own makes that before the first
step (spec.pipeline.ModulationSpec)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NoReturn

import numpy as np

from edgesd.errors import InputError
from edgesd.runtime.arrays import Array, Float
from edgesd.runtime.backends.base import Runner, run_once
from edgesd.runtime.conditioning import Conditioned, joined, stacked
from edgesd.spec.pipeline import InputSpec, Wiring

ROWS = 32
"""Of one run, at most: what a network makes of a row may be some megabytes, and each run reads all
its weights."""


def modulated(
    wiring: Wiring,
    runner: Runner,
    timesteps: Sequence[float] | Array,
    conditioned: Conditioned,
    batch: int,
    guidance_scale: float,
) -> Float:
    """What the modulation makes for a loop [steps, halves of guidance, batch, D], the negative half
    first. runner: of its component. timesteps: that are taken. Raises InputError where it isn't
    finite, or what the text encoders made isn't."""
    spec = wiring.modulation
    assert spec is not None
    halves = [one for one in (conditioned.negative, conditioned.positive) if one is not None]
    each = len(halves) * batch
    count = len(timesteps) * each

    def rows(one: InputSpec) -> Float:
        if one.fill == "timestep":
            return np.repeat(np.asarray(timesteps, np.float32), each)
        if one.fill == "guidance":
            return np.full(count, guidance_scale, np.float32)
        both = stacked([joined(half, one.parts) for half in halves], one.parts[0])
        if not np.isfinite(both).all():
            _refuse(" and ".join(dict.fromkeys(part.component for part in one.parts)))
        return np.concatenate([both] * len(timesteps))

    inputs = {one.name: rows(one) for one in spec.inputs}
    fixed = runner.spec.inputs[0].shape[0]
    size = fixed if isinstance(fixed, int) else min(count, ROWS)
    found = [
        run_once(runner, _padded(inputs, start, size))[spec.output][: count - start].copy()
        for start in range(0, count, size)
    ]
    made = np.concatenate(found).astype(np.float32, copy=False)
    if not np.isfinite(made).all():
        _refuse(spec.component)
    return made.reshape(len(timesteps), len(halves), batch, -1)


def _refuse(component: str) -> NoReturn:
    raise InputError(
        f"{component} makes NaN or infinite values: try a bundle of higher precision, or another "
        "prompt"
    )


def _padded(inputs: Mapping[str, Float], start: int, size: int) -> dict[str, Float]:
    """`size` rows of all inputs from `start` on; the last one again where there are fewer."""
    return {
        name: values[np.minimum(np.arange(start, start + size), len(values) - 1)]
        for name, values in inputs.items()
    }
