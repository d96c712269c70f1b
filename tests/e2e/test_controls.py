"""ControlNets and adapters act on images as in diffusers' pipelines.

The networks are the torch modules that would be exported, as in test_same_images.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

pytest.importorskip("torch")

import diffusers

from edgesd.export.families import ExportSpec
from edgesd.export.own_pipeline import check_own_pipeline
from edgesd.export.pipeline import export_spec
from edgesd.export.source import ModelSource
from edgesd.recipes.sources import open_model
from edgesd.runtime.pipeline import Pipeline
from edgesd.runtime.requests import Control, Request
from edgesd.runtime.settings import Settings
from edgesd.runtime.tokenizer import tokenizer_of
from tests.support import random_picture
from tests.tiny_pipelines import adapter, controlnet, diffusers_images, on_torch, tiny

STEPS = 4
PROMPTS, SEEDS = ("a red apple on a house", "the blue cat"), (5, 6)
SIZE, OBLONG = (32, 32), (40, 24)
"""Width and height."""


PICTURES = (random_picture(1, (63, 45)), random_picture(2, (63, 45)))
"""Of another size than the images."""
_CLASSES = {
    "sd": (diffusers.StableDiffusionControlNetPipeline, diffusers.StableDiffusionAdapterPipeline),
    "sdxl": (
        diffusers.StableDiffusionXLControlNetPipeline,
        diffusers.StableDiffusionXLAdapterPipeline,
    ),
}


class Model(NamedTuple):
    """A tiny pipeline with its sides: diffusers' own, and what edgesd exports of it."""

    theirs: Any
    source: ModelSource
    export: ExportSpec

    def ours(self, folder: Path, **settings: Any) -> Pipeline:
        """edgesd's pipeline of it, with the bundle in the new `folder`."""
        return on_torch(self.source, self.export, folder, Settings(made_here=True, **settings))

    def difference(
        self,
        ours: Pipeline,
        controls: Sequence[Control],
        theirs: Mapping[str, Any],
        count: int = 1,
        size: tuple[int, int] = OBLONG,
        steps: int = STEPS,
        **asked: Any,
    ) -> int:
        """The largest difference of `count` images in one batch from diffusers', 0 to 255. theirs,
        asked: further arguments of diffusers' call, and of the requests."""
        width, height = size
        prompts, seeds = PROMPTS[:count], SEEDS[:count]
        guidance = asked.pop("guidance_scale", 4.0)
        wanted = diffusers_images(
            self.theirs, prompts, seeds, num_inference_steps=steps, width=width, height=height,
            guidance_scale=guidance, **theirs,
        )  # fmt: skip
        request = Request(
            "", 0, None, steps, guidance, height, width, controls=(*controls,), **asked
        )
        requests = [
            replace(request, prompt=prompt, seed=seed)
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        pairs = zip(ours.generate(requests), wanted, strict=True)
        return max(int(np.abs(np.int32(one) - np.int32(other)).max()) for one, other in pairs)


def made(name: str, folder: Path, nets: int = 1, kind: str = "controlnet") -> Model:
    """The tiny pipeline `name` with so many ControlNets or adapters, called a, b ..."""
    plain = tiny(name)
    plain.save_pretrained(folder / "base")
    make: Callable[..., Any] = controlnet if kind == "controlnet" else adapter
    sides = [make(plain.unet, seed) for seed in range(nets)]
    given = []
    for side, letter in zip(sides, "abcd", strict=False):
        side.save_pretrained(folder / letter)
        given.append((kind, f"{folder / letter}:{letter}" if nets > 1 else str(folder / letter)))
    source = open_model(str(folder / "base"), sides=given)  # type: ignore[arg-type]
    parts = {**plain.components, kind: sides if nets > 1 else sides[0]}
    if name.startswith("sdxl"):
        parts["add_watermarker"] = False
    else:
        parts["requires_safety_checker"] = False
    cls = _CLASSES[name.split("-", maxsplit=1)[0]][kind == "adapter"]
    theirs = cls(**parts)
    theirs.set_progress_bar_config(disable=True)
    return Model(theirs, source, export_spec(source))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("controls")


@pytest.fixture(scope="module")
def models(folder: Path) -> Callable[[str, int], Model]:
    """The models with ControlNets, each made once."""
    known: dict[tuple[str, int], Model] = {}

    def get(name: str, nets: int = 1) -> Model:
        if (name, nets) not in known:
            known[name, nets] = made(name, folder / f"{name}-{nets}", nets)
        return known[name, nets]

    return get


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_images_are_those_of_diffusers(
    name: str, models: Callable[..., Model], tmp_path: Path
) -> None:
    model = models(name)
    own = PICTURES[0]
    with model.ours(tmp_path / "bundle") as pipeline:
        folders = pipeline.spec.wiring.tokenizers
        check_own_pipeline(
            model.export, {each: tokenizer_of(pipeline.bundle, each) for each in folders}
        )
        for scale in 0.0, 0.5, 1.0:
            for count, size in (1, SIZE), (2, OBLONG):
                theirs = {
                    "image": [own.decoded()] * count, "controlnet_conditioning_scale": scale,
                }  # fmt: skip
                controls = [Control(own, scale=scale)]
                assert model.difference(pipeline, controls, theirs, count, size) <= 1
        unlike = model.difference(pipeline, [], {"image": own.decoded()})
        assert unlike > 1


@pytest.mark.parametrize("name", ["sd", "sdxl"])
@pytest.mark.parametrize("guess", [False, True])
@pytest.mark.parametrize("mode", ["batched", "sequential"])
def test_two_at_once_and_each_half_of_guidance(
    name: str, guess: bool, mode: Any, models: Callable[..., Model], tmp_path: Path
) -> None:
    model = models(name, 2)
    images = [one.decoded() for one in PICTURES]
    theirs = {
        "image": images,
        "controlnet_conditioning_scale": [0.7, 1.2],
        "control_guidance_start": [0.0, 0.3],
        "control_guidance_end": [0.5, 1.0],
        "guess_mode": guess,
    }
    controls = [
        Control(PICTURES[1], "b", 1.2, start=0.3),
        Control(PICTURES[0], "a", 0.7, end=0.5),
    ]
    with model.ours(tmp_path / "bundle", guidance_mode=mode) as pipeline:
        difference = model.difference(pipeline, controls, theirs, guess_mode=guess)
        assert difference <= 1
        assert model.difference(pipeline, controls, theirs, guess_mode=not guess) > 1


RANGES = ((0.0, 0.25), (0.2, 0.8), (0.3, 0.7), (0.25, 0.75), (0.5, 1.0), (0.9, 1.0))


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_ranges_of_steps_are_those_of_diffusers(
    guidance: float, models: Callable[..., Model], tmp_path: Path
) -> None:
    model = models("sd")
    with model.ours(tmp_path / "bundle") as pipeline:
        for start, end in RANGES:
            for steps in 3, 4:
                theirs = {
                    "image": PICTURES[0].decoded(),
                    "control_guidance_start": start,
                    "control_guidance_end": end,
                }
                controls = [Control(PICTURES[0], start=start, end=end)]
                asked = {"steps": steps, "guidance_scale": guidance}
                assert model.difference(pipeline, controls, theirs, **asked) <= 1  # type: ignore[arg-type]


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_guess_mode_is_that_of_diffusers(
    guidance: float, models: Callable[..., Model], tmp_path: Path
) -> None:
    """Two images in a batch, with guidance and without."""
    model = models("sd")
    theirs = {"image": [PICTURES[0].decoded()] * 2, "guess_mode": True}
    asked = {"count": 2, "guidance_scale": guidance}
    with model.ours(tmp_path / "bundle") as pipeline:
        own = [Control(PICTURES[0])]
        assert model.difference(pipeline, own, theirs, guess_mode=True, **asked) <= 1  # type: ignore[arg-type]
        assert model.difference(pipeline, own, theirs, **asked) > 1  # type: ignore[arg-type]
