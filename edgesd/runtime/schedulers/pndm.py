"""PNDM (Liu et al., Pseudo Numerical Methods for Diffusion Models on Manifolds)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from edgesd.errors import UsageError
from edgesd.runtime.arrays import Array
from edgesd.runtime.schedulers import schedule
from edgesd.runtime.schedulers.base import Asked, BetaConfig, Noise, read_config
from edgesd.runtime.schedulers.preserving import PreservingScheduler
from edgesd.runtime.schedulers.schedule import F32, Spacing

_RUNGE_KUTTA = (1 / 6, 1 / 3, 1 / 3, 1 / 6)
_WARM_UP_TIMESTEPS = 4
# Weights of the newest output and of those before it (Adams-Bashforth; eq. 12 of the paper).
_MULTISTEP = {
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


class PNDMConfig(BetaConfig, frozen=True, kw_only=True):
    """diffusers' PNDMScheduler."""

    skip_prk_steps: bool = False
    set_alpha_to_one: bool = False
    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon"
    timestep_spacing: Spacing = "leading"


class PNDM(PreservingScheduler):
    """Linear multistep steps, after a warm-up: twelve pseudo Runge-Kutta evaluations, or, with
    skip_prk_steps, one second-order step that evaluates one timestep twice.

    Eq. 11 of the paper, with a = alphas_cumprod at t and p at the earlier timestep:

        x_prev = sqrt(p / a) x - (p - a) e / (a sqrt(1 - p) + sqrt(a (1 - a) p))
    """

    name = "pndm"
    diffusers_class = "PNDMScheduler"

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = c = read_config(PNDMConfig, config, self.name)
        self._prepare(c)

    def _lay_out(self, asked: Asked) -> int:
        """num_train_timesteps at most, and 4 at least unless skip_prk_steps.

        `timesteps` has one more entry than steps with skip_prk_steps (from 2 on), 9 more without.
        """
        c, n = self.config, asked.steps
        down = self._spaced(asked, c.timestep_spacing)
        self._stride = c.num_train_timesteps // n
        self._warm_up = np.empty(0, np.int64)
        if c.skip_prk_steps:
            self.timesteps = np.concatenate([down[:1], down[1:2], down[1:]])
        else:
            if n < _WARM_UP_TIMESTEPS:
                raise UsageError(
                    f"num_inference_steps is {n}: scheduler pndm with skip_prk_steps false "
                    f"expects {_WARM_UP_TIMESTEPS} or more"
                )
            half = np.tile([0, self._stride // 2], 4)
            pairs = np.repeat(down[:_WARM_UP_TIMESTEPS][::-1], 2) + half
            self._warm_up = np.repeat(pairs[:-1], 2)[1:-1][::-1]
            self.timesteps = np.concatenate([self._warm_up, down[3:]])
        return n

    def begin(self, first: int = 0) -> None:
        """See Scheduler. The warm-up begins there, too; as in diffusers, its evaluations are
        counted from the first one, whatever their timesteps are."""
        self._first = first
        self._outputs: list[F32] = []  # newest first, at most four
        self._start: F32 | None = None
        self._sum: F32 | None = None
        spans = [self._span(k, int(t)) for k, t in enumerate(self.timesteps[first:])]
        self._weights = [self._step_weights(*span) for span in spans]

    def _span(self, k: int, t: int) -> tuple[int, int]:
        """Timesteps from which and to which the evaluation k of a loop, at timestep t, steps."""
        if k < len(self._warm_up):
            return int(self._warm_up[k // 4 * 4]), t - (0 if k % 2 else self._stride // 2)
        if k == 1 and not len(self._warm_up):
            return t + self._stride, t
        return t, t - self._stride

    def _step_weights(self, t: int, t_prev: int) -> tuple[float, float]:
        """x_prev from (sample, combined output); a v_prediction is turned into epsilon first."""
        c = self.config
        final = 1.0 if c.set_alpha_to_one else float(self._table[0])
        a = schedule.alpha_at(self._table, t)
        p = schedule.alpha_before(self._table, t_prev, final)
        scale = math.sqrt(p / a)
        slope = -(p - a) / (a * math.sqrt(1 - p) + math.sqrt(a * (1 - a) * p))
        eps_s, eps_m = schedule.epsilon_weights(c.prediction_type, *schedule.signal_and_noise(a))
        return scale + slope * eps_s, slope * eps_m

    def step(self, model_output: Array, i: int, sample: F32, noise: Noise) -> F32:
        """See Scheduler; steps must be taken in order."""
        k = i - self._first
        if k < len(self._warm_up):
            output, start = self._runge_kutta(model_output, k, sample)
        else:
            output, start = self._multistep(model_output, k, sample)
        from_sample, from_output = self._weights[k]
        return schedule.combine(from_sample, start, from_output, output)

    def _runge_kutta(self, model_output: Array, k: int, sample: F32) -> tuple[Array, F32]:
        """The output and the sample to step with; four evaluations make one step."""
        stage = k % 4
        part = np.multiply(model_output, _RUNGE_KUTTA[stage], dtype=np.float32)
        if stage == 0:
            self._remember(model_output)
            self._start, self._sum = sample.copy(), part
        else:
            assert self._sum is not None
            self._sum += part
        assert self._start is not None
        return (self._sum if stage == 3 else model_output), self._start

    def _multistep(self, model_output: Array, k: int, sample: F32) -> tuple[Array, F32]:
        """The output and the sample to step with."""
        if k == 1 and not len(self._warm_up):
            # The second evaluation corrects the first step: Heun's rule from the same start.
            assert self._start is not None
            start, self._start = self._start, None
            return schedule.combine(0.5, model_output, 0.5, self._outputs[0]), start
        self._remember(model_output)
        if k == 0:
            self._start = sample.copy()
        weights = _MULTISTEP[len(self._outputs)]
        total = np.multiply(self._outputs[0], weights[0])
        for output, weight in zip(self._outputs[1:], weights[1:], strict=True):
            total += np.multiply(output, weight)
        return total, sample

    def _remember(self, model_output: Array) -> None:
        """Keep a copy: a runner may reuse its output buffer."""
        self._outputs = [np.array(model_output, np.float32), *self._outputs[:3]]
