"""DPM2 and its ancestral variant (k-diffusion's sample_dpm_2 and sample_dpm_2_ancestral, after
algorithm 2 of Karras et al., Elucidating the Design Space of Diffusion-Based Generative Models)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import numpy as np

from edgesd.runtime.arrays import Array
from edgesd.runtime.schedulers import schedule
from edgesd.runtime.schedulers.base import Asked, Noise, read_config
from edgesd.runtime.schedulers.euler_ancestral import down_and_up
from edgesd.runtime.schedulers.exploding import SpreadConfig, SpreadScheduler, slope
from edgesd.runtime.schedulers.heun import doubled
from edgesd.runtime.schedulers.schedule import F32
from edgesd.runtime.schedulers.solver import ratio


class DPM2Config(SpreadConfig, frozen=True, kw_only=True):
    """diffusers' KDPM2DiscreteScheduler and KDPM2AncestralDiscreteScheduler."""

    beta_start: float = 0.00085
    beta_end: float = 0.012
    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon"


class _Half(NamedTuple):
    """sigma of the network's input, how far its slope is followed, and noise added at the end."""

    sigma: float
    growth: float
    up: float = 0.0


class DPM2(SpreadScheduler):
    """The midpoint method in log sigma: with d' = (x - x_0) / sigma at the middle,

        x_next = x + (sigma_next - sigma) d'

    Each step but the last, which is Euler's, runs the network twice.
    """

    name = "dpm2"
    diffusers_class = "KDPM2DiscreteScheduler"
    order = 2

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = c = read_config(DPM2Config, config, self.name)
        self._prepare_spread(c)

    def _lay_out(self, asked: Asked) -> int:
        """At most num_train_timesteps steps."""
        timesteps, sigmas = self._levels(asked)
        if self._kind == "karras":
            timesteps = timesteps.round()
        values = self._use_sigmas(np.append(doubled(sigmas), 0).astype(np.float32))
        self._halves, middles = [], []
        for sigma, target in pairwise([*values[:1], *values[1:-1:2]]):
            down, up = self._target(np.float32(sigma), np.float32(target))
            middles.append(math.sqrt(sigma * down))
            schedule.check_finite(asked.steps, ratio(1.0, middles[-1]))
            self._halves.append(_Half(sigma, middles[-1] - sigma))
            self._halves.append(_Half(middles[-1], down - sigma, up))
        self._halves.append(_Half(values[-2], -values[-2]))
        self.timesteps = doubled(timesteps)
        self.timesteps[1::2] = schedule.fractional_timesteps(
            np.array(middles), self._train_sigmas
        ).astype(np.float32)
        self._divisors = [math.sqrt(half.sigma * half.sigma + 1.0) for half in self._halves]
        return asked.steps

    def _target(self, sigma: np.float32, target: np.float32) -> tuple[float, float]:
        """The sigma to which a step goes down, and the noise that is added there."""
        return float(target), 0.0

    def begin(self, first: int = 0) -> None:
        self._start: F32 | None = None
        """The sample at the start of a step whose first half was taken."""

    def step(self, model_output: Array, i: int, sample: F32, noise: Noise) -> F32:
        half = self._halves[i]
        result = slope(self.config.prediction_type, model_output, sample, half.sigma)
        result *= half.growth
        result += sample if self._start is None else self._start
        second = self._start is not None
        self._start = None if second else sample.copy()
        if second:
            self._perturb(result, half.up, noise)
        return result

    def _perturb(self, sample: F32, up: float, noise: Noise) -> None:
        """Add noise to a sample in place, if the sampler draws any."""


class DPM2Ancestral(DPM2):
    """Steps of DPM2 down to sigma_down, then noise back up to sigma_next; see EulerAncestral.

    In steps from a sigma to one a thousandth of it, sigma_down is what rounding leaves of it.
    """

    name = "dpm2-a"
    diffusers_class = "KDPM2AncestralDiscreteScheduler"
    exact = False

    def _target(self, sigma: np.float32, target: np.float32) -> tuple[float, float]:
        return down_and_up(sigma, target)

    def _perturb(self, sample: F32, up: float, noise: Noise) -> None:
        sample += np.multiply(noise(sample.shape), up)
