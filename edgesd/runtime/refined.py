"""Images by two bundles: a base model denoises the first steps, a refiner the last ones (Podell et
al. 2023, arXiv 2307.01952, sec. 2.5). The networks of one are freed before the other's are loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from edgesd.errors import UsageError
from edgesd.runtime.arrays import Float
from edgesd.runtime.bundle import Bundle
from edgesd.runtime.cut import first_of_refiner, taken_by_base
from edgesd.runtime.denoise import Step
from edgesd.runtime.loaded import Timings
from edgesd.runtime.memory import MemoryMode
from edgesd.runtime.pipeline import Listener, Pipeline
from edgesd.runtime.requests import CompleteRequest, Request, scheduler_of
from edgesd.runtime.tokenizer import Truncation
from edgesd.spec.pipeline import PipelineSpec

if TYPE_CHECKING:
    from PIL import Image

DENOISING_END = 0.8
"""Where SDXL's refiner goes on: it was trained on the last fifth of the timesteps."""

_REFINE = "refine"


def is_refiner(pipeline: PipelineSpec) -> bool:
    """Whether a pipeline finishes images that another one begins."""
    return _REFINE in pipeline.wiring.tasks


def check_roles(base: Bundle, refiner: Bundle | None, from_image: bool = False) -> None:
    """Raise UsageError unless `base` begins images, and `refiner`, if there is one, finishes those
    of such latents. from_image: whether they begin with one, as a refiner's may, too."""
    if is_refiner(base.manifest.pipeline) and not (from_image and refiner is None):
        raise UsageError(
            f"{base.path} is a refiner, which finishes what a base model began: edgesd generate "
            f"BASE --refiner {base.path}"
        )
    if refiner is None:
        return
    if not is_refiner(refiner.manifest.pipeline):
        raise UsageError(
            f"{refiner.path} is no refiner: expected a bundle of one, such as of "
            "stabilityai/stable-diffusion-xl-refiner-1.0"
        )
    first, second = (_latents_of(bundle.manifest.pipeline) for bundle in (base, refiner))
    if first != second:
        raise UsageError(
            f"the latents of {base.path} aren't those that {refiner.path} refines: take a refiner "
            "of the same family"
        )


def _latents_of(pipeline: PipelineSpec) -> tuple[object, ...]:
    """What latents mean, whichever decoder they are for."""
    latent = pipeline.latent
    return pipeline.family, latent.channels, latent.scale_factor, latent.mean, latent.std


class Refined:
    """A base model's pipeline and a refiner's, used like one pipeline (runtime/images.py).

    Both are the caller's to close. Raises what `check_roles` raises.
    """

    def __init__(self, base: Pipeline, refiner: Pipeline) -> None:
        check_roles(base.bundle, refiner.bundle)
        self.base, self.refiner, self.bundle = base, refiner, base.bundle
        self.loras = base.loras
        self._running = base
        self._second: dict[CompleteRequest, CompleteRequest] = {}
        """The base model's request -> the refiner's."""
        self._cuts: dict[tuple[CompleteRequest, CompleteRequest], tuple[int, int]] = {}
        """What both requests share with others -> the steps of both."""

    def complete(self, request: Request | CompleteRequest) -> CompleteRequest:
        """The request as the base model takes it, for `generate`. Raises UsageError, also where the
        refiner can't go on."""
        if isinstance(request, CompleteRequest):
            return request
        end = DENOISING_END if request.denoising_end is None else request.denoising_end
        request = replace(request, denoising_end=end)
        first = self.base.complete(request)
        self._second[first] = self.refiner.complete(_for_refiner(request, first))
        self._steps(first)
        return first

    def _steps(self, request: CompleteRequest) -> tuple[int, int]:
        """How often the base model's denoiser is run for a request, and the refiner's. Raises
        UsageError where one of both has nothing to do, or the refiner can't go on."""
        second = self._second[request]
        shared = request.shared, second.shared
        if shared not in self._cuts:
            self._cuts[shared] = self._cut(request, second)
        return self._cuts[shared]

    def _cut(self, first: CompleteRequest, second: CompleteRequest) -> tuple[int, int]:
        at = first.denoising_end or DENOISING_END
        base = scheduler_of(self.base.spec, first)
        refiner = scheduler_of(self.refiner.spec, second)
        begun = len(taken_by_base(self.base.spec, base, at, first.strength))
        left = len(refiner.timesteps) - first_of_refiner(self.refiner.spec, refiner, at)
        if (base.noise_level(0)[0] == 1) != (refiner.noise_level(0)[0] == 1):
            raise UsageError(
                f"the samplers {first.scheduler} and {second.scheduler} scale latents differently, "
                "so that the refiner can't go on: choose one for both with --scheduler"
            )
        return begun, left

    def fit(self, request: CompleteRequest, count: int, previews: bool = False) -> None:
        """See Pipeline: each of both must fit on its own."""
        self.base.fit(request, count, previews)
        self.refiner.fit(self._second[request], count, previews)

    def chunks(self, request: CompleteRequest) -> int:
        """A number that images which share a batch have in common."""
        return self.base.chunks(request) << 16 | self.refiner.chunks(self._second[request])

    def generate(
        self,
        requests: Sequence[CompleteRequest],
        on_step: Listener | None = None,
        previews: bool = False,
    ) -> list[Image.Image]:
        """See Pipeline; `on_step` gets the steps of both in a row."""
        begun, left = self._steps(requests[0])

        def watch(before: int) -> Callable[[Step], None]:
            def listen(step: Step) -> None:
                if on_step:
                    on_step(replace(step, index=before + step.index, count=begun + left))

            return listen

        self._running = self.base
        latents = self.base.begin(requests, watch(0), previews)
        self.base.unload()
        self._running = self.refiner
        second = [self._second[request] for request in requests]
        images = self.refiner.generate(second, watch(begun), previews, latents)
        self.refiner.unload()
        return images

    def decode(self, latents: Float) -> list[Image.Image]:
        """See Pipeline: for a preview, by the one that is generating."""
        return self._running.decode(latents)

    @property
    def truncations(self) -> Mapping[str, Truncation]:
        """See Pipeline."""
        return {**self.refiner.truncations, **self.base.truncations}

    @property
    def fallbacks(self) -> Mapping[str, str]:
        """See Pipeline; the refiner's components are called so."""
        return {**self.base.fallbacks, **_named(self.refiner.fallbacks)}

    @property
    def memory(self) -> MemoryMode:
        """See Pipeline: the base model's."""
        return self.base.memory

    @property
    def timings(self) -> Timings:
        """Those of both; the refiner's components are called so."""
        base, refiner = self.base.timings, self.refiner.timings
        return Timings(
            {**base.load, **_named(refiner.load)},
            {**base.run, **_named(refiner.run)},
            [*base.steps, *refiner.steps],
            base.total + refiner.total,
            max(base.peak_memory_bytes, refiner.peak_memory_bytes),
        )


def _for_refiner(request: Request, first: CompleteRequest) -> Request:
    """The refiner's request for an image that the base model begins with `first`. Its only text
    encoder is the base model's second; of a picture it sees what the base model made of it."""

    def second(one: str | None, two: str | None) -> str | None:
        return one if two is None else two

    return replace(
        request,
        prompt=second(request.prompt, request.prompt_2) or "",
        negative_prompt=second(request.negative_prompt, request.negative_prompt_2),
        prompt_2=None,
        negative_prompt_2=None,
        controls=(),
        image=None,
        strength=None,
        num_inference_steps=first.num_inference_steps,
        height=first.height,
        width=first.width,
    )


_T = TypeVar("_T")


def _named(values: Mapping[str, _T]) -> dict[str, _T]:
    return {f"refiner.{name}": value for name, value in values.items()}
