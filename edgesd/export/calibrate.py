"""Records what flows into each layer while the pipeline's own loop generates calibration prompts.

Components run in the order of the pipeline's flow, each on what those before made; the denoiser in
`runtime/denoise.py` with a torch-backed runner, one step of the schedule after the other. One
component is in memory at a time. Statistics are streamed: with more prompts only the outputs grow
(latents, images). The state is written now and then, so that a run that was interrupted goes on
from there and ends with the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from edgesd.errors import EdgesdError, InputError
from edgesd.export.examples import example_mask
from edgesd.export.families import Component, ExportSpec
from edgesd.export.quantize.layers import Layer
from edgesd.export.torch_runner import TorchRunner, any_batch
from edgesd.files import atomic_path, atomic_write
from edgesd.progress import SILENT, Progress
from edgesd.runtime.arrays import Array, Float
from edgesd.runtime.backends.base import run_once
from edgesd.runtime.conditioning import Conditioned, Encoded, with_size_ids
from edgesd.runtime.controls import controls_of
from edgesd.runtime.denoise import Step, denoise
from edgesd.runtime.flow import Stage, flow_of
from edgesd.runtime.modulation import modulated
from edgesd.runtime.noise import BatchNoise
from edgesd.runtime.pictures import Picture
from edgesd.runtime.requests import (
    CompleteRequest,
    Completion,
    Control,
    Request,
    painted_whole,
    scheduler_of,
)
from edgesd.runtime.tasks import text as text_to_image
from edgesd.runtime.tasks.beginning import Beginning
from edgesd.runtime.tokenizer import PromptTokenizer
from edgesd.spec.bundle import CalibrationSpec
from edgesd.spec.pipeline import Fill, Part, PipelineSpec

VERSION = 4
"""Part of the cache key: raised when the statistics change in meaning."""

COVARIANCE_BYTES = 3 << 29
"""Covariance blocks of one component, at most: 1.5 GiB."""

BLOCKS = (4608, 2304, 1152, 576, 288)
"""Sizes of covariance blocks; the largest that fits is taken. Whole taps of usual channels."""

ROWS_PER_RUN = 512
"""Rows that enter the covariance per run of the network; they are spread evenly over all."""

SAMPLE_BYTES = 4 << 20
SAMPLE_ROWS = 1024
"""Rows of a layer's input that are kept as they are, at most."""
SAMPLES_BYTES = 1 << 30
"""The same of all layers of a component together: where there are more, each gets its share."""
LEAST_ROWS = 64

SAVE_SECONDS = 20.0
"""Between two states on disk at least; the last one of a component is always written."""
SAVE_SHARE = 20
"""Times as long as writing a state takes, nothing is written after it."""

_NEGATIVE = ""
_MAX_FP16 = float(torch.finfo(torch.float16).max)

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LayerStats:
    """What went into one layer, T recorded timesteps, C channels, K columns.

    low, high [T, C]: smallest and largest value of each channel. blocks: sums
    of x x^T over `count` rows, one [B, B] for each B columns of K (the last one smaller). rows
    [n, K] float16: a sample, spread over prompts and timesteps; row_steps [n]: index of theirs.
    rows_per_run: rows of the matrix product in one run of the network. blocks are () where no
    covariance was asked for.
    """

    low: Float
    high: Float
    blocks: tuple[Float, ...]
    count: int
    rows: npt.NDArray[np.float16]
    row_steps: npt.NDArray[np.int64]
    rows_per_run: int = 1


class Calibration:
    """Statistics on disk, read layer by layer. `timesteps` [T]: those of the denoising loop."""

    def __init__(self, folder: Path, spec: CalibrationSpec) -> None:
        self.folder, self.spec = folder, spec

    def timesteps(self) -> Float:
        """The timesteps that the loop went through, in its order, each once [T]."""
        values: Float = np.load(self.folder / "timesteps.npy")
        return values

    def layer(self, layer: Layer) -> LayerStats | None:
        """Statistics of one layer; None for one that saw nothing (an embedding)."""
        with self._opened(layer) as file:
            names = set(file.keys())
            key = layer.module
            if f"{key}:low" not in names:
                return None
            used = int(file.get_tensor(f"{key}:used")[0])
            blocks: list[Float] = []
            while f"{key}:block{len(blocks)}" in names:
                blocks.append(file.get_tensor(f"{key}:block{len(blocks)}"))
            whole = LayerStats(
                low=file.get_tensor(f"{key}:low"),
                high=file.get_tensor(f"{key}:high"),
                blocks=tuple(blocks),
                count=int(file.get_tensor(f"{key}:count")[0]),
                rows=file.get_tensor(f"{key}:rows")[:used],
                row_steps=file.get_tensor(f"{key}:row_steps")[:used],
                rows_per_run=int(file.get_tensor(f"{key}:rows_per_run")[0]),
            )
        return whole if layer.part is None else _part_of(whole, *layer.part)

    def rows_per_run(self, layer: Layer) -> int:
        """Rows of the layer's matrix product in one run of the network; 1 where none was seen."""
        key = f"{layer.module}:rows_per_run"
        with self._opened(layer) as file:
            return int(file.get_tensor(key)[0]) if key in file.keys() else 1  # noqa: SIM118

    @contextmanager
    def _opened(self, layer: Layer) -> Iterator[Any]:
        path = self.folder / f"{layer.component}.safetensors"
        try:
            with safe_open(path, "numpy") as file:
                yield file
        except (SafetensorError, OSError) as exc:
            raise EdgesdError(f"{path} can't be read ({exc}): remove it and run again") from exc


def _part_of(stats: LayerStats, start: int, stop: int) -> LayerStats:
    """What went into the columns from `start` to `stop` of a linear."""
    blocks, at = [], 0
    for block in stats.blocks:
        first, last = (min(max(edge - at, 0), len(block)) for edge in (start, stop))
        if first < last:
            blocks.append(block[first:last, first:last])
        at += len(block)
    columns = slice(start, stop)
    return replace(
        stats,
        low=stats.low[:, columns],
        high=stats.high[:, columns],
        blocks=tuple(blocks),
        rows=stats.rows[:, columns],
    )


@dataclass(frozen=True)
class CalibrationSettings:
    """What is to be recorded. Prompts are generated one at a time, seeds counting from
    `first_seed`. covariance: of layers' inputs, is wanted. sides: names of the pipeline's
    ControlNets and adapters, which every second prompt, from the first on, shows one of
    `pictures`. A denoiser that takes control images is shown one by each prompt; one for inpainting
    begins with the first."""

    prompts: tuple[str, ...]
    num_inference_steps: int
    guidance_scale: float
    scheduler: str
    height: int
    width: int
    first_seed: int = 1 << 20
    covariance: bool = True
    sides: tuple[str, ...] = ()
    pictures: tuple[Picture, ...] = ()

    def spec(self) -> CalibrationSpec:
        """The settings as the bundle's manifest has them."""
        return CalibrationSpec(
            prompts=len(self.prompts),
            prompts_sha256=hashlib.sha256("\n".join(self.prompts).encode()).hexdigest(),
            num_inference_steps=self.num_inference_steps,
            guidance_scale=self.guidance_scale,
            scheduler=self.scheduler,
            height=self.height,
            width=self.width,
        )

    def request(self, index: int) -> Request:
        """The request of a calibration prompt."""
        return Request(
            prompt=self.prompts[index],
            seed=self.first_seed + index,
            num_inference_steps=self.num_inference_steps,
            guidance_scale=self.guidance_scale,
            height=self.height,
            width=self.width,
            scheduler=self.scheduler,
            controls=self.controls(index),
        )

    def controls(self, index: int) -> tuple[Control, ...]:
        """What a prompt shows to sides."""
        if not self.controlled(index):
            return ()
        picture = self.pictures[index // 2 % len(self.pictures)]
        return tuple(Control(picture, name) for name in self.sides)

    def controlled(self, index: int) -> bool:
        """Whether a prompt shows anything."""
        return bool(self.sides) and index % 2 == 0


def calibration_key(settings: CalibrationSettings, source_sha256: str) -> str:
    """Name of the cache entry: a hash of all that the statistics depend on."""
    said = dict(vars(settings))
    pictures = [picture.sha256 for picture in said.pop("pictures")]
    if said.pop("covariance") is False:  # it was always there
        said["covariance"] = False
    if (sides := said.pop("sides")) or pictures:
        said["sides"] = (sides, pictures)
    parts = (VERSION, source_sha256, *said.values(), BLOCKS, COVARIANCE_BYTES)
    # Sums depend on how work is shared among threads.
    limits = (ROWS_PER_RUN, SAMPLE_BYTES, SAMPLE_ROWS, torch.__version__, torch.get_num_threads())
    return hashlib.sha256(repr((parts, limits)).encode()).hexdigest()[:16]


def calibrate(
    export: ExportSpec,
    layers: Sequence[Layer],
    settings: CalibrationSettings,
    tokenizers: Mapping[str, PromptTokenizer],
    folder: Path,
    progress: Progress = SILENT,
) -> Calibration:
    """Record statistics of `layers` into `folder`, or go on where a run before was interrupted.

    tokenizers: by the folders that the pipeline's wiring names. Raises InputError when the loop's
    values stop being finite or a prompt is bad, ResourceError when the disk is full.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _Calibrating(export, layers, settings, tokenizers, folder, progress).run()
    return Calibration(folder, settings.spec())


class _State:
    """One component's state on disk: statistics, outputs so far, and how many prompts are in."""

    def __init__(self, folder: Path, component: str) -> None:
        self.path = folder / f"{component}.safetensors"
        self._next = time.monotonic() + SAVE_SECONDS

    def due(self) -> bool:
        """Whether the state should be saved again: gigabytes take their time."""
        return time.monotonic() > self._next

    def load(self, layers: Sequence[Layer]) -> tuple[int, bool, dict[str, Tensor]]:
        """Prompts done, whether that is all of them, and the tensors; nothing, where the state is
        damaged or lacks one of `layers`."""
        if not self.path.exists():
            return 0, False, {}
        try:
            with safe_open(self.path, "pt") as file:
                meta = json.loads(file.metadata()["edgesd"])
                done, complete = int(meta["done"]), bool(meta["complete"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, KeyError, TypeError, ValueError):
            _log.warning("%s is damaged: recording again", self.path)
            return 0, False, {}
        if any(f"{layer.name}:low" not in tensors for layer in layers):
            _log.warning("%s lacks a layer: recording again", self.path)
            return 0, False, {}
        return done, complete, tensors

    def save(self, done: int, complete: bool, tensors: dict[str, Tensor]) -> None:
        began = time.monotonic()
        with atomic_path(self.path) as part:
            meta = json.dumps({"done": done, "complete": complete}, sort_keys=True)
            save_file({k: v.contiguous() for k, v in tensors.items()}, part, {"edgesd": meta})
        now = time.monotonic()
        self._next = now + max(SAVE_SECONDS, SAVE_SHARE * (now - began))


class _StatsRecorder:
    """Hooks on a component's layers that add up statistics; `runs` are expected in all. told: takes
    how many of them are done. covariance: of inputs, is added up, too."""

    def __init__(
        self,
        module: nn.Module,
        layers: Sequence[Layer],
        steps: int,
        runs: int,
        tensors: dict[str, Tensor],
        told: Callable[[int], None],
        covariance: bool = True,
    ) -> None:
        self.step = 0
        self.runs, self.told = runs, told
        self.tensors = tensors
        self._handles = []
        block, rows = _block_size(layers) if covariance else 0, _sample_rows(layers)
        for layer in layers:
            target = module.get_submodule(f"net.{layer.name}")
            if f"{layer.name}:low" not in tensors:
                _allocate(tensors, layer, steps, block, rows[layer])
            self._handles.append(target.register_forward_pre_hook(self._hook(layer)))

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, layer: Layer) -> Any:
        def record(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self._record(layer, inputs[0].detach())

        return record

    def _record(self, layer: Layer, x: Tensor) -> None:
        tensors, name = self.tensors, layer.name
        others = tuple(axis for axis in range(x.ndim) if axis != _channel_axis(layer, x))
        low, high = tensors[f"{name}:low"][self.step], tensors[f"{name}:high"][self.step]
        torch.minimum(low, x.amin(others), out=low)
        torch.maximum(high, x.amax(others), out=high)
        rows, total = _rows(layer, x, ROWS_PER_RUN)
        tensors[f"{name}:rows_per_run"][0] = total
        start = index = 0
        while (block := tensors.get(f"{name}:block{index}")) is not None:
            part = rows[:, start : start + len(block)]
            block.addmm_(part.T, part)
            start, index = start + len(block), index + 1
        tensors[f"{name}:count"] += len(rows)
        self._sample(layer, rows)

    def _sample(self, layer: Layer, rows: Tensor) -> None:
        """Keep some rows: each run gets an equal share of the space, whatever comes after it."""
        kept = self.tensors[f"{layer.name}:rows"]
        used = int(self.tensors[f"{layer.name}:used"])
        run = int(self.tensors[f"{layer.name}:runs"])
        self.tensors[f"{layer.name}:runs"] += 1
        share = (run + 1) * len(kept) // self.runs - run * len(kept) // self.runs
        take = min(share, len(rows), len(kept) - used)
        if take <= 0:
            return
        # A different phase each time, so that the sample isn't always the same corner.
        at = (torch.arange(take) * len(rows) // take + used * 7) % len(rows)
        kept[used : used + take] = rows[at].clamp(-_MAX_FP16, _MAX_FP16).half()
        self.tensors[f"{layer.name}:row_steps"][used : used + take] = self.step
        self.tensors[f"{layer.name}:used"] += take


def _channel_axis(layer: Layer, x: Tensor) -> int:
    return 1 if layer.kind == "conv" else x.ndim - 1


def _allocate(tensors: dict[str, Tensor], layer: Layer, steps: int, block: int, rows: int) -> None:
    """Zeros for one layer. block: of the covariance; 0: none. rows: that are kept."""
    name, columns = layer.name, layer.columns
    tensors[f"{name}:low"] = torch.full((steps, layer.channels), torch.inf)
    tensors[f"{name}:high"] = torch.full((steps, layer.channels), -torch.inf)
    for index, start in enumerate(range(0, columns if block else 0, block or 1)):
        size = min(block, columns - start)
        tensors[f"{name}:block{index}"] = torch.zeros(size, size)
    tensors[f"{name}:count"] = torch.zeros(1, dtype=torch.int64)
    tensors[f"{name}:used"] = torch.zeros(1, dtype=torch.int64)
    tensors[f"{name}:runs"] = torch.zeros(1, dtype=torch.int64)
    tensors[f"{name}:rows_per_run"] = torch.zeros(1, dtype=torch.int64)
    tensors[f"{name}:rows"] = torch.zeros(rows, columns, dtype=torch.float16)
    tensors[f"{name}:row_steps"] = torch.zeros(rows, dtype=torch.int64)


def _block_size(layers: Sequence[Layer]) -> int:
    """The largest of BLOCKS at which all covariance blocks fit into COVARIANCE_BYTES."""
    columns = [layer.columns for layer in layers if layer.kind != "embedding"]
    for block in BLOCKS:
        if sum(4 * n * min(n, block) for n in columns) <= COVARIANCE_BYTES:
            return block
    return BLOCKS[-1]


def _sample_rows(layers: Sequence[Layer]) -> dict[Layer, int]:
    """Rows to keep of each layer's input."""
    sizes = {layer: min(SAMPLE_ROWS, SAMPLE_BYTES // (2 * layer.columns)) for layer in layers}
    total = sum(2 * layer.columns * rows for layer, rows in sizes.items())
    share = min(1.0, SAMPLES_BYTES / max(1, total))
    return {layer: max(LEAST_ROWS, int(rows * share)) for layer, rows in sizes.items()}


def _rows(layer: Layer, x: Tensor, limit: int) -> tuple[Tensor, int]:
    """Rows of the layer's matrix product [n, K], n at most `limit`, spread evenly over x; and how
    many there are."""
    if layer.kind != "conv":
        flat = x.reshape(-1, layer.channels)
        return flat[_spread(len(flat), limit)], len(flat)
    kernel_h, kernel_w = layer.kernel
    top, left, bottom, right = layer.pads
    batch, _, height, width = x.shape
    out_h = (height + top + bottom - kernel_h) // layer.strides[0] + 1
    out_w = (width + left + right - kernel_w) // layer.strides[1] + 1
    at = _spread(batch * out_h * out_w, limit)
    b, rest = at // (out_h * out_w), at % (out_h * out_w)
    row, column = rest // out_w * layer.strides[0] - top, rest % out_w * layer.strides[1] - left

    def tap(i: int, j: int) -> Tensor:
        # Padding is a mask: a padded copy of a large image would be as large again.
        y, z = row + i, column + j
        inside = (y >= 0) & (y < height) & (z >= 0) & (z < width)
        values = x[b, :, y.clamp(0, height - 1), z.clamp(0, width - 1)]
        return torch.where(inside[:, None], values, values.new_zeros(()))

    taps = [tap(i, j) for i in range(kernel_h) for j in range(kernel_w)]
    return torch.cat(taps, 1), batch * out_h * out_w


def _spread(total: int, limit: int) -> Tensor:
    """Up to `limit` indices below `total`, evenly spread."""
    count = min(total, limit)
    return torch.arange(count) * total // count


_Made = Sequence[list[Float]]
"""Outputs of a component, one list for each of its runs so far."""


@dataclass(frozen=True)
class _Calibrating:
    """The stages of a pipeline's flow, one after the other. See `calibrate`."""

    export: ExportSpec
    layers: Sequence[Layer]
    settings: CalibrationSettings
    tokenizers: Mapping[str, PromptTokenizer]
    folder: Path
    progress: Progress

    def run(self) -> None:
        encoded: dict[Part | Fill, Float] = {}
        features: dict[Part, Float] = {}
        latents = np.empty(0, np.float32)
        flow = flow_of(self.export.pipeline)
        for stage in flow.stages:
            match stage.role:
                case "text":
                    encoded.update(self._encode(stage).items())
                case "modulation":
                    self._modulate(stage, encoded)
                case "side" if stage.per == "image":
                    features |= self._adapt(stage)
                case "side" | "denoiser":
                    latents = self._denoise(stage, encoded, features)
                case "decoder":
                    images = self._decode(stage, latents)
                    if flow.encoder is not None:
                        self._encode_images(flow.encoder, images)
                case "encoder":
                    pass

    def _encode(self, stage: Stage) -> dict[Part, Float]:
        """Encode the empty prompt and all others with a text encoder, one by one."""
        wiring = self.export.pipeline.wiring
        text = next(text for text in wiring.texts if text.component == stage.component)
        tokenizer = self.tokenizers[text.tokenizer]
        ids = [tokenizer.encode(prompt)[0] for prompt in (_NEGATIVE, *self.settings.prompts)]
        labels = ["the empty prompt", *self._labels()]
        outputs = self._run_each(stage, [{text.input: row} for row in ids], labels)
        return self._by_part(stage, outputs)

    def _modulate(self, stage: Stage, encoded: Encoded) -> None:
        """Make what each prompt's denoiser is told of all timesteps."""
        spec, settings = self.export.pipeline, self.settings

        def run(
            runner: TorchRunner, index: int, recorder: _StatsRecorder, earlier: _Made
        ) -> list[Float]:
            request = Completion(spec).complete(settings.request(index))
            made = self._modulated(runner, request, self._conditioned(encoded, index))
            return [made[:0, 0, 0, 0]]  # it is some megabytes a step, and made again in no time

        self._record(stage, self._labels(), run)

    def _modulated(
        self, runner: TorchRunner, request: CompleteRequest, conditioned: Conditioned
    ) -> Float:
        """What the modulation makes for a request."""
        spec = self.export.pipeline
        steps, scale = scheduler_of(spec, request).timesteps, request.guidance_scale
        return modulated(spec.wiring, runner, steps, conditioned, 1, scale)

    def _conditioned(self, encoded: Encoded, index: int) -> Conditioned:
        """What a calibration prompt's denoiser is conditioned on."""
        positive = {part: rows[index + 1 : index + 2] for part, rows in encoded.items()}
        if not flow_of(self.export.pipeline).guided(self.settings.guidance_scale):
            return Conditioned(positive, None)
        negative = {part: self._negative(rows[:1]) for part, rows in encoded.items()}
        return Conditioned(positive, negative)

    def _adapt(self, stage: Stage) -> dict[Part, Float]:
        """Run a side once for each prompt that shows it a picture; its outputs [n, C, h, w]."""
        side = next(
            side for side in self.export.pipeline.wiring.sides if side.component == stage.component
        )
        shown = [
            control.hint(self.settings.width, self.settings.height)
            for index in self._controlled
            for control in self.settings.controls(index)
            if control.name == side.name
        ]
        labels = [self._labels()[index] for index in self._controlled]
        outputs = self._run_each(stage, [{side.inputs[0].name: image} for image in shown], labels)
        return self._by_part(stage, outputs)

    def _by_part(self, stage: Stage, outputs: Sequence[Float]) -> dict[Part, Float]:
        """Outputs of a component in the order of its spec, by what they are called elsewhere."""
        tensors = self.export.pipeline.components[stage.component].outputs
        return {
            Part(stage.component, tensor.name): rows
            for tensor, rows in zip(tensors, outputs, strict=True)
        }

    @property
    def _controlled(self) -> list[int]:
        """Indices of the prompts that show pictures."""
        count = len(self.settings.prompts)
        return [index for index in range(count) if self.settings.controlled(index)]

    def _denoise(self, stage: Stage, encoded: Encoded, features: Mapping[Part, Float]) -> Float:
        """Generate with the denoising loop, recording one of its components: every prompt for the
        denoiser, for a side those that show it a picture. The final latents [prompts, C, h, w].
        features: of sides that ran once, for each prompt that shows them one."""
        spec, settings = self.export.pipeline, self.settings
        flow = flow_of(spec)
        completion = Completion(spec)
        asked = [settings.request(index) for index in range(len(settings.prompts))]
        requests = [painted_whole(spec, request) for request in asked]
        first = completion.complete(requests[0])
        # A sampler may call the network twice at one timestep.
        every = [float(value) for value in scheduler_of(spec, first).timesteps]
        timesteps = list(dict.fromkeys(every))
        index_of = [timesteps.index(value) for value in every]
        with atomic_write(self.folder / "timesteps.npy") as file:
            np.save(file, np.array(timesteps, np.float32))
        beside = self._latents_beside() if spec.wiring.denoiser.concat else None

        every_index = [*range(len(settings.prompts))]
        chosen = every_index if stage.role == "denoiser" else self._controlled
        others: dict[str, TorchRunner] = {}

        def run(
            runner: TorchRunner, place: int, recorder: _StatsRecorder, earlier: _Made
        ) -> list[Float]:
            index = chosen[place]
            if not others:
                others.update(
                    (other.component, opened.enter_context(self._source_runner(other.component)))
                    for other in (*flow.loop, *([flow.modulation] if flow.modulation else []))
                    if other != stage
                )
            request = completion.complete(requests[index])
            controls = controls_of(spec.wiring, [request])
            if controls.shown:
                at = self._controlled.index(index)
                own = {part: rows[at : at + 1] for part, rows in features.items()}
                controls = replace(controls, features=own)
            scheduler, noise = scheduler_of(spec, request), BatchNoise([request.seed])
            recorder.step = index_of[0]

            def step_done(step: Step) -> None:
                recorder.step = index_of[min(step.index + 1, len(every) - 1)]
                if step.index + 1 < step.count:
                    recorder.told(place * len(every) + step.index + 1)

            conditioned, modulation = self._conditioned(encoded, index), None
            if flow.modulation is not None:
                modulation = self._modulated(
                    others[flow.modulation.component], request, conditioned
                )
            start = text_to_image.prepare(Beginning(spec, [request], scheduler, noise))
            if beside is not None:
                given = _beside(spec, beside, [rows[0] for rows in earlier])
                start = replace(start, given=given)
            latents = denoise(
                spec.wiring,
                {**others, stage.component: runner},
                scheduler,
                start,
                with_size_ids(conditioned, request, 1),
                request.guidance_scale,
                noise,
                on_step=step_done,
                controls=controls,
                modulation=modulation,
            )
            return [latents[0]]

        with ExitStack() as opened:
            labels = [self._labels()[index] for index in chosen]
            (latents,) = self._record(stage, labels, run, len(timesteps), len(every))
        return latents

    def _source_runner(self, name: str) -> TorchRunner:
        """A component that is run without recording."""
        component = self._component(name)
        return TorchRunner(any_batch(component.spec), component.load())

    def _component(self, name: str) -> Component:
        return next(each for each in self.export.components if each.name == name)

    def _negative(self, rows: Float) -> Float:
        return np.zeros_like(rows) if self.export.pipeline.wiring.zero_negative else rows

    def _decode(self, stage: Stage, latents: Float) -> Float:
        """Images [prompts, 3, H, W] of latents."""
        name = self.export.pipeline.wiring.decoder.input
        (images,) = self._run_each(stage, [{name: row[None]} for row in latents], self._labels())
        return images

    def _encode_images(self, stage: Stage, images: Float) -> None:
        """Encode what was made, as no other images are there, and what is encoded beside it: the
        pictures that were shown, or what masks leave of those made."""
        encoder = self.export.pipeline.wiring.image_encoder
        images, (height, width) = images.clip(-1, 1), images.shape[2:]
        if "control_latents" in self.export.pipeline.wiring.denoiser.concat:
            shown = self._pictures()
            rest = [shown[index % len(shown)][0] for index in range(len(images))]
        else:
            masks = [example_mask(index, height, width)[0] for index in range(len(images))]
            rest = [image * (mask < 0.5) for image, mask in zip(images, masks, strict=True)]
        inputs = [{encoder.input: image[None]} for image in (*images, *rest)]
        self._run_each(stage, inputs, [*self._labels(), *self._labels()])

    def _latents_beside(self) -> Float:
        """Latents [1 + n, C, h, w] of mid grey, which is put in place of what is painted, and of
        the n pictures."""
        path = self.folder / "beside.npy"
        if not path.exists():
            encoder = self.export.pipeline.wiring.image_encoder
            with self._source_runner(encoder.component) as runner:
                made = [
                    np.array(run_once(runner, {encoder.input: image})[encoder.outputs[0]])
                    for image in (self._grey(), *self._pictures())
                ]
            with atomic_write(path) as file:
                np.save(file, np.concatenate(made))
        values: Float = np.load(path)
        return values

    def _pictures(self) -> list[Float]:
        """The pictures that are shown, [1, 3, H, W] of -1 to 1 each; a grey one where there are
        none."""
        width, height = self.settings.width, self.settings.height
        hints = [Control(picture).hint(width, height) for picture in self.settings.pictures]
        return [np.float32(2) * hint - np.float32(1) for hint in hints] or [self._grey()]

    def _grey(self) -> Float:
        return np.zeros((1, 3, self.settings.height, self.settings.width), np.float32)

    def _labels(self) -> list[str]:
        return [f"calibration prompt {index + 1}" for index in range(len(self.settings.prompts))]

    def _run_each(
        self, stage: Stage, inputs: Sequence[Mapping[str, Array]], labels: Sequence[str]
    ) -> list[Float]:
        """Run a component once for each of `inputs`, recording; its outputs, one for each."""

        def run(
            runner: TorchRunner, index: int, recorder: _StatsRecorder, earlier: _Made
        ) -> list[Float]:
            outputs = run_once(runner, inputs[index])
            return [np.array(values[0], np.float32) for values in outputs.values()]

        return self._record(stage, labels, run)

    def _record(
        self,
        stage: Stage,
        labels: Sequence[str],
        run: Callable[[TorchRunner, int, _StatsRecorder, _Made], list[Float]],
        timesteps: int = 1,
        runs: int = 1,
    ) -> list[Float]:
        """Record a component in one `run` for each of `labels`: what they return, stacked. A run is
        handed what those before it returned.

        timesteps: recorded one by one. runs: of the component's network in one `run`.
        """
        name = stage.component
        mine = [la for la in self.layers if la.component == name and la.kind != "embedding"]
        state = _State(self.folder, name)
        done, complete, tensors = state.load(mine)
        made: list[Float] = []
        while (key := _output(len(made))) in tensors:
            made.append(tensors.pop(key).numpy())
        if complete:
            return made
        component = self._component(name)
        module = component.load()
        outputs = [list(rows) for rows in zip(*made, strict=True)]
        count, task = len(labels), f"{name}: calibrate"

        def told(finished: int) -> None:
            self.progress.update(task, finished, count * runs)

        recorder = _StatsRecorder(
            module, mine, timesteps, count * runs, tensors, told, self.settings.covariance
        )
        told(done * runs)
        try:
            with TorchRunner(any_batch(component.spec), module) as runner:
                for index in range(done, count):
                    outputs.append(run(runner, index, recorder, outputs))
                    if not all(np.isfinite(values).all() for values in outputs[-1]):
                        raise InputError(
                            f"{name} makes NaN or infinite values of {labels[index]}: check the "
                            "model, or give other prompts"
                        )
                    last = index + 1 == count
                    if last or state.due():
                        made = [np.stack(rows) for rows in zip(*outputs, strict=True)]
                        kept = {_output(i): torch.from_numpy(rows) for i, rows in enumerate(made)}
                        state.save(index + 1, last, {**tensors, **kept})
                    told((index + 1) * runs)
        finally:
            recorder.close()
        return made


def _beside(spec: PipelineSpec, latents: Float, earlier: Sequence[Float]) -> dict[Fill, Float]:
    """What a denoiser for inpainting is given: the picture that was made before, without what a
    mask covers; for the first, the one of `latents`. One that takes a control image: another of
    these each time. latents: of mid grey, then of pictures; earlier: of what was made.

    The seam is that of latents, not of their pictures', which an encoder would blur.
    """
    grey, shown, number = latents[:1], latents[1:], len(earlier)
    mask, unit = example_mask(1 + number, *grey.shape[2:]), spec.latent.scale_factor
    picture = earlier[-1][None] if earlier else shown[:1]
    return {
        "mask": mask,
        "masked": np.where(mask < 0.5, picture, grey),
        "pixel_mask": mask.repeat(unit, 2).repeat(unit, 3),
        "control_latents": shown[number % len(shown)][None],
    }


def _output(index: int) -> str:
    """The name in a state of one of the component's outputs."""
    return f"outputs:{index}" if index else "outputs"
