"""The denoising loop. There is one: device, calibration, parity and evaluation all run it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from edgesd.errors import InputError
from edgesd.runtime.backends.base import Runner
from edgesd.runtime.schedulers import Scheduler

Float = npt.NDArray[np.float32]
GuidanceMode = Literal["batched", "sequential"]


@dataclass(frozen=True)
class Step:
    """What `on_step` is told: the step just done (0-based), of how many, its wall time, latents."""

    index: int
    count: int
    seconds: float
    latents: Float


class Conditioning(NamedTuple):
    """Text embeddings, each [B, tokens, channels]. `negative` is None without guidance."""

    positive: Float
    negative: Float | None


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
    unet: Runner,
    scheduler: Scheduler,
    latents: Float,
    conditioning: Conditioning,
    guidance_scale: float,
    noise: Callable[[tuple[int, ...]], Float],
    mode: GuidanceMode = "batched",
    on_step: Callable[[Step], None] | None = None,
) -> Float:
    """Take latents [B, C, h, w], unit-variance noise, to an image's latents of the same shape.

    scheduler: `set_timesteps` has been called. noise: draws for stochastic schedulers.
    Classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598, eq. 6, in diffusers' form)
    noise_pred = negative + guidance_scale * (positive - negative), when `conditioning.negative`
    is given: both halves in one run of batch 2 B ("batched"), or one after the other
    ("sequential", less memory). Raises InputError when the latents stop being finite.
    """
    batch = len(latents)
    guided = conditioning.negative is not None
    together = guided and mode == "batched"
    halves = (
        [conditioning.positive]
        if conditioning.negative is None
        else [
            conditioning.negative,
            conditioning.positive,
        ]
    )
    embeddings = [np.concatenate(halves)] if together else halves
    rows = batch * 2 if together else batch
    shapes: dict[str, tuple[int, ...]] = {
        "sample": (rows, *latents.shape[1:]),
        "encoder_hidden_states": embeddings[0].shape,
        "timestep": (1,),
    }
    cond = unet.spec.input("timestep_cond")
    if cond is not None:
        shapes["timestep_cond"] = (rows, int(cond.shape[1]))
    unet.bind(shapes)
    sample, timestep, states = (
        unet.inputs[name] for name in ("sample", "timestep", "encoder_hidden_states")
    )
    if cond is not None:
        unet.inputs["timestep_cond"][:] = guidance_scale_embedding(
            guidance_scale, int(cond.shape[1])
        )
    if len(embeddings) == 1:
        states[:] = embeddings[0]

    latents = (latents * np.float32(scheduler.init_noise_sigma)).astype(np.float32)
    scale = np.float32(guidance_scale)
    difference = np.empty_like(latents)
    negative = np.empty_like(latents)
    count = len(scheduler.timesteps)
    for index in range(count):
        start = time.perf_counter()
        scheduler.scale_model_input(latents, index, out=sample[:batch])
        if together:
            sample[batch:] = sample[:batch]
        timestep[0] = scheduler.timesteps[index]
        if guided and not together:
            states[:] = embeddings[0]
            unet.run()
            negative[:] = unet.outputs["noise_pred"]
            states[:] = embeddings[1]
        unet.run()
        noise_pred: npt.NDArray[Any] = unet.outputs["noise_pred"]
        if noise_pred.shape != sample.shape:
            raise InputError(
                f"{unet.spec.name} makes noise_pred of the shape {list(noise_pred.shape)} from "
                f"latents of {list(sample.shape)}: build the bundle again"
            )
        if guided:
            low = noise_pred[:batch] if together else negative
            np.subtract(noise_pred[-batch:], low, out=difference)
            difference *= scale
            difference += low
            noise_pred = difference
        latents = scheduler.step(noise_pred, index, latents, noise)
        if not math.isfinite(float(latents.sum())):
            raise InputError(
                f"the latents are no longer finite after step {index + 1} of {count}: try another "
                "--scheduler, a smaller --guidance, or a bundle of higher precision"
            )
        if on_step:
            on_step(Step(index, count, time.perf_counter() - start, latents))
    return latents
