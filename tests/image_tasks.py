"""diffusers' pipeline and edgesd's of one model side by side, for every task.

edgesd's networks are the torch modules that would be exported, as in test_same_images.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
from PIL import Image

from edgesd.export.families import ExportSpec
from edgesd.export.own_pipeline import check_own_pipeline
from edgesd.export.pipeline import export_spec
from edgesd.export.source import ModelSource
from edgesd.runtime.pipeline import Pipeline
from edgesd.runtime.requests import Control, Request
from edgesd.runtime.schedulers import SCHEDULERS, preset
from edgesd.runtime.tokenizer import PromptTokenizer, tokenizer_of
from edgesd.spec.pipeline import ImageTask, Task
from tests.samplers import diffusers_sampler, round_once
from tests.support import random_picture
from tests.tiny_pipelines import diffusers_images, on_torch

STEPS = 6
PROMPTS, SEEDS = ("a red apple", "the blue cat"), (5, 6)
SQUARE, OBLONG = (32, 32), (40, 24)
"""Width and height."""

HINT, SCALE = random_picture(1, (63, 45)), 0.9
"""A control image, of another size than what is drawn, and how much a ControlNet counts: diffusers'
pipelines differ in what they take where nobody says it."""

CLASSES: Mapping[tuple[str, Task], tuple[Any, Any]] = {
    ("sd", "text"): (
        diffusers.StableDiffusionPipeline,
        diffusers.StableDiffusionControlNetPipeline,
    ),
    ("sd", "image"): (
        diffusers.StableDiffusionImg2ImgPipeline,
        diffusers.StableDiffusionControlNetImg2ImgPipeline,
    ),
    ("sd", "inpaint"): (
        diffusers.StableDiffusionInpaintPipeline,
        diffusers.StableDiffusionControlNetInpaintPipeline,
    ),
    ("sdxl", "text"): (
        diffusers.StableDiffusionXLPipeline,
        diffusers.StableDiffusionXLControlNetPipeline,
    ),
    ("sdxl", "image"): (
        diffusers.StableDiffusionXLImg2ImgPipeline,
        diffusers.StableDiffusionXLControlNetImg2ImgPipeline,
    ),
    ("sdxl", "inpaint"): (
        diffusers.StableDiffusionXLInpaintPipeline,
        diffusers.StableDiffusionXLControlNetInpaintPipeline,
    ),
    ("flux", "text"): (diffusers.FluxPipeline, None),
    ("flux", "control"): (diffusers.FluxControlPipeline, None),
    ("flux", "image"): (diffusers.FluxImg2ImgPipeline, None),
    ("flux", "inpaint"): (diffusers.FluxInpaintPipeline, None),
}
"""diffusers' pipelines without and with a ControlNet."""

MADE_FOR_ONE = (diffusers.FluxFillPipeline, diffusers.FluxControlPipeline)
"""Pipelines of models that know one task."""

_DISTILLED = {
    "text": diffusers.LatentConsistencyModelPipeline,
    "image": diffusers.LatentConsistencyModelImg2ImgPipeline,
}
"""Those for latent consistency models, which know their own sampler alone."""


def picture(index: int, size: tuple[int, int]) -> Image.Image:
    """An image of colours that run smoothly, another for each index."""
    width, height = size
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / (5 + index) + phase) * np.cos(y / 7 - phase) for phase in (0, 1, 2)]
    return Image.fromarray((127.5 * (1 + np.stack(waves, 2))).astype(np.uint8))


def mask(index: int, size: tuple[int, int]) -> Image.Image:
    """A box within an image, with a grey edge."""
    width, height = size
    values = np.zeros((height, width), np.uint8)
    values[4 + index : height // 2 + 5, width // 3 :] = 255
    values[4 + index, :] = 100
    return Image.fromarray(values)


@dataclass
class Both:
    """A pipeline of diffusers, and edgesd's of it. controlnet: diffusers', which is shown HINT."""

    theirs: Any
    ours: Pipeline
    export: ExportSpec
    tokenizers: Mapping[str, PromptTokenizer] = field(default_factory=dict)
    controlnet: Any = None

    @property
    def distilled(self) -> bool:
        """Whether it is a latent consistency model of its own."""
        return isinstance(self.theirs, diffusers.LatentConsistencyModelPipeline)

    def check_own_pipeline(self) -> None:
        """As a build does."""
        check_own_pipeline(self.export, self.tokenizers)

    def of_task(self, task: Task, sampler: str) -> Any:
        """diffusers' pipeline for a task."""
        family, parts = self.ours.spec.family, dict(self.theirs.components)
        parts["scheduler"] = deepcopy(self.theirs.scheduler)  # some pipelines change its options
        cls = CLASSES[family, task][self.controlnet is not None]
        if type(self.theirs) in MADE_FOR_ONE:
            cls = type(self.theirs)
        if self.distilled and sampler == "lcm":
            cls = _DISTILLED.get(task, cls)
        config = self.theirs.config
        options: dict[str, Any] = {}
        if family == "sd":
            options["requires_safety_checker"] = False
        if family == "sdxl":
            forced = config.force_zeros_for_empty_prompt
            options = {"force_zeros_for_empty_prompt": forced, "add_watermarker": False}
        if family == "sdxl" and task != "text" and self.controlnet is None:
            options["requires_aesthetics_score"] = config.get("requires_aesthetics_score", False)
        if self.controlnet is not None:
            parts["controlnet"] = self.controlnet
        found = cls(**parts, **options)
        found.set_progress_bar_config(disable=True)
        return found

    def wanted(self, task: Task, count: int, size: tuple[int, int], **asked: Any) -> list[Any]:
        """diffusers' images, of its pipeline for the task. asked: of its call."""
        sampler = asked.get("scheduler", self.ours.spec.scheduler.name)
        pipeline = self.of_task(task, sampler)
        given = self._given(task, count, size)
        if "strength" in asked:
            given["strength"] = asked["strength"]
        if "true_cfg_scale" in asked:
            given["true_cfg_scale"] = asked["true_cfg_scale"]
            given["negative_prompt"] = [asked["negative_prompt"]] * count
        with pytest.MonkeyPatch.context() as patch:
            own = diffusers_sampler(sampler, patch)
            if not SCHEDULERS[sampler].exact:
                round_once(patch)
            # As saved and read again: a file gives all options.
            known = dict(self.theirs.scheduler.config) | {"_use_default_values": []}
            pipeline.scheduler = own.from_config(known, **preset(sampler))
            if hasattr(pipeline.scheduler, "noise_sampler_seed"):
                pipeline.scheduler.noise_sampler_seed = SEEDS[0]  # else a random one
            return diffusers_images(
                pipeline, PROMPTS[:count], SEEDS[:count],
                num_inference_steps=asked.get("num_inference_steps", STEPS),
                guidance_scale=asked.get("guidance_scale", self.ours.spec.guidance_scale), **given,
            )  # fmt: skip

    def _given(self, task: Task, count: int, size: tuple[int, int]) -> dict[str, Any]:
        """Pictures of diffusers' call, and the size where it doesn't follow from these."""
        sides = {"width": size[0], "height": size[1]}
        given: dict[str, Any] = {}
        if task == "control":
            given["control_image"] = [HINT.decoded()] * count
        elif task != "text":
            given["image"] = [picture(k, size) for k in range(count)]
        if task == "inpaint":
            given["mask_image"] = [mask(k, size) for k in range(count)]
        if self.controlnet is not None:
            given["image" if task == "text" else "control_image"] = [HINT.decoded()] * count
            given["controlnet_conditioning_scale"] = SCALE
        if (spec := self.ours.spec).family == "flux":
            longest = spec.wiring.tokenizers["tokenizer_2"].max_tokens
            return given | sides | {"max_sequence_length": longest}
        return given if set(given) == {"image"} else given | sides

    def requests(
        self, task: Task, count: int, size: tuple[int, int], **asked: Any
    ) -> list[Request]:
        asked = {"num_inference_steps": STEPS, **asked}
        if task in ("text", "control"):
            asked |= {"width": size[0], "height": size[1]}
        if task == "control":
            asked["controls"] = (Control(HINT),)
        if self.controlnet is not None:
            asked["controls"] = (Control(HINT, scale=SCALE),)
        return [
            Request(
                PROMPTS[k], SEEDS[k],
                image=None if task in ("text", "control") else picture(k, size),
                mask=mask(k, size) if task == "inpaint" else None, **asked,
            )
            for k in range(count)
        ]  # fmt: skip

    def difference(
        self,
        task: Task,
        count: int = 1,
        size: tuple[int, int] = OBLONG,
        **asked: Any,
    ) -> int:
        """The largest difference of `count` images in one batch from diffusers', 0 to 255."""
        wanted = self.wanted(task, count, size, **asked)
        found = self.ours.generate(self.requests(task, count, size, **asked))
        pairs = zip(found, wanted, strict=True)
        return max(int(np.abs(np.int32(one) - np.int32(other)).max()) for one, other in pairs)


def both(
    source: ModelSource,
    theirs: Any,
    folder: Path,
    tasks: Sequence[ImageTask] = ("inpaint",),
    controlnet: Any = None,
) -> Both:
    """Both pipelines of a model. folder: for edgesd's bundle; new."""
    export = export_spec(source, tasks=(*tasks,))
    ours = on_torch(source, export, folder)
    folders = ours.spec.wiring.tokenizers
    tokenizers = {each: tokenizer_of(ours.bundle, each) for each in folders}
    return Both(theirs, ours, export, tokenizers, controlnet)
