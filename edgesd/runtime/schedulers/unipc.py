"""UniPC (Zhao et al., UniPC: A Unified Predictor-Corrector Framework for Fast Sampling of Diffusion
Models)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from edgesd.errors import InputError
from edgesd.runtime.arrays import Array
from edgesd.runtime.schedulers import schedule
from edgesd.runtime.schedulers.base import Asked, Noise, read_config, refusal
from edgesd.runtime.schedulers.schedule import F32, FinalSigma, Spacing
from edgesd.runtime.schedulers.solver import (
    AnySolver,
    SolverConfig,
    SolverScheduler,
    signal_and_noise,
    windows,
)


class UniPCConfig(SolverConfig, frozen=True, kw_only=True):
    """diffusers' UniPCMultistepScheduler."""

    predict_x0: bool = True
    solver_type: AnySolver = "bh2"
    disable_corrector: tuple[int, ...] = ()
    solver_p: dict[str, Any] | None = None
    final_sigmas_type: FinalSigma = "zero"
    timestep_spacing: Spacing = "linspace"
    rescale_betas_zero_snr: bool = False
    shift_terminal: float | None = None


class _Weights(NamedTuple):
    """Of the sample at the start of a step, and of what was predicted there and before, newest
    first; the corrector's first is of what was predicted at its end."""

    scale: float
    predictions: list[float]


class UniPC(SolverScheduler):
    """UniP-p predicts, and UniC-p corrects what it predicted once the network has seen it, without
    another run (algorithms 5 to 8 of the paper). With m the predicted x_0, D_k = (m_k - m) / r_k
    of the step r_k h before, and phi_1 = e^-h - 1,

        x_next = (sigma_next / sigma) x - alpha_next (phi_1 m + B(h) sum_k rho_k D_k)

    where rho solves a Vandermonde system (eq. 9), and B is -h (bh1) or phi_1 (bh2). The corrector
    has the prediction at the step's end as D of r = 1. predict_x0 false: the same of epsilon, with
    alpha and sigma exchanged and h for -h.
    """

    name = "unipc"
    diffusers_class = "UniPCMultistepScheduler"

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = c = read_config(UniPCConfig, config, self.name)
        self._bh1 = c.solver_type == "bh1"
        ends_clean = c.final_sigmas_type == "zero"
        refused: list[tuple[str, object, bool, str]] = [
            ("solver_p", c.solver_p, c.solver_p is not None, "expected null"),
            ("shift_terminal", c.shift_terminal, c.shift_terminal is not None, "expected null"),
            # In these the weights of a step that ends without noise aren't finite.
            ("predict_x0", False, ends_clean and not c.predict_x0, _WITH_SIGMA_MIN),
            ("solver_type", "bh1", ends_clean and self._bh1, _WITH_SIGMA_MIN),
            (
                "lower_order_final",
                False,
                ends_clean and not c.lower_order_final and c.solver_order > 1,
                _WITH_SIGMA_MIN,
            ),
        ]
        for option, value, is_refused, expected in refused:
            if is_refused:
                raise InputError(refusal(self.name, option, value, expected))
        self._prepare(c, c.rescale_betas_zero_snr)

    def _lay_out(self, asked: Asked) -> int:
        """At most num_train_timesteps steps."""
        c = self.config
        spaced = self._spaced(asked, c.timestep_spacing)
        sigmas = self._spread(spaced, asked.steps)
        last = 0.0
        if c.final_sigmas_type == "sigma_min":
            last = float(self._train_sigmas[0] if self._kind is None else sigmas[-1])
        values = self._use_sigmas(sigmas, last)
        n = len(self.timesteps)
        orders = (min(c.solver_order, i + 1, n - i if c.lower_order_final else n) for i in range(n))
        seen = list(windows(values, orders))
        self._predictors = [[self._predictor(w) for w in each] for each in seen]
        self._correctors = [[self._corrector(w) for w in each] for each in seen[:-1]]
        for found in (*self._predictors, *self._correctors):
            schedule.check_finite(asked.steps, *(w for one in found for w in one.predictions))
        return asked.steps

    def _parts(self, sigmas: list[float]) -> tuple[float, float, float, list[float], list[float]]:
        """Of a step between the last two of `sigmas` [p + 1]: weight of the sample and of the first
        order; B(h) with its factor; r_k [p - 1] of the steps before; right side of eq. 9 [p]."""
        start, target = sigmas[-2:]
        (alpha, noise), (alpha_start, noise_start) = map(signal_and_noise, (target, start))
        h = math.log(start / target) if target > 0 else math.inf
        scale, factor, hh = noise / noise_start, alpha, -h
        if not self.config.predict_x0:
            scale, factor, hh = alpha / alpha_start, noise, h
        phi = math.expm1(hh)
        b_h = hh if self._bh1 else phi
        right, phi_k, factorial = [], (phi / hh if hh else 1.0) - 1, 1
        for k in range(1, len(sigmas)):
            right.append(phi_k * factorial / b_h if b_h else math.nan)
            factorial *= k + 1
            phi_k = (phi_k / hh if hh else math.nan) - 1 / factorial
        ratios = [-math.log(before / start) / h if h else math.nan for before in sigmas[-3::-1]]
        return scale, -factor * phi, -factor * b_h, ratios, right

    def _predictor(self, sigmas: list[float]) -> _Weights:
        """UniP over the last two of `sigmas` [p + 1]."""
        scale, main, factor, ratios, right = self._parts(sigmas)
        if not ratios:
            return _Weights(scale, [main])
        # As in diffusers, the second order has the limit of small h.
        rho = [0.5] if len(ratios) == 1 else _solved(ratios, right[: len(ratios)])
        shares = [factor * each / r for each, r in zip(rho, ratios, strict=True)]
        return _Weights(scale, [main - sum(shares), *shares])

    def _corrector(self, sigmas: list[float]) -> _Weights:
        """UniC over the last two of `sigmas` [p + 1]."""
        scale, main, factor, ratios, right = self._parts(sigmas)
        *rho, newest = _solved([*ratios, 1.0], right) if ratios else [0.5]
        shares = [factor * each / r for each, r in zip(rho, ratios, strict=True)]
        newest *= factor
        return _Weights(scale, [newest, main - sum(shares) - newest, *shares])

    def begin(self, first: int = 0) -> None:
        super().begin()
        self._before: tuple[F32, int] | None = None
        """The sample at the start of the last step, and that step's order."""

    def step(self, model_output: Array, i: int, sample: F32, noise: Noise) -> F32:
        if self.config.predict_x0:
            predicted = self._x0(model_output, i, sample)
        else:
            weights = schedule.epsilon_weights(self._prediction, *self._levels[i])
            predicted = schedule.combine(weights[0], sample, weights[1], model_output)
        if self._before is not None and i - 1 not in self.config.disable_corrector:
            start, order = self._before
            scale, each = self._correctors[i - 1][order - 1]
            sample = schedule.weighted(scale, start, each, [predicted, *self._history[:order]])
        self._remember(predicted)
        possible = self._predictors[i]
        order = min(len(self._history), len(possible))
        self._before = np.array(sample), order
        scale, each = possible[order - 1]
        return schedule.weighted(scale, sample, each, self._history[:order])


_WITH_SIGMA_MIN = "expected another, or final_sigmas_type 'sigma_min'"


def _solved(ratios: list[float], right: list[float]) -> list[float]:
    """rho [p] of sum_k rho_k r_k^(j - 1) = right_j (eq. 9 of the paper)."""
    if not all(math.isfinite(value) for value in (*ratios, *right)):
        return [math.nan] * len(ratios)
    matrix = np.vander(ratios, len(right), increasing=True).T
    try:
        return [float(value) for value in np.linalg.solve(matrix, right)]
    except np.linalg.LinAlgError:
        return [math.nan] * len(ratios)
