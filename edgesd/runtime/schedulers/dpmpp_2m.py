"""Multistep DPM-Solver++ (Lu et al., DPM-Solver++: Fast Solver for Guided Sampling of Diffusion
Probabilistic Models)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from edgesd.errors import InputError
from edgesd.runtime.arrays import Array
from edgesd.runtime.schedulers import schedule
from edgesd.runtime.schedulers.base import Asked, Noise, read_config, refusal
from edgesd.runtime.schedulers.schedule import F32, FinalSigma, Spacing
from edgesd.runtime.schedulers.solver import (
    AnySolver,
    SolverConfig,
    SolverScheduler,
    growth,
    ratio,
    signal_and_noise,
    windows,
)

_FEW = 15
"""Below so many steps the last ones are of lower order, if so configured."""


class DPMConfig(SolverConfig, frozen=True, kw_only=True):
    """diffusers' DPMSolverMultistepScheduler."""

    algorithm_type: str = "dpmsolver++"
    solver_type: AnySolver = "midpoint"
    euler_at_final: bool = False
    use_lu_lambdas: bool = False
    final_sigmas_type: FinalSigma = "zero"
    lambda_min_clipped: float = -math.inf
    variance_type: str | None = None
    timestep_spacing: Spacing = "linspace"
    rescale_betas_zero_snr: bool = False


class MultistepOptions(Protocol):
    """What the order of a step depends on."""

    @property
    def solver_order(self) -> int: ...
    @property
    def lower_order_final(self) -> bool: ...
    @property
    def euler_at_final(self) -> bool: ...
    @property
    def final_sigmas_type(self) -> FinalSigma: ...


class DPMSolverPlusPlus(SolverScheduler):
    """Orders 1 to 3, and the SDE variant.

    With h the growth of lambda over this step, h' over the one before, m the predicted x_0, m' the
    one before and D = (h / h') (m - m'), the second order is

        x_next = (sigma_next / sigma) x - alpha_next (e^-h - 1) (m + D / 2)      midpoint

    (algorithm 2 and eq. 4.1); heun replaces D / 2 as in the paper's appendix; the first order
    drops D, the third adds a second difference. sde-dpmsolver++ (appendix, SDE-DPM-Solver++) draws
    noise z at every step:

        x_next = (sigma_next / sigma) e^-h x + alpha_next (1 - e^-2h) (m + D / 2)
                 + sigma_next sqrt(1 - e^-2h) z
    """

    name = "dpmpp-2m"
    diffusers_class = "DPMSolverMultistepScheduler"
    takes = frozenset(("timesteps",))
    _level = staticmethod(signal_and_noise)

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = c = read_config(DPMConfig, config, self.name)
        self._sde = is_sde(self.name, c.algorithm_type)
        refuse_variance(self.name, c.variance_type)
        self._heun = c.solver_type == "heun"
        self._options: MultistepOptions = c
        self._prepare(c, c.rescale_betas_zero_snr)

    def _lay_out(self, asked: Asked) -> int:
        """At most num_train_timesteps steps; fewer where lambda_min_clipped cuts some."""
        c, train = self.config, self._train_sigmas
        spaced = self._spaced(asked, c.timestep_spacing, c.lambda_min_clipped)
        rounds = c.beta_schedule != "squaredcos_cap_v2"
        sigmas = self._spread(spaced, asked.steps, rounds, c.use_lu_lambdas)
        last = float(train[0]) if c.final_sigmas_type == "sigma_min" else 0.0
        self._weigh(self._use_sigmas(sigmas, last))
        return asked.steps

    def _weigh(self, values: list[float]) -> None:
        """Lay out the steps between noise levels."""
        n = len(values) - 1
        orders = (self._order(i, n) for i in range(n))
        self._weights = [[self._step(w) for w in each] for each in windows(values, orders)]
        for weights in self._weights:
            schedule.check_finite(n, *(w for _, each, _ in weights for w in each))

    def _order(self, i: int, n: int) -> int:
        """Of step i of n, as far as the steps before it are known."""
        c = self._options
        few = c.lower_order_final and n < _FEW
        if i == n - 1 and (c.euler_at_final or few or c.final_sigmas_type == "zero"):
            return 1
        return min(c.solver_order, i + 1, 2 if few and i == n - 2 else 3)

    def _step(self, sigmas: list[float]) -> tuple[float, list[float], float]:
        """Weights of the sample, of the predictions, newest first, and of noise, of a step between
        the last two of `sigmas` [order + 1]."""
        *before, start, target = sigmas
        step = growth(target, start, self._sde, self._level)
        if not before:
            return step.scale, [step.main], step.spread
        h0 = math.log(before[-1] / start)
        first = ratio(step.h, h0)
        if len(before) == 1:
            share = (step.slope if self._heun else step.main / 2) * first
            return step.scale, [step.main + share, -share], step.spread
        h1 = math.log(before[-2] / before[-1])
        second, both = ratio(step.h, h1), h0 + h1
        bend = step.bend * ratio(step.h, both)
        new = (step.slope * (1 + ratio(h0, both)) + bend) * first
        old = (step.slope * ratio(h0, both) + bend) * second
        return step.scale, [step.main + new, -new - old, old], step.spread

    def step(self, model_output: Array, i: int, sample: F32, noise: Noise) -> F32:
        self._remember(self._x0(model_output, i, sample))
        possible = self._weights[i]
        scale, weights, spread = possible[min(len(self._history), len(possible)) - 1]
        result = schedule.weighted(scale, sample, weights, self._history[: len(weights)])
        if self._sde:
            result += np.multiply(noise(sample.shape), spread)
        return result


def is_sde(scheduler: str, algorithm: str) -> bool:
    """Whether noise is drawn. Names of other solvers stand for the plain choice, as in diffusers.
    Raises InputError for what isn't implemented."""
    if algorithm not in ("dpmsolver++", "sde-dpmsolver++", "deis"):
        expected = "expected 'dpmsolver++' or 'sde-dpmsolver++'"
        raise InputError(refusal(scheduler, "algorithm_type", algorithm, expected))
    return algorithm == "sde-dpmsolver++"


def refuse_variance(scheduler: str, variance_type: str | None) -> None:
    """Raise InputError for a network that predicts variance, too."""
    if variance_type in ("learned", "learned_range"):
        expected = "expected a model that predicts no variance"
        raise InputError(refusal(scheduler, "variance_type", variance_type, expected))
