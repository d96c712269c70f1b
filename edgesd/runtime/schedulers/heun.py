"""Heun's method on the probability flow ODE (Karras et al., Elucidating the Design Space of
Diffusion-Based Generative Models)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from edgesd.runtime.arrays import Array
from edgesd.runtime.schedulers.base import Asked, Noise, read_config
from edgesd.runtime.schedulers.exploding import SpreadConfig, SpreadScheduler, slope
from edgesd.runtime.schedulers.schedule import F32, Prediction


class HeunConfig(SpreadConfig, frozen=True, kw_only=True):
    """diffusers' HeunDiscreteScheduler."""

    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2", "exp"] = "linear"  # type: ignore[assignment]
    prediction_type: Prediction = "epsilon"
    clip_sample: bool = False
    clip_sample_range: float = 1.0


class Heun(SpreadScheduler):
    """Algorithm 1 of the paper without churn: with d = (x - x_0) / sigma, and d' the same at the
    end of Euler's step,

        x_next = x + (sigma_next - sigma) (d + d') / 2

    Each step but the last, which is Euler's, runs the network twice: its timesteps are doubled.
    """

    name = "heun"
    diffusers_class = "HeunDiscreteScheduler"
    order = 2
    takes = frozenset(("timesteps",))

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = c = read_config(HeunConfig, config, self.name)
        self._clip = c.clip_sample_range if c.clip_sample else None
        self._prepare_spread(c)

    def _lay_out(self, asked: Asked) -> int:
        """At most num_train_timesteps steps."""
        timesteps, sigmas = self._levels(asked)
        self._use_sigmas(np.append(doubled(sigmas), 0).astype(np.float32))
        self.timesteps = doubled(timesteps)
        return asked.steps

    def begin(self, first: int = 0) -> None:
        self._before: tuple[F32, F32, float] | None = None
        """Sample, slope and growth of sigma of the first half of a step."""

    def step(self, model_output: Array, i: int, sample: F32, noise: Noise) -> F32:
        sigma, prediction = self._sigmas[i], self.config.prediction_type
        found = slope(prediction, model_output, sample, sigma, self._clip)
        if self._before is None:
            growth = float(np.float32(self._sigmas[i + 1] - sigma))
            self._before = sample.copy(), found.copy(), growth
        else:
            sample, before, growth = self._before
            found += before
            found /= 2
            self._before = None
        found *= growth
        found += sample
        return found


def doubled(values: Any) -> Any:
    """[n] -> [2 n - 1]: all but the first twice."""
    return np.concatenate([values[:1], np.repeat(values[1:], 2)])
