"""Noise levels between a first and a last one, other than those of evenly spaced timesteps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from edgesd.errors import InputError, UsageError
from edgesd.runtime.schedulers.base import refusal
from edgesd.runtime.schedulers.schedule import F64

Spread = Callable[[float, float, int], F64]
"""(largest sigma, smallest sigma, n) -> sigmas [n], descending."""


def karras_sigmas(top: float, bottom: float, steps: int, rho: float = 7.0) -> F64:
    """See Spread; Karras et al., Elucidating the Design Space of Diffusion-Based Generative Models,
    eq. 5."""
    first, last = top ** (1 / rho), bottom ** (1 / rho)
    return np.asarray((first + np.linspace(0, 1, steps) * (last - first)) ** rho)


def exponential_sigmas(top: float, bottom: float, steps: int) -> F64:
    """See Spread; equally spaced in the logarithm."""
    return np.asarray(np.exp(np.linspace(math.log(top), math.log(bottom), steps)))


def beta_sigmas(top: float, bottom: float, steps: int) -> F64:
    """See Spread; Lee et al., Beta Sampling is All You Need: quantiles of the beta distribution
    with both parameters 0.6."""
    return bottom + beta_quantiles(1 - np.linspace(0, 1, steps), 0.6) * (top - bottom)


def beta_quantiles(p: F64, a: float) -> F64:
    """x [n] in [0, 1] where the beta distribution with both parameters a (0 < a <= 1) has the
    cumulative probability p [n].

    By Newton's method in y = x^a, of which the cumulative probability of x <= 1/2,

        I(x) = y / B(a, a) * sum_k (1 - a)_k / (k! (a + k)) x^k

    (DLMF 8.17.7), is nearly linear. The distribution is symmetrical about 1/2.
    """
    low = np.minimum(p, 1 - p)
    beta = math.gamma(a) ** 2 / math.gamma(2 * a)
    series, term = [], 1.0
    for k in range(60):  # x^k <= 2^-k
        series.append(term / (a + k))
        term *= (1 - a + k) / (k + 1)
    y = low * a * beta
    for _ in range(8):
        x = np.minimum(y ** (1 / a), 0.5)
        error = y * np.polynomial.polynomial.polyval(x, series) / beta - low
        y = np.clip(y - error * a * beta * (1 - x) ** (1 - a), 0, 0.5**a)
    x = y ** (1 / a)
    return np.asarray(np.where(p > 0.5, 1 - x, x))


SPREADS: dict[str, Spread] = {
    "karras": karras_sigmas,
    "exponential": exponential_sigmas,
    "beta": beta_sigmas,
}
"""By the name that --sigmas takes; `use_<name>_sigmas` is the option of diffusers."""


class HasSpreads(Protocol):
    """A configuration of a sampler whose noise levels can be spread."""

    @property
    def use_karras_sigmas(self) -> bool: ...
    @property
    def use_exponential_sigmas(self) -> bool: ...
    @property
    def use_beta_sigmas(self) -> bool: ...


def option_of(kind: str) -> str:
    """The option of diffusers that asks for a kind of sigmas."""
    return f"use_{kind}_sigmas"


def spread_of(scheduler: str, config: HasSpreads) -> str | None:
    """Which of SPREADS is asked for. Raises InputError for two at once."""
    asked = [kind for kind in SPREADS if getattr(config, option_of(kind))]
    if len(asked) > 1:
        expected = f"expected only one of it and {option_of(asked[0])}"
        raise InputError(refusal(scheduler, option_of(asked[1]), True, expected))
    return asked[0] if asked else None


def check_unlisted(timesteps: Sequence[int] | None, kind: str | None) -> None:
    """Raise UsageError where both a list of timesteps and a kind of sigmas say where steps are."""
    if timesteps is not None and kind is not None:
        raise UsageError(
            f"a list of timesteps leaves nothing to spread: give it or {kind} sigmas, not both"
        )
