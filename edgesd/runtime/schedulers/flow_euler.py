"""Euler's method for flow matching (Esser et al., Scaling Rectified Flow Transformers for
High-Resolution Image Synthesis)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, Literal

import msgspec
import numpy as np

from edgesd.errors import InputError, UsageError
from edgesd.runtime.arrays import Array
from edgesd.runtime.schedulers import schedule
from edgesd.runtime.schedulers.base import (
    Asked,
    Noise,
    Scheduler,
    TrainTimesteps,
    read_config,
    refusal,
)
from edgesd.runtime.schedulers.schedule import F32, F64
from edgesd.runtime.schedulers.sigmas import SPREADS, spread_of


class FlowEulerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """diffusers' FlowMatchEulerDiscreteScheduler."""

    num_train_timesteps: TrainTimesteps = 1000
    shift: float = 1.0
    use_dynamic_shifting: bool = False
    base_shift: float = 0.5
    max_shift: float = 1.15
    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096
    invert_sigmas: bool = False
    shift_terminal: float | None = None
    use_karras_sigmas: bool = False
    use_exponential_sigmas: bool = False
    use_beta_sigmas: bool = False
    sigma_min: float | None = None
    sigma_max: float | None = None
    time_shift_type: Literal["exponential", "linear"] = "exponential"
    stochastic_sampling: bool = False


class FlowEuler(Scheduler):
    """For sample = (1 - sigma) x_0 + sigma noise and the velocity v that the network predicts:

        x_next = x + (sigma_next - sigma) v                              (eq. 1 of the paper)

    stochastic_sampling instead draws noise z anew at every step:

        x_next = (1 - sigma_next) (x - sigma v) + sigma_next z
    """

    name = "flow-euler"
    diffusers_class = "FlowMatchEulerDiscreteScheduler"
    spreads = True
    process = "flow"
    takes = frozenset(("sigmas",))

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = c = read_config(FlowEulerConfig, config, self.name)
        spread_of(self.name, c)
        if c.num_train_timesteps < 1:
            expected = "expected 1 or more"
            option = "num_train_timesteps"
            raise InputError(refusal(self.name, option, c.num_train_timesteps, expected))
        if not c.shift > 0:
            raise InputError(refusal(self.name, "shift", c.shift, "expected more than 0"))
        if c.shift_terminal is not None and not 0 <= c.shift_terminal < 1:
            expected = "expected 0 to below 1, or null"
            raise InputError(refusal(self.name, "shift_terminal", c.shift_terminal, expected))
        train = np.arange(c.num_train_timesteps, 0, -1, dtype=np.float32)
        sigmas = train / np.float32(c.num_train_timesteps)
        if not c.use_dynamic_shifting:
            sigmas = _shifted(sigmas, c.shift)
        self._range = float(sigmas[0]), float(sigmas[-1])
        self.timesteps = sigmas * np.float32(c.num_train_timesteps)

    def dynamic_shift(self, image_seq_len: int) -> float:
        """mu: linear in the number of latent patches, base_shift at base_image_seq_len, max_shift
        at max_image_seq_len, as diffusers' Flux and Stable Diffusion 3 pipelines have it."""
        c = self.config
        slope = (c.max_shift - c.base_shift) / (c.max_image_seq_len - c.base_image_seq_len)
        return image_seq_len * slope + c.base_shift - slope * c.base_image_seq_len

    def _lay_out(self, asked: Asked) -> int:
        """At most num_train_timesteps steps.

        With use_dynamic_shifting the shift is that of image_seq_len; without, it is ignored. sigmas
        [n]: before shifting, where a pipeline has its own; with even_sigmas they are 1 to 1 / n,
        evenly spaced, as diffusers' FluxPipeline has them. Raises UsageError when image_seq_len is
        missing or sigmas doesn't have n values inside (0, 1].
        """
        c = self.config
        n = asked.steps if asked.sigmas is None else len(asked.sigmas)
        schedule.check_steps(n, c.num_train_timesteps)
        spread: F32 | F64
        if asked.sigmas is None and asked.even_sigmas:
            spread = np.linspace(1.0, 1 / n, n).astype(np.float32)
        elif asked.sigmas is None:
            top, bottom = (sigma * c.num_train_timesteps for sigma in self._range)
            spread = np.linspace(top, bottom, n) / c.num_train_timesteps
        elif not all(0 < sigma <= 1 for sigma in asked.sigmas):
            raise UsageError("sigmas: expected values inside (0, 1], without the last, which is 0")
        else:
            spread = np.asarray(asked.sigmas, np.float32)
        if c.use_dynamic_shifting:
            spread = self._shifted_dynamically(spread, asked.image_seq_len)
        else:
            spread = _shifted(spread, c.shift)
        if c.shift_terminal:
            rest = 1 - spread
            if rest[-1] == 0:
                raise UsageError(
                    f"num_inference_steps is {n}: with shift_terminal two or more are expected"
                )
            spread = 1 - rest / (rest[-1] / (1 - c.shift_terminal))
        kind = spread_of(self.name, c)
        if kind is not None:
            top = float(spread[0]) if c.sigma_max is None else c.sigma_max
            bottom = float(spread[-1]) if c.sigma_min is None else c.sigma_min
            spread = SPREADS[kind](top, bottom, n)
        rounded = spread.astype(np.float32)
        if c.invert_sigmas:
            rounded = np.float32(1.0) - rounded
        self.timesteps = rounded * np.float32(c.num_train_timesteps)
        values = [float(s) for s in np.append(rounded, np.float32(c.invert_sigmas))]
        self._pairs = list(pairwise(values))
        return n

    def _shifted_dynamically(self, sigmas: F32 | F64, image_seq_len: int | None) -> F32 | F64:
        """e^mu / (e^mu + 1 / sigma - 1), or mu in place of e^mu with time_shift_type linear."""
        if image_seq_len is None:
            raise UsageError(
                "scheduler flow-euler has use_dynamic_shifting: expected image_seq_len"
            )
        mu = self.dynamic_shift(image_seq_len)
        weight = math.exp(mu) if self.config.time_shift_type == "exponential" else mu
        shifted: F32 | F64 = weight / (weight + (1 / sigmas - 1))
        return shifted

    def noise_level(self, i: int) -> tuple[float, float]:
        sigma = self._pairs[i][0]
        return 1.0 - sigma, sigma

    def step(self, model_output: Array, i: int, sample: F32, noise: Noise) -> F32:
        sigma, sigma_next = self._pairs[i]
        if not self.config.stochastic_sampling:
            return schedule.combine(1.0, sample, sigma_next - sigma, model_output)
        keep = 1.0 - sigma_next
        result = schedule.combine(keep, sample, -keep * sigma, model_output)
        result += np.multiply(noise(sample.shape), sigma_next)
        return result


def _shifted(sigmas: F32 | F64, shift: float) -> F32 | F64:
    """shift sigma / (1 + (shift - 1) sigma), same shape (eq. 23 of the paper)."""
    shifted: F32 | F64 = shift * sigmas / (1 + (shift - 1) * sigmas)
    return shifted
