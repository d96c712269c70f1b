"""Brownian motion whose path depends on its seed alone, not on where it is looked at, as torchsde's
BrownianInterval has it with halfway_tree.

Between two points, halfway is normally distributed about the mean of both (Levy's construction:
Karatzas and Shreve, Brownian Motion and Stochastic Calculus, 2.3). Each such point of the binary
tree has a seed of its own, from numpy's SeedSequence of the path's seed and the point's place.
"""

from __future__ import annotations

import math

import numpy as np

from edgesd.runtime.noise import TorchNoise
from edgesd.runtime.schedulers.schedule import F32, F64

_DIGITS = 6
"""Decimal places of the times at which the tree ends."""
_POOL = 24
"""Words of the SeedSequence's pool, k-diffusion's choice."""


class BrownianPath:
    """The motion from `start` (where it is 0) to `end`, an array of `shape` at each time."""

    def __init__(self, seed: int, shape: tuple[int, ...], start: float, end: float) -> None:
        self._seed, self._shape = seed, shape
        self._start, self._end = round(start, _DIGITS), round(end, _DIGITS)
        first = int(np.random.SeedSequence(seed, pool_size=_POOL).generate_state(3)[0])
        self._whole = self._normal(first) * math.sqrt(end - start)
        self._known: dict[float, F64] = {}

    def increment(self, start: float, end: float) -> F32:
        """The motion from one time to a later one, of variance end - start."""
        ends = [min(max(round(at, _DIGITS), self._start), self._end) for at in (start, end)]
        # A step looks at three times, one of which the next step looks at again.
        self._known = {at: value for at, value in self._known.items() if at in ends}
        for at in ends:
            if at not in self._known:
                self._known[at] = self._at(at)
        return np.asarray(self._known[ends[1]] - self._known[ends[0]], np.float32)

    def _normal(self, seed: int) -> F64:
        return TorchNoise(seed).normal(self._shape).astype(np.float64)

    def _at(self, time: float) -> F64:
        """The motion at a time: halves the interval around it until that is one of its ends."""
        low, high, key, depth = self._start, self._end, 0, 0
        done, left = np.zeros(self._shape), self._whole
        while low < time < high:
            half = round(0.5 * (low + high), _DIGITS)
            place = np.random.SeedSequence(self._seed, spawn_key=(key, depth), pool_size=_POOL)
            width, first, second = high - low, half - low, high - half
            spread = math.sqrt(first * second / width)
            below = left * (first / width) + self._normal(int(place.generate_state(4)[0])) * spread
            if time >= half:
                done, left, low, key = done + below, left - below, half, 2 * key + 1
            else:
                left, high, key = below, half, 2 * key
            depth += 1
        return done if time <= low else done + left
