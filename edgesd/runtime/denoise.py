"""The denoising loop. There is one: device, calibration, parity and evaluation all run it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from edgesd.errors import InputError
from edgesd.runtime.arrays import Array, Float
from edgesd.runtime.backends.base import Runner
from edgesd.runtime.conditioning import Conditioned, Encoded, joined, stacked
from edgesd.runtime.controls import (
    NO_CONTROLS,
    Controls,
    Shown,
    Sums,
    guess_weights,
    sum_shapes,
)
from edgesd.runtime.flow import GuidanceMode
from edgesd.runtime.schedulers import Scheduler
from edgesd.runtime.schedulers.base import Noise
from edgesd.spec.pipeline import (
    SIZE_FILLS,
    DenoiserSpec,
    Fill,
    InputSpec,
    SideSpec,
    Wiring,
)

Given = Mapping[Fill, Float]
"""What stays the same in all steps [B, ...]: by how an input is filled."""


@dataclass(frozen=True)
class Step:
    """The step just done (0-based), of how many, its wall time, latents."""

    index: int
    count: int
    seconds: float
    latents: Float


@dataclass(frozen=True)
class Start:
    """Where denoising starts, as a task prepares it.

    latents: [B, C, h, w], as noisy as `first_step` of the schedule expects. given: see Given.
    after_step: makes of a step's index in the schedule and its latents those that go on.
    last_step: the index of the first step that isn't taken; None where all are.
    """

    latents: Float
    first_step: int = 0
    given: Given = field(default_factory=dict)
    after_step: Callable[[int, Float], Float] | None = None
    last_step: int | None = None


def guidance_scale_embedding(guidance_scale: float, dim: int) -> Float:
    """Sinusoidal embedding [1, dim] of guidance_scale - 1, for UNets distilled with guidance.

    Latent Consistency Models (Luo et al. 2023, arXiv 2310.04378, sec. 4.2), after the timestep
    embedding of Imagen's reference code (vdm, model_vdm.py).
    """
    half = dim // 2
    frequency = np.exp(np.arange(half, dtype=np.float32) * -(np.log(10000.0) / (half - 1)))
    angle = np.float32((guidance_scale - 1) * 1000) * frequency[None].astype(np.float32)
    out = np.concatenate([np.sin(angle), np.cos(angle)], axis=1)
    return np.pad(out, ((0, 0), (0, dim % 2))).astype(np.float32)


def denoise(
    wiring: Wiring,
    runners: Mapping[str, Runner],
    scheduler: Scheduler,
    start: Start,
    conditioned: Conditioned,
    guidance_scale: float,
    noise: Noise,
    mode: GuidanceMode = "batched",
    on_step: Callable[[Step], None] | None = None,
    guidance_rescale: float = 0.0,
    controls: Controls = NO_CONTROLS,
    modulation: Float | None = None,
    true_cfg_scale: float = 1.0,
) -> Float:
    """Take `start` to an image's latents [B, C, h, w].

    runners: by component, of the denoiser and of the sides that run at each step, which `wiring`
    joins; of the latter, those that `controls` has. scheduler: `set_timesteps` has been called.
    noise: draws for stochastic schedulers. Guidance, when `conditioned.negative` is given: both
    halves in one run of batch 2 B ("batched"), or one after the other ("sequential", less memory).
    guidance_scale, guidance_rescale: see `_guided`; where `wiring` has guidance as an input,
    true_cfg_scale is the scale there. modulation [steps, halves, B, D]: what the
    wiring's modulation made (`modulated`), for each step that is taken. Raises InputError when the
    latents stop being finite.
    """
    latents, batch, channels = start.latents, len(start.latents), start.latents.shape[1]
    halves = [conditioned.positive]
    if conditioned.negative is not None:
        halves.insert(0, conditioned.negative)
    guided, scale = len(halves) == 2, guidance_scale if wiring.cfg else true_cfg_scale
    runs = [halves] if mode == "batched" else [[half] for half in halves]
    given, denoiser = start.given, wiring.denoiser
    network = _network(
        runners[denoiser.component], denoiser, runs, batch, given, guidance_scale, None
    )
    behind = [given[fill] for fill in denoiser.concat]
    sample = np.concatenate([np.concatenate([latents, *behind], axis=1)] * len(runs[0]))
    sample_halves = sample.reshape(len(runs[0]), batch, *sample.shape[1:])
    timestep = np.zeros(1, np.float32)
    expected = (len(sample), *latents.shape[1:])
    sides = _Sides(wiring, runners, runs, batch, given, guidance_scale, controls)
    spec = runners[denoiser.component].spec
    shapes = sum_shapes(wiring, spec, len(sample), *latents.shape[2:])
    told: dict[str, Array] = {"timestep": timestep}
    rows: Array = np.zeros(0, np.float32)  # [steps, runs, rows, D]
    if modulation is not None:
        rows = modulation.reshape(len(modulation), len(runs), len(sample), -1)
        told["modulation"] = rows[0, 0]
    bound = {name: values.shape for name, values in told.items()}
    inputs = network.bind({**bound, "sample": sample.shape, **shapes})
    sums = Sums(wiring, {name: inputs[name] for name in shapes})

    def predict(run: int) -> Array:
        if modulation is not None:
            told["modulation"] = rows[index, run]
        values: dict[str, Array] = {**told, "sample": sample[:, :channels]}
        sums.clear()
        for one in controls.shown:
            if one.acts(index, len(scheduler.timesteps) - start.first_step, count):
                sides.add(one, run, values, sums)
        found = network.run(run, {**values, "sample": sample, **sums.arrays})[denoiser.output]
        if found.shape != expected:
            raise InputError(
                f"{denoiser.component} makes {denoiser.output} of the shape {list(found.shape)} "
                f"from latents of {list(expected)}: build the bundle again"
            )
        return found

    prediction, negative = np.empty_like(latents), np.empty_like(latents)
    count = len(scheduler.timesteps[start.first_step : start.last_step])
    scheduler.begin(start.first_step)
    for index in range(count):
        began, at = time.perf_counter(), start.first_step + index
        scheduler.scale_model_input(latents, at, out=sample_halves[0, :, :channels])
        sample_halves[1:, :, :channels] = sample_halves[0, :, :channels]
        timestep[0] = scheduler.timesteps[at]
        noise_pred = predict(0)
        if len(runs) == 2:
            negative[:] = noise_pred
            noise_pred = predict(1)
        if guided:
            low = negative if len(runs) == 2 else noise_pred[:batch]
            high = noise_pred[-batch:]
            noise_pred = _guided(low, high, scale, guidance_rescale, prediction)
        latents = scheduler.step(noise_pred, at, latents, noise)
        if start.after_step:
            latents = start.after_step(at, latents)
        if not math.isfinite(float(latents.sum())):
            raise InputError(
                f"the latents are no longer finite after step {index + 1} of {count}: try another "
                "--scheduler, a smaller --guidance, or a bundle of higher precision"
            )
        if on_step:
            on_step(Step(index, count, time.perf_counter() - began, latents))
    return latents


def _guided(negative: Array, positive: Array, scale: float, rescale: float, out: Float) -> Float:
    """Classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598, eq. 6, in diffusers' form):
    negative + scale * (positive - negative) [B, C, h, w], in `out`. rescale: see `_rescale`."""
    np.subtract(positive, negative, out=out)
    out *= np.float32(scale)
    out += negative
    if rescale > 0:
        _rescale(out, positive, rescale)
    return out


def _rescale(guided: Float, positive: Array, strength: float) -> None:
    """Bring a prediction under guidance [B, C, h, w] back to the deviation of its positive half, in
    place, by `strength` of the way.

    Lin et al. 2023, arXiv 2305.08891, eq. 15 and 16, with the deviation of samples, as diffusers
    has it.
    """
    axes = tuple(range(1, guided.ndim))
    deviations = (values.std(axes, ddof=1, keepdims=True) for values in (positive, guided))
    wanted, found = deviations
    guided *= np.float32(strength) * wanted / found + np.float32(1 - strength)


class _Network:
    """A component of the loop. fixed: for each run of a step, inputs that stay the same in all
    steps, by name. The others are found by how they are filled; sums, by their name."""

    def __init__(
        self, runner: Runner, spec: DenoiserSpec | SideSpec, fixed: Sequence[Mapping[str, Array]]
    ) -> None:
        self.component = spec.component
        self._runner, self._fixed = runner, fixed
        self._changing = {
            one.name: one.name if one.fill == "side" else one.fill
            for one in spec.inputs
            if one.name not in fixed[0]
        }
        self._filled: int | None = None
        """The run that the inputs are filled for."""

    def bind(self, shapes: Mapping[str, tuple[int, ...]]) -> Mapping[str, Array]:
        """The arrays that are run on, by input. shapes: of those that change, as in `run`."""
        changing = {name: shapes[key] for name, key in self._changing.items()}
        fixed = {name: array.shape for name, array in self._fixed[0].items()}
        self._runner.bind({**fixed, **changing})
        return self._runner.inputs

    def run(self, run: int, values: Mapping[str, Array]) -> Mapping[str, Array]:
        """Fill the inputs and run: all outputs. They stay as they are until the next run. An array
        that is run on itself was filled by the caller."""
        filled = {name: values[key] for name, key in self._changing.items()}
        if self._filled != run:
            filled |= self._fixed[run]
        if self._filled is None:
            self.bind({key: values[key].shape for key in self._changing.values()})
        for name, array in filled.items():
            if array.shape != self._runner.inputs[name].shape:
                raise InputError(
                    f"{self.component}: {name} gets the shape {list(array.shape)} after others: "
                    "build the bundle again"
                )
            if array is not self._runner.inputs[name]:
                self._runner.inputs[name][:] = array
        self._filled = run
        self._runner.run()
        return self._runner.outputs


def _network(
    runner: Runner,
    spec: DenoiserSpec | SideSpec,
    runs: Sequence[Sequence[Encoded]],
    batch: int,
    given: Given,
    guidance_scale: float,
    image: Float | None,
) -> _Network:
    """The denoiser, or a side that runs at each step. runs: of a step, each with the halves of
    guidance that its batch is conditioned on. image: [1, 3, H, W] that a side is shown."""

    def fixed(one: InputSpec, halves: Sequence[Encoded]) -> Array | None:
        if one.fill == "joined":
            return stacked([joined(half, one.parts) for half in halves], one.parts[0])
        if one.fill in SIZE_FILLS:
            return np.concatenate([half[one.fill] for half in halves])
        if one.fill == "guidance":
            return np.full(batch * len(halves), guidance_scale, np.float32)
        if one.fill == "guidance_embedding":
            width = next(int(t.shape[1]) for t in runner.spec.inputs if t.name == one.name)
            embedding = guidance_scale_embedding(guidance_scale, width)
            return np.repeat(embedding, batch * len(halves), axis=0)
        if one.fill == "control" and image is not None:
            return np.repeat(image, batch * len(halves), axis=0)
        value = given.get(one.fill)
        return None if value is None else np.concatenate([value] * len(halves))

    values = [{one.name: fixed(one, run) for one in spec.inputs} for run in runs]
    known = [{name: v for name, v in each.items() if v is not None} for each in values]
    return _Network(runner, spec, known)


class _Sides:
    """The sides that run at each step, and the outputs of those that ran once. runs: of the
    denoiser in a step. All else: see `_network`."""

    def __init__(
        self,
        wiring: Wiring,
        runners: Mapping[str, Runner],
        runs: Sequence[Sequence[Encoded]],
        batch: int,
        given: Given,
        guidance_scale: float,
        controls: Controls,
    ) -> None:
        self._controls, self._last = controls, len(runs) - 1
        # The positive half of guidance is the last of the last run.
        self._guesses = controls.guess and sum(map(len, runs)) == 2
        self._runs = [runs[-1][-1:]] if self._guesses else runs
        self._batch = batch
        images = {one.component: one.image for one in controls.shown}
        self._networks = {
            side.component: _network(
                runners[side.component], side, self._runs, batch, given, guidance_scale,
                images[side.component],
            )
            for side in wiring.sides
            if side.when == "each_step" and side.component in controls.components
        }  # fmt: skip

    def add(self, one: Shown, run: int, values: Mapping[str, Array], sums: Sums) -> None:
        """Add what a component makes of `values` in a run of the denoiser. In guess mode, that is
        nothing for the negative half."""
        network = self._networks.get(one.component)
        if network is None:
            features = self._controls.features
            outputs = {p.output: v for p, v in features.items() if p.component == one.component}
            sums.add(one.component, outputs, [one.scale] * len(outputs), len(values["sample"]))
            return
        if self._guesses:
            if run != self._last:
                return
            values, run = {**values, "sample": values["sample"][-self._batch :]}, 0
        made = network.run(run, values)
        weights = guess_weights(len(made)) if self._controls.guess else np.ones(len(made))
        rows = self._batch * len(self._runs[run])
        sums.add(one.component, made, [one.scale * float(each) for each in weights], rows)
