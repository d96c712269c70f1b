"""Multistep DPM-Solver++ for models in the form of Karras et al., Elucidating the Design Space of
Diffusion-Based Generative Models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgesd.errors import InputError
from edgesd.runtime.arrays import Array
from edgesd.runtime.schedulers import schedule
from edgesd.runtime.schedulers.base import Asked, read_config, refusal
from edgesd.runtime.schedulers.dpmpp_2m import DPMSolverPlusPlus, is_sde
from edgesd.runtime.schedulers.edm import EDMConfig, EDMScheduler
from edgesd.runtime.schedulers.schedule import F32
from edgesd.runtime.schedulers.solver import AnySolver


class EDMDPMConfig(EDMConfig, frozen=True, kw_only=True):
    """diffusers' EDMDPMSolverMultistepScheduler."""

    solver_order: int = 2
    thresholding: bool = False
    dynamic_thresholding_ratio: float = 0.995
    sample_max_value: float = 1.0
    algorithm_type: str = "dpmsolver++"
    solver_type: AnySolver = "midpoint"
    lower_order_final: bool = True
    euler_at_final: bool = False


class EDMDPMSolver(EDMScheduler, DPMSolverPlusPlus):
    """The steps of DPMSolverPlusPlus with alpha = 1."""

    name = "edm-dpmpp-2m"
    diffusers_class = "EDMDPMSolverMultistepScheduler"
    takes = frozenset()
    spreads = False
    _level = staticmethod(lambda sigma: (1.0, sigma))

    def __init__(self, config: Mapping[str, Any]) -> None:
        c = self._options = read_config(EDMDPMConfig, config, self.name)
        self.config = c  # type: ignore[assignment]
        self._sde, self._heun = is_sde(self.name, c.algorithm_type), c.solver_type == "heun"
        # diffusers' third order has no formula for noise.
        if c.solver_order not in ((1, 2) if self._sde else (1, 2, 3)):
            expected = "expected 1 or 2, or 3 of dpmsolver++"
            raise InputError(refusal(self.name, "solver_order", c.solver_order, expected))
        self._most = c.solver_order
        self._limit = schedule.x0_limiter(
            c.thresholding, c.dynamic_thresholding_ratio, c.sample_max_value
        )
        self._prepare_edm(c)
        self.begin()

    def _lay_out(self, asked: Asked) -> int:
        """At most num_train_timesteps steps."""
        self.timesteps, sigmas = self._levels_of(asked.steps)
        if self._options.final_sigmas_type == "sigma_min":
            sigmas[-1] = self._edm.sigma_min  # also after a single step
        self._weigh(self._use_levels(sigmas))
        return asked.steps

    def _x0(self, model_output: Array, i: int, sample: F32) -> F32:
        x0 = self._x0_edm(model_output, i, sample)
        return x0 if self._limit is None else self._limit(x0)
