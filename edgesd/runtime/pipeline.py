"""From a bundle and a prompt to images, on the device: loads, runs and releases what the flow of
the bundle's networks says."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from edgesd.errors import UsageError
from edgesd.runtime.arrays import Float
from edgesd.runtime.backends import get_backend
from edgesd.runtime.backends.base import Backend, LoadedPlan, Runner, RunnerOptions
from edgesd.runtime.bundle import Bundle
from edgesd.runtime.closeable import Closeable
from edgesd.runtime.conditioning import Conditioned, Prompts
from edgesd.runtime.decoding import Decoding
from edgesd.runtime.denoise import Step, denoise, with_sides
from edgesd.runtime.fitting import (
    Batch,
    Budget,
    Fit,
    Fitting,
    bundle_costs,
    images_per_run,
    process_bytes,
    unimported_bytes,
)
from edgesd.runtime.flow import GuidanceMode, flow_of, guidance_mode
from edgesd.runtime.loaded import Loaded, Timings
from edgesd.runtime.memory import MemoryMode, available_bytes, peak_bytes
from edgesd.runtime.networks import check_networks
from edgesd.runtime.noise import BatchNoise
from edgesd.runtime.requests import CompleteRequest, Completion, Request, scheduler_of
from edgesd.runtime.signature import check_trusted
from edgesd.runtime.tasks import TASKS
from edgesd.runtime.tiles import WINDOWS
from edgesd.runtime.tokenizer import tokenizer_of
from edgesd.spec.bundle import DecoderPart

if TYPE_CHECKING:
    from PIL import Image
    from typing_extensions import Self


@dataclass(frozen=True)
class Settings:
    """How to run. memory, guidance_mode: None decides by the memory that is free.

    max_memory: bytes that the process may take, mapped weights included; None for what is free.
    threads: per operator, 0 for all cores. plan_of: component -> its plan for TensorRT on this
    machine, built if need be (engines.plans). fallback: a bundle for TensorRT is generated on the
    CPU where there is no plan, or it fails. kernels: edgesd's own, where the bundle and this
    machine have them. made_here: the bundle was just built by this program, so that nobody need
    have signed it.
    """

    threads: int = 0
    memory: MemoryMode | None = None
    guidance_mode: GuidanceMode | None = None
    plan_of: Callable[[str], LoadedPlan] | None = None
    fallback: bool = True
    kernels: bool = True
    max_memory: int | None = None
    made_here: bool = False


Listener = Callable[[Step], None]


class Pipeline(Closeable):
    """A bundle's networks, loaded when first needed. A context manager: leaving it frees them.

    Components stay loaded between images unless memory is short, when each is released after
    its use. `truncations` holds of every prompt what was cut; `fallbacks` of every component that
    runs on the CPU instead of TensorRT why. `memory` is the mode of the last request that was
    fitted (`fit`): of one that needs more, the next mode may leave less in memory.

    open_runner: opens the runner of a component, instead of the bundle's backend.

    Raises BundleError for a bundle that this machine doesn't trust (runtime.signature), or whose
    networks aren't what images are generated with.

    Threads may share a pipeline: it does one thing at a time, and whoever calls meanwhile waits,
    `close` included. Pipelines of their own generate side by side. Within `on_step`, on the thread
    that generates, `decode` shows a preview; what would change the networks that are in use
    (`generate`, `replace`, `restore`, `close` ...) raises UsageError there, as every use after
    `close` does.
    """

    def __init__(
        self,
        bundle: Bundle,
        settings: Settings | None = None,
        open_runner: Callable[[str], Runner] | None = None,
    ) -> None:
        self.bundle = bundle
        self.spec = bundle.manifest.pipeline
        self.settings = settings or Settings()
        if not self.settings.made_here:
            check_trusted(bundle)
        check_networks(bundle.manifest)
        self.flow = flow_of(self.spec)
        texts = self.spec.wiring.texts
        folders = {text.tokenizer for text in texts}
        self._prompts = Prompts(texts, {name: tokenizer_of(bundle, name) for name in folders})
        self.truncations = self._prompts.truncations
        self.fallbacks: dict[str, str] = {}
        self._open = open_runner or self._opened_runner
        self._loaded = Loaded(lambda component: self.open_runner(component))
        self._completion = Completion(self.spec)
        self._lock = threading.RLock()
        self._generating = self._closed = False
        self._fit_now: Fit | None = None
        self._backends = {get_backend(e.backend) for e in bundle.manifest.engines.values()}
        self._process = process_bytes(self._backends)

    def __enter__(self) -> Self:
        with self._turn(while_generating=True):
            return super().__enter__()

    @contextmanager
    def _turn(self, *, while_generating: bool = False) -> Iterator[None]:
        """Have the pipeline alone. Raises UsageError once it is closed, and, unless
        `while_generating`, to a call from within `on_step`."""
        with self._lock:
            self._check_open()
            if self._generating and not while_generating:
                raise UsageError(
                    "this pipeline is generating: within on_step it only decodes previews; call it "
                    "after generate has returned"
                )
            yield

    def _check_open(self) -> None:
        if self._closed:
            raise UsageError(f"the pipeline of {self.bundle.path} was closed: open another one")

    def complete(self, request: Request | CompleteRequest) -> CompleteRequest:
        """Fill in the bundle's defaults and check every value, as Completion does. Raises
        UsageError, also once the pipeline is closed."""
        # Without a turn: a request can be checked while another thread generates.
        self._check_open()
        return self._completion.complete(request)

    def guidance_mode(self, request: CompleteRequest, count: int) -> GuidanceMode:
        """How `count` images like `request` are generated in one batch, in the mode that was fitted
        last. Raises UsageError when the bundle's rows, or the mode asked for in the settings, don't
        allow that."""
        guided, fast = self.flow.guided(request.guidance_scale), self.memory == "fast"
        return guidance_mode(self.spec.shape, count, guided, fast, self.settings.guidance_mode)

    def images_per_run(self, request: Request | CompleteRequest) -> int:
        """Images like `request` that a bundle with a fixed number of rows generates at a time."""
        guided = self.flow.guided(self.complete(request).guidance_scale)
        return images_per_run(self.spec.shape, guided)

    def generate(
        self,
        requests: Sequence[Request | CompleteRequest],
        on_step: Listener | None = None,
        previews: bool = False,
    ) -> list[Image.Image]:
        """Make one image per request, all in one batch.

        The requests may differ in prompt, negative prompt and seed only. Image k depends on its
        own request alone, not on the batch it was made in (up to the backend's rounding; where
        activations are quantized dynamically, the images of a batch share their ranges).
        on_step gets each step; what it raises ends the generation, not the pipeline. previews:
        whether it decodes unfinished images, which takes memory of its own.
        Raises UsageError for requests that can't share a batch, once the pipeline is closed, and
        within on_step; ResourceError when memory is short.
        """
        with self._turn():
            self._generating = True
            try:
                complete = [self.complete(request) for request in requests]
                return self._generate(complete, on_step, previews) if complete else []
            finally:
                self._generating = False
                self._release(*self.flow.components)  # what an error left there

    def _generate(
        self, requests: Sequence[CompleteRequest], on_step: Listener | None, previews: bool
    ) -> list[Image.Image]:
        start, first, wiring = time.perf_counter(), requests[0], self.spec.wiring
        if not all(request.like(first) for request in requests):
            raise UsageError("the images of one batch must share steps, size and scheduler")
        self._fit(first, len(requests), previews)
        conditioned = self._conditioned(requests)
        noise = BatchNoise([request.seed for request in requests])
        scheduler = scheduler_of(self.spec, first)
        begin = TASKS[wiring.tasks[0]].prepare(self.spec, requests, scheduler, noise)
        begin = with_sides(wiring, begin, self._loaded.run, self._release)
        loop = [stage.component for stage in self.flow.loop]
        runners = {component: self._loaded.runner(component) for component in loop}
        with ExitStack() as timed:
            for component, runner in runners.items():
                timed.enter_context(self.timings.running(component, runner))
            latents = denoise(
                wiring,
                runners,
                scheduler,
                begin,
                conditioned,
                first.guidance_scale,
                noise,
                self.guidance_mode(first, len(requests)),
                self._watch(on_step),
            )
        self._release(*loop)
        images = self._images(latents)
        self.timings.total += time.perf_counter() - start
        self.timings.peak_memory_bytes = peak_bytes()
        return images

    def _conditioned(self, requests: Sequence[CompleteRequest]) -> Conditioned:
        """What the text encoders make of the requests' prompts; other prompts are forgotten."""
        positive = [request.prompt for request in requests]
        negative = [request.negative_prompt for request in requests]
        guided = self.flow.guided(requests[0].guidance_scale)
        found = self._prompts.conditioned(
            positive, negative if guided else None, self._loaded.run, self._release
        )
        self._prompts.keep((*positive, *negative))
        return found

    def _watch(self, on_step: Listener | None) -> Listener:
        def watch(step: Step) -> None:
            self.timings.steps.append(step.seconds)
            if on_step:
                on_step(step)

        return watch

    def decode(self, latents: Float) -> list[Image.Image]:
        """Latents [B, C, h, w] -> B images of h, w times the latent scale factor, 8-bit RGB.

        Also shows unfinished latents, for a preview. Raises UsageError once the pipeline is closed.
        """
        with self._turn(while_generating=True):
            return self._images(latents)

    def _images(self, latents: Float) -> list[Image.Image]:
        from PIL import Image

        decoder, streamed = self.flow.decoder.component, self.memory == "stream"
        whole = not streamed or decoder in self._loaded.replaced
        split = None if whole else self.bundle.manifest.engines[decoder].split
        window = self._fit_now.window if self._fit_now else WINDOWS[0]
        decoding = Decoding(
            self.spec, self._loaded, partial(self._opened_runner, decoder), split, streamed, window
        )
        images = []
        for row in latents:  # one at a time: the decoder is what sets the memory peak
            pixels = np.clip(decoding.values(row).transpose(1, 2, 0) * 127.5 + 127.5, 0, 255)
            images.append(Image.fromarray(pixels.round().astype(np.uint8)))
        self._release(decoder)
        return images

    def replace(self, component: str, runner: Runner) -> None:
        """Generate with another runner for one component from now on; the one before is freed.
        Raises UsageError, as `restore` and `forget_prompts` do, within on_step and once it is
        closed."""
        with self._turn():
            self._loaded.replace(component, runner)
            self._prompts.forget()

    def restore(self, component: str) -> None:
        """Generate with the bundle's own engine again; it is loaded when first needed."""
        with self._turn():
            self._loaded.restore(component)
            self._prompts.forget()

    def forget_prompts(self) -> None:
        """Encode every prompt anew from now on, as for an image on its own."""
        with self._turn():
            self._prompts.forget()

    def close(self) -> None:
        """Free all components, for good; twice is as good as once.

        Waits for what another thread generates. Raises UsageError within on_step.
        """
        with self._lock:
            if self._closed:
                return
            with self._turn():
                self._closed = True
                self._loaded.close()

    def open_runner(self, component: str) -> Runner:
        """A runner of one component, for `generate`; it is the caller's to close. Raises UsageError
        once the pipeline is closed."""
        with self._turn(while_generating=True):
            return self._open(component)

    def _opened_runner(self, component: str, part: DecoderPart | None = None) -> Runner:
        kept = self._fit_now.weights_kept if self._fit_now else {}
        options = RunnerOptions(
            threads=self.settings.threads,
            streamed=self.memory == "stream",
            kept_bytes=kept.get(component, 0),
            kernels=self.settings.kernels,
            plan_of=self.settings.plan_of,
            fallback=self.settings.fallback,
            on_fallback=partial(self.fallbacks.__setitem__, component),
        )
        return self._backend(component).open_runner(self.bundle, component, options, part)

    def _backend(self, component: str) -> Backend:
        return get_backend(self.bundle.manifest.engines[component].backend)

    def _own_kernels(self, component: str) -> bool:
        """Whether the component's graph for edgesd's own kernels is there and can run here."""
        backend = self._backend(component)
        return self.settings.kernels and backend.own_kernels(self.bundle, component)

    def _release(self, *components: str) -> None:
        if self.memory != "fast":
            self._loaded.release(components)

    @property
    def timings(self) -> Timings:
        """Where the time of all images went; new ones may be put in their place."""
        return self._loaded.timings

    @timings.setter
    def timings(self, timings: Timings) -> None:
        self._loaded.timings = timings

    @property
    def loaded(self) -> tuple[str, ...]:
        """Components that are in memory."""
        return tuple(self._loaded.components)

    @property
    def process_bytes(self) -> int:
        """What the process takes without any component, backends included."""
        return self._process

    @property
    def memory(self) -> MemoryMode:
        """The mode that was fitted last; before any, the one that the settings ask for, or fast."""
        return self._fit_now.memory if self._fit_now else self.settings.memory or "fast"

    def fit(self, request: CompleteRequest, count: int, previews: bool = False) -> None:
        """Choose how to generate `count` images like `request` at a time, so that it fits into
        memory: `memory` is the fastest mode that does.

        Raises ResourceError, before anything is loaded, where it doesn't fit in any mode (or in the
        one that the settings ask for), and UsageError as `guidance_mode` does.
        """
        with self._turn():
            self._fit(request, count, previews)

    def estimate(self, request: CompleteRequest, count: int, previews: bool = False) -> int:
        """Bytes of the process at most, mapped files included, while `count` images like `request`
        are generated at a time in the mode that is set."""
        fitting = self._fitting()
        generation = fitting.generation(self._batch(request, count, previews), self.memory)
        window = self._fit_now.window if self._fit_now else WINDOWS[0]
        return fitting.costs.need(self.memory, generation, window).resident

    def _fit(self, request: CompleteRequest, count: int, previews: bool) -> None:
        found = self._fitting().check(self._batch(request, count, previews))
        before, self._fit_now = self._fit_now, found
        changed = before is not None and (
            (found.memory, found.window) != (before.memory, before.window)
            # What a session took for another size, it keeps: together that may be more than either.
            or (self.settings.max_memory is not None and found.generation != before.generation)
        )
        if changed:
            self._loaded.release(self._loaded.components)

    def _fitting(self) -> Fitting:
        """What is asked to fit, with what is free now."""
        settings, loaded, process = self.settings, self._loaded, self._process
        components = self.flow.components
        costs = bundle_costs(self.bundle, components, self._own_kernels, process, loaded.replaced)
        free = available_bytes() if settings.max_memory is None else None
        taken = process - unimported_bytes(self._backends)
        taken += costs.loaded(loaded.components, self.memory == "stream")
        budget = Budget(settings.max_memory, free, taken)
        return Fitting(costs, budget, settings.memory, settings.guidance_mode)

    def _batch(self, request: CompleteRequest, count: int, previews: bool) -> Batch:
        guided = self.flow.guided(request.guidance_scale)
        return Batch(request.height, request.width, count, guided, previews)
