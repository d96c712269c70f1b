"""DEIS (Zhang and Chen, Fast Sampling of Diffusion Models with Exponential Integrator)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from edgesd.runtime.arrays import Array
from edgesd.runtime.schedulers import schedule
from edgesd.runtime.schedulers.base import Asked, Noise, read_config
from edgesd.runtime.schedulers.schedule import F32, Spacing
from edgesd.runtime.schedulers.solver import (
    AnySolver,
    SolverConfig,
    SolverScheduler,
    signal_and_noise,
    windows,
)

_FEW = 15


class DEISConfig(SolverConfig, frozen=True, kw_only=True):
    """diffusers' DEISMultistepScheduler."""

    algorithm_type: Literal["deis", "dpmsolver", "dpmsolver++"] = "deis"
    solver_type: AnySolver = "logrho"
    timestep_spacing: Spacing = "linspace"


class DEIS(SolverScheduler):
    """tAB-DEIS in log rho, rho = sigma / alpha: epsilon is interpolated by a polynomial in log rho
    through the last `solver_order` values, and (eq. 17 of the paper)

        x_next / alpha_next = x / alpha + integral of epsilon from rho to rho_next
    """

    name = "deis"
    diffusers_class = "DEISMultistepScheduler"

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = read_config(DEISConfig, config, self.name)
        self._prepare(self.config)

    def _lay_out(self, asked: Asked) -> int:
        """At most num_train_timesteps steps."""
        spaced = self._spaced(asked, self.config.timestep_spacing)
        sigmas = self._spread(spaced, asked.steps)
        last = self._train_sigmas[0] if self._kind is None else sigmas[-1]
        values = self._use_sigmas(sigmas, float(last))
        n = len(self.timesteps)
        orders = (self._order(i, n) for i in range(n))
        self._weights = [[self._step(w) for w in each] for each in windows(values, orders)]
        for weights in self._weights:
            schedule.check_finite(asked.steps, *(w for _, each in weights for w in each))
        return asked.steps

    def _order(self, i: int, n: int) -> int:
        """Of step i of n, as far as the steps before it are known."""
        few = self.config.lower_order_final and n < _FEW
        return min(self.config.solver_order, i + 1, n - i if few else 3)

    def _step(self, rhos: list[float]) -> tuple[float, list[float]]:
        """Weights of the sample and of the epsilons, newest first, of a step between the last two
        of `rhos` [order + 1]."""
        (alpha, _), (alpha_start, _) = signal_and_noise(rhos[-1]), signal_and_noise(rhos[-2])
        logs = [math.log(rho) for rho in rhos[-2::-1]]
        ends = rhos[-2], rhos[-1]
        return alpha / alpha_start, [alpha * _integral(logs, k, *ends) for k in range(len(logs))]

    def step(self, model_output: Array, i: int, sample: F32, noise: Noise) -> F32:
        self._remember(self._epsilon(model_output, i, sample))
        possible = self._weights[i]
        scale, weights = possible[min(len(self._history), len(possible)) - 1]
        return schedule.weighted(scale, sample, weights, self._history[: len(weights)])


def _integral(logs: list[float], k: int, start: float, end: float) -> float:
    """Of Lagrange's polynomial in log rho that is 1 at logs[k] and 0 at the others, over rho."""
    others = [log for j, log in enumerate(logs) if j != k]
    if logs[k] in others:
        return math.nan
    coefficients = [1.0]  # of powers of log rho, from the highest
    for log in others:
        scaled = [c / (logs[k] - log) for c in coefficients]
        coefficients = [a - log * b for a, b in zip([*scaled, 0.0], [0.0, *scaled], strict=True)]

    def antiderivative(rho: float) -> float:
        total, lower = 0.0, 0.0
        for power, c in zip(range(len(logs)), reversed(coefficients), strict=True):
            # The integral of log(rho)^p is rho log(rho)^p - p times that of log(rho)^(p - 1).
            lower = rho * math.log(rho) ** power - power * lower
            total += c * lower
        return total

    return antiderivative(end) - antiderivative(start)
