"""What every sampler offers, and how a diffusers scheduler_config.json is read."""

from __future__ import annotations

import re
import typing
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Protocol, TypeVar

import msgspec
import numpy as np

from edgesd.errors import InputError, UsageError
from edgesd.runtime.arrays import Array
from edgesd.runtime.schedulers.schedule import (
    F32,
    I64,
    BetaSchedule,
    alphas_cumprod,
    combine,
    x0_limiter,
)


class Noise(Protocol):
    """shape -> standard normal float32 values of that shape; TorchNoise and BatchNoise are such.
    seeds: of its generators, one for each image or one for all."""

    @property
    def seeds(self) -> tuple[int, ...]: ...

    def __call__(self, shape: tuple[int, ...], /) -> F32: ...


@dataclass(frozen=True)
class Asked:
    """What a schedule is laid out for; see Scheduler.set_timesteps. steps: not to be read where
    there is a list of sigmas."""

    steps: int
    image_seq_len: int | None = None
    timesteps: tuple[int, ...] | None = None
    sigmas: tuple[float, ...] | None = None
    strength: float = 1.0
    even_sigmas: bool = False


class Scheduler(ABC):
    """A sampler: turns noise into latents along the timesteps, one model output at a time.

    timesteps [n]: as handed to the network, descending, int64 or float32 as in diffusers: an entry
    for each run of the network. init_noise_sigma: initial latents are noise * init_noise_sigma.
    order: runs of the network for each step that is asked for, but the last, as in diffusers.
    """

    name: ClassVar[str]
    diffusers_class: ClassVar[str]
    process: ClassVar[str] = "diffusion"
    """Which process the model was trained on; samplers of others don't fit it."""
    order: ClassVar[int] = 1
    takes: ClassVar[frozenset[str]] = frozenset()
    """Which of `timesteps` and `sigmas` may be given as a list."""
    exact: ClassVar[bool] = True
    """Whether diffusers' samples are the same on all machines, up to rounding."""
    spreads: ClassVar[bool] = False
    """Whether it has options that spread its noise levels (sigmas.SPREADS)."""
    draws_by_eta: ClassVar[bool] = False
    """Whether it has an `eta`."""
    narrows: ClassVar[bool] = False
    """Whether diffusers has a pipeline that places all its steps within a strength."""

    timesteps: F32 | I64
    init_noise_sigma: float = 1.0
    eta: float = 0.0
    """How much of the noise is drawn anew at each step, 0 to 1; to be set before set_timesteps."""
    num_inference_steps: int = 0
    """Steps that the timesteps were last laid out for."""
    strength: float = 1.0
    """How much of the schedule they lie within."""

    def set_timesteps(
        self,
        num_inference_steps: int = 0,
        *,
        image_seq_len: int | None = None,
        timesteps: Sequence[int] | None = None,
        sigmas: Sequence[float] | None = None,
        strength: float = 1.0,
        even_sigmas: bool = False,
    ) -> None:
        """Lay out the timesteps and forget everything about earlier steps.

        image_seq_len: number of latent patches of the image; only a flow-matching schedule
        with dynamic shifting reads it. timesteps, sigmas: descending, where a model was distilled
        for those; num_inference_steps isn't read then. strength: of a sampler that `narrows`, how
        much of the schedule the steps lie within, above 0 to 1. even_sigmas: see SchedulerSpec;
        only a flow-matching schedule reads it. `self.timesteps` can be longer than
        `num_inference_steps`. Raises UsageError for a number of steps, or a list, that this
        schedule can't make or take.
        """
        for option, values in (("timesteps", timesteps), ("sigmas", sigmas)):
            if values is not None and option not in self.takes:
                raise UsageError(
                    f"scheduler {self.name} takes no list of {option}: leave it out, or choose "
                    "another --scheduler"
                )
        if timesteps is not None and sigmas is not None:
            raise UsageError("expected a list of timesteps or one of sigmas, not both")
        asked = Asked(
            num_inference_steps if timesteps is None else len(timesteps),
            image_seq_len,
            None if timesteps is None else tuple(timesteps),
            None if sigmas is None else tuple(sigmas),
            strength,
            even_sigmas,
        )
        self.strength = strength
        self.num_inference_steps = self._lay_out(asked)
        self.begin()

    @abstractmethod
    def _lay_out(self, asked: Asked) -> int:
        """Set `timesteps` and what follows from them; the number of steps."""

    def begin(self, first: int = 0) -> None:  # noqa: B027 - most samplers remember nothing
        """Forget what earlier loops left; the next step is the one of index `first`.

        To be called before each loop.
        """

    @abstractmethod
    def noise_level(self, i: int) -> tuple[float, float]:
        """(a, b) such that the sample before step i is a x_0 + b noise."""

    def add_noise(self, x0: F32, noise: F32, i: int) -> F32:
        """x0 [B, ...] made as noisy as the sample before step i is, by standard normal noise of the
        same shape; a new array. Behind the last step, where diffusers' pipelines add none, x0."""
        if i == len(self.timesteps):
            return np.array(x0)
        signal, spread = self.noise_level(i)
        return combine(signal, x0, spread, noise)

    def scale_model_input(self, sample: F32, i: int, out: Array | None = None) -> Array:
        """sample [B, ...] as the network wants it at step i; into `out` if given.

        Without `out` the result may be `sample` itself.
        """
        if out is None:
            return sample
        np.copyto(out, sample)
        return out

    @abstractmethod
    def step(self, model_output: Array, i: int, sample: F32, noise: Noise) -> F32:
        """sample [B, ...] after step i, as a new float32 array.

        model_output (float32, or float16 of a reduced engine), sample (float32): same shape;
        neither is changed or kept by reference.
        noise: called only by a stochastic sampler, once, exactly when diffusers draws. Steps
        go on by one from where the loop began.
        """


TrainTimesteps = Annotated[int, msgspec.Meta(le=100_000)]
"""Tables of so many values are made of it; diffusers' models have 1000."""


class BetaConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Options of every scheduler of a discrete diffusion process, with diffusers' defaults."""

    num_train_timesteps: TrainTimesteps = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: BetaSchedule = "linear"
    trained_betas: tuple[float, ...] | None = None
    steps_offset: int = 0

    def table(self, *, zero_snr: bool = False, floor: float = 0.0) -> F32:
        """alphas_cumprod [num_train_timesteps]; see `schedule.alphas_cumprod`."""
        return alphas_cumprod(
            self.num_train_timesteps,
            self.beta_schedule,
            self.beta_start,
            self.beta_end,
            self.trained_betas,
            zero_snr,
            floor,
        )


class LimitConfig(BetaConfig, frozen=True, kw_only=True):
    """Options that limit a predicted x_0."""

    thresholding: bool = False
    dynamic_thresholding_ratio: float = 0.995
    sample_max_value: float = 1.0


class ClipConfig(LimitConfig, frozen=True, kw_only=True):
    """Options that limit or clip it."""

    clip_sample: bool = True
    clip_sample_range: float = 1.0

    def limiter(self) -> Callable[[F32], F32] | None:
        """See `schedule.x0_limiter`."""
        return x0_limiter(
            self.thresholding,
            self.dynamic_thresholding_ratio,
            self.sample_max_value,
            self.clip_sample,
            self.clip_sample_range,
        )


C = TypeVar("C", bound=msgspec.Struct)


def read_config(as_type: type[C], config: Mapping[str, Any], scheduler: str) -> C:
    """The options that this sampler has; as diffusers' from_config, others are ignored, missing
    ones (and those listed under `_use_default_values`) take this sampler's defaults.

    Raises InputError naming the option, its value and the valid ones.
    """
    listed = config.get("_use_default_values")
    skip = {key for key in listed if isinstance(key, str)} if isinstance(listed, list) else set()
    given = {key: value for key, value in config.items() if key not in skip}
    fields = typing.get_type_hints(as_type)
    for key, kind in fields.items():
        # null stands for "off" in older files, and for -Infinity, which JSON can't write.
        if given.get(key, ...) is None and type(None) not in typing.get_args(kind):
            del given[key]
    try:
        return msgspec.convert(given, as_type)
    except msgspec.ValidationError as exc:
        match = re.search(r"\$\.(\w+)", str(exc))
        key = match.group(1) if match else ""
        valid = [repr(value) for value in typing.get_args(fields.get(key)) if value is not None]
        if typing.get_origin(fields.get(key)) is typing.Literal:
            expected = "expected " + ", ".join(valid)
        else:
            expected = str(exc).split(" - at ")[0]
        raise InputError(refusal(scheduler, key, given.get(key), expected)) from exc


def refusal(scheduler: str, option: str, value: object, expected: str) -> str:
    """One line for an option of scheduler_config.json that can't be honoured."""
    shown = repr(value)
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    return f"scheduler {scheduler} doesn't support {option} = {shown}: {expected}"
