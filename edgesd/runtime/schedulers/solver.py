"""What solvers in lambda = ln(alpha / sigma) share: DPM-Solver++, DEIS and UniPC, over
x = alpha x_0 + sigma epsilon with alpha**2 + sigma**2 = 1.

Noise levels are kept as sigma / alpha, which diffusers calls sigmas, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Literal, NamedTuple

import numpy as np

from edgesd.errors import InputError
from edgesd.runtime.arrays import Array
from edgesd.runtime.schedulers import schedule
from edgesd.runtime.schedulers.base import Asked, LimitConfig, Scheduler, refusal
from edgesd.runtime.schedulers.schedule import F32, F64, Prediction, Spacing
from edgesd.runtime.schedulers.sigmas import (
    SPREADS,
    check_unlisted,
    exponential_sigmas,
    spread_of,
)

AnySolver = Literal["midpoint", "heun", "logrho", "bh1", "bh2"]
"""A solver_type may be another class's: it stands for the class's usual one, as in diffusers."""


class SolverConfig(LimitConfig, frozen=True, kw_only=True):
    """Options of all of them. sigma_min and sigma_max are options of UniPC alone, which diffusers
    reads in the others, too."""

    solver_order: int = 2
    prediction_type: Literal["epsilon", "v_prediction", "sample", "flow_prediction"] = "epsilon"
    lower_order_final: bool = True
    use_karras_sigmas: bool = False
    use_exponential_sigmas: bool = False
    use_beta_sigmas: bool = False
    use_flow_sigmas: bool = False
    sigma_min: float | None = None
    sigma_max: float | None = None


class SolverScheduler(Scheduler):
    """Predicts x_0 at each step and remembers what it needs of the steps before."""

    spreads = True

    def _prepare(self, config: SolverConfig, zero_snr: bool = False) -> None:
        """Check the common options; keep the training sigmas. Raises InputError for an option that
        isn't implemented."""
        c = self._common = config
        self._kind = spread_of(self.name, c)
        if c.solver_order not in (1, 2, 3):
            expected = "expected 1, 2 or 3"
            raise InputError(refusal(self.name, "solver_order", c.solver_order, expected))
        if c.use_flow_sigmas:
            raise InputError(refusal(self.name, "use_flow_sigmas", True, "expected false"))
        if c.prediction_type == "flow_prediction":
            expected = "expected 'epsilon', 'v_prediction' or 'sample'"
            raise InputError(refusal(self.name, "prediction_type", c.prediction_type, expected))
        self._most = c.solver_order
        self._prediction: Prediction = c.prediction_type
        self._table = c.table(zero_snr=zero_snr, floor=schedule.ZERO_SNR_FLOOR)
        self._train_sigmas = schedule.exploding_sigmas(self._table)
        self._limit = schedule.x0_limiter(
            c.thresholding, c.dynamic_thresholding_ratio, c.sample_max_value
        )
        self.timesteps = np.arange(c.num_train_timesteps, dtype=np.int64)[::-1].copy()
        self.begin()

    def begin(self, first: int = 0) -> None:
        self._history: list[F32] = []
        """What was predicted, the newest first."""

    def _remember(self, predicted: F32) -> None:
        self._history = [predicted, *self._history[: self._most - 1]]

    def _spaced(self, asked: Asked, spacing: Spacing, lambda_min: float = -math.inf) -> F64:
        """Timesteps [n] as they are asked for. lambda_min: those below are left out, so that fewer
        than n may be left."""
        c = self._common
        schedule.check_steps(asked.steps, c.num_train_timesteps)
        if asked.timesteps is not None:
            check_unlisted(asked.timesteps, self._kind)
            return schedule.check_timesteps(asked.timesteps, len(self._table)).astype(np.float64)
        # lambda descends with the timestep.
        lambdas = np.log(np.sqrt(self._table)) - np.log(np.sqrt(np.float32(1) - self._table))
        end = len(self._table) - int(np.searchsorted(lambdas[::-1], lambda_min))
        if spacing == "trailing":
            return schedule.trailing_timesteps(end, len(self._table) / asked.steps)
        spaced = schedule.spaced_timesteps(spacing, end, asked.steps + 1, c.steps_offset)[:-1]
        return np.asarray(spaced.round())

    def _spread(self, timesteps: F64, steps: int, rounds: bool = True, lu: bool = False) -> F64:
        """The sigmas of the schedule; sets `timesteps`, at which they are. rounds: whether the
        timesteps of karras sigmas are rounded, not truncated. lu: evenly spaced in lambda."""
        c, train = self._common, self._train_sigmas
        top, bottom = float(train[-1]), float(train[0])
        if lu and self._kind != "karras":
            sigmas = exponential_sigmas(top, bottom, steps)
        elif self._kind is not None:
            top = top if c.sigma_max is None else c.sigma_max
            bottom = bottom if c.sigma_min is None else c.sigma_min
            sigmas = SPREADS[self._kind](top, bottom, steps)
        else:
            self.timesteps = timesteps.astype(np.int64)
            return np.asarray(np.interp(timesteps, np.arange(len(train)), train))
        timesteps = schedule.fractional_timesteps(sigmas, train)
        if rounds and (lu or self._kind == "karras"):
            timesteps = timesteps.round()
        self.timesteps = timesteps.astype(np.int64)
        return sigmas

    def _use_sigmas(self, sigmas: F64, last: float) -> list[float]:
        """Set what follows from the sigmas [n] and the one after the last step."""
        values = [float(sigma) for sigma in np.append(sigmas, last).astype(np.float32)]
        self._levels = [signal_and_noise(sigma) for sigma in values]
        self._conversions = [
            schedule.x0_weights(self._prediction, *level) for level in self._levels[:-1]
        ]
        return values

    def noise_level(self, i: int) -> tuple[float, float]:
        return self._levels[i]

    def _x0(self, model_output: Array, i: int, sample: F32) -> F32:
        """x_0 as predicted at step i, within the limits of the configuration; same shape."""
        from_sample, from_output = self._conversions[i]
        x0 = schedule.combine(from_sample, sample, from_output, model_output)
        return x0 if self._limit is None else self._limit(x0)

    def _epsilon(self, model_output: Array, i: int, sample: F32) -> F32:
        """epsilon as it follows from that x_0."""
        alpha, sigma = self._levels[i]
        return schedule.combine(
            1 / sigma, sample, -alpha / sigma, self._x0(model_output, i, sample)
        )


def signal_and_noise(sigma: float) -> tuple[float, float]:
    """(alpha, sigma), variance preserving, of sigma / alpha."""
    alpha = 1.0 / math.sqrt(sigma * sigma + 1.0)
    return alpha, sigma * alpha


Level = Callable[[float], tuple[float, float]]


class Growth(NamedTuple):
    """What a step of DPM-Solver++ over h of lambda takes: the weight of the sample, and those of
    x_0, of its first derivative by lambda / h (midpoint: as half of `main`) and of its second, all
    at the step's start, and of noise.

    Lu et al., DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models,
    algorithm 2 and appendix; the SDE's are those of 2 h.
    """

    h: float
    scale: float
    main: float
    slope: float
    bend: float
    spread: float


def growth(target: float, start: float, sde: bool, level: Level = signal_and_noise) -> Growth:
    """From a noise level to another, which may be 0 (then only `scale` and `main` are finite).
    level: a noise level -> (alpha, sigma)."""
    alpha, noise = level(target)
    h = math.log(start / target) if target > 0 else math.inf
    scale = noise / level(start)[1]
    span = 2 * h if sde else h
    decay = -math.expm1(-span)
    slope = alpha * (1.0 - decay / span) if span else 0.0
    bend = alpha * ((decay - span) / span**2 + 0.5) if 0 < span < math.inf else 0.0
    if not sde:
        return Growth(h, scale, alpha * decay, slope, bend, 0.0)
    # diffusers subtracts the half that the ODE's formula adds.
    spread = noise * math.sqrt(max(decay, 0.0))
    return Growth(h, scale * math.exp(-h), alpha * decay, slope, bend - alpha, spread)


def windows(values: list[float], orders: Iterable[int]) -> Iterator[list[list[float]]]:
    """For step i, what each of the orders 1 to orders[i] looks at: the noise levels [order + 1] of
    the steps before, of its start and of its end."""
    for i, most in enumerate(orders):
        yield [values[i - order + 1 : i + 2] for order in range(1, most + 1)]


def ratio(a: float, b: float) -> float:
    """a / b; no number where two steps coincide."""
    return a / b if b else math.nan
