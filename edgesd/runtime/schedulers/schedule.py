"""Schedule maths that the samplers share: betas, timestep spacing, sigmas, predictions.

Symbols, all dimensionless: beta_t is the variance of the noise added at training timestep t;
alphas_cumprod_t = prod_{s<=t} (1 - beta_s) (Ho et al., Denoising Diffusion Probabilistic
Models, eq. 4). Variance preserving samplers use the pair alpha = sqrt(alphas_cumprod), sigma =
sqrt(1 - alphas_cumprod); variance exploding ones the single sigma = sqrt((1 - alphas_cumprod)
/ alphas_cumprod) (Karras et al., Elucidating the Design Space of Diffusion-Based Generative
Models, table 1). Tables are rounded to float32 where diffusers rounds, so that both start from
the same numbers; what follows from them is float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from edgesd.errors import InputError, UsageError
from edgesd.runtime.arrays import Array

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
I64 = NDArray[np.int64]

BetaSchedule = Literal["linear", "scaled_linear", "squaredcos_cap_v2"]
AnyBetaSchedule = Literal[
    "linear", "scaled_linear", "squaredcos_cap_v2", "exp", "laplace", "sigmoid"
]
Spacing = Literal["leading", "trailing", "linspace"]
Prediction = Literal["epsilon", "v_prediction", "sample"]
FinalSigma = Literal["zero", "sigma_min"]

ZERO_SNR_FLOOR = 2.0**-24
"""What diffusers puts in place of an alphas_cumprod of zero, so that sigma stays finite (4096)."""


def check_steps(num_inference_steps: int, limit: int, reason: str = "training timesteps") -> None:
    """Raise UsageError unless 1 <= num_inference_steps <= limit."""
    if not 1 <= num_inference_steps <= limit:
        raise UsageError(
            f"num_inference_steps is {num_inference_steps}: expected 1 to {limit}, "
            f"the number of {reason}"
        )


def steps_within(steps: int, strength: float) -> int:
    """How many of so many steps are taken at a strength, above 0 to 1. Raises UsageError for none.

    As in diffusers' pipelines, the product is rounded down.
    """
    found = min(int(steps * strength), steps)
    if found < 1:
        raise UsageError(
            f"strength {strength:g} leaves no step of {steps}: take more --steps, or a --strength "
            f"of {math.ceil(1000 / steps) / 1000:g} or more"
        )
    return found


def check_timesteps(timesteps: tuple[int, ...], limit: int) -> I64:
    """A list of timesteps from outside [n]. Raises UsageError unless there are 1 to `limit`, whole
    and descending from below `limit` to 0 or more."""
    check_steps(len(timesteps), limit)
    whole = all(t % 1 == 0 for t in timesteps)
    down = all(a > b for a, b in pairwise(timesteps))
    if not (whole and down and timesteps[-1] >= 0 and timesteps[0] < limit):
        shown = ", ".join(f"{t:g}" for t in timesteps[:6])
        raise UsageError(
            f"timesteps {shown}{', ...' if len(timesteps) > 6 else ''}: expected whole numbers "
            f"that descend, from below {limit} to 0 or more"
        )
    return np.array(timesteps, np.int64)


def check_sigmas(sigmas: tuple[float, ...], limit: int) -> F32:
    """A list of noise levels from outside [n + 1], the last of which is the image's. Raises
    UsageError unless it is of 2 to `limit` + 1 that descend to 0 or more."""
    check_steps(len(sigmas) - 1, limit)
    values = np.array(sigmas, np.float32)
    if not (np.isfinite(values).all() and (np.diff(values) < 0).all() and values[-1] >= 0):
        shown = ", ".join(f"{sigma:g}" for sigma in sigmas[:6])
        raise UsageError(
            f"sigmas {shown}{', ...' if len(sigmas) > 6 else ''}: expected numbers that descend to "
            "0 or more, one more than there are steps"
        )
    return values


def _linspace(start: float, end: float, count: int) -> F32:
    """torch.linspace in float32, bit for bit: from both ends to the middle, each value with one
    rounding of start + i * step. Products of two float32 are exact in float64."""
    first, last = np.float32(start), np.float32(end)
    if count == 1:
        return np.array([first])
    step = float(np.float32((last - first) / np.float32(count - 1)))
    i = np.arange(count)
    up = (float(first) + step * i).astype(np.float32)
    down = (float(last) - step * (count - 1 - i)).astype(np.float32)
    return np.where(i < count // 2, up, down)


def _cosine(t: float) -> float:
    """Nichol and Dhariwal, Improved Denoising Diffusion Probabilistic Models, eq. 17."""
    return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2


def _exponential(t: float) -> float:
    return math.exp(t * -12.0)


def _laplace(t: float) -> float:
    """Hang et al., Improved Noise Schedule for Diffusion Training, table 1, as diffusers has it."""
    snr = math.exp(-0.5 * math.copysign(1, 0.5 - t) * math.log(1 - 2 * abs(0.5 - t) + 1e-6))
    return math.sqrt(snr / (1 + snr))


_ALPHA_BARS = {"squaredcos_cap_v2": _cosine, "exp": _exponential, "laplace": _laplace}
"""alphas_cumprod at the share t in [0, 1] of the training timesteps."""


def _betas_for(alpha_bar: Callable[[float], float], count: int) -> F32:
    """beta [count] of a function for alphas_cumprod."""
    betas = [1 - alpha_bar((i + 1) / count) / alpha_bar(i / count) for i in range(count)]
    return np.minimum(betas, 0.999).astype(np.float32)


def _rescale_to_zero_snr(betas: F32) -> F32:
    """Betas [T] whose last step has no signal left (Lin et al., Common Diffusion Noise Schedules
    and Sample Steps are Flawed, algorithm 1)."""
    root = np.sqrt(_cumprod(np.float32(1.0) - betas))
    first, last = root[0], root[-1]
    root = (root - last) * (first / (first - last))
    bar = root * root
    alphas = np.concatenate([bar[:1], bar[1:] / bar[:-1]])
    return np.asarray(np.float32(1.0) - alphas, np.float32)


def _cumprod(values: F32) -> F32:
    """torch.cumprod on the CPU: accumulated in float64, rounded to float32; same shape."""
    return np.cumprod(values, dtype=np.float64).astype(np.float32)


def alphas_cumprod(
    count: int,
    schedule: AnyBetaSchedule,
    beta_start: float,
    beta_end: float,
    trained_betas: tuple[float, ...] | None,
    rescale_to_zero_snr: bool = False,
    floor: float = 0.0,
) -> F32:
    """alphas_cumprod [count] by training timestep, in [0, 1), descending.

    floor: replaces the last one when `rescale_to_zero_snr` made it zero. Raises InputError when
    a beta isn't inside (0, 1) or their number isn't `count`.
    """
    if count < 1:
        raise InputError(f"scheduler option num_train_timesteps is {count}: expected 1 or more")
    if trained_betas is not None:
        betas = np.asarray(trained_betas, np.float32)
        if len(betas) != count:
            raise InputError(
                f"scheduler option trained_betas has {len(betas)} values: expected {count}, "
                "as num_train_timesteps says"
            )
    elif schedule in _ALPHA_BARS:
        betas = _betas_for(_ALPHA_BARS[schedule], count)
    else:
        if not 0 < beta_start <= beta_end < 1:
            raise InputError(
                f"scheduler options beta_start {beta_start} and beta_end {beta_end}: "
                "expected 0 < beta_start <= beta_end < 1"
            )
        if schedule == "linear":
            betas = _linspace(beta_start, beta_end, count)
        elif schedule == "sigmoid":
            share = np.float32(1.0) / (np.float32(1.0) + np.exp(-_linspace(-6, 6, count)))
            betas = share * np.float32(beta_end - beta_start) + np.float32(beta_start)
        else:
            betas = _linspace(beta_start**0.5, beta_end**0.5, count) ** 2
    if not (np.all(betas > 0) and np.all(betas < 1)):
        raise InputError("scheduler option trained_betas: expected every beta inside (0, 1)")
    if rescale_to_zero_snr:
        if count < 2:
            raise InputError(
                "scheduler option rescale_betas_zero_snr: expected 2 timesteps or more"
            )
        betas = _rescale_to_zero_snr(betas)
    table = _cumprod(np.float32(1.0) - betas)
    if rescale_to_zero_snr and floor > 0:
        table[-1] = floor
    return table


def spaced_timesteps(spacing: Spacing, train_steps: int, steps: int, offset: int) -> F64:
    """`steps` training timesteps, descending (one more: see `trailing_timesteps`); those of
    linspace are not rounded.

    Table 2 of Lin et al. (Common Diffusion Noise Schedules and Sample Steps are Flawed).
    """
    if spacing == "linspace":
        return np.linspace(0, train_steps - 1, steps)[::-1]
    if spacing == "leading":
        return np.arange(steps, dtype=np.float64)[::-1] * (train_steps // steps) + offset
    return trailing_timesteps(train_steps, train_steps / steps)


def trailing_timesteps(start: int, stride: float) -> F64:
    """Whole timesteps from start - 1 downwards.

    For some step counts (61 of 1000, say) a rounding error appends one of -1, in diffusers, too.
    """
    return np.round(np.arange(start, 0, -stride)) - 1


def alpha_at(table: F32, timestep: int) -> float:
    """alphas_cumprod at a training timestep; before the first, as diffusers' index has it, those
    at the table's end.

    Raises UsageError out of the table: steps_offset and the number of steps don't go together.
    """
    if not -len(table) <= timestep < len(table):
        raise UsageError(
            f"timestep {timestep} lies past the {len(table)} training timesteps because of "
            "steps_offset: use fewer num_inference_steps"
        )
    return float(table[timestep])


def alpha_before(table: F32, timestep: int, final: float) -> float:
    """alphas_cumprod at the timestep that a step leads to; `final` before the first."""
    return final if timestep < 0 else alpha_at(table, timestep)


def signal_and_noise(cumprod: float) -> tuple[float, float]:
    """(alpha, sigma) of x_t = alpha x_0 + sigma epsilon, variance preserving.

    Rounded to float32 as in diffusers: where little signal is left, x_0 amplifies the difference.
    """
    return float(np.float32(math.sqrt(cumprod))), float(np.float32(math.sqrt(1.0 - cumprod)))


def x0_weights(prediction: Prediction, alpha: float, sigma: float) -> tuple[float, float]:
    """(a, b) such that x_0 = a sample + b model_output, at signal alpha and noise sigma.

    epsilon: Song et al., Denoising Diffusion Implicit Models, eq. 9; v_prediction: Salimans and
    Ho, Progressive Distillation for Fast Sampling of Diffusion Models, appendix D. Raises
    InputError where epsilon says nothing about x_0 because no signal is left.
    """
    if prediction == "epsilon":
        if alpha == 0:
            raise InputError(
                "scheduler option prediction_type is 'epsilon' and rescale_betas_zero_snr leaves "
                "no signal at the first timestep: expected v_prediction or sample, or "
                "timestep_spacing 'leading'"
            )
        return 1.0 / alpha, -sigma / alpha
    if prediction == "sample":
        return 0.0, 1.0
    return alpha, -sigma


def epsilon_weights(prediction: Prediction, alpha: float, sigma: float) -> tuple[float, float]:
    """(a, b) such that epsilon = a sample + b model_output; sources as in `x0_weights`."""
    if prediction == "epsilon":
        return 0.0, 1.0
    if prediction == "sample":
        return 1.0 / sigma, -alpha / sigma
    return sigma, alpha


def exploding_x0_weights(prediction: Prediction, sigma: float) -> tuple[float, float]:
    """(a, b) such that x_0 = a sample + b model_output, for sample = x_0 + sigma epsilon.

    The model saw sample / sqrt(sigma**2 + 1); v_prediction as in Karras et al., table 1 with
    c_skip and c_out of sigma_data = 1.
    """
    if prediction == "epsilon":
        return 1.0, -sigma
    if prediction == "sample":
        return 0.0, 1.0
    scale = sigma * sigma + 1.0
    return 1.0 / scale, -sigma / math.sqrt(scale)


def combine(a: float, x: Array, b: float, y: Array) -> F32:
    """a x + b y as a new float32 array of the shape of x; float16 is widened first."""
    result: F32 = np.multiply(x, a, dtype=np.float32)
    result += np.multiply(y, b, dtype=np.float32)
    return result


def weighted(weight: float, sample: F32, weights: Sequence[float], arrays: Sequence[F32]) -> F32:
    """weight sample + sum of weights times arrays, of the same shape; a new array."""
    result: F32 = np.multiply(sample, weight, dtype=np.float32)
    for each, array in zip(weights, arrays, strict=True):
        result += np.multiply(array, each, dtype=np.float32)
    return result


def exploding_sigmas(table: F32) -> F32:
    """sigma [T] of each training timestep, ascending."""
    sigmas: F32 = np.sqrt((np.float32(1.0) - table) / table)
    # torch rounds this one root up, and 4096 magnifies a difference in the last bit.
    sigmas[table == np.float32(ZERO_SNR_FLOOR)] = 4096.0
    return sigmas


def fractional_timesteps(sigmas: F64, train_sigmas: F32) -> F64:
    """The training timesteps [n] at which sigma is `sigmas` [n], interpolated in log sigma."""
    table = np.log(train_sigmas)  # float32 to the divisor, as in diffusers, which truncates some
    wanted = np.log(np.maximum(sigmas, 1e-10))
    if len(table) < 2:
        return np.zeros_like(wanted)
    low = np.clip(np.searchsorted(table, wanted, side="right") - 1, 0, len(table) - 2)
    weight = (table[low].astype(np.float64) - wanted) / (table[low] - table[low + 1])
    weight = np.clip(weight, 0, 1)
    return np.asarray((1 - weight) * low + weight * (low + 1))


def check_finite(steps: int, *weights: float) -> None:
    """Raise UsageError when two steps of a schedule coincide and a weight came out as no number."""
    if not all(math.isfinite(weight) for weight in weights):
        raise UsageError(
            f"num_inference_steps is {steps}: two steps of this schedule fall on the same noise "
            "level; use fewer steps"
        )


def threshold(x0: F32, ratio: float, max_value: float) -> F32:
    """Dynamic thresholding of x_0 [B, ...] per image (Saharia et al., Photorealistic Text-to-Image
    Diffusion Models with Deep Language Understanding, section 2.3); new array, same shape."""
    flat = np.abs(x0.reshape(len(x0), -1))
    s = np.clip(np.quantile(flat, ratio, axis=1), 1.0, max(1.0, max_value))
    s = np.minimum(s, max_value).astype(np.float32).reshape(-1, *([1] * (x0.ndim - 1)))
    return np.asarray(np.clip(x0, -s, s) / s)


def x0_limiter(
    thresholding: bool,
    ratio: float,
    max_value: float,
    clip_sample: bool = False,
    clip_range: float = 1.0,
) -> Callable[[F32], F32] | None:
    """What is done to a predicted x_0, or None for nothing; thresholding goes before clipping."""
    if thresholding:
        if not 0 <= ratio <= 1:
            raise InputError(
                f"scheduler option dynamic_thresholding_ratio is {ratio}: expected 0 to 1"
            )
        return lambda x0: threshold(x0, ratio, max_value)
    if clip_sample:
        return lambda x0: np.clip(x0, -clip_range, clip_range, out=x0)
    return None
