"""Euler's method for models in the form of Karras et al., Elucidating the Design Space of
Diffusion-Based Generative Models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from edgesd.runtime.arrays import Array
from edgesd.runtime.schedulers.base import Asked, Noise, read_config
from edgesd.runtime.schedulers.edm import EDMConfig, EDMScheduler
from edgesd.runtime.schedulers.schedule import F32


class EDMEuler(EDMScheduler):
    """Algorithm 1 of the paper without the second-order correction and without churn; see Euler."""

    name = "edm-euler"
    diffusers_class = "EDMEulerScheduler"

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = read_config(EDMConfig, config, self.name)
        self._prepare_edm(self.config)

    def _lay_out(self, asked: Asked) -> int:
        """At most num_train_timesteps steps."""
        self.timesteps, sigmas = self._levels_of(asked.steps)
        self._use_levels(sigmas)
        return asked.steps

    def step(self, model_output: Array, i: int, sample: F32, noise: Noise) -> F32:
        result = self._x0_edm(model_output, i, sample)
        np.subtract(sample, result, out=result)
        result /= self._sigmas[i]
        result *= float(np.float32(self._sigmas[i + 1] - self._sigmas[i]))
        result += sample
        return result
