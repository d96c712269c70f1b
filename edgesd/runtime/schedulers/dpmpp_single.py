"""Single-step DPM-Solver++ (Lu et al., DPM-Solver++: Fast Solver for Guided Sampling of Diffusion
Probabilistic Models)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from edgesd.runtime.arrays import Array
from edgesd.runtime.schedulers import schedule
from edgesd.runtime.schedulers.base import Asked, Noise, read_config
from edgesd.runtime.schedulers.dpmpp_2m import is_sde, refuse_variance
from edgesd.runtime.schedulers.schedule import F32, FinalSigma
from edgesd.runtime.schedulers.solver import (
    AnySolver,
    SolverConfig,
    SolverScheduler,
    growth,
    ratio,
    windows,
)


class SinglestepConfig(SolverConfig, frozen=True, kw_only=True):
    """diffusers' DPMSolverSinglestepScheduler."""

    algorithm_type: str = "dpmsolver++"
    solver_type: AnySolver = "midpoint"
    lower_order_final: bool = False
    final_sigmas_type: FinalSigma = "zero"
    lambda_min_clipped: float = -math.inf
    variance_type: str | None = None


class DPMSolverSinglestep(SolverScheduler):
    """Steps of the third order are made of three evaluations, of the first, second and third order,
    all from where the first began; those of the second order of two (algorithm 1 of the paper and
    its appendix). With D of the differences to the first evaluation, formulas are as in
    DPMSolverPlusPlus.
    """

    name = "dpmpp-2s"
    diffusers_class = "DPMSolverSinglestepScheduler"
    takes = frozenset(("timesteps",))

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = c = read_config(SinglestepConfig, config, self.name)
        self._sde = is_sde(self.name, c.algorithm_type)
        refuse_variance(self.name, c.variance_type)
        self._heun = c.solver_type == "heun"
        self._prepare(c)

    def _lay_out(self, asked: Asked) -> int:
        """At most num_train_timesteps steps."""
        c, train = self.config, self._train_sigmas
        spaced = self._spaced(asked, "linspace", c.lambda_min_clipped)
        sigmas = self._spread(spaced, asked.steps)
        last = float(train[0]) if c.final_sigmas_type == "sigma_min" else 0.0
        values = self._use_sigmas(sigmas, last)
        self._orders = self._order_list(len(self.timesteps))
        self._weights = [[self._step(w) for w in each] for each in windows(values, self._orders)]
        for weights in self._weights:
            schedule.check_finite(asked.steps, *(w for _, each, _ in weights for w in each))
        return asked.steps

    def _order_list(self, n: int) -> list[int]:
        """The order of each evaluation [n]. As in diffusers, the last ones are of lower order, too,
        where n evaluations don't make whole steps or the last ends without noise."""
        c, most = self.config, self.config.solver_order
        orders = [1 + i % most for i in range(n)]
        if (c.lower_order_final or n % most or c.final_sigmas_type == "zero") and most > 1:
            if most == 3 and n % 3 == 0:
                orders[-3:] = [1, 2, 1]
            elif most == 2 and n % 2 == 0:
                orders[-2:] = [1, 1]
        if c.final_sigmas_type == "zero":
            orders[-1] = 1
        return orders

    def _step(self, sigmas: list[float]) -> tuple[float, list[float], float]:
        """Weights of the sample at the first of `sigmas` [order + 1], of the predictions, newest
        first, and of noise; the last of `sigmas` is where the step ends."""
        start, *middle, target = sigmas
        step = growth(target, start, self._sde)
        if not middle:
            return step.scale, [step.main], step.spread
        newest = math.log(start / middle[-1])
        if len(middle) == 1:
            share = (step.slope if self._heun else step.main / 2) * ratio(step.h, newest)
            return step.scale, [share, step.main - share], step.spread
        # Differences of the newest and of the middle prediction to the first, and their weights.
        older = math.log(start / middle[0])
        to_newest, to_middle = ratio(step.h, newest), ratio(step.h, older)
        new, old = step.slope, 0.0
        if self._heun:
            gap = newest - older
            bend = 2 * step.bend * ratio(step.h, gap)
            new = -step.slope * ratio(older, gap) + bend
            old = step.slope * ratio(newest, gap) - bend
        new, old = new * to_newest, old * to_middle
        return step.scale, [new, old, step.main - new - old], step.spread

    def step(self, model_output: Array, i: int, sample: F32, noise: Noise) -> F32:
        self._remember(self._x0(model_output, i, sample))
        # As in diffusers, an order that needs more evaluations than there were is reduced.
        order = min(self._orders[i], len(self._history))
        if order == 1:
            self._start = sample.copy()
        scale, weights, spread = self._weights[i][order - 1]
        result = schedule.weighted(scale, self._start, weights, self._history[:order])
        if self._sde:
            result += np.multiply(noise(sample.shape), spread)
        return result
