"""Gaussian noise equal to torch's CPU generator, from numpy alone and the same on every board.

torch.randn draws from a Mersenne Twister (MT19937) and applies the Box-Muller transform
(Box, Muller: A Note on the Generation of Random Normal Deviates, 1958):

    z1 = sqrt(-2 ln u1) cos(2 pi u2),  z2 = sqrt(-2 ln u1) sin(2 pi u2)

in one of two ways (ATen/native/cpu/DistributionTemplates.h, normal_fill and
normal_distribution): float32 in blocks of 16 for 16 values and more, double with the second
value kept for later below that. Both are followed here.

Logarithm, sine and cosine of numpy and of C libraries differ in the last bit between machines
and versions. They are written here with float64 additions, multiplications and divisions in a
fixed order, one ufunc each, so that IEEE 754 alone decides every bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edgesd.errors import UsageError

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

_LN2_HI = float.fromhex("0x1.62e42feep-1")  # 32 bits, so that an exponent times it is exact
_LN2_LO = float.fromhex("0x1.a39ef35793c76p-33")
_SQRT_HALF = float.fromhex("0x1.6a09e667f3bcdp-1")
_HALF_PI_HI = float.fromhex("0x1.921fb544p+0")  # 33 bits, so that a quadrant times it is exact
_HALF_PI_LO = float.fromhex("0x1.0b4611a626331p-34")
_TWO_OVER_PI = float.fromhex("0x1.45f306dc9c883p-1")
_TWO_PI = float.fromhex("0x1.921fb54442d18p+2")
_TWO_PI_F32 = np.float32(_TWO_PI)

# Taylor coefficients, highest power first; the error on the reduced range is below 2**-56.
_ATANH = tuple(1.0 / (2 * k + 1) for k in range(12, 0, -1))
_SIN = tuple((-1.0) ** k / math.factorial(2 * k + 1) for k in range(9, 0, -1))
_COS = tuple((-1.0) ** k / math.factorial(2 * k) for k in range(9, 0, -1))

_BLOCK = 16  # values per Box-Muller block of torch's vectorised path
_HALF = _BLOCK // 2
_AHEAD = 1 << 14  # values made ahead at most: 64 KB


def _horner(x: F64, coefficients: tuple[float, ...]) -> F64:
    """x * (c[-1] + x * (c[-2] + ...)): a polynomial without its constant term, same shape as x."""
    total = x * coefficients[0]
    for c in coefficients[1:]:
        total += c
        total *= x
    return total


def log(x: F64) -> F64:
    """Natural logarithm of positive, normal numbers, same shape, error below 2**-51 relative.

    x = 2**e * m with m in [sqrt(1/2), sqrt(2)); ln m = 2 atanh(s), s = (m - 1) / (m + 1)
    (Abramowitz and Stegun, Handbook of Mathematical Functions, 4.1.27).
    """
    m, e = np.frexp(x)
    small = m < _SQRT_HALF
    m = np.where(small, m + m, m)
    e = e - small
    s = (m - 1.0) / (m + 1.0)
    series = _horner(s * s, _ATANH)
    series *= s
    series += s
    series += series
    series += e * _LN2_LO
    series += e * _LN2_HI
    return series


def sincos(x: F64) -> tuple[F64, F64]:
    """Sine and cosine of angles of a few turns in radians, same shape, error below 2**-52.

    Cody and Waite reduction to |r| <= pi/4 and quadrant q, then Taylor series; a quarter turn
    swaps the two and signs follow from q.
    """
    q = np.rint(x * _TWO_OVER_PI)
    r = x - q * _HALF_PI_HI
    r -= q * _HALF_PI_LO
    square = r * r
    sine = _horner(square, _SIN)
    sine *= r
    sine += r
    cosine = _horner(square, _COS)
    cosine += 1.0
    quadrant = q.astype(np.int64) & 3
    odd = (quadrant & 1) == 1
    sin_x = np.where(odd, cosine, sine)
    cos_x = np.where(odd, sine, cosine)
    return (
        np.where(quadrant >= 2, -sin_x, sin_x),
        np.where((quadrant == 1) | (quadrant == 2), -cos_x, cos_x),
    )


class TorchNoise:
    """A torch.Generator on the CPU: successive `normal` calls give what torch.randn would.

    seed: 0 .. 2**64 - 1; as in torch only its low 32 bits count. Raises UsageError for others.
    """

    def __init__(self, seed: int) -> None:
        if not 0 <= seed < 2**64:
            raise UsageError(f"seed {seed} is out of range: expected 0 to 18446744073709551615")
        self.seeds = (seed,)
        # RandomState seeds MT19937 with init_genrand, as torch does, and its stream is frozen
        # by numpy's NEP 19.
        self._state = np.random.RandomState(seed & 0xFFFFFFFF)
        self._kept: float | None = None
        # Words of the stream not yet used, and the values of the first blocks of them.
        self._words = np.empty(0, np.uint32)
        self._ready = np.empty(0, np.float32)
        self._draws = 0

    def __call__(self, shape: tuple[int, ...]) -> F32:
        """The same as `normal`, so that the object itself serves as a scheduler's noise."""
        return self.normal(shape)

    def normal(self, shape: tuple[int, ...]) -> F32:
        """Standard normal values [*shape], within 2e-6 of torch.randn(shape, generator=...)."""
        count = math.prod(shape)
        values = self._blocks(count) if count >= _BLOCK else self._pairs(count)
        return values.reshape(shape)

    def _raw(self, count: int) -> NDArray[np.uint32]:
        """The next `count` words of the generator."""
        self._fill(count)
        words, self._words = self._words[:count], self._words[count:]
        self._ready = self._ready[:0]
        return words

    def _fill(self, count: int) -> None:
        """Make at least `count` words available."""
        missing = count - len(self._words)
        if missing > 0:
            new = self._state.randint(0, 2**32, size=missing, dtype=np.uint32)
            self._words = np.concatenate([self._words, new])

    def _whole_blocks(self, count: int) -> F32:
        """`count` values, a multiple of 16. From the second draw on, later ones are made with it:
        a sampler that draws at each step pays for some 100 numpy calls once in a while only."""
        if len(self._ready) < count:
            ahead = max(count, min(8 * count, _AHEAD)) if self._draws else count
            self._fill(ahead)
            self._ready = _box_muller(_uniform(self._words[:ahead]))
        self._draws += 1
        values: F32 = self._ready[:count].copy()
        self._ready, self._words = self._ready[count:], self._words[count:]
        return values

    def _blocks(self, count: int) -> F32:
        """`count` >= 16 values; where 16 doesn't divide count the last 16 are drawn again."""
        tail = count % _BLOCK
        if not tail:
            return self._whole_blocks(count)
        uniform = _uniform(self._raw(count + _BLOCK))
        values = np.empty(count, np.float32)
        values[: count - tail] = _box_muller(uniform[: count - tail])
        values[count - _BLOCK :] = _box_muller(uniform[count:])
        return values

    def _pairs(self, count: int) -> F32:
        """`count` < 16 values, one pair at a time; an odd value out waits for the next call."""
        values = np.empty(count, np.float32)
        for i in range(count):
            if self._kept is not None:
                values[i], self._kept = self._kept, None
                continue
            words = [int(word) for word in self._raw(4)]
            u1, u2 = (
                float(((words[k] << 32) | words[k + 1]) & (2**53 - 1)) * 2.0**-53 for k in (0, 2)
            )
            radius = math.sqrt(-2.0 * float(log(np.array([1.0 - u2]))[0]))
            sine, cosine = sincos(np.array([_TWO_PI * u1]))
            values[i] = radius * float(cosine[0])
            self._kept = radius * float(sine[0])
        return values


def _uniform(words: NDArray[np.uint32]) -> F32:
    """Multiples of 2**-24 in [0, 1), exact in float32; same shape."""
    uniform: F32 = (words & np.uint32(0xFFFFFF)).astype(np.float32) * np.float32(2.0**-24)
    return uniform


def _box_muller(uniform: F32) -> F32:
    """uniform [n * 16] in [0, 1) -> normal [n * 16]: of each block the first 8 give the radius
    and the last 8 the angle; cosines fill the first 8, sines the last 8.

    Rounded to float32 where torch's vectorised path rounds.
    """
    blocks = uniform.reshape(-1, _BLOCK)
    u1 = np.float32(1.0) - blocks[:, :_HALF]
    theta = blocks[:, _HALF:] * _TWO_PI_F32
    radius = np.sqrt(np.float32(-2.0) * log(u1.astype(np.float64)).astype(np.float32))
    sine, cosine = sincos(theta.astype(np.float64))
    values = np.empty_like(blocks)
    np.multiply(radius, cosine.astype(np.float32), out=values[:, :_HALF])
    np.multiply(radius, sine.astype(np.float32), out=values[:, _HALF:])
    return values.reshape(-1)


class BatchNoise:
    """One generator per image, as diffusers' randn_tensor with a list of generators.

    seeds: of image 0, 1, ...; `image_seeds` makes the usual list. Image k of a batch is then the
    same whatever the batch size. Raises UsageError when empty or a seed is out of range.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        if not seeds:
            raise UsageError("no seed was given: expected one for each image of the batch")
        self._generators = tuple(TorchNoise(seed) for seed in seeds)
        self.seeds = tuple(seeds)

    def __call__(self, shape: tuple[int, ...]) -> F32:
        """The same as `normal`: serves as a scheduler's noise."""
        return self.normal(shape)

    def normal(self, shape: tuple[int, ...]) -> F32:
        """Standard normal values [B, ...]: image k is its generator's next draw of [1, ...].

        Raises UsageError when B isn't the number of seeds.
        """
        if len(shape) == 0 or shape[0] != len(self._generators):
            raise UsageError(
                f"noise of shape {shape} was asked for {len(self._generators)} seeds: "
                "expected one seed for each image of the batch"
            )
        values = np.empty(shape, np.float32)
        for image, generator in zip(values, self._generators, strict=True):
            image[...] = generator.normal(shape[1:])
        return values


def image_seeds(seed: int, batch: int) -> tuple[int, ...]:
    """The seeds of `batch` images: seed, seed + 1, ... wrapping after 2**64 - 1."""
    return tuple((seed + k) % 2**64 for k in range(batch))
