"""LCM (Luo et al., Latent Consistency Models)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from edgesd.errors import InputError
from edgesd.runtime.arrays import Array
from edgesd.runtime.schedulers import schedule
from edgesd.runtime.schedulers.base import (
    Asked,
    ClipConfig,
    Noise,
    read_config,
    refusal,
)
from edgesd.runtime.schedulers.preserving import PreservingScheduler
from edgesd.runtime.schedulers.schedule import F32, I64, BetaSchedule, Prediction

_SIGMA_DATA = 0.5


class LCMConfig(ClipConfig, frozen=True, kw_only=True):
    """diffusers' LCMScheduler. It places its timesteps on the grid of the distillation, so that
    timestep_spacing and steps_offset have no effect there either."""

    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: BetaSchedule = "scaled_linear"
    original_inference_steps: int = 50
    clip_sample: bool = False
    set_alpha_to_one: bool = True
    prediction_type: Prediction = "epsilon"
    timestep_scaling: float = 10.0
    rescale_betas_zero_snr: bool = False


def distilled_timesteps(asked: Asked, grid_size: int, train_steps: int) -> I64:
    """Timesteps [n] as they are asked for: a list, or of the grid that a model was distilled on.
    Within a strength these are the last of the list, or n of what is left of the grid.

    Raises UsageError for more than it has, and for none.
    """
    if asked.timesteps is not None:
        given = schedule.check_timesteps(asked.timesteps, train_steps)
        return given[len(given) - schedule.steps_within(len(given), asked.strength) :]
    limit = "original_inference_steps of the distilled model"
    schedule.check_steps(asked.steps, grid_size, limit)
    size = schedule.steps_within(grid_size, asked.strength)
    schedule.check_steps(asked.steps, size, f"{limit} within strength {asked.strength:g}")
    grid = np.arange(size, 0, -1, dtype=np.int64) * (train_steps // grid_size)
    picks = np.floor(np.linspace(0, size, asked.steps, endpoint=False)).astype(np.int64)
    return np.asarray(grid[picks] - 1)


def check_grid(scheduler: str, grid_size: int, train_steps: int) -> None:
    """Raise InputError for an impossible original_inference_steps."""
    if not 1 <= grid_size <= train_steps:
        expected = f"expected 1 to {train_steps}, as num_train_timesteps says"
        raise InputError(refusal(scheduler, "original_inference_steps", grid_size, expected))


class LCM(PreservingScheduler):
    """Multistep consistency sampling (algorithm 3 of the paper), with u = timestep_scaling t:

        c_skip = 0.25 / (u**2 + 0.25),  c_out = u / sqrt(u**2 + 0.25)
        d = c_skip x + c_out x_0
        x_prev = sqrt(p) d + sqrt(1 - p) z

    p is alphas_cumprod at the next timestep; the last step returns d and draws no noise.
    """

    name = "lcm"
    diffusers_class = "LCMScheduler"
    takes = frozenset(("timesteps",))
    narrows = True

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = c = read_config(LCMConfig, config, self.name)
        check_grid(self.name, c.original_inference_steps, c.num_train_timesteps)
        self._prepare(c, c.rescale_betas_zero_snr)
        self._limit = c.limiter()

    def _lay_out(self, asked: Asked) -> int:
        """At most original_inference_steps steps."""
        c = self.config
        timesteps = distilled_timesteps(asked, c.original_inference_steps, c.num_train_timesteps)
        n = len(timesteps)
        self._weights = []
        for i, t in enumerate(timesteps):
            alpha, sigma = schedule.signal_and_noise(float(self._table[t]))
            x0_s, x0_m = schedule.x0_weights(c.prediction_type, alpha, sigma)
            u = float(t) * c.timestep_scaling
            scale = u * u + _SIGMA_DATA**2
            skip, out = _SIGMA_DATA**2 / scale, u / scale**0.5
            signal, spread = 1.0, 0.0
            if i < n - 1:
                signal, spread = schedule.signal_and_noise(float(self._table[timesteps[i + 1]]))
            self._weights.append((x0_s, x0_m, signal * skip, signal * out, spread))
        self.timesteps = timesteps
        return asked.steps

    def step(self, model_output: Array, i: int, sample: F32, noise: Noise) -> F32:
        x0_s, x0_m, skip, out, spread = self._weights[i]
        x0 = schedule.combine(x0_s, sample, x0_m, model_output)
        if self._limit is not None:
            x0 = self._limit(x0)
        result = schedule.combine(skip, sample, out, x0)
        if i < len(self._weights) - 1:
            result += np.multiply(noise(sample.shape), spread)
        return result
