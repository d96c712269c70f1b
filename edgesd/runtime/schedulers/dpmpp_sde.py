"""DPM-Solver++ for the SDE with a midpoint (k-diffusion's sample_dpmpp_sde)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
import numpy as np

from edgesd.runtime.arrays import Array
from edgesd.runtime.schedulers import schedule
from edgesd.runtime.schedulers.base import Asked, Noise, read_config
from edgesd.runtime.schedulers.brownian import BrownianPath
from edgesd.runtime.schedulers.exploding import SpreadConfig, SpreadScheduler
from edgesd.runtime.schedulers.heun import doubled
from edgesd.runtime.schedulers.schedule import F32, F64


class DPMSolverSDEConfig(SpreadConfig, frozen=True, kw_only=True):
    """diffusers' DPMSolverSDEScheduler."""

    beta_start: float = 0.00085
    beta_end: float = 0.012
    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon"
    noise_sampler_seed: Annotated[int, msgspec.Meta(ge=0)] | None = None


class _Half(NamedTuple):
    """A step, or its first half: sigma of the network's input; the weights of sample, x_0 and
    noise; between which sigmas the noise lies."""

    sigma: float
    sample: float
    x0: float
    noise: float
    between: tuple[float, float] | None


class DPMSolverSDE(SpreadScheduler):
    """Each step but the last, which is Euler's, runs the network twice: at the step's start, and
    in the middle of it in log sigma. Both go down to sigma_down and back up to sigma_next, as
    ancestral steps do,

        x_next = (down / sigma) x + (1 - down / sigma) x_0 + up z

    with the second x_0 in the whole step. The noise z of both halves is of one Brownian motion in
    sigma (BrownianPath), of the option noise_sampler_seed or else of the image's own seed, where
    diffusers takes a random one. The noise depends on the last bit of sigma, logarithms and
    exponentials, which torch rounds in another way on other processors: edgesd's noise is the same
    on all boards, and diffusers' where torch rounds correctly.
    """

    name = "dpmpp-sde"
    diffusers_class = "DPMSolverSDEScheduler"
    order = 2
    exact = False
    _limits_karras = False

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = c = read_config(DPMSolverSDEConfig, config, self.name)
        self._prepare_spread(c)

    def _lay_out(self, asked: Asked) -> int:
        """At most num_train_timesteps steps."""
        timesteps, sigmas = self._levels(asked)
        middles = np.exp((np.log(sigmas[:-1]) + np.log(sigmas[1:])) / 2)
        values = self._use_sigmas(np.append(doubled(sigmas), 0).astype(np.float32))
        self.timesteps = doubled(timesteps)
        self.timesteps[1::2] = schedule.fractional_timesteps(middles, self._train_sigmas)
        self._range = min(value for value in values if value > 0), max(values)
        self._halves = []
        for i in range(0, len(values) - 2, 2):
            self._halves += _step(np.float32(values[i]), np.float32(values[i + 1]))
        self._halves.append(_Half(values[-2], 0.0, 1.0, 0.0, None))
        for half in self._halves:
            schedule.check_finite(asked.steps, *half[1:4])
        self._divisors = [math.sqrt(half.sigma * half.sigma + 1.0) for half in self._halves]
        return asked.steps

    def _levels(self, asked: Asked) -> tuple[F32, F64]:
        """Here timesteps keep their fractions until the sigmas are known."""
        timesteps = self._spaced(asked)
        return self._spread(asked, timesteps, self._interpolated(timesteps))

    def begin(self, first: int = 0) -> None:
        self._start: F32 | None = None
        """The sample that the second half of a step starts from, too."""
        self._paths: list[BrownianPath] = []

    def step(self, model_output: Array, i: int, sample: F32, noise: Noise) -> F32:
        half = self._halves[i]
        weights = schedule.exploding_x0_weights(self.config.prediction_type, half.sigma)
        x0 = schedule.combine(weights[0], sample, weights[1], model_output)
        start = sample if self._start is None else self._start
        result = schedule.combine(half.sample, start, half.x0, x0)
        if half.between is not None:
            self._start = sample.copy() if self._start is None else None
            low, high = half.between
            result += self._noise(sample.shape, noise, low, high) * np.float32(half.noise)
        return result

    def _noise(self, shape: tuple[int, ...], noise: Noise, low: float, high: float) -> F32:
        """Standard normal noise [B, ...] of the motion between two sigmas."""
        if not self._paths:
            seeds, own = noise.seeds, self.config.noise_sampler_seed
            each = shape if len(seeds) == 1 else (1, *shape[1:])
            self._paths = [
                BrownianPath(seed if own is None else own, each, *self._range) for seed in seeds
            ]
        moved = np.concatenate([path.increment(low, high) for path in self._paths])
        # The motion is that of falling sigma.
        return np.asarray(moved / np.float32(-math.sqrt(high - low)))


def _step(sigma: np.float32, target: np.float32) -> list[_Half]:
    """Both halves of a step. In float32, as in diffusers: the noise's place depends on it."""
    t, t_next = -_log(sigma), -_log(target)
    middle = np.float32(t + (t_next - t) * np.float32(0.5))
    start = _exp(-t)
    found = []
    for at, end in ((sigma, _exp(-middle)), (_exp(-middle), _exp(-t_next))):
        square = end * end
        up = min(end, np.sqrt(square * (start * start - square) / (start * start)))
        down = np.sqrt(square - up * up)
        down_t = -_log(down)
        x0 = -math.expm1(float(t - down_t))
        between = (float(end), float(start))
        found.append(_Half(float(at), float(_exp(-down_t) / start), x0, float(up), between))
    return found


def _log(x: np.float32) -> np.float32:
    found: np.float32 = np.float32(math.log(x) if x > 0 else -math.inf)
    return found


def _exp(x: np.float32) -> np.float32:
    found: np.float32 = np.float32(math.exp(x))
    return found
