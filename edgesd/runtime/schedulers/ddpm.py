"""DDPM (Ho, Jain, Abbeel: Denoising Diffusion Probabilistic Models)."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any, Literal

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
from edgesd.runtime.schedulers.schedule import F32, Prediction, Spacing

_LARGE = "fixed_large"
_VARIANCES = ("fixed_small", "fixed_small_log", _LARGE)
_BetaSchedule = Literal["linear", "scaled_linear", "squaredcos_cap_v2", "laplace", "sigmoid"]


class DDPMConfig(ClipConfig, frozen=True, kw_only=True):
    """diffusers' DDPMScheduler."""

    beta_schedule: _BetaSchedule = "linear"  # type: ignore[assignment]
    variance_type: str | None = "fixed_small"
    prediction_type: Prediction = "epsilon"
    timestep_spacing: Spacing = "leading"
    rescale_betas_zero_snr: bool = False


class DDPM(PreservingScheduler):
    """Samples of the posterior (eq. 6 and 7 of the paper), with a = alphas_cumprod at t, p the same
    at the next timestep, b = 1 - a / p, and noise z:

        x_prev = sqrt(p) b / (1 - a) x_0 + sqrt(a / p) (1 - p) / (1 - a) x + sqrt(v) z

    v is b (1 - p) / (1 - a), or b for fixed_large. The timestep 0 draws no noise.
    """

    name = "ddpm"
    diffusers_class = "DDPMScheduler"
    takes = frozenset(("timesteps",))

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = c = read_config(DDPMConfig, config, self.name)
        # null is what the solvers' configurations say.
        self._variance = c.variance_type or "fixed_small"
        if self._variance not in _VARIANCES:
            expected = f"expected {', '.join(_VARIANCES)}"
            raise InputError(refusal(self.name, "variance_type", c.variance_type, expected))
        self._prepare(c, c.rescale_betas_zero_snr)
        self._limit = c.limiter()

    def _lay_out(self, asked: Asked) -> int:
        """At most num_train_timesteps steps."""
        timesteps = self._spaced(asked, self.config.timestep_spacing)
        self._weights = [self._step_weights(*pair) for pair in pairwise([*timesteps.tolist(), -1])]
        self.timesteps = timesteps
        return asked.steps

    def _step_weights(self, t: int, t_prev: int) -> tuple[float, ...]:
        """x_0 from (sample, model_output), then x_prev from (sample, x_0, noise)."""
        # float32 as in diffusers: in small steps the differences below cancel.
        one = np.float32(1)
        a = np.float32(schedule.alpha_at(self._table, t))
        p = np.float32(schedule.alpha_before(self._table, t_prev, 1.0))
        share = a / p
        b = one - share
        x0_s, x0_m = schedule.x0_weights(
            self.config.prediction_type, *schedule.signal_and_noise(float(a))
        )
        variance = max((one - p) / (one - a) * b, np.float32(1e-20))
        spread = np.sqrt(b if self._variance == _LARGE else variance) if t > 0 else 0.0
        keep = np.sqrt(share) * (one - p) / (one - a)
        return x0_s, x0_m, float(keep), float(np.sqrt(p) * b / (one - a)), float(spread)

    def step(self, model_output: Array, i: int, sample: F32, noise: Noise) -> F32:
        x0_s, x0_m, keep, main, spread = self._weights[i]
        x0 = schedule.combine(x0_s, sample, x0_m, model_output)
        if self._limit is not None:
            x0 = self._limit(x0)
        result = schedule.combine(keep, sample, main, x0)
        if self.timesteps[i] > 0:
            result += np.multiply(noise(sample.shape), spread)
        return result
