"""What the denoising loop costs beside the network.

    python -m benchmarks.loop_overhead BUNDLE

Host overhead is the time of `denoise` that isn't spent inside the runner, with batched guidance:
scaling the input, guidance, the scheduler's step and its noise, and filling the buffers. Each
repeat runs the bundle's UNet and, right after it, a runner that computes nothing, so that the
overhead is given as a share of a step and, undisturbed by a network, in microseconds.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.common import Spread, environment, parser, run, spread, table, write_json
from edgesd.errors import InputError
from edgesd.runtime.arrays import Float
from edgesd.runtime.backends.base import Runner
from edgesd.runtime.backends.fake import FakeRunner
from edgesd.runtime.backends.onnxruntime import OnnxRuntimeRunner
from edgesd.runtime.bundle import Bundle, open_bundle
from edgesd.runtime.conditioning import Conditioned, with_size_ids
from edgesd.runtime.denoise import Start, denoise
from edgesd.runtime.noise import TorchNoise
from edgesd.runtime.requests import Completion, Request
from edgesd.runtime.schedulers import SCHEDULERS, create_scheduler
from edgesd.spec.pipeline import Fill, Part, PipelineSpec

GUIDANCE = 4.0


class Overhead(NamedTuple):
    """Of one scheduler, over all repeats. percent: of the whole step, network included."""

    scheduler: str
    percent: Spread
    step_us: Spread
    host_us: Spread
    host_us_fake: Spread


class Lap(NamedTuple):
    """One run of the loop: seconds in all, of them inside the runner, and the steps done."""

    total: float
    inside: float
    steps: int

    @property
    def host_us(self) -> float:
        """Microseconds per step outside the runner."""
        return (self.total - self.inside) / self.steps * 1e6


def fitting_schedulers(spec: PipelineSpec) -> list[str]:
    """Names of the schedulers that can sample this model."""
    fitting = []
    for name in SCHEDULERS:
        try:
            create_scheduler(name, spec.scheduler.config)
        except InputError:
            continue
        fitting.append(name)
    return fitting


def lap(runner: Runner, spec: PipelineSpec, scheduler_name: str, steps: int) -> Lap:
    """Run the loop once for one image of the bundle's own size, on random embeddings."""
    rng = np.random.default_rng(0)
    outputs = {
        part: spec.components[part.component].output(part.output)
        for one in spec.wiring.denoiser.inputs
        for part in one.parts
    }
    positive, negative = (
        dict[Part | Fill, Float](
            {
                part: rng.standard_normal((1, *map(int, tensor.shape[1:])), dtype=np.float32)
                for part, tensor in outputs.items()
                if tensor is not None
            }
        )
        for _ in range(2)
    )
    request = Completion(spec).complete(Request("", 0))
    scale = spec.latent.scale_factor
    noise = TorchNoise(0)
    latents = noise(
        (1, spec.latent.channels, spec.shape.height // scale, spec.shape.width // scale)
    )
    scheduler = create_scheduler(scheduler_name, spec.scheduler.config)
    scheduler.set_timesteps(steps)
    before = runner.seconds
    start = time.perf_counter()
    denoise(
        spec.wiring,
        {runner.spec.name: runner},
        scheduler,
        Start(latents * np.float32(scheduler.init_noise_sigma)),
        with_size_ids(Conditioned(positive, negative), request, 1),
        GUIDANCE,
        noise,
    )
    total = time.perf_counter() - start
    return Lap(total, runner.seconds - before, len(scheduler.timesteps))


def measure(
    bundle: Bundle, schedulers: Sequence[str], steps: int, repeats: int, threads: int
) -> list[Overhead]:
    """For each scheduler, alternate the bundle's UNet and a fake `repeats` times, after one lap of
    each that isn't counted."""
    spec = bundle.manifest.pipeline
    denoiser = spec.wiring.denoiser
    component = spec.components[denoiser.component]
    shape = (
        2,
        spec.latent.channels,
        *(size // spec.latent.scale_factor for size in (spec.shape.height, spec.shape.width)),
    )
    nothing = {denoiser.output: np.full(shape, 0.01, np.float32)}
    results = []
    with (
        OnnxRuntimeRunner(component, bundle.graph_file(denoiser.component), threads) as real,
        FakeRunner(component, lambda _: nothing) as fake,
    ):
        for name in schedulers:
            laps = [
                (lap(real, spec, name, steps), lap(fake, spec, name, steps))
                for _ in range(repeats + 1)
            ][1:]
            results.append(
                Overhead(
                    name,
                    spread(100 * (1 - ours.inside / ours.total) for ours, _ in laps),
                    spread(ours.total / ours.steps * 1e6 for ours, _ in laps),
                    spread(ours.host_us for ours, _ in laps),
                    spread(theirs.host_us for _, theirs in laps),
                )
            )
    return results


def main() -> None:
    """Measure, print, and write."""
    arguments = parser(__doc__)
    arguments.add_argument("bundle", type=Path)
    arguments.add_argument("--steps", type=int, default=50, help="per repeat (default: 50)")
    arguments.add_argument("--repeats", type=int, default=9, help="counted ones (default: 9)")
    arguments.add_argument("--threads", type=int, default=0, help="0 (default): all cores")
    given = arguments.parse_args()
    bundle = open_bundle(given.bundle)
    names = fitting_schedulers(bundle.manifest.pipeline)
    results = measure(bundle, names, given.steps, given.repeats, given.threads)
    print(f"medians of {given.repeats} runs of {given.steps} steps (quartiles)")
    print(
        table(
            ("scheduler", "overhead %", "step us", "outside us", "outside us, no network"),
            (
                (
                    row.scheduler,
                    row.percent.text(2),
                    row.step_us.text(0),
                    row.host_us.text(0),
                    row.host_us_fake.text(0),
                )
                for row in results
            ),
        )
    )
    overall = spread(row.percent.median for row in results)
    print(f"median over the schedulers: {overall.median:.2f} %")
    write_json(
        given.json,
        {
            "environment": environment(),
            "steps": given.steps,
            "repeats": given.repeats,
            "overhead_percent": overall.median,
            "schedulers": {
                row.scheduler: {
                    "overhead_percent": row.percent._asdict(),
                    "step_us": row.step_us._asdict(),
                    "outside_us": row.host_us._asdict(),
                    "outside_us_fake": row.host_us_fake._asdict(),
                }
                for row in results
            },
        },
    )


if __name__ == "__main__":
    run(main)
