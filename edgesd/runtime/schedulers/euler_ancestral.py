"""Ancestral sampling with Euler steps (Karras et al.; k-diffusion's sample_euler_ancestral)."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any, Literal

import numpy as np

from edgesd.runtime.arrays import Array
from edgesd.runtime.schedulers.base import Asked, Noise, read_config
from edgesd.runtime.schedulers.exploding import ExplodingConfig, ExplodingScheduler, slope
from edgesd.runtime.schedulers.schedule import F32


class EulerAncestralConfig(ExplodingConfig, frozen=True, kw_only=True):
    """diffusers' EulerAncestralDiscreteScheduler."""

    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon"
    rescale_betas_zero_snr: bool = False


class EulerAncestral(ExplodingScheduler):
    """An Euler step down to sigma_down, then noise z back up to sigma_next; drawn at every step:

    up**2 = sigma_next**2 (sigma**2 - sigma_next**2) / sigma**2
    down**2 = sigma_next**2 - up**2
    x_next = x + (down - sigma) (x - x_0) / sigma + up z
    """

    name = "euler-a"
    diffusers_class = "EulerAncestralDiscreteScheduler"

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = read_config(EulerAncestralConfig, config, self.name)
        self._prepare(self.config, self.config.rescale_betas_zero_snr)

    def _lay_out(self, asked: Asked) -> int:
        """At most num_train_timesteps steps."""
        timesteps = self._spaced(asked).astype(np.float32)
        values = self._use_sigmas(np.append(self._interpolated(timesteps), 0).astype(np.float32))
        self._weights = []
        for sigma, sigma_next in pairwise(values):
            down, up = down_and_up(np.float32(sigma), np.float32(sigma_next))
            self._weights.append((sigma, float(np.float32(down - sigma)), up))
        self.timesteps = timesteps
        return asked.steps

    def step(self, model_output: Array, i: int, sample: F32, noise: Noise) -> F32:
        sigma, growth, up = self._weights[i]
        result = slope(self.config.prediction_type, model_output, sample, sigma)
        result *= growth
        result += sample
        result += np.multiply(noise(sample.shape), up)
        return result


def down_and_up(sigma: np.float32, sigma_next: np.float32) -> tuple[float, float]:
    """sigma_down and sigma_up; float32 throughout, as the difference under the root cancels."""
    target = sigma_next * sigma_next
    start = sigma * sigma
    up = np.sqrt(target * (start - target) / start)
    down = np.sqrt(np.maximum(target - up * up, np.float32(0.0)))
    return float(down), float(up)
