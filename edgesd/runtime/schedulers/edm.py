"""What samplers of models in the form of Karras et al., Elucidating the Design Space of
Diffusion-Based Generative Models, share: their own preconditioning, and noise levels without betas.
"""

from __future__ import annotations

import math
from typing import Literal

import msgspec
import numpy as np

from edgesd.errors import InputError
from edgesd.runtime.arrays import Array
from edgesd.runtime.schedulers import schedule
from edgesd.runtime.schedulers.base import Scheduler, TrainTimesteps, refusal
from edgesd.runtime.schedulers.schedule import F32, F64, FinalSigma
from edgesd.runtime.schedulers.sigmas import exponential_sigmas, karras_sigmas


class EDMConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Options of all of them, with diffusers' defaults."""

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    sigma_data: float = 0.5
    sigma_schedule: Literal["karras", "exponential"] = "karras"
    num_train_timesteps: TrainTimesteps = 1000
    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon"
    rho: float = 7.0
    final_sigmas_type: FinalSigma = "zero"


class EDMScheduler(Scheduler):
    """sample = x_0 + sigma epsilon, fed to the network as sample / sqrt(sigma**2 + sigma_data**2)
    with the timestep ln(sigma) / 4; its output F makes (table 1 of the paper)

        x_0 = sigma_data**2 / (sigma**2 + sigma_data**2) sample
              + sigma sigma_data / sqrt(sigma**2 + sigma_data**2) F

    v_prediction: with -F.
    """

    process = "edm"

    def _prepare_edm(self, config: EDMConfig) -> None:
        """Check the common options. Raises InputError."""
        c = self._edm = config
        for option in ("sigma_data", "rho", "sigma_min"):
            if not 0 < getattr(c, option) < math.inf:
                expected = "expected more than 0"
                raise InputError(refusal(self.name, option, getattr(c, option), expected))
        if not c.sigma_min < c.sigma_max < math.inf:
            expected = f"expected more than {c.sigma_min}, as sigma_min says"
            raise InputError(refusal(self.name, "sigma_max", c.sigma_max, expected))
        self.init_noise_sigma = math.sqrt(c.sigma_max**2 + 1)
        self.timesteps = np.zeros(0, np.float32)

    def _levels_of(self, steps: int) -> tuple[F32, F64]:
        """Timesteps [steps] and sigmas [steps + 1]; at most num_train_timesteps steps."""
        c = self._edm
        schedule.check_steps(steps, c.num_train_timesteps)
        if c.sigma_schedule == "karras":
            sigmas = karras_sigmas(c.sigma_max, c.sigma_min, steps, c.rho)
        else:
            # As in diffusers, a single one is the smallest.
            top = c.sigma_max if steps > 1 else c.sigma_min
            sigmas = exponential_sigmas(top, c.sigma_min, steps)
        last = sigmas[-1] if c.final_sigmas_type == "sigma_min" else 0.0
        return (0.25 * np.log(sigmas)).astype(np.float32), np.append(sigmas, last)

    def _use_levels(self, sigmas: F64) -> list[float]:
        """Set what follows from the sigmas alone; returns them as floats."""
        self._sigmas = [float(sigma) for sigma in sigmas.astype(np.float32)]
        data = self._edm.sigma_data
        self._divisors = [math.sqrt(sigma * sigma + data * data) for sigma in self._sigmas]
        return self._sigmas

    def noise_level(self, i: int) -> tuple[float, float]:
        return 1.0, self._sigmas[i]

    def scale_model_input(self, sample: F32, i: int, out: Array | None = None) -> Array:
        return np.divide(sample, self._divisors[i], out=out)

    def _x0_edm(self, model_output: Array, i: int, sample: F32) -> F32:
        """x_0 as predicted at step i, same shape."""
        data, divisor = self._edm.sigma_data, self._divisors[i]
        out = self._sigmas[i] * data / divisor
        sign = 1.0 if self._edm.prediction_type == "epsilon" else -1.0
        return schedule.combine((data / divisor) ** 2, sample, sign * out, model_output)
