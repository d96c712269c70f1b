"""DPM-Solver++(2M) (Lu et al., DPM-Solver++: Fast Solver for Guided Sampling of Diffusion
Probabilistic Models)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from edgesd.errors import InputError
from edgesd.runtime.arrays import Array
from edgesd.runtime.schedulers import schedule
from edgesd.runtime.schedulers.base import LimitConfig, Noise, Scheduler, read_config, refusal
from edgesd.runtime.schedulers.euler import refuse_beta_sigmas
from edgesd.runtime.schedulers.schedule import F32, F64, I64, FinalSigma, Prediction, Spacing


class DPMConfig(LimitConfig, frozen=True, kw_only=True):
    """diffusers' DPMSolverMultistepScheduler."""

    solver_order: int = 2
    prediction_type: Prediction = "epsilon"
    algorithm_type: str = "dpmsolver++"
    solver_type: Literal["midpoint", "heun", "logrho", "bh1", "bh2"] = "midpoint"
    lower_order_final: bool = True
    euler_at_final: bool = False
    use_karras_sigmas: bool = False
    use_exponential_sigmas: bool = False
    use_beta_sigmas: bool = False
    use_lu_lambdas: bool = False
    use_flow_sigmas: bool = False
    sigma_min: float | None = None
    sigma_max: float | None = None
    final_sigmas_type: FinalSigma = "zero"
    lambda_min_clipped: float = -math.inf
    variance_type: str | None = None
    timestep_spacing: Spacing = "linspace"
    rescale_betas_zero_snr: bool = False


class DPMSolverPlusPlus(Scheduler):
    """Multistep DPM-Solver++ of order 1 or 2, and its SDE variant.

    With lambda = ln(alpha / sigma), h the growth of lambda over this step, h' over the one
    before, m the predicted x_0 and m' the one before, D = (h / h') (m - m'):

        x_next = (sigma_next / sigma) x - alpha_next (e^-h - 1) (m + D / 2)      midpoint

    (algorithm 2 and eq. 4.1); heun replaces D / 2 as in the paper's appendix; the first order
    drops D. sde-dpmsolver++ (appendix, SDE-DPM-Solver++) draws noise z at every step:

        x_next = (sigma_next / sigma) e^-h x + alpha_next (1 - e^-2h) (m + D / 2)
                 + sigma_next sqrt(1 - e^-2h) z
    """

    name = "dpmpp-2m"
    diffusers_class = "DPMSolverMultistepScheduler"

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = c = read_config(DPMConfig, config, self.name)
        self._check_options()
        # Names of other solvers (deis, bh1 ...) stand for the plain choice, as in diffusers.
        self._sde = c.algorithm_type == "sde-dpmsolver++"
        self._heun = c.solver_type == "heun"
        self._table = c.table(zero_snr=c.rescale_betas_zero_snr, floor=schedule.ZERO_SNR_FLOOR)
        self._limit = schedule.x0_limiter(
            c.thresholding, c.dynamic_thresholding_ratio, c.sample_max_value
        )
        self.timesteps = np.arange(c.num_train_timesteps, dtype=np.int64)[::-1].copy()
        self.begin()

    def _check_options(self) -> None:
        """Raise InputError for an option value that isn't implemented."""
        c = self.config
        refuse_beta_sigmas(self.name, c.use_beta_sigmas)
        refused: list[tuple[str, object, bool, str]] = [
            (
                "algorithm_type",
                c.algorithm_type,
                c.algorithm_type in ("dpmsolver++", "sde-dpmsolver++", "deis"),
                "expected 'dpmsolver++' or 'sde-dpmsolver++'",
            ),
            ("solver_order", c.solver_order, c.solver_order in (1, 2), "expected 1 or 2"),
            ("use_flow_sigmas", c.use_flow_sigmas, not c.use_flow_sigmas, "expected false"),
            (
                "variance_type",
                c.variance_type,
                c.variance_type not in ("learned", "learned_range"),
                "expected a model that predicts no variance",
            ),
            (
                "use_exponential_sigmas",
                c.use_exponential_sigmas,
                not (c.use_exponential_sigmas and c.use_karras_sigmas),
                "expected only one of it and use_karras_sigmas",
            ),
        ]
        for option, value, supported, expected in refused:
            if not supported:
                raise InputError(refusal(self.name, option, value, expected))

    def begin(self, first: int = 0) -> None:
        self._previous_x0: F32 | None = None

    def set_timesteps(self, num_inference_steps: int, *, image_seq_len: int | None = None) -> None:
        """See Scheduler; at most num_train_timesteps steps."""
        c = self.config
        schedule.check_steps(num_inference_steps, c.num_train_timesteps)
        timesteps, sigmas = self._layout(num_inference_steps)
        last = math.sqrt((1 - float(self._table[0])) / float(self._table[0]))
        final = last if c.final_sigmas_type == "sigma_min" else 0.0
        values = [float(s) for s in np.append(sigmas, final).astype(np.float32)]
        n = len(timesteps)
        steps = [(values[i + 1], values[i], values[i - 1] if i else None) for i in range(n)]
        self._conversions = []
        for _, sigma, _ in steps:
            alpha, sigma_vp = _signal_and_noise(sigma)
            self._conversions.append(schedule.x0_weights(c.prediction_type, alpha, sigma_vp))
        self._first = [self._weights(target, sigma, None) for target, sigma, _ in steps]
        self._second = list(self._first)
        for i in range(n):
            if c.solver_order == 2 and i > 0 and not self._ends_low(i, n):
                self._second[i] = self._weights(*steps[i])
        for weights in (*self._first, *self._second):
            schedule.check_finite(num_inference_steps, *weights)
        self.timesteps = timesteps
        self._levels = [_signal_and_noise(sigma) for sigma in values]
        self.begin()

    def noise_level(self, i: int) -> tuple[float, float]:
        return self._levels[i]

    def _ends_low(self, i: int, n: int) -> bool:
        """Whether step i of n is the last one and must be of the first order."""
        c = self.config
        short = c.lower_order_final and n < 15
        return i == n - 1 and (c.euler_at_final or short or c.final_sigmas_type == "zero")

    def _layout(self, n: int) -> tuple[I64, F64]:
        """Timesteps [m] and their sigmas [m]; m is n unless lambda_min_clipped cuts some."""
        c = self.config
        train = schedule.exploding_sigmas(self._table)
        if c.use_karras_sigmas or c.use_lu_lambdas or c.use_exponential_sigmas:
            top = float(train[-1]) if c.sigma_max is None else c.sigma_max
            bottom = float(train[0]) if c.sigma_min is None else c.sigma_min
            if c.use_karras_sigmas:
                sigmas = schedule.karras_sigmas(top, bottom, n)
            elif c.use_lu_lambdas:
                sigmas = schedule.exponential_sigmas(float(train[-1]), float(train[0]), n)
            else:
                sigmas = schedule.exponential_sigmas(top, bottom, n)
            timesteps = schedule.fractional_timesteps(sigmas, train)
            rounds = c.use_karras_sigmas or c.use_lu_lambdas
            if rounds and c.beta_schedule != "squaredcos_cap_v2":
                timesteps = timesteps.round()
            return timesteps.astype(np.int64), sigmas
        # Timesteps whose lambda lies below the clip are left out (lambda descends with t).
        lambdas = np.log(np.sqrt(self._table)) - np.log(np.sqrt(np.float32(1) - self._table))
        end = len(train) - int(np.searchsorted(lambdas[::-1], c.lambda_min_clipped))
        if c.timestep_spacing == "trailing":
            spaced = schedule.trailing_timesteps(end, len(train) / n)
        else:
            spaced = schedule.spaced_timesteps(c.timestep_spacing, end, n + 1, c.steps_offset)[:-1]
        timesteps = spaced.round()
        sigmas = np.asarray(np.interp(timesteps, np.arange(len(train)), train))
        return timesteps.astype(np.int64), sigmas

    def _weights(self, target: float, sigma: float, before: float | None) -> tuple[float, ...]:
        """(of sample, of x_0, of the x_0 before, of noise) from the sigmas (variance exploding)
        of the step's end, of its start and of the start of the step before."""
        alpha, noise = _signal_and_noise(target)
        noise_start = _signal_and_noise(sigma)[1]
        h = math.log(sigma / target) if target > 0 else math.inf
        scale = noise / noise_start
        if self._sde:
            scale *= math.exp(-h)
            decay = -math.expm1(-2 * h)
            slope = alpha * (1.0 - decay / (2 * h)) if self._heun and h else alpha * decay / 2
            spread = noise * math.sqrt(max(decay, 0.0))
        else:
            decay = -math.expm1(-h)
            slope = alpha * (1.0 - decay / h) if self._heun and h else alpha * decay / 2
            spread = 0.0
        main = alpha * decay
        if before is None:
            return scale, main, 0.0, spread
        grown = math.log(before / sigma)
        share = slope * h / grown if grown else math.nan
        return scale, main + share, -share, spread

    def step(self, model_output: Array, i: int, sample: F32, noise: Noise) -> F32:
        from_sample, from_output = self._conversions[i]
        x0 = schedule.combine(from_sample, sample, from_output, model_output)
        if self._limit is not None:
            x0 = self._limit(x0)
        previous = self._previous_x0
        weights = self._first[i] if previous is None else self._second[i]
        result = schedule.combine(weights[0], sample, weights[1], x0)
        if previous is not None and weights[2]:
            previous *= weights[2]  # not needed again
            result += previous
        if self._sde:
            result += np.multiply(noise(sample.shape), weights[3])
        self._previous_x0 = x0
        return result


def _signal_and_noise(sigma: float) -> tuple[float, float]:
    """(alpha, sigma), variance preserving, of a variance exploding sigma."""
    alpha = 1.0 / math.sqrt(sigma * sigma + 1.0)
    return alpha, sigma * alpha
