"""Euler's method on the probability flow ODE (Karras et al., Elucidating the Design Space of
Diffusion-Based Generative Models), and what its ancestral variant shares with it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, Literal

import numpy as np

from edgesd.errors import InputError
from edgesd.runtime.arrays import Array
from edgesd.runtime.schedulers import schedule
from edgesd.runtime.schedulers.base import BetaConfig, Noise, Scheduler, read_config, refusal
from edgesd.runtime.schedulers.schedule import F32, F64, FinalSigma, Prediction, Spacing


class ExplodingConfig(BetaConfig, frozen=True, kw_only=True):
    """Options of both Euler schedulers."""

    timestep_spacing: Spacing = "linspace"
    rescale_betas_zero_snr: bool = False


class EulerConfig(ExplodingConfig, frozen=True, kw_only=True):
    """diffusers' EulerDiscreteScheduler."""

    prediction_type: Literal["epsilon", "v_prediction", "sample", "original_sample"] = "epsilon"
    interpolation_type: Literal["linear", "log_linear"] = "linear"
    use_karras_sigmas: bool = False
    use_exponential_sigmas: bool = False
    use_beta_sigmas: bool = False
    sigma_min: float | None = None
    sigma_max: float | None = None
    timestep_type: Literal["discrete", "continuous"] = "discrete"
    final_sigmas_type: FinalSigma = "zero"


class ExplodingScheduler(Scheduler):
    """A sampler over sample = x_0 + sigma epsilon, fed to the network as
    sample / sqrt(sigma**2 + 1)."""

    def _prepare(self, config: ExplodingConfig) -> None:
        """Keep the training sigmas; `timesteps` and `init_noise_sigma` as before any choice."""
        self._common = config
        table = config.table(zero_snr=config.rescale_betas_zero_snr, floor=schedule.ZERO_SNR_FLOOR)
        self._train_sigmas = schedule.exploding_sigmas(table)
        self.timesteps = np.arange(len(table), dtype=np.float32)[::-1].copy()
        self._use_sigmas(self._train_sigmas[::-1])

    def _spaced(self, num_inference_steps: int) -> F32:
        """Timesteps [n], float32, with fractions for linspace."""
        c = self._common
        schedule.check_steps(num_inference_steps, c.num_train_timesteps)
        return schedule.spaced_timesteps(
            c.timestep_spacing, c.num_train_timesteps, num_inference_steps, c.steps_offset
        ).astype(np.float32)

    def _interpolated(self, timesteps: F32) -> F64:
        """sigma [n] at timesteps [n]."""
        train = self._train_sigmas
        return np.asarray(np.interp(timesteps, np.arange(len(train)), train))

    def _use_sigmas(self, sigmas: F32) -> list[float]:
        """Set what follows from the sigmas alone; returns them as floats."""
        values = [float(sigma) for sigma in sigmas]
        top = max(values)
        whole_range = self._common.timestep_spacing in ("linspace", "trailing")
        self.init_noise_sigma = top if whole_range else math.sqrt(top * top + 1.0)
        self._divisors = [math.sqrt(sigma * sigma + 1.0) for sigma in values]
        self._sigmas = values
        return values

    def noise_level(self, i: int) -> tuple[float, float]:
        return 1.0, self._sigmas[i]

    def scale_model_input(self, sample: F32, i: int, out: Array | None = None) -> Array:
        """sample / sqrt(sigma_i**2 + 1), see Scheduler (Karras et al., table 1, c_in)."""
        return np.divide(sample, self._divisors[i], out=out)


class Euler(ExplodingScheduler):
    """Algorithm 1 of the paper without the second-order correction and without churn:

    x_next = x + (sigma_next - sigma) (x - x_0) / sigma
    """

    name = "euler"
    diffusers_class = "EulerDiscreteScheduler"

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = c = read_config(EulerConfig, config, self.name)
        refuse_beta_sigmas(self.name, c.use_beta_sigmas)
        if c.use_karras_sigmas and c.use_exponential_sigmas:
            expected = "expected only one of it and use_karras_sigmas"
            raise InputError(refusal(self.name, "use_exponential_sigmas", True, expected))
        self._prediction: Prediction = (
            "sample" if c.prediction_type == "original_sample" else c.prediction_type
        )
        self._prepare(c)

    def set_timesteps(self, num_inference_steps: int, *, image_seq_len: int | None = None) -> None:
        """See Scheduler; at most num_train_timesteps steps."""
        c, n = self.config, num_inference_steps
        timesteps = self._spaced(n)
        train = self._train_sigmas
        if c.interpolation_type == "linear":
            sigmas = self._interpolated(timesteps)
        else:
            sigmas = schedule.exponential_sigmas(float(train[-1]), float(train[0]), n + 1)
        if c.use_karras_sigmas or c.use_exponential_sigmas:
            spread = schedule.karras_sigmas if c.use_karras_sigmas else schedule.exponential_sigmas
            top = float(sigmas[0]) if c.sigma_max is None else c.sigma_max
            bottom = float(sigmas[-1]) if c.sigma_min is None else c.sigma_min
            sigmas = spread(top, bottom, n)
            timesteps = schedule.fractional_timesteps(sigmas, train).astype(np.float32)
        last = float(train[0]) if c.final_sigmas_type == "sigma_min" else 0.0
        rounded = np.append(sigmas, last).astype(np.float32)
        if c.timestep_type == "continuous" and self._prediction == "v_prediction":
            timesteps = np.float32(0.25) * np.log(rounded[:-1])
        values = self._use_sigmas(rounded)
        self._weights = []
        for sigma, sigma_next in pairwise(values[: len(timesteps) + 1]):
            x0_s, x0_m = schedule.exploding_x0_weights(self._prediction, sigma)
            self._weights.append((x0_s, x0_m, sigma, float(np.float32(sigma_next - sigma))))
        self.timesteps = timesteps

    def step(self, model_output: Array, i: int, sample: F32, noise: Noise) -> F32:
        return euler_step(model_output, sample, *self._weights[i])


def euler_step(
    model_output: Array, sample: F32, x0_s: float, x0_m: float, sigma: float, growth: float
) -> F32:
    """x + growth (x - x_0) / sigma with x_0 = x0_s x + x0_m model_output; x [B, ...], new array.

    In this order, which is diffusers': at a sigma of thousands another one rounds differently.
    """
    result = schedule.combine(x0_s, sample, x0_m, model_output)
    np.subtract(sample, result, out=result)
    result /= sigma
    result *= growth
    result += sample
    return result


def refuse_beta_sigmas(scheduler: str, value: bool) -> None:
    """Raise InputError when the option is on: it needs the inverse of the beta distribution."""
    if value:
        expected = "expected false; use_karras_sigmas and use_exponential_sigmas are supported"
        raise InputError(refusal(scheduler, "use_beta_sigmas", value, expected))
