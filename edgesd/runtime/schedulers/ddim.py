"""DDIM (Song, Meng, Ermon: Denoising Diffusion Implicit Models)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from edgesd.runtime.arrays import Array
from edgesd.runtime.schedulers import schedule
from edgesd.runtime.schedulers.base import Asked, ClipConfig, Noise, read_config
from edgesd.runtime.schedulers.preserving import PreservingScheduler
from edgesd.runtime.schedulers.schedule import F32, Prediction, Spacing


class DDIMConfig(ClipConfig, frozen=True, kw_only=True):
    """diffusers' DDIMScheduler."""

    set_alpha_to_one: bool = True
    prediction_type: Prediction = "epsilon"
    timestep_spacing: Spacing = "leading"
    rescale_betas_zero_snr: bool = False


class DDIM(PreservingScheduler):
    """Eq. 12 of the paper, with a = alphas_cumprod at t and p the same at the step before:

        x_prev = sqrt(p) x_0 + sqrt(1 - p - s**2) epsilon + s z
        s = eta sqrt((1 - p) / (1 - a) (1 - a / p))

    With eta 0, the default, no noise z is drawn.
    """

    name = "ddim"
    diffusers_class = "DDIMScheduler"
    draws_by_eta = True

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = c = read_config(DDIMConfig, config, self.name)
        self._prepare(c, c.rescale_betas_zero_snr)
        self._limit = c.limiter()

    def _lay_out(self, asked: Asked) -> int:
        """At most num_train_timesteps steps."""
        c, n = self.config, asked.steps
        timesteps = self._spaced(asked, c.timestep_spacing)
        stride = c.num_train_timesteps // n
        self._weights = [self._step_weights(int(t), int(t) - stride) for t in timesteps]
        self.timesteps = timesteps
        return n

    def _step_weights(self, t: int, t_prev: int) -> tuple[float, ...]:
        """x_0 and epsilon from (sample, model_output), then x_prev from (x_0, epsilon)."""
        prediction = self.config.prediction_type
        final = 1.0 if self.config.set_alpha_to_one else float(self._table[0])
        a = schedule.alpha_at(self._table, t)
        p = schedule.alpha_before(self._table, t_prev, final)
        alpha, sigma = schedule.signal_and_noise(a)
        x0_s, x0_m = schedule.x0_weights(prediction, alpha, sigma)
        eps_s, eps_m = schedule.epsilon_weights(prediction, alpha, sigma)
        spread = self.eta * math.sqrt(max((1 - p) / (1 - a) * (1 - a / p), 0.0))
        direct, towards = math.sqrt(p), math.sqrt(max(1 - p - spread * spread, 0.0))
        folded = (direct * x0_s + towards * eps_s, direct * x0_m + towards * eps_m)
        return (*folded, x0_s, x0_m, eps_s * towards, eps_m * towards, direct, spread)

    def step(self, model_output: Array, i: int, sample: F32, noise: Noise) -> F32:
        from_sample, from_output, x0_s, x0_m, eps_s, eps_m, direct, spread = self._weights[i]
        if self._limit is None:
            result = schedule.combine(from_sample, sample, from_output, model_output)
        else:
            x0 = self._limit(schedule.combine(x0_s, sample, x0_m, model_output))
            result = schedule.combine(eps_s, sample, eps_m, model_output)
            result += np.multiply(x0, direct)
        if self.eta > 0:
            result += np.multiply(noise(sample.shape), spread)
        return result
