"""Linear multistep method on the probability flow ODE (k-diffusion's sample_lms)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from edgesd.runtime.arrays import Array
from edgesd.runtime.schedulers import schedule
from edgesd.runtime.schedulers.base import Asked, Noise, read_config
from edgesd.runtime.schedulers.exploding import SpreadConfig, SpreadScheduler, slope
from edgesd.runtime.schedulers.schedule import F32, Prediction

_ORDER = 4
_NODES = (-1 / math.sqrt(3), 1 / math.sqrt(3))
"""Of Gauss and Legendre's rule, which integrates cubic polynomials exactly."""


class LMSConfig(SpreadConfig, frozen=True, kw_only=True):
    """diffusers' LMSDiscreteScheduler."""

    prediction_type: Prediction = "epsilon"


class LMS(SpreadScheduler):
    """Adams and Bashforth's method for uneven steps: the slope d = (x - x_0) / sigma is
    interpolated through the last four values (Hairer, Norsett, Wanner: Solving Ordinary
    Differential Equations I, III.1 and III.5), and

        x_next = x + integral of d from sigma to sigma_next
    """

    name = "lms"
    diffusers_class = "LMSDiscreteScheduler"
    _limits_karras = False

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = c = read_config(LMSConfig, config, self.name)
        self._prepare_spread(c)

    def _lay_out(self, asked: Asked) -> int:
        """At most num_train_timesteps steps."""
        timesteps, sigmas = self._levels(asked)
        values = self._use_sigmas(np.append(sigmas, 0).astype(np.float32))
        self._weights = [_weights(values, i) for i in range(len(timesteps))]
        for weights in self._weights:
            schedule.check_finite(asked.steps, *weights)
        self.timesteps = timesteps
        return asked.steps

    def begin(self, first: int = 0) -> None:
        self._slopes: list[F32] = []  # newest first

    def step(self, model_output: Array, i: int, sample: F32, noise: Noise) -> F32:
        found = slope(self.config.prediction_type, model_output, sample, self._sigmas[i])
        self._slopes = [found, *self._slopes[: _ORDER - 1]]
        # As in diffusers, a loop that begins later has the weights of one that didn't.
        return schedule.weighted(1.0, sample, self._weights[i][: len(self._slopes)], self._slopes)


def _weights(sigmas: list[float], i: int) -> list[float]:
    """Of the slopes at sigmas i, i - 1, ...: integrals of Lagrange's polynomials over step i; not
    finite where two sigmas coincide."""
    points = [sigmas[i - k] for k in range(min(i + 1, _ORDER))]
    half = (sigmas[i + 1] - sigmas[i]) / 2
    nodes = [sigmas[i] + half * (1 + node) for node in _NODES]

    def polynomial(k: int, at: float) -> float:
        others = [point for j, point in enumerate(points) if j != k]
        if points[k] in others:
            return math.nan
        return math.prod((at - point) / (points[k] - point) for point in others)

    return [half * sum(polynomial(k, at) for at in nodes) for k in range(len(points))]
