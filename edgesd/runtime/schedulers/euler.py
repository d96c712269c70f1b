"""Euler's method on the probability flow ODE (Karras et al., Elucidating the Design Space of
Diffusion-Based Generative Models)."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any, Literal

import numpy as np

from edgesd.runtime.arrays import Array
from edgesd.runtime.schedulers import schedule
from edgesd.runtime.schedulers.base import Asked, Noise, read_config
from edgesd.runtime.schedulers.exploding import SpreadConfig, SpreadScheduler, slope
from edgesd.runtime.schedulers.schedule import F32, F64, FinalSigma, Prediction
from edgesd.runtime.schedulers.sigmas import exponential_sigmas


class EulerConfig(SpreadConfig, frozen=True, kw_only=True):
    """diffusers' EulerDiscreteScheduler."""

    prediction_type: Literal["epsilon", "v_prediction", "sample", "original_sample"] = "epsilon"
    interpolation_type: Literal["linear", "log_linear"] = "linear"
    timestep_type: Literal["discrete", "continuous"] = "discrete"
    final_sigmas_type: FinalSigma = "zero"
    rescale_betas_zero_snr: bool = False


class Euler(SpreadScheduler):
    """Algorithm 1 of the paper without the second-order correction and without churn:

    x_next = x + (sigma_next - sigma) (x - x_0) / sigma
    """

    name = "euler"
    diffusers_class = "EulerDiscreteScheduler"
    takes = frozenset(("timesteps", "sigmas"))

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = c = read_config(EulerConfig, config, self.name)
        self._prediction: Prediction = (
            "sample" if c.prediction_type == "original_sample" else c.prediction_type
        )
        self._prepare_spread(c, c.rescale_betas_zero_snr)

    def _lay_out(self, asked: Asked) -> int:
        """At most num_train_timesteps steps."""
        c, train = self.config, self._train_sigmas
        if asked.sigmas is not None:
            rounded = schedule.check_sigmas(asked.sigmas, c.num_train_timesteps)
            fractions = schedule.fractional_timesteps(rounded[:-1].astype(np.float64), train)
            timesteps = fractions.astype(np.float32)
        else:
            timesteps, sigmas = self._levels(asked)
            last = float(train[0]) if c.final_sigmas_type == "sigma_min" else 0.0
            rounded = np.append(sigmas, last).astype(np.float32)
        if c.timestep_type == "continuous" and self._prediction == "v_prediction":
            timesteps = np.float32(0.25) * np.log(rounded[:-1])
        values = self._use_sigmas(rounded)
        self._pairs = list(pairwise(values[: len(timesteps) + 1]))
        self.timesteps = timesteps
        return len(timesteps) if asked.sigmas is not None else asked.steps

    def _levels(self, asked: Asked) -> tuple[F32, F64]:
        """Timesteps [n] and sigmas [n], or one more for log_linear."""
        if self.config.interpolation_type == "linear":
            return super()._levels(asked)
        timesteps, train = self._spaced(asked), self._train_sigmas
        sigmas = exponential_sigmas(float(train[-1]), float(train[0]), asked.steps + 1)
        return self._spread(asked, timesteps, sigmas)

    def step(self, model_output: Array, i: int, sample: F32, noise: Noise) -> F32:
        sigma, sigma_next = self._pairs[i]
        result = slope(self._prediction, model_output, sample, sigma)
        result *= float(np.float32(sigma_next - sigma))
        result += sample
        return result
