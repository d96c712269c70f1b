"""TCD (Zheng et al., Trajectory Consistency Distillation)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np

from edgesd.runtime.arrays import Array
from edgesd.runtime.schedulers import schedule
from edgesd.runtime.schedulers.base import Asked, LimitConfig, Noise, read_config
from edgesd.runtime.schedulers.lcm import check_grid, distilled_timesteps
from edgesd.runtime.schedulers.preserving import PreservingScheduler
from edgesd.runtime.schedulers.schedule import F32, BetaSchedule, Prediction


class TCDConfig(LimitConfig, frozen=True, kw_only=True):
    """diffusers' TCDScheduler. It clips and limits nothing, whatever its options say, and places
    its timesteps on the grid of the distillation: these options have no effect there either."""

    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: BetaSchedule = "scaled_linear"
    original_inference_steps: int = 50
    prediction_type: Prediction = "epsilon"
    rescale_betas_zero_snr: bool = False


class TCD(PreservingScheduler):
    """Strategic stochastic sampling (algorithm 4 of the paper): down to s = (1 - eta) t_next, then
    noise z back up, with a, p and q = alphas_cumprod at t, t_next and s:

        y = sqrt(q) x_0 + sqrt(1 - q) epsilon
        x_next = sqrt(p / q) y + sqrt(1 - p / q) z

    eta is the paper's gamma; with 0, and in the last step, no noise is drawn.
    """

    name = "tcd"
    diffusers_class = "TCDScheduler"
    draws_by_eta = True
    takes = frozenset(("timesteps",))

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = c = read_config(TCDConfig, config, self.name)
        check_grid(self.name, c.original_inference_steps, c.num_train_timesteps)
        self._prepare(c, c.rescale_betas_zero_snr)

    def _lay_out(self, asked: Asked) -> int:
        """At most original_inference_steps steps."""
        c = self.config
        timesteps = distilled_timesteps(asked, c.original_inference_steps, c.num_train_timesteps)
        steps = [self._step_weights(*pair) for pair in pairwise(timesteps.tolist())]
        self._weights = [*steps, self._step_weights(int(timesteps[-1]), None)]
        self.timesteps = timesteps
        return asked.steps

    def _step_weights(self, t: int, t_next: int | None) -> tuple[float, float, float]:
        """Of sample, model_output and noise. t_next: None in the last step."""
        prediction = self.config.prediction_type
        level = schedule.signal_and_noise(float(self._table[t]))
        s = math.floor(np.float32(1 - self.eta) * np.float32(t_next or 0))
        q = float(self._table[s])
        x0_s, x0_m = schedule.x0_weights(prediction, *level)
        eps_s, eps_m = schedule.epsilon_weights(prediction, *level)
        direct, towards = math.sqrt(q), math.sqrt(1 - q)
        from_sample, from_output = direct * x0_s + towards * eps_s, direct * x0_m + towards * eps_m
        if self.eta == 0 or t_next is None:
            return from_sample, from_output, 0.0
        share = float(self._table[t_next]) / q
        up = math.sqrt(share)
        return up * from_sample, up * from_output, math.sqrt(max(1 - share, 0.0))

    def step(self, model_output: Array, i: int, sample: F32, noise: Noise) -> F32:
        from_sample, from_output, spread = self._weights[i]
        result = schedule.combine(from_sample, sample, from_output, model_output)
        if self.eta > 0 and i < len(self._weights) - 1:
            result += np.multiply(noise(sample.shape), spread)
        return result
