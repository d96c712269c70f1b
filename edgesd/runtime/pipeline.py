"""From a bundle and a prompt to pictures, on the device."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import numpy.typing as npt

from edgesd.errors import (
    BundleError,
    EdgesdError,
    MissingDependencyError,
    ResourceError,
    TargetError,
    UsageError,
)
from edgesd.runtime import kernels
from edgesd.runtime.bundle import Bundle
from edgesd.runtime.closing import Closing
from edgesd.runtime.denoise import Conditioning, GuidanceMode, Step, denoise
from edgesd.runtime.memory import MemoryMode, available_bytes, give_back, peak_bytes, resident_bytes
from edgesd.runtime.networks import check_networks
from edgesd.runtime.noise import BatchNoise
from edgesd.runtime.runners import Runner, run_once
from edgesd.runtime.schedulers import Scheduler, create_scheduler
from edgesd.runtime.signature import check_trusted
from edgesd.runtime.tiles import (
    TILE,
    WINDOWS,
    Tile,
    decoder_bytes,
    draw_tail,
    draw_tiles,
    margin_of,
    tiled_decoder_bytes,
)
from edgesd.runtime.tokenizer import Truncation, check_prompt, tokenizer_of
from edgesd.spec import (
    ComponentSpec,
    Half,
    Halves,
    LayerRecipe,
    check_multiple,
    number_format,
    parse_scheme,
)

if TYPE_CHECKING:
    from PIL import Image
    from typing_extensions import Self

    from edgesd.runtime.runners.tensorrt import LoadedPlan

Float = npt.NDArray[np.float32]

_FAMILIES = ("sd",)
DRAWING = ("text_encoder", "unet", "vae_decoder")
_MAX_GUIDANCE = 1000
_HEADROOM_BYTES = 64 << 20
_ONNXRUNTIME_BYTES = 72 << 20
_LIVE_TENSORS = 18


@dataclass(frozen=True)
class Request:
    """One picture to make; None takes the bundle's own default.

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

    max_memory: bytes that drawing may take, at the bundle's own size; None for what is free.
    threads: per operator, 0 for all cores. plan_of: component -> its plan for TensorRT on this
    machine, built if need be (engines.plans). fallback: a bundle for TensorRT is drawn on the CPU
    where there is no plan, or it fails. kernels: edgesd's own, where the bundle and this machine
    have them. made_here: the bundle was just built by this program, so that nobody need have signed
    it.
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

    Components stay loaded between pictures unless memory is short, when each is released after
    its use. `truncations` tells of every prompt what was cut; `fallbacks` of every component that
    runs on the CPU instead of TensorRT why.

    Raises BundleError for a bundle that this machine doesn't trust (runtime.signature), or whose
    networks aren't what pictures are drawn with.

    Threads may share a pipeline: it does one thing at a time, and whoever calls meanwhile waits,
    `close` included. Pipelines of their own draw side by side. Within `on_step`, on the thread that
    draws, `decode` shows a preview; what would change the networks that are drawing (`generate`,
    `replace`, `restore`, `close` ...) raises UsageError there, as every use after `close` does.
    """

    def __init__(self, bundle: Bundle, settings: Settings | None = None) -> None:
        self.bundle = bundle
        self.spec = bundle.manifest.pipeline
        self.settings = settings or Settings()
        if self.spec.family not in _FAMILIES:
            raise BundleError(
                f"{bundle.path} holds a pipeline of the family {self.spec.family!r}; this version "
                f"draws with: {', '.join(_FAMILIES)}"
            )
        if not self.settings.made_here:
            check_trusted(bundle)
        check_networks(bundle.manifest, DRAWING)
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
        self._window = WINDOWS[0]
        # Bytes of a component's weights that stay mapped while weights are streamed.
        self._weights_kept: dict[str, int] = {}
        self.memory: MemoryMode = self.settings.memory or self._fitting_mode()

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
        self._check_open()  # without a turn: what is asked for can be checked while another draws
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
            check_multiple(name, size, shape.multiple_of)
        self._check_schedule(request)
        return request

    def guidance_mode(self, request: Request, count: int) -> GuidanceMode:
        """How `count` pictures like the completed `request` are drawn in one batch.

        A picture takes two rows of the UNet in batched guidance, one otherwise. Raises UsageError
        when the bundle's rows, or the mode asked for in the settings, don't allow that.
        """
        shape, asked = self.spec.shape, self.settings.guidance_mode
        rows: dict[GuidanceMode, int] = {"batched": 2 * count, "sequential": count}
        if not self._guided(request):
            rows = {"sequential": count}
        fits = (
            [mode for mode, n in rows.items() if n == shape.batch]
            if not shape.dynamic
            else [mode for mode, n in rows.items() if n <= shape.batch]
        )
        if asked and len(rows) == 2:
            fits = [mode for mode in fits if mode == asked]
        if not fits:
            most = "up to" if shape.dynamic else "exactly"
            need = " or ".join(f"{n} ({mode} guidance)" for mode, n in rows.items())
            raise UsageError(
                f"this bundle's UNet takes {most} {shape.batch} rows; {count} at a time need {need}"
                ": change --batch or --guidance-mode"
            )
        return fits[0] if self.memory == "fast" else fits[-1]

    def pictures_per_run(self, request: Request) -> int:
        """Pictures like `request` that a bundle with a fixed number of rows draws at a time."""
        rows = self.spec.shape.batch
        return rows // 2 if self._guided(self.complete(request)) and rows % 2 == 0 else rows

    def generate(
        self, requests: Sequence[Request], on_step: Listener | None = None
    ) -> list[Image.Image]:
        """Make one picture per request, all in one batch.

        The requests may differ in prompt, negative prompt and seed only. Picture k depends on its
        own request alone, not on the batch it was made in (up to the backend's rounding; where
        activations are quantized dynamically, the pictures of a batch share their ranges).
        on_step is told of each step; what it raises ends the drawing, not the pipeline.
        Raises UsageError for requests that can't share a batch, once the pipeline is closed, and
        within on_step; ResourceError when memory is short.
        """
        with self._turn():
            self._drawing = True
            try:
                return self._generate(requests, on_step)
            finally:
                self._drawing = False
                for component in DRAWING:  # what an error left there
                    self._release(component)

    def _generate(self, requests: Sequence[Request], on_step: Listener | None) -> list[Image.Image]:
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
                raise UsageError("the pictures of one batch must share steps, size and scheduler")
        count = len(requests)
        assert first.guidance_scale is not None and first.height and first.width

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
        pictures = self._pictures(latents)
        self.timings.total += time.perf_counter() - start
        self.timings.peak_memory_bytes = peak_bytes()
        return pictures

    def decode(self, latents: Float) -> list[Image.Image]:
        """Latents [B, C, h, w] -> B pictures of h, w times the latent scale factor, 8-bit RGB.

        Also shows unfinished latents, for a preview. Raises UsageError once the pipeline is closed.
        """
        with self._turn(while_drawing=True):
            return self._pictures(latents)

    def _pictures(self, latents: Float) -> list[Image.Image]:
        from PIL import Image

        pictures = []
        for row in latents:  # one at a time: the decoder is what sets the memory peak
            image = self._decoded(row)
            pixels = np.clip(image.transpose(1, 2, 0) * 127.5 + 127.5, 0, 255)
            pictures.append(Image.fromarray(pixels.round().astype(np.uint8)))
        self._release("vae_decoder")
        return pictures

    def _decoded(self, latents: Float) -> Float:
        """Latents [C, h, w] -> values [3, H, W] from -1 to 1; in tiles where weights are streamed,
        if the bundle's decoder can be run so."""
        spec = self.spec.latent
        halves = self._halves()
        if halves is not None:
            return self._decoded_in_halves(halves, latents)
        runner = self._load("vae_decoder")

        def decode(seen: Float, rows: Tile, columns: Tile) -> Float:
            part: Float = self._run(runner, {"latents": seen})[0]
            return part

        if self.memory == "stream" and spec.halo is not None and self.spec.shape.dynamic:
            return draw_tiles(decode, latents, spec.scale_factor, TILE, margin_of(spec.halo))
        whole: Float = self._run(runner, {"latents": latents[None]})[0]
        return whole

    def _halves(self) -> Halves | None:
        """Those that the decoder is run in; None where it is run as a whole."""
        replaced = "vae_decoder" in self._runners
        if self.memory != "stream" or replaced:
            return None
        return self.bundle.manifest.engines["vae_decoder"].halves

    def _decoded_in_halves(self, halves: Halves, latents: Float) -> Float:
        """See runtime.tiles. Only one half is in memory at a time."""
        with self._open_half(halves.head) as head:
            features = self._run(head, {"latents": latents[None]})[0]
        give_back()
        with self._open_half(halves.tail) as tail:
            scale = self.spec.latent.scale_factor
            picture = draw_tail(tail, features, scale, self._window)
            self.timings.add(self.timings.run, "vae_decoder", tail.seconds)
        give_back()
        return picture

    def _open_half(self, half: Half) -> Runner:
        start = time.perf_counter()
        self._check_memory("vae_decoder")
        runner = self._onnxruntime_runner("vae_decoder", half.spec, half)
        self.timings.add(self.timings.load, "vae_decoder", time.perf_counter() - start)
        return runner

    def replace(self, component: str, runner: Runner) -> None:
        """Draw with another runner for one component from now on; the one before is freed. Raises
        UsageError, as `restore` and `forget_prompts` do, within on_step and once it is closed."""
        with self._turn():
            before = self._runners.pop(component, None)
            if before is not None:
                before.close()
            self._embeddings.clear()
            self._runners[component] = runner

    def restore(self, component: str) -> None:
        """Draw with the bundle's own engine again; it is loaded when first needed."""
        with self._turn():
            self._runners.pop(component).close()
            self._embeddings.clear()

    def forget_prompts(self) -> None:
        """Encode every prompt anew from now on, as for a picture on its own."""
        with self._turn():
            self._embeddings.clear()

    def close(self) -> None:
        """Free all components, for good; twice is as good as once.

        Waits for what another thread draws. Raises UsageError within on_step.
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
        assert request.scheduler and request.num_inference_steps is not None
        scheduler = create_scheduler(request.scheduler, self.spec.scheduler.config)
        scheduler.set_timesteps(request.num_inference_steps)
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
        component = runner.spec.name.partition(".")[0]  # of a half: vae_decoder.head
        self.timings.add(self.timings.run, component, runner.seconds - before)
        return np.array(output, np.float32)

    def _load(self, component: str) -> Runner:
        if component not in self._runners:
            start = time.perf_counter()
            self._check_memory(component)
            self._runners[component] = self.open_runner(component)
            self.timings.add(self.timings.load, component, time.perf_counter() - start)
        return self._runners[component]

    def open_runner(self, component: str) -> Runner:
        """A runner of one component, for `generate`; it is the caller's to close. Raises UsageError
        once the pipeline is closed."""
        with self._turn(while_drawing=True):
            return self._opened_runner(component)

    def _opened_runner(self, component: str) -> Runner:
        engine, spec = self.bundle.manifest.engines[component], self.spec.components[component]
        if engine.backend == "tensorrt":
            try:
                return self._tensorrt_runner(component, spec)
            except EdgesdError as exc:
                if not self.settings.fallback or isinstance(exc, BundleError):
                    raise
                self.fallbacks[component] = str(exc)
        elif engine.backend != "onnxruntime":
            raise TargetError(
                f"{component} was built for the backend {engine.backend!r}; this version runs: "
                "onnxruntime, tensorrt"
            )
        # Graphs for TensorRT are of standard operators, which ONNX Runtime has, too.
        return self._onnxruntime_runner(component, spec, None)

    def _onnxruntime_runner(self, component: str, spec: ComponentSpec, half: Half | None) -> Runner:
        """A runner of one component, or of one of its halves, with edgesd's own kernels where they
        can be used."""
        from edgesd.runtime.runners.onnxruntime import OnnxRuntimeRunner

        threads, stream = self.settings.threads, self.memory == "stream"
        if self._own_kernels(component):
            kept = self._weights_kept.get(component, self._weights_kept.get("unet", 0))
            graph = self.bundle.graph_file(component, kernels=True, half=half)
            try:
                with kernels.keeping_weights(kept if stream else None):
                    return OnnxRuntimeRunner(
                        spec, graph, threads, library=kernels.library(), small=half is not None
                    )
            except MissingDependencyError as exc:
                self.fallbacks[component] = f"{exc}: drawing without edgesd's own kernels"
        graph = self.bundle.graph_file(component, half=half)
        return OnnxRuntimeRunner(
            spec, graph, threads, weights_in_file=stream, small=half is not None
        )

    def _own_kernels(self, component: str) -> bool:
        """Whether the component's graph for edgesd's own kernels is there and can run here."""
        engine, recipe = self.bundle.manifest.engines[component], self.bundle.manifest.recipe
        if not self.settings.kernels or engine.kernels is None or recipe is None:
            return False
        return kernels.usable(la.scheme for la in recipe.layers if la.component == component)

    def _tensorrt_runner(self, component: str, spec: ComponentSpec) -> Runner:
        if self.settings.plan_of is None:
            raise TargetError("there are no plans for TensorRT")
        plan = self.settings.plan_of(component)
        from edgesd.runtime.device_memory import open_device_memory
        from edgesd.runtime.runners.tensorrt import TensorRtRunner

        return TensorRtRunner(spec, plan.data, open_device_memory(), plan.module)

    def _release(self, component: str) -> None:
        if self.memory != "fast" and component in self._runners:
            self._runners.pop(component).close()
            give_back()

    def _loaded_bytes(self, component: str) -> int:
        """Memory that a component's weights take once loaded: they are computed with in fp32."""
        recipe = self.bundle.manifest.recipe
        if self._own_kernels(component):
            return self.bundle.weight_bytes(component)  # mapped, and used where they lie
        if recipe is not None:
            # Codes of convolutions become int8 or fp32 when they are loaded: the weights' number
            # bounds it from above.
            layers = [layer for layer in recipe.layers if layer.component == component]
            return sum(_loaded_layer_bytes(layer) for layer in layers)
        engine = self.bundle.manifest.engines[component]
        return self.bundle.weight_bytes(component) * (2 if engine.precision == "fp16" else 1)

    def _check_memory(self, component: str) -> None:
        available = available_bytes()
        loaded = 0 if self.memory == "stream" else self._loaded_bytes(component)
        needed = loaded + _HEADROOM_BYTES
        if available is not None and needed > available:
            raise ResourceError(
                f"{component} needs about {needed >> 20} MB of memory and {available >> 20} MB are "
                "free: end other programs, use --memory stream, or build for a smaller model"
            )

    def _fitting_mode(self) -> MemoryMode:
        """The mode that leaves most in memory, within max_memory or what is free.

        Raises ResourceError when max_memory is too little for any.
        """
        loaded = {component: self._loaded_bytes(component) for component in DRAWING}
        most, decoder = max(loaded.values()), loaded["vae_decoder"] + self._decoder_bytes()
        limit = self.settings.max_memory
        if limit is None:
            free = available_bytes()
            if free is None:
                return "fast"
            together = sum(loaded.values()) + max(sum(loaded.values()), self._decoder_bytes())
            if together <= free:
                return "fast"
            return "balanced" if max(most, decoder) + _HEADROOM_BYTES <= free else "stream"
        process = resident_bytes() + _ONNXRUNTIME_BYTES
        drawing = self._drawing_bytes()
        for self._window in WINDOWS:
            tiled = process + self._streamed_decoder_bytes()
            if tiled <= limit:
                break
        if (least := max(drawing, tiled)) > limit:
            shape = self.spec.shape
            raise ResourceError(
                f"{shape.width}x{shape.height} pixels need about {least / 1e6:.0f} MB "
                f"besides the weights, and --max-memory is {limit / 1e6:.0f} MB: allow more, or "
                "build for a smaller --size"
            )
        self._weights_kept = {"vae_decoder": limit - tiled, "unet": limit - drawing}
        together = sum(loaded.values()) + max(drawing, process + self._decoder_bytes())
        if together <= limit:
            return "fast"
        return "balanced" if max(most + drawing, process + decoder) <= limit else "stream"

    def _decoder_bytes(self) -> int:
        """Memory that a full autoencoder's decoder takes besides its weights at the bundle's size,
        if it is run as a whole; other decoders take less than the UNet."""
        levels, engine = self.spec.latent.levels, self.bundle.manifest.engines["vae_decoder"]
        if levels is None or engine.backend != "onnxruntime":
            return 0
        # ONNX Runtime copies weights of convolutions into the layout that is fastest.
        copied = 0 if self._own_kernels("vae_decoder") else self._loaded_bytes("vae_decoder")
        return decoder_bytes(levels, *self._latent_size()) + copied

    def _streamed_decoder_bytes(self) -> int:
        """The same in halves, with their weights, where the bundle has them; tiles of _window."""
        levels, engine = self.spec.latent.levels, self.bundle.manifest.engines["vae_decoder"]
        if levels is None or engine.halves is None:
            return self._decoder_bytes()
        # Mapped; those of 16 bits besides as they are computed with, and codes that become fp32.
        copies = 1
        if not self._own_kernels("vae_decoder") and engine.precision != "fp32":
            copies = 3 if engine.precision == "fp16" else 5
        head, tail = (
            copies * half.weight_bytes for half in (engine.halves.head, engine.halves.tail)
        )
        height, width = self._latent_size()
        return tiled_decoder_bytes(levels, height, width, head, tail, self._window)

    def _latent_size(self) -> tuple[int, int]:
        """Height and width of the latents of the bundle's own size."""
        shape, scale = self.spec.shape, self.spec.latent.scale_factor
        return shape.height // scale, shape.width // scale

    def _drawing_bytes(self) -> int:
        """Memory that a picture of the bundle's size takes besides weights, about.

        The process and ONNX Runtime, the UNet's activations: `_LIVE_TENSORS` of its first block's
        at a time, and twice the largest layer, which passes through (docs/cpu.md).
        """
        recipe = self.bundle.manifest.recipe
        convs = [] if recipe is None else [la for la in recipe.layers if la.name == "conv_in"]
        channels = max((la.shape[0] for la in convs if la.component == "unet"), default=320)
        latents = math.prod(self._latent_size())
        layers = () if recipe is None else recipe.layers
        passing = max((layer.bytes for layer in layers if layer.kind != "embedding"), default=0)
        live = _LIVE_TENSORS * 4 * channels * latents
        return resident_bytes() + _ONNXRUNTIME_BYTES + live + 2 * passing

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


def _loaded_layer_bytes(layer: LayerRecipe) -> int:
    """Memory of one quantized layer's weights in a session: what is computed with (fp32, int8, or
    packed 4 bits), its file, and its branch in fp32."""
    scheme = None if layer.scheme == "fp16" else parse_scheme(layer.scheme)
    if scheme is None:
        per_weight = 4
    elif layer.kind == "embedding":
        per_weight = 1
    elif layer.kind == "linear" and scheme.weight_bits == 4:
        per_weight = 0
    else:
        per_weight = 1 if scheme.activation_bits == 8 else 4
    return per_weight * math.prod(layer.shape) + 2 * layer.bytes


_T = TypeVar("_T")


def _first(value: _T | None, default: _T) -> _T:
    return default if value is None else value
