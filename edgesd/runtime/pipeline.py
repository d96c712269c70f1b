"""From a bundle and prompts to images, on the device: interprets the flow of the bundle's networks,
each of which is loaded, run and released."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from edgesd.errors import UsageError
from edgesd.runtime.arrays import Float
from edgesd.runtime.autoencoding import Encoded, decoded
from edgesd.runtime.backends.base import Runner
from edgesd.runtime.bundle import Bundle
from edgesd.runtime.chunks import fixed_chunks
from edgesd.runtime.closeable import Closeable
from edgesd.runtime.conditioning import Conditioned, Prompts, with_size_ids
from edgesd.runtime.controls import controls_of, with_features
from edgesd.runtime.denoise import Step, denoise
from edgesd.runtime.fitting import Batch, images_per_run
from edgesd.runtime.flow import GuidanceMode, flow_of, guidance_mode
from edgesd.runtime.loaded import Loaded, OpenRunner, Timings
from edgesd.runtime.lora import Used, filling
from edgesd.runtime.memory import MemoryMode, peak_bytes
from edgesd.runtime.modulation import modulated
from edgesd.runtime.networks import check_networks
from edgesd.runtime.noise import BatchNoise
from edgesd.runtime.requests import (
    CompleteRequest,
    Completion,
    Request,
    of_pictures,
    scheduler_of,
)
from edgesd.runtime.settings import Settings
from edgesd.runtime.signature import check_trusted
from edgesd.runtime.tasks import TASKS
from edgesd.runtime.tasks.beginning import Beginning
from edgesd.runtime.tasks.control import NO_CONTROL
from edgesd.runtime.tokenizer import tokenizer_of
from edgesd.runtime.turns import Turns
from edgesd.spec.pipeline import ENCODING_TASKS, IMAGE_TASKS

if TYPE_CHECKING:
    from PIL import Image
    from typing_extensions import Self

Listener = Callable[[Step], None]


class Pipeline(Closeable):
    """A bundle's networks, loaded when first needed. A context manager: leaving it frees them.

    Components stay loaded between images unless memory is short, when each is released after
    its use. `truncations` holds of every prompt what was cut; `fallbacks` of every component that
    runs on the CPU instead of TensorRT why. `memory` is the mode of the last request that was
    fitted (`fit`): of one that needs more, the next mode may leave less in memory.

    open_runner: opens the runner of a component, instead of the bundle's backend.
    loras: that it generates with (`use_loras`).

    Raises BundleError for a bundle that this machine doesn't trust (runtime.signature), or whose
    networks aren't what images are generated with. Threads may share a pipeline: it does one thing
    at a time, and other callers wait, `close` included. Pipelines of their own generate
    side by side. Within `on_step`, on the thread that generates, `decode` shows a preview; what
    would change the networks that are in use (`generate`, `replace`, `restore`, `close` ...) raises
    UsageError there, as every use after `close` does.
    """

    def __init__(
        self,
        bundle: Bundle,
        settings: Settings | None = None,
        open_runner: OpenRunner | None = None,
    ) -> None:
        self.bundle = bundle
        self.spec = bundle.manifest.pipeline
        self.settings = settings or Settings()
        if not self.settings.made_here:
            check_trusted(bundle)
        check_networks(bundle.manifest)
        self.flow = flow_of(self.spec)
        texts, refs = self.spec.wiring.texts, self.spec.wiring.tokenizers
        folders = {text.tokenizer for text in texts}
        tokenizers = {name: tokenizer_of(bundle, name) for name in folders}
        whole = [name for name in folders if not refs[name].chunked]
        self._prompts = Prompts(texts, tokenizers, fixed_chunks(self.spec), whole)
        self._completion = Completion(self.spec)
        self._loaded = Loaded(bundle, self.settings, open_runner)
        self._encoded = Encoded(self._loaded)
        self.truncations, self.fallbacks = self._prompts.truncations, self._loaded.fallbacks
        self._turns = Turns(str(bundle.path))
        self.loras: tuple[Used, ...] = ()

    def __enter__(self) -> Self:
        with self._turns.turn(while_generating=True):
            return super().__enter__()

    def complete(self, request: Request | CompleteRequest) -> CompleteRequest:
        """Fill in the bundle's defaults and check every value, as Completion does. Raises
        UsageError, also once the pipeline is closed."""
        # Without a turn: a request can be checked while another thread generates.
        self._turns.check_open()
        found = self._completion.complete(request)
        if found.image is None and self.spec.wiring.tasks[0] in IMAGE_TASKS:
            raise UsageError(
                "this bundle is for inpainting: give --image and --mask, which is white where the "
                "image is to be painted"
            )
        if not found.controls and self.spec.wiring.tasks[0] == "control":
            raise UsageError(NO_CONTROL)
        return found

    def guidance_mode(self, request: CompleteRequest, count: int) -> GuidanceMode:
        """How `count` images like `request` are generated in one batch, in the mode that was fitted
        last. Raises UsageError when the bundle's batch, or the mode asked for in the settings,
        doesn't allow that."""
        guided, fast = self._guided(request), self.memory == "fast"
        return guidance_mode(self.spec.shape, count, guided, fast, self.settings.guidance_mode)

    def images_per_run(self, request: Request | CompleteRequest) -> int:
        """Images like `request` that a bundle of a fixed batch generates at a time; 1 with
        others."""
        return images_per_run(self.spec.shape, self._guided(self.complete(request)))

    def chunks(self, request: CompleteRequest) -> int:
        """Chunks of tokens that the request's prompts are encoded in. Only images of equally many
        share a batch: an empty chunk behind a prompt changes its image."""
        negative = request.negative if self._guided(request) else None
        return self._prompts.count((request.positive, negative))

    def _guided(self, request: CompleteRequest) -> bool:
        return self.flow.guided(request.guidance_scale, request.true_cfg_scale)

    def generate(
        self,
        requests: Sequence[Request | CompleteRequest],
        on_step: Listener | None = None,
        previews: bool = False,
        begun: Float | None = None,
    ) -> list[Image.Image]:
        """Make one image per request, all in one batch.

        The requests may differ in prompts (of equally many `chunks`), seed, and the images and
        masks that they begin with; those with a mask make a batch of their own. Image k depends
        on its own request alone, not on the batch it was made in (up to the backend's rounding;
        where activations are quantized dynamically, the images of a batch share their ranges).
        on_step gets each step; what it raises ends the generation, not the pipeline. previews:
        whether it decodes unfinished images, which takes memory of its own. begun: for a refiner,
        what another pipeline's `begin` made of the same requests.
        Raises UsageError for requests that can't share a batch, once the pipeline is closed, and
        within on_step; ResourceError when memory is short.
        """
        complete = [self.complete(request) for request in requests]
        if begun is None and any(request.denoising_end is not None for request in complete):
            raise UsageError("denoising_end leaves the last steps to a refiner: give --refiner")
        with self._generating():
            if not complete:
                return []
            began = time.perf_counter()
            images = self._images(self._denoised(complete, on_step, previews, begun))
            images = _pasted(images, complete)
            self._count(began)
            return images

    def begin(
        self,
        requests: Sequence[Request | CompleteRequest],
        on_step: Listener | None = None,
        previews: bool = False,
    ) -> Float:
        """Denoise as far as `denoising_end` of the requests says: latents [B, C, h, w], which a
        refiner's pipeline makes images of. All else as in `generate`."""
        complete = [self.complete(request) for request in requests]
        if any(request.denoising_end is None for request in complete):
            raise UsageError("give denoising_end: it says where the refiner goes on")
        with self._generating():
            began = time.perf_counter()
            latents = self._denoised(complete, on_step, previews, None)
            self._count(began)
            return latents

    @contextmanager
    def _generating(self) -> Iterator[None]:
        with self._turns.generating():
            try:
                yield
            finally:
                self._loaded.release(*self.flow.components)  # what an error left there

    def _count(self, began: float) -> None:
        self.timings.total += time.perf_counter() - began
        self.timings.peak_memory_bytes = peak_bytes()

    def _denoised(
        self,
        requests: Sequence[CompleteRequest],
        on_step: Listener | None,
        previews: bool,
        begun: Float | None,
    ) -> Float:
        """Latents [B, C, h, w] of the requests."""
        first, wiring = requests[0], self.spec.wiring
        if any(request.shared != first.shared for request in requests):
            raise UsageError("the images of one batch must share steps, size and scheduler")
        if len({request.task for request in requests}) > 1:
            raise UsageError("the images of one batch must all begin with an image, or none")
        if len(requests) > 1 and len({self.chunks(request) for request in requests}) > 1:
            raise UsageError("the prompts of one batch must have the same number of chunks")
        self._loaded.fit(self._batch(first, len(requests), previews))
        controls = controls_of(wiring, requests)  # refuses a sketch without lines at once
        conditioned = self._conditioned(requests)
        noise = BatchNoise([request.seed for request in requests])
        scheduler = scheduler_of(self.spec, first)
        self._encoded.next_batch()
        begin = Beginning(self.spec, requests, scheduler, noise, begun, self._encoded)
        start = TASKS[first.task or wiring.tasks[0]].prepare(begin)
        if self.flow.encoder is not None:
            self._loaded.release(self.flow.encoder.component)
        controls = with_features(wiring, controls, self._loaded.run, self._loaded.release)
        mode, guidance = self.guidance_mode(first, len(requests)), first.guidance_scale
        modulation = None
        if (stage := self.flow.modulation) is not None:
            steps = scheduler.timesteps[start.first_step : start.last_step]
            with self._loaded.running((stage.component,)) as runners:
                runner = runners[stage.component]
                modulation = modulated(wiring, runner, steps, conditioned, len(requests), guidance)
            self._loaded.release(stage.component)
        idle = self.flow.sides - controls.components
        loop = tuple(stage.component for stage in self.flow.loop if stage.component not in idle)
        with self._loaded.running(loop) as runners:
            latents = denoise(
                wiring, runners, scheduler, start, conditioned, guidance, noise, mode,
                self._watch(on_step), first.guidance_rescale, controls, modulation,
                first.true_cfg_scale,
            )  # fmt: skip
        self._loaded.release(*loop)
        return latents

    def _batch(self, request: CompleteRequest, count: int, previews: bool) -> Batch:
        guided, chunks = self._guided(request), self.chunks(request)
        shown = {one.name for one in request.controls if one.scale != 0}
        sides = frozenset(side.component for side in self.spec.wiring.sides if side.name in shown)
        return Batch(
            request.height,
            request.width,
            count,
            guided,
            previews,
            chunks,
            encodes=(request.task or self.spec.wiring.tasks[0]) in ENCODING_TASKS,
            sides=sides,
            picture_bytes=request.picture_bytes(count),
            steps=request.num_inference_steps,
        )

    def _conditioned(self, requests: Sequence[CompleteRequest]) -> Conditioned:
        """What the requests are conditioned on."""
        positive = [request.positive for request in requests]
        negative = [request.negative for request in requests]
        asked = negative if self._guided(requests[0]) else None
        loaded = self._loaded
        found = self._prompts.conditioned(positive, asked, loaded.run, loaded.release)
        return with_size_ids(found, requests[0], len(requests))

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
        with self._turns.turn(while_generating=True):
            return self._images(latents)

    def _images(self, latents: Float) -> list[Image.Image]:
        from PIL import Image

        images = []
        for row in latents:  # one at a time: the decoder is what sets the memory peak
            values = decoded(self._loaded, row).transpose(1, 2, 0)
            pixels = np.clip(values * 127.5 + 127.5, 0, 255).round()
            images.append(Image.fromarray(pixels.astype(np.uint8)))
        self._loaded.release(self.flow.decoder.component)
        return images

    def replace(self, component: str, runner: Runner) -> None:
        """Generate with another runner for one component from now on; the one before is freed.
        Raises UsageError, as `restore` and `forget` do, within on_step and once it is
        closed."""
        with self._turns.turn():
            self._loaded.replace(component, runner)
            self._forget()

    def restore(self, component: str) -> None:
        """Generate with the bundle's own engine again; it is loaded when first needed."""
        with self._turns.turn():
            self._loaded.restore(component)
            self._forget()

    def use_loras(self, loras: Sequence[Used]) -> None:
        """Generate with these from now on, instead of those before; () for none. No network is
        loaded for that, where the bundle has slots (`edgesd build --lora-slots`).

        Raises UsageError for a bundle without, for LoRAs that don't fit it or are too large
        together, within on_step, and once the pipeline is closed; all stays as it was then.
        """
        factors = filling(self.bundle.manifest, loras)
        with self._turns.turn():
            changed = self._loaded.adapt(factors, sum(each.lora.bytes for each in loras))
            self.loras = tuple(loras)
            if changed & {text.component for text in self.spec.wiring.texts}:
                self._prompts.forget()

    def forget(self) -> None:
        """Encode every prompt and image anew from now on, as for an image on its own."""
        with self._turns.turn():
            self._forget()

    def _forget(self) -> None:
        self._prompts.forget()
        self._encoded.forget()

    def unload(self) -> None:
        """Free all networks, until they are needed again. Raises UsageError within on_step, and
        once the pipeline is closed."""
        with self._turns.turn():
            self._loaded.unload()

    def open_runner(self, component: str) -> Runner:
        """A runner of one component, as for `generate`; it is the caller's to close. Raises
        UsageError once the pipeline is closed."""
        with self._turns.turn(while_generating=True):
            return self._loaded.open(component)

    def close(self) -> None:
        """Free all components, for good; twice is as good as once.

        Waits for what another thread generates. Raises UsageError within on_step.
        """
        self._turns.close(self._loaded.close)

    def fit(self, request: CompleteRequest, count: int, previews: bool = False) -> None:
        """Choose how to generate `count` images like `request` at a time, so that it fits into
        memory: `memory` is the fastest mode that does.

        Raises ResourceError, before anything is loaded, where it doesn't fit in any mode (or in the
        one that the settings ask for), and UsageError as `guidance_mode` does.
        """
        with self._turns.turn():
            self._loaded.fit(self._batch(request, count, previews))

    def estimate(self, request: CompleteRequest, count: int, previews: bool = False) -> int:
        """Bytes of the process at most, mapped files included, while `count` images like `request`
        are generated at a time in the mode that is set."""
        return self._loaded.estimate(self._batch(request, count, previews))

    @property
    def memory(self) -> MemoryMode:
        """The mode that was fitted last; before any, the one that the settings ask for, or fast."""
        return self._loaded.memory

    @property
    def process_bytes(self) -> int:
        """Memory of the process without any component, backends included."""
        return self._loaded.process_bytes

    @property
    def loaded(self) -> tuple[str, ...]:
        """Components that are in memory."""
        return self._loaded.components

    @property
    def timings(self) -> Timings:
        """Timings of all images so far; may be replaced by new ones."""
        return self._loaded.timings

    @timings.setter
    def timings(self, timings: Timings) -> None:
        self._loaded.timings = timings


def _pasted(images: list[Image.Image], requests: Sequence[CompleteRequest]) -> list[Image.Image]:
    """What masks cover of `images`, in those that they begin with, where that is asked for."""
    if not requests[0].pasted:
        return images
    painted = of_pictures(requests, CompleteRequest.painting)
    pairs = zip(images, painted, strict=True)
    return [image if one is None else one.overlaid(image) for image, one in pairs]
