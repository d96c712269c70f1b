"""From a bundle and a prompt to images, on the device."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import numpy.typing as npt

from edgesd.errors import (
    BundleError,
    InputError,
    UsageError,
)
from edgesd.runtime.backends import get_backend
from edgesd.runtime.backends.base import Backend, LoadedPlan, Runner, RunnerOptions, run_once
from edgesd.runtime.bundle import Bundle
from edgesd.runtime.closing import Closing
from edgesd.runtime.denoise import Conditioning, GuidanceMode, Step, denoise
from edgesd.runtime.fitting import (
    Batch,
    Budget,
    Fit,
    Fitting,
    bundle_costs,
    guidance_mode,
    process_bytes,
    unimported_bytes,
)
from edgesd.runtime.memory import MemoryMode, available_bytes, give_back, peak_bytes
from edgesd.runtime.networks import check_networks
from edgesd.runtime.noise import BatchNoise
from edgesd.runtime.schedulers import Scheduler, create_scheduler
from edgesd.runtime.signature import check_trusted
from edgesd.runtime.tiles import TILE, WINDOWS, Tile, decode_tail, decode_tiles, margin_of
from edgesd.runtime.tokenizer import Truncation, check_prompt, tokenizer_of
from edgesd.spec.bundle import DecoderPart, SplitDecoder
from edgesd.spec.pipeline import check_multiple
from edgesd.spec.scheme import number_format

if TYPE_CHECKING:
    from PIL import Image
    from typing_extensions import Self

Float = npt.NDArray[np.float32]

_FAMILIES = ("sd",)
DRAWING = ("text_encoder", "unet", "vae_decoder")
"""Components that generate: others take no part in an image."""

_MAX_GUIDANCE = 1000


@dataclass(frozen=True)
class Request:
    """One image to make; None takes the bundle's own default.

    height, width: pixels. guidance_scale <= 1 turns guidance off. scheduler: one of our names.
    """

    prompt: str
    seed: int
    negative_prompt: str = ""
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    height: int | None = None
    width: int | None = None
    scheduler: str | None = None


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


@dataclass
class Timings:
    """Where the time went, in seconds; `steps` holds each step's wall time."""

    load: dict[str, float] = field(default_factory=dict)
    run: dict[str, float] = field(default_factory=dict)
    steps: list[float] = field(default_factory=list)
    total: float = 0.0
    peak_memory_bytes: int = 0

    def add(self, table: dict[str, float], component: str, seconds: float) -> None:
        """Add to one component's entry of `table`."""
        table[component] = table.get(component, 0.0) + seconds


Listener = Callable[[Step], None]


class Pipeline(Closing):
    """A bundle's networks, loaded when first needed. A context manager: leaving it frees them.

    Components stay loaded between images unless memory is short, when each is released after
    its use. `truncations` tells of every prompt what was cut; `fallbacks` of every component that
    runs on the CPU instead of TensorRT why. `memory` is the mode of the last request that was
    fitted (`fit`): of one that needs more, the next mode may leave less in memory.

    Raises BundleError for a bundle that this machine doesn't trust (runtime.signature), or whose
    networks aren't what images are generated with.

    Threads may share a pipeline: it does one thing at a time, and whoever calls meanwhile waits,
    `close` included. Pipelines of their own generate side by side. Within `on_step`, on the thread
    that generates, `decode` shows a preview; what would change the networks that are drawing
    (`generate`, `replace`, `restore`, `close` ...) raises UsageError there, as every use after
    `close` does.
    """

    def __init__(self, bundle: Bundle, settings: Settings | None = None) -> None:
        self.bundle = bundle
        self.spec = bundle.manifest.pipeline
        self.settings = settings or Settings()
        if self.spec.family not in _FAMILIES:
            raise BundleError(
                f"{bundle.path} holds a pipeline of the family {self.spec.family!r}; this version "
                f"generates with: {', '.join(_FAMILIES)}"
            )
        if not self.settings.made_here:
            check_trusted(bundle)
        check_networks(bundle.manifest)
        _check_precisions(bundle)
        self.timings = Timings()
        self.truncations: dict[str, Truncation] = {}
        self.fallbacks: dict[str, str] = {}
        self._runners: dict[str, Runner] = {}
        self._embeddings: dict[str, Float] = {}
        self._schedules: set[tuple[str | None, int | None]] = set()
        self._lock = threading.RLock()
        self._drawing = self._closed = False
        self._tokenizer = tokenizer_of(bundle)
        self._replaced: set[str] = set()
        self._fit_now: Fit | None = None
        self._backends = {get_backend(e.backend) for e in bundle.manifest.engines.values()}
        self._process = process_bytes(self._backends)

    def __enter__(self) -> Self:
        with self._turn(while_drawing=True):
            return super().__enter__()

    @contextmanager
    def _turn(self, *, while_drawing: bool = False) -> Iterator[None]:
        """Have the pipeline alone. Raises UsageError once it is closed, and, unless
        `while_drawing`, to a call from within `on_step`."""
        with self._lock:
            self._check_open()
            if self._drawing and not while_drawing:
                raise UsageError(
                    "this pipeline is drawing: within on_step it only decodes previews; call it "
                    "after generate has returned"
                )
            yield

    def _check_open(self) -> None:
        if self._closed:
            raise UsageError(f"the pipeline of {self.bundle.path} was closed: open another one")

    def complete(self, request: Request) -> Request:
        """Fill in the bundle's defaults and check every value.

        Raises UsageError naming the value, what is valid, and the nearest valid choice, or once the
        pipeline is closed.
        """
        # Without a turn: a request can be checked while another thread generates.
        self._check_open()
        spec, shape = self.spec, self.spec.shape
        request = replace(
            request,
            num_inference_steps=_first(request.num_inference_steps, spec.num_inference_steps),
            guidance_scale=_first(request.guidance_scale, spec.guidance_scale),
            height=_first(request.height, shape.height),
            width=_first(request.width, shape.width),
            scheduler=_first(request.scheduler, spec.scheduler.name),
        )
        assert request.guidance_scale is not None and request.height and request.width
        if not abs(request.guidance_scale) <= _MAX_GUIDANCE:
            raise UsageError(
                f"guidance must be a number of at most {_MAX_GUIDANCE}, not "
                f"{request.guidance_scale}: 1 is none, 7.5 is usual"
            )
        for text in (request.prompt, request.negative_prompt):
            check_prompt(text)
        for name, size, built in (
            ("height", request.height, shape.height),
            ("width", request.width, shape.width),
        ):
            if not shape.dynamic and size != built:
                raise UsageError(
                    f"this bundle was built for {shape.width}x{shape.height} pixels only, "
                    f"not {name} {size}: leave --size out, or build without --size"
                )
            check_multiple(name, size, shape.multiple_of, spec.latent.scale_factor)
        self._check_schedule(request)
        return request

    def guidance_mode(
        self, request: Request, count: int, memory: MemoryMode | None = None
    ) -> GuidanceMode:
        """How `count` images like the completed `request` are generated in one batch, in the mode
        that was fitted last, or in `memory`.

        An image takes two rows of the UNet in batched guidance, one otherwise. Raises UsageError
        when the bundle's rows, or the mode asked for in the settings, don't allow that.
        """
        fast = (memory or self.memory) == "fast"
        asked = self.settings.guidance_mode
        return guidance_mode(self.spec.shape, count, self._guided(request), fast, asked)

    def images_per_run(self, request: Request) -> int:
        """Images like `request` that a bundle with a fixed number of rows generates at a time."""
        rows = self.spec.shape.batch
        return rows // 2 if self._guided(self.complete(request)) and rows % 2 == 0 else rows

    def generate(
        self,
        requests: Sequence[Request],
        on_step: Listener | None = None,
        previews: bool = False,
    ) -> list[Image.Image]:
        """Make one image per request, all in one batch.

        The requests may differ in prompt, negative prompt and seed only. Image k depends on its
        own request alone, not on the batch it was made in (up to the backend's rounding; where
        activations are quantized dynamically, the images of a batch share their ranges).
        on_step is told of each step; what it raises ends the drawing, not the pipeline. previews:
        whether it decodes unfinished images, which takes memory of its own.
        Raises UsageError for requests that can't share a batch, once the pipeline is closed, and
        within on_step; ResourceError when memory is short.
        """
        with self._turn():
            self._drawing = True
            try:
                return self._generate(requests, on_step, previews)
            finally:
                self._drawing = False
                for component in DRAWING:  # what an error left there
                    self._release(component)

    def _generate(
        self, requests: Sequence[Request], on_step: Listener | None, previews: bool
    ) -> list[Image.Image]:
        if not requests:
            return []
        start = time.perf_counter()
        requests = [self.complete(request) for request in requests]
        first = requests[0]
        for request in requests:
            same = replace(
                request,
                prompt=first.prompt,
                seed=first.seed,
                negative_prompt=first.negative_prompt,
            )
            if same != first:
                raise UsageError("the images of one batch must share steps, size and scheduler")
        count = len(requests)
        assert first.guidance_scale is not None and first.height and first.width

        self._fit(first, count, previews)
        guided = self._guided(first)
        mode = self.guidance_mode(first, count)
        conditioning = Conditioning(
            self._encode([request.prompt for request in requests]),
            self._encode([request.negative_prompt for request in requests]) if guided else None,
        )
        used = {text for r in requests for text in (r.prompt, r.negative_prompt)}
        self._embeddings = {k: v for k, v in self._embeddings.items() if k in used}
        self._release("text_encoder")

        scale = self.spec.latent.scale_factor
        shape = (self.spec.latent.channels, first.height // scale, first.width // scale)
        noise = BatchNoise([request.seed for request in requests])
        unet = self._load("unet")
        before = unet.seconds
        latents = denoise(
            unet,
            self._scheduler(first),
            noise((count, *shape)),
            conditioning,
            first.guidance_scale,
            noise,
            mode=mode,
            on_step=self._watch(on_step),
        )
        self.timings.add(self.timings.run, "unet", unet.seconds - before)
        self._release("unet")
        images = self._images(latents)
        self.timings.total += time.perf_counter() - start
        self.timings.peak_memory_bytes = peak_bytes()
        return images

    def decode(self, latents: Float) -> list[Image.Image]:
        """Latents [B, C, h, w] -> B images of h, w times the latent scale factor, 8-bit RGB.

        Also shows unfinished latents, for a preview. Raises UsageError once the pipeline is closed.
        """
        with self._turn(while_drawing=True):
            return self._images(latents)

    def _images(self, latents: Float) -> list[Image.Image]:
        from PIL import Image

        images = []
        for row in latents:  # one at a time: the decoder is what sets the memory peak
            image = self._decoded(row)
            pixels = np.clip(image.transpose(1, 2, 0) * 127.5 + 127.5, 0, 255)
            images.append(Image.fromarray(pixels.round().astype(np.uint8)))
        self._release("vae_decoder")
        return images

    def _decoded(self, latents: Float) -> Float:
        """Latents [C, h, w] -> values [3, H, W] from -1 to 1; in tiles where weights are streamed,
        if the bundle's decoder can be run so."""
        spec = self.spec.latent
        split = self._split()
        if split is not None:
            return self._decoded_in_parts(split, latents)
        runner = self._load("vae_decoder")

        def decode(seen: Float, rows: Tile, columns: Tile) -> Float:
            return self._image(runner, seen)

        if self.memory == "stream" and spec.halo is not None and self.spec.shape.dynamic:
            return decode_tiles(decode, latents, spec.scale_factor, TILE, margin_of(spec.halo))
        return self._image(runner, latents[None])

    def _image(self, runner: Runner, latents: Float) -> Float:
        """Latents [1, C, h, w] through the whole decoder: values [3, H, W]."""
        image: Float = self._run(runner, {"latents": latents})[0]
        scale = self.spec.latent.scale_factor
        expected = (3, *(scale * size for size in latents.shape[2:]))
        if image.shape != expected:
            raise BundleError(
                f"vae_decoder makes an image of the shape {list(image.shape)}, not "
                f"{list(expected)}: build the bundle again"
            )
        return image

    def _split(self) -> SplitDecoder | None:
        """Those that the decoder is run in; None where it is run as a whole."""
        if self.memory != "stream" or "vae_decoder" in self._replaced:
            return None
        return self.bundle.manifest.engines["vae_decoder"].split

    def _decoded_in_parts(self, split: SplitDecoder, latents: Float) -> Float:
        """See runtime.tiles. Only one part is in memory at a time."""
        with self._open_part(split.head) as head:
            features = self._run(head, {"latents": latents[None]})[0]
        give_back()
        with self._open_part(split.tail) as tail:
            scale = self.spec.latent.scale_factor
            try:
                image = decode_tail(tail, features, scale, self._window)
            except ValueError as exc:  # its tiles have other sizes than those of the features
                raise BundleError(
                    f"head and tail of vae_decoder don't fit each other ({exc}): build the bundle "
                    "again"
                ) from exc
            self.timings.add(self.timings.run, "vae_decoder", tail.seconds)
        give_back()
        return image

    def _open_part(self, part: DecoderPart) -> Runner:
        start = time.perf_counter()
        runner = self._opened_runner("vae_decoder", part)
        self.timings.add(self.timings.load, "vae_decoder", time.perf_counter() - start)
        return runner

    def replace(self, component: str, runner: Runner) -> None:
        """Generate with another runner for one component from now on; the one before is freed.
        Raises UsageError, as `restore` and `forget_prompts` do, within on_step and once it is
        closed."""
        with self._turn():
            before = self._runners.pop(component, None)
            if before is not None:
                before.close()
            self._embeddings.clear()
            self._runners[component] = runner
            self._replaced.add(component)

    def restore(self, component: str) -> None:
        """Generate with the bundle's own engine again; it is loaded when first needed."""
        with self._turn():
            self._runners.pop(component).close()
            self._replaced.discard(component)
            self._embeddings.clear()

    def forget_prompts(self) -> None:
        """Encode every prompt anew from now on, as for an image on its own."""
        with self._turn():
            self._embeddings.clear()

    def close(self) -> None:
        """Free all components, for good; twice is as good as once.

        Waits for what another thread generates. Raises UsageError within on_step.
        """
        with self._lock:
            if self._closed:
                return
            with self._turn():
                self._closed = True
                for runner in self._runners.values():
                    runner.close()
                self._runners.clear()

    def _scheduler(self, request: Request) -> Scheduler:
        assert request.scheduler is not None and request.num_inference_steps is not None
        try:
            scheduler = create_scheduler(request.scheduler, self.spec.scheduler.config)
            scheduler.set_timesteps(request.num_inference_steps)
        except (ArithmeticError, ValueError, IndexError) as exc:
            raise InputError(
                f"no schedule of {request.scheduler} in {request.num_inference_steps} steps can be "
                f"computed from the bundle's configuration ({exc}): choose another --scheduler"
            ) from exc
        return scheduler

    def _check_schedule(self, request: Request) -> None:
        """Raise for a sampler or number of steps that can't be; each pair is tried once."""
        pair = (request.scheduler, request.num_inference_steps)
        if pair not in self._schedules:
            self._scheduler(request)
            self._schedules.add(pair)

    def _encode(self, prompts: list[str]) -> Float:
        """Text embeddings [len(prompts), tokens, channels]; each distinct prompt is run once."""
        for prompt in dict.fromkeys(prompts):
            if prompt not in self._embeddings:
                ids, cut = self._tokenizer.encode(prompt)
                if cut:
                    self.truncations[prompt] = cut
                runner = self._load("text_encoder")
                self._embeddings[prompt] = self._run(runner, {"input_ids": ids})
        return np.concatenate([self._embeddings[prompt] for prompt in prompts])

    def _run(self, runner: Runner, inputs: dict[str, npt.NDArray[np.generic]]) -> Float:
        """Run one row through a component of one output; a copy of what comes out."""
        before = runner.seconds
        (output,) = run_once(runner, inputs).values()
        component = runner.spec.name.partition(".")[0]  # of a part: vae_decoder.head
        self.timings.add(self.timings.run, component, runner.seconds - before)
        return np.array(output, np.float32)

    def _load(self, component: str) -> Runner:
        if component not in self._runners:
            start = time.perf_counter()
            self._runners[component] = self.open_runner(component)
            self.timings.add(self.timings.load, component, time.perf_counter() - start)
        return self._runners[component]

    def open_runner(self, component: str) -> Runner:
        """A runner of one component, for `generate`; it is the caller's to close. Raises UsageError
        once the pipeline is closed."""
        with self._turn(while_drawing=True):
            return self._opened_runner(component)

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

    def _release(self, component: str) -> None:
        if self.memory != "fast" and component in self._runners.keys() - self._replaced:
            self._runners.pop(component).close()
            give_back()

    def fit(self, request: Request, count: int, previews: bool = False) -> None:
        """Choose how to generate `count` images like the completed `request` at a time, so that it
        fits into memory: `memory` is the fastest mode that does.

        Raises ResourceError, before anything is loaded, where it doesn't fit in any mode (or in the
        one that the settings ask for), and UsageError as `guidance_mode` does.
        """
        with self._turn():
            self._fit(request, count, previews)

    def estimate(self, request: Request, count: int, previews: bool = False) -> int:
        """Bytes of the process at most, mapped files included, while `count` images like the
        completed `request` are generated at a time in the mode that is set."""
        fitting = self._fitting()
        drawing = fitting.drawing(self._batch(request, count, previews), self.memory)
        return fitting.costs.need(self.memory, drawing, self._window).resident

    @property
    def process_bytes(self) -> int:
        """What the process takes without any component, backends included."""
        return self._process

    def _fit(self, request: Request, count: int, previews: bool) -> None:
        found = self._fitting().check(self._batch(request, count, previews))
        before, self._fit_now = self._fit_now, found
        changed = before is not None and (
            (found.memory, found.window) != (before.memory, before.window)
            # What a session took for another size, it keeps: together that may be more than either.
            or (self.settings.max_memory is not None and found.drawing != before.drawing)
        )
        if changed:
            for component in self._runners.keys() - self._replaced:
                self._runners.pop(component).close()
            give_back()

    @property
    def memory(self) -> MemoryMode:
        """The mode that was fitted last; before any, the one that the settings ask for, or fast."""
        return self._fit_now.memory if self._fit_now else self.settings.memory or "fast"

    @property
    def _window(self) -> int:
        """Side in latents of a streamed decoder's tiles."""
        return self._fit_now.window if self._fit_now else WINDOWS[0]

    def _fitting(self) -> Fitting:
        """What is asked to fit, with what is free now."""
        settings, streamed = self.settings, self.memory == "stream"
        costs = bundle_costs(self.bundle, DRAWING, self._own_kernels, self._process, self._replaced)
        free = available_bytes() if settings.max_memory is None else None
        taken = (
            self._process - unimported_bytes(self._backends) + costs.loaded(self._runners, streamed)
        )
        budget = Budget(settings.max_memory, free, taken)
        return Fitting(costs, budget, settings.memory, settings.guidance_mode)

    def _batch(self, request: Request, count: int, previews: bool) -> Batch:
        """`count` images like a completed request."""
        assert request.height and request.width
        return Batch(request.height, request.width, count, self._guided(request), previews)

    def _guided(self, request: Request) -> bool:
        assert request.guidance_scale is not None
        return request.guidance_scale > 1 and not self._guidance_is_an_input()

    def _guidance_is_an_input(self) -> bool:
        return self.spec.components["unet"].input("timestep_cond") is not None

    def _watch(self, on_step: Listener | None) -> Listener:
        def watch(step: Step) -> None:
            self.timings.steps.append(step.seconds)
            if on_step:
                on_step(step)

        return watch


def _check_precisions(bundle: Bundle) -> None:
    """Raise BundleError for a number format that no version knows."""
    manifest = bundle.manifest
    layers = () if manifest.recipe is None else manifest.recipe.layers
    for precision in {manifest.precision, *(layer.scheme for layer in layers)}:
        try:
            number_format(precision)
        except UsageError as exc:
            raise BundleError(f"{bundle.path}: its manifest isn't valid: {exc}") from exc


_T = TypeVar("_T")


def _first(value: _T | None, default: _T) -> _T:
    return default if value is None else value
