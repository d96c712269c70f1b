"""Every task of every tiny pipeline, by every sampler, makes diffusers' images, from the same draws
of noise in the same order; and so do the embedded models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

import diffusers
import torch

from edgesd.export.source import resolve_source
from edgesd.recipes.sources import open_model
from edgesd.runtime import pipeline as running
from edgesd.runtime.noise import BatchNoise
from edgesd.runtime.schedulers import SCHEDULERS
from edgesd.spec.pipeline import Task
from tests.image_tasks import OBLONG, SQUARE, Both, both
from tests.models import EMOJI
from tests.tiny_pipelines import PIPELINES, controlnet, tiny, write_tiny

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]

STEPS = 5
STRENGTHS = (0.3, 0.8, 1.0)
SAMPLERS = sorted(name for name, cls in SCHEDULERS.items() if cls.process == "diffusion")
"""All but those of EDM, for which none of these models is made, and of flows."""

FLOW_SAMPLERS = sorted(name for name, cls in SCHEDULERS.items() if cls.process == "flow")
"""Those of FLUX."""

INPAINTING = ("sd-inpaint", "sdxl-inpaint")
MODELS = EMOJI.parent
STEERED = {f"{name} with a ControlNet": name for name in ("sd", "sdxl")}
WHOLE, OBLONG_WHOLE = (128, 128), (128, 96)
"""Sizes of the embedded models, width and height."""

NAMES = (*PIPELINES, *STEERED)
FLUX = tuple(name for name in PIPELINES if name.startswith("flux"))
WHOLLY = ("sd", "sdxl", *INPAINTING, *STEERED, *FLUX)
"""Tried with all samplers, strengths and batches. The others differ from them in their networks and
in what these are conditioned on, of which neither samplers nor strengths know: each is tried with
all samplers, strengths and batches, but not with each combination of the three."""

EMBEDDED = (
    *("emoji", "emoji-xl", "emoji-lcm", "emoji with emoji-sketch", "emoji-inpaint"),
    *("emoji-flux", "emoji-flux-dev"),
)


class Draws:
    """Shapes of the noise that is drawn, image by image: by edgesd's loop, and by diffusers."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.ours: list[tuple[int, ...]] = []
        self.theirs: list[tuple[int, ...]] = []
        outer, randn = self, torch.randn

        class Recorded(BatchNoise):
            def __call__(self, shape: tuple[int, ...], /) -> Any:
                outer.ours += [(1, *shape[1:])] * shape[0]
                return super().__call__(shape)

        def recorded(shape: Any, **options: Any) -> Any:
            self.theirs.append(tuple(shape))
            return randn(shape, **options)

        patch.setattr(running, "BatchNoise", Recorded)
        patch.setattr(torch, "randn", recorded)

    def taken(self) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
        """Both, since the last time."""
        found = self.ours, self.theirs
        self.ours, self.theirs = [], []
        return found


@pytest.fixture
def draws(monkeypatch: pytest.MonkeyPatch) -> Draws:
    return Draws(monkeypatch)


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Both]]:
    """Opens models by their names, each once."""
    kept: dict[str, Both] = {}

    def open_one(name: str) -> Both:
        if name not in kept:
            folder = tmp_path_factory.mktemp("model")
            kept[name] = (_embedded if name in EMBEDDED else _tiny)(name, folder)
        return kept[name]

    yield open_one
    for each in kept.values():
        each.ours.close()


def _tiny(name: str, folder: Path) -> Both:
    base = STEERED.get(name, name)
    theirs = tiny(base)
    path = write_tiny(base, folder / "model")
    if name not in STEERED:
        tasks = () if base == "flux-control" else ("inpaint",)
        return both(resolve_source(path), theirs, folder / "bundle", tasks)
    net = controlnet(theirs.unet)
    net.save_pretrained(folder / "net")
    source = open_model(str(path), sides=[("controlnet", str(folder / "net"))])
    return both(source, theirs, folder / "bundle", controlnet=net)


def _embedded(name: str, folder: Path) -> Both:
    base, _, side = name.partition(" with ")
    theirs = diffusers.DiffusionPipeline.from_pretrained(MODELS / base, torch_dtype=torch.float32)
    if not side:
        return both(resolve_source(str(MODELS / base)), theirs, folder / "bundle")
    net = diffusers.ControlNetModel.from_pretrained(MODELS / side, torch_dtype=torch.float32)
    source = open_model(str(MODELS / base), sides=[("controlnet", str(MODELS / side))])
    return both(source, theirs, folder / "bundle", controlnet=net)


def samplers_of(name: str) -> list[str]:
    return FLOW_SAMPLERS if "flux" in name else SAMPLERS


def tasks_of(name: str) -> tuple[Task, ...]:
    if name == "flux-control":
        return ("control",)
    if name.endswith(("inpaint", "fill")):
        return ("inpaint",)
    if name == "sdxl-refiner":  # which finishes what a base model began: test_same_images.py
        return ("image", "inpaint")
    if name == "sdxl-per-channel":
        # diffusers inpaints without the mean and deviation of channels that it decodes with.
        return ("text", "image")
    return ("text", "image", "inpaint")


def cases_of(name: str, sampler: str) -> list[tuple[float, int]]:
    """Strengths and images of a batch that a tiny pipeline is tried with."""
    every = [(strength, count) for count in (1, 2) for strength in STRENGTHS]
    if name not in WHOLLY:
        every = every[(NAMES.index(name) + SAMPLERS.index(sampler)) % len(every) :][:1]
    # diffusers draws the noise of a whole batch by one seed there, edgesd each image's by its own.
    return [(strength, 1 if sampler == "dpmpp-sde" else count) for strength, count in every]


def compared(pair: Both, task: Task, sampler: str, count: int, draws: Draws, **asked: Any) -> int:
    """Asserts that both draw alike; how far apart the images are."""
    size = asked.pop("size", OBLONG if count == 2 else SQUARE)
    off = pair.difference(task, count, size, scheduler=sampler, num_inference_steps=STEPS, **asked)
    ours, theirs = draws.taken()
    assert ours and ours == theirs
    return off


@pytest.mark.parametrize(
    ("name", "task", "sampler"),
    [
        (name, task, sampler)
        for name in NAMES
        for task in tasks_of(name)
        for sampler in samplers_of(name)
    ],
)
def test_tiny_pipelines(
    name: str, task: Task, sampler: str, opened: Callable[[str], Both], draws: Draws
) -> None:
    """An oblong batch of two, and a square image alone."""
    pair, cases = opened(name), cases_of(name, sampler)
    if task in ("text", "control"):
        for count in sorted({count for _, count in cases}):
            assert compared(pair, task, sampler, count, draws) <= 1
        return
    for strength, count in dict.fromkeys(cases):
        assert compared(pair, task, sampler, count, draws, strength=strength) <= 1


OF_EMBEDDED = [(name, task) for name in EMBEDDED for task in tasks_of(name)]


@pytest.mark.parametrize(("name", "task"), OF_EMBEDDED)
def test_embedded_models(
    name: str, task: Task, opened: Callable[[str], Both], draws: Draws
) -> None:
    """By their own samplers."""
    pair = opened(name)
    sampler = pair.ours.spec.scheduler.name
    asked = [{}] if task == "text" else [{"strength": strength} for strength in STRENGTHS]
    for each in asked:
        for count, size in (1, WHOLE), (2, OBLONG_WHOLE):
            assert compared(pair, task, sampler, count, draws, size=size, **each) <= 1


@pytest.mark.parametrize(
    ("name", "task", "sampler"),
    [(*each, sampler) for each in OF_EMBEDDED for sampler in samplers_of(each[0])],
)
def test_embedded_models_by_all_samplers(
    name: str, task: Task, sampler: str, opened: Callable[[str], Both], draws: Draws
) -> None:
    """Each with a strength: any two are tried together with tiny pipelines."""
    pair, index = opened(name), samplers_of(name).index(sampler)
    asked = {} if task == "text" else {"strength": STRENGTHS[index % len(STRENGTHS)]}
    count = 1 if sampler == "dpmpp-sde" else 1 + index // len(STRENGTHS) % 2
    assert compared(pair, task, sampler, count, draws, size=WHOLE, **asked) <= 1
