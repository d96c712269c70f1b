"""What samplers over sample = x_0 + sigma epsilon share (Karras et al., Elucidating the Design
Space of Diffusion-Based Generative Models)."""

from __future__ import annotations

import math

import numpy as np

from edgesd.runtime.arrays import Array
from edgesd.runtime.schedulers import schedule
from edgesd.runtime.schedulers.base import Asked, BetaConfig, Scheduler
from edgesd.runtime.schedulers.schedule import F32, F64, Prediction, Spacing
from edgesd.runtime.schedulers.sigmas import SPREADS, check_unlisted, spread_of


class ExplodingConfig(BetaConfig, frozen=True, kw_only=True):
    """Options of all of them."""

    timestep_spacing: Spacing = "linspace"


class SpreadConfig(ExplodingConfig, frozen=True, kw_only=True):
    """Options of those whose sigmas can be spread."""

    use_karras_sigmas: bool = False
    use_exponential_sigmas: bool = False
    use_beta_sigmas: bool = False
    sigma_min: float | None = None
    sigma_max: float | None = None


class ExplodingScheduler(Scheduler):
    """The network is fed sample / sqrt(sigma**2 + 1)."""

    def _prepare(self, config: ExplodingConfig, zero_snr: bool = False) -> None:
        """Keep the training sigmas; `timesteps` and `init_noise_sigma` as before any choice."""
        self._common = config
        table = config.table(zero_snr=zero_snr, floor=schedule.ZERO_SNR_FLOOR)
        self._train_sigmas = schedule.exploding_sigmas(table)
        self.timesteps = np.arange(len(table), dtype=np.float32)[::-1].copy()
        self._use_sigmas(self._train_sigmas[::-1])

    def _spaced(self, asked: Asked) -> F64:
        """Timesteps [n], with fractions for linspace."""
        c = self._common
        if asked.timesteps is not None:
            given = schedule.check_timesteps(asked.timesteps, c.num_train_timesteps)
            return given.astype(np.float64)
        schedule.check_steps(asked.steps, c.num_train_timesteps)
        return schedule.spaced_timesteps(
            c.timestep_spacing, c.num_train_timesteps, asked.steps, c.steps_offset
        )

    def _interpolated(self, timesteps: F32 | F64) -> F64:
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


class SpreadScheduler(ExplodingScheduler):
    """Its sigmas can be spread. limits_karras: whether sigma_min and sigma_max hold for karras
    sigmas."""

    spreads = True
    _limits_karras = True

    def _prepare_spread(self, config: SpreadConfig, zero_snr: bool = False) -> None:
        """As `_prepare`. Raises InputError for two spreads at once."""
        self._options, self._kind = config, spread_of(self.name, config)
        self._prepare(config, zero_snr)

    def _levels(self, asked: Asked) -> tuple[F32, F64]:
        """Timesteps [n] and sigmas [n]."""
        timesteps = self._spaced(asked).astype(np.float32)
        return self._spread(asked, timesteps, self._interpolated(timesteps))

    def _spread(self, asked: Asked, timesteps: F32 | F64, sigmas: F64) -> tuple[F32, F64]:
        """Timesteps [n] and sigmas [n] between the first and last of `sigmas`, as the configuration
        spreads them, or else as they are."""
        if self._kind is None:
            return timesteps.astype(np.float32), sigmas
        check_unlisted(asked.timesteps, self._kind)
        top, bottom = float(sigmas[0]), float(sigmas[-1])
        if self._kind != "karras" or self._limits_karras:
            c = self._options
            top = top if c.sigma_max is None else c.sigma_max
            bottom = bottom if c.sigma_min is None else c.sigma_min
        sigmas = SPREADS[self._kind](top, bottom, asked.steps)
        fractions = schedule.fractional_timesteps(sigmas, self._train_sigmas)
        return fractions.astype(np.float32), sigmas


def slope(
    prediction: Prediction,
    model_output: Array,
    sample: F32,
    sigma: float,
    clip: float | None = None,
) -> F32:
    """d sample / d sigma = (sample - x_0) / sigma, same shape; x_0 is what the network predicts at
    sigma, limited to +-clip."""
    x0_s, x0_m = schedule.exploding_x0_weights(prediction, sigma)
    result = schedule.combine(x0_s, sample, x0_m, model_output)
    if clip is not None:
        np.clip(result, -clip, clip, out=result)
    np.subtract(sample, result, out=result)
    result /= sigma
    return result
