"""ControlNets and adapters act on images as in diffusers' pipelines.

The networks are the torch modules that would be exported, as in test_same_images.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

pytest.importorskip("torch")

import diffusers
import msgspec
from PIL import Image

from edgesd.errors import InputError, UsageError
from edgesd.export.calibrate import CalibrationSettings, calibrate, calibration_key
from edgesd.export.families import ExportSpec
from edgesd.export.own_pipeline import check_own_pipeline
from edgesd.export.pipeline import export_spec
from edgesd.export.source import ModelSource
from edgesd.recipes.drawings import drawing
from edgesd.recipes.footprints import Networks
from edgesd.recipes.sources import open_model
from edgesd.runtime import denoise
from edgesd.runtime.controls import Shown
from edgesd.runtime.pipeline import Pipeline
from edgesd.runtime.requests import Control, Request
from edgesd.runtime.settings import Settings
from edgesd.runtime.tokenizer import tokenizer_of
from edgesd.spec.build import SideKind
from edgesd.spec.pipeline import ImageTask
from tests.image_tasks import CLASSES
from tests.support import random_picture
from tests.tiny_pipelines import (
    adapter,
    controlnet,
    diffusers_images,
    for_adapter,
    on_torch,
    tiny,
)

STEPS = 4
PROMPTS, SEEDS = ("a red apple on a house", "the blue cat"), (5, 6)
SIZE, OBLONG = (32, 32), (40, 24)
"""Width and height."""


PICTURES = (random_picture(1, (63, 45)), random_picture(2, (63, 45)))
"""Of another size than the images."""
_ADAPTED = {
    "sd": diffusers.StableDiffusionAdapterPipeline,
    "sdxl": diffusers.StableDiffusionXLAdapterPipeline,
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


def made(name: str, folder: Path, nets: int = 1, kind: str = "controlnet", **options: Any) -> Model:
    """The tiny pipeline `name` with so many ControlNets or adapters, called a, b ... options: of
    these."""
    plain = tiny(name) if kind == "controlnet" else for_adapter(tiny(name))
    plain.save_pretrained(folder / "base")
    make: Callable[..., Any] = controlnet if kind == "controlnet" else adapter
    # A ControlNet of a model for inpainting takes the latents alone.
    unet = tiny(name.removesuffix("-inpaint")).unet if "inpaint" in name else plain.unet
    sides = [make(unet, seed, **options) for seed in range(nets)]
    given = []
    for side, letter in zip(sides, "abcd", strict=False):
        side.save_pretrained(folder / letter)
        given.append((kind, f"{folder / letter}:{letter}" if nets > 1 else str(folder / letter)))
    source = open_model(str(folder / "base"), sides=given)  # type: ignore[arg-type]
    parts = {**plain.components, kind: sides if nets > 1 else sides[0]}
    if not name.startswith("sdxl"):
        parts["requires_safety_checker"] = False
    elif kind == "controlnet":
        parts["add_watermarker"] = False
    if kind == "adapter" and not name.startswith("sdxl"):
        del parts["image_encoder"]
    family = name.split("-", maxsplit=1)[0]
    cls: Any = _ADAPTED[family] if kind == "adapter" else CLASSES[family, "text"][True]
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
        for scale, count, size in (0.0, 1, SIZE), (0.5, 2, OBLONG), (1.0, 1, SIZE):
            theirs = {"image": [own.decoded()] * count, "controlnet_conditioning_scale": scale}
            controls = [Control(own, scale=scale)]
            assert model.difference(pipeline, controls, theirs, count, size) <= 1
        for others in [], [Control(PICTURES[1])]:
            assert model.difference(pipeline, others, {"image": own.decoded()}) > 1


@pytest.mark.parametrize(
    ("name", "guess", "mode"),
    [
        ("sd", False, "batched"),
        ("sd", True, "sequential"),
        ("sdxl", True, "batched"),
        ("sdxl", False, "sequential"),
    ],
)
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
        assert model.difference(pipeline, controls, theirs, guess_mode=guess) <= 1


RANGES = ((0.0, 0.3), (0.25, 0.75), (0.9, 1.0))


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_ranges_of_steps_are_those_of_diffusers(
    guidance: float, models: Callable[..., Model], tmp_path: Path
) -> None:
    model = models("sd")
    with model.ours(tmp_path / "bundle") as pipeline:
        for steps, (start, end) in enumerate(RANGES, 3):
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


@pytest.mark.parametrize(("name", "nets", "channels"), [("sd", 1, 1), ("sd", 2, 3), ("sdxl", 1, 3)])
def test_adapters_act_as_in_diffusers(name: str, nets: int, channels: int, tmp_path: Path) -> None:
    """Once for all steps. One of a single channel sees the picture in greys."""
    model = made(name, tmp_path / "model", nets, "adapter", channels=channels)
    width, height = OBLONG
    # diffusers makes several into one only where their sizes are equal.
    shown = [one.decoded().resize((width, height), Image.Resampling.LANCZOS) for one in PICTURES]
    images = [one.convert("L") if channels == 1 else one for one in shown]
    scales = [0.8, 1.5][:nets]
    controls = [
        Control(own, letter if nets > 1 else "", scale)
        for own, letter, scale in zip(PICTURES, "ab", scales, strict=False)
    ]
    theirs = {
        "image": images if nets > 1 else images[0],
        "adapter_conditioning_scale": scales if nets > 1 else scales[0],
    }
    with model.ours(tmp_path / "bundle") as pipeline:
        assert model.difference(pipeline, controls, theirs, size=OBLONG) <= 1
        assert model.difference(pipeline, [], theirs, size=OBLONG) > 1
        if name == "sdxl":
            late = [replace(controls[0], end=0.5)]
            theirs["adapter_conditioning_factor"] = 0.5
            assert model.difference(pipeline, late, theirs, size=OBLONG) <= 1
            # Of the steps before a refiner's, which are 5 of 8: not those before the half of all.
            wanted = diffusers_images(
                model.theirs, PROMPTS[:1], SEEDS[:1], num_inference_steps=8, width=width,
                height=height, guidance_scale=4.0, denoising_end=0.6, output_type="latent",
                **theirs,
            )  # fmt: skip
            request = Request(
                PROMPTS[0],
                SEEDS[0],
                None,
                8,
                4.0,
                height,
                width,
                denoising_end=0.6,
                controls=(*late,),
            )
            np.testing.assert_allclose(pipeline.begin([request])[0], wanted[0], atol=1e-4)


def test_calibration_shows_pictures_to_every_second_prompt(
    models: Callable[..., Model], tmp_path: Path
) -> None:
    model = models("sd")
    networks = Networks(model.export)
    layers = [
        layer
        for stage in networks.flow.stages
        if stage.per == "step"
        for layer in networks.trace_own(stage).layers
    ]
    spec = model.export.pipeline
    pictures = drawing(spec, 0), drawing(spec, 1)
    assert pictures[0].size == SIZE and pictures[0] != pictures[1]
    settings = CalibrationSettings(
        ("a", "b", "c"), 2, 3.0, "pndm", 32, 32, sides=("controlnet",), pictures=pictures
    )
    assert calibration_key(settings, "") != calibration_key(replace(settings, sides=()), "")
    with model.ours(tmp_path / "bundle") as pipeline:
        tokenizers = {"tokenizer": tokenizer_of(pipeline.bundle, "tokenizer")}
    found = calibrate(model.export, layers, settings, tokenizers, tmp_path / "work")
    name = "down_blocks.0.resnets.0.conv1"
    counts = {}
    for layer in layers:
        if layer.name == name:
            stats = found.layer(layer)
            assert stats is not None
            counts[layer.component] = stats.count
    assert counts["controlnet"] * 3 == counts["unet"] * 2


# Mutations: the image differs.


@pytest.mark.parametrize("change", ["order", "guess", "count"])
def test_mistakes_are_noticed(
    change: str, models: Callable[..., Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models("sd")
    theirs: dict[str, Any] = {"image": PICTURES[0].decoded(), "guess_mode": change == "guess"}
    if change == "count":
        theirs["control_guidance_end"] = 0.5
    controls = [Control(PICTURES[0], end=theirs.get("control_guidance_end", 1.0))]
    if change == "order":  # residuals of the same shape change their places
        wiring = model.export.pipeline.wiring
        inputs = [*wiring.denoiser.inputs]
        first, second = (
            i for i, one in enumerate(inputs) if one.name in ("residual_0", "residual_1")
        )
        inputs[first], inputs[second] = (
            msgspec.structs.replace(inputs[first], parts=inputs[second].parts),
            msgspec.structs.replace(inputs[second], parts=inputs[first].parts),
        )
        changed = msgspec.structs.replace(wiring.denoiser, inputs=tuple(inputs))
        spec = msgspec.structs.replace(
            model.export.pipeline, wiring=msgspec.structs.replace(wiring, denoiser=changed)
        )
        model = model._replace(export=replace(model.export, pipeline=spec))
    elif change == "guess":
        monkeypatch.setattr(denoise, "guess_weights", lambda count: np.ones(count, np.float32))
    else:
        monkeypatch.setattr(Shown, "acts", lambda self, index, count, _: index / count <= self.end)
    with model.ours(tmp_path / "bundle") as pipeline:
        assert model.difference(pipeline, controls, theirs, guess_mode=change == "guess") > 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"cross_attention_dim": 24}, "its cross_attention_dim is 24, and that of .* 16"),
        ({"layers_per_block": 2}, "its layers_per_block is 2, and that of .* 1"),
        ({"conditioning_embedding_out_channels": [16]}, "has 1 pixels to a side of a latent.* 2"),
        ({"conditioning_channels": 1}, "has 1 channels of a control image.* 3"),
        ({"global_pool_conditions": True}, "global_pool_conditions=True, which isn't supported"),
        ({"_class_name": "ControlNetUnionModel"}, "a ControlNetUnionModel, and edgesd takes a Con"),
    ],
)
def test_a_controlnet_of_another_model_is_refused(
    change: dict[str, Any], words: str, models: Callable[..., Model], folder: Path, tmp_path: Path
) -> None:
    models("sd")
    path = shutil.copytree(folder / "sd-1" / "a", tmp_path / "a") / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(InputError, match=words) as caught:
        export_spec(
            open_model(str(folder / "sd-1" / "base"), sides=[("controlnet", str(path.parent))])
        )
    assert len(str(caught.value).splitlines()) == 1


def test_what_does_not_fit_together_is_refused(
    models: Callable[..., Model], folder: Path, tmp_path: Path
) -> None:
    models("sd"), models("sdxl")
    base, own = str(folder / "sd-1" / "base"), str(folder / "sd-1" / "a")
    adapter(tiny("sd").unet).save_pretrained(tmp_path / "adapter")
    cases: list[tuple[list[tuple[SideKind, str]], type[Exception], str]] = [
        # An adapter's first feature is of the whole size, which a plain block has halved.
        (
            [("adapter", str(tmp_path / "adapter"))],
            InputError,
            r"makes feature 0 as \[16, 16, 16\]",
        ),
        ([("adapter", own)], InputError, "a ControlNetModel, and edgesd takes a T2IAdapter there"),
        ([("controlnet", str(folder / "sdxl-1" / "a"))], InputError, "cross_attention_dim is 32"),
        ([("controlnet", own), ("controlnet", own)], UsageError, "give each one of its own"),
        ([("controlnet", f"{own}:x"), ("controlnet", f"{own}:x")], UsageError, "the name 'x'"),
        ([("controlnet", f"{own}:a b")], UsageError, "'a b' is no name"),
        ([("controlnet", base)], InputError, "that is a pipeline"),
        ([("controlnet", str(tmp_path / "none"))], InputError, "doesn't exist"),
    ]
    for sides, kind, words in cases:
        with pytest.raises(kind, match=words) as caught:
            export_spec(open_model(base, sides=sides))
        assert len(str(caught.value).splitlines()) == 1
    # A folder that exists is taken whole, whatever colons it has.
    odd = shutil.copytree(own, tmp_path / "a:b")
    assert open_model(base, sides=[("controlnet", str(odd))]).sides == ("controlnet",)
    assert open_model(base, sides=[("controlnet", f"{odd}:c")]).sides == ("controlnet-c",)


def beside(models: Callable[..., Model], name: str, task: ImageTask) -> Model:
    """The model `name` with a ControlNet, for images that begin with one."""
    base = models(name)
    family = name.removesuffix("-inpaint")
    own: dict[str, Any] = (
        {"requires_safety_checker": False} if family == "sd" else {"add_watermarker": False}
    )
    pipeline = CLASSES[family, task][True](**base.theirs.components, **own)
    pipeline.set_progress_bar_config(disable=True)
    return Model(pipeline, base.source, export_spec(base.source, tasks=(task,)))


@pytest.mark.parametrize(
    ("name", "task", "guess"),
    [
        ("sd", "image", True),
        ("sd", "inpaint", False),
        ("sdxl", "image", False),
        ("sdxl", "inpaint", True),
        ("sd-inpaint", "inpaint", True),
        ("sdxl-inpaint", "inpaint", False),
    ],
)
def test_beside_an_image_and_a_mask(
    name: str, task: ImageTask, guess: bool, models: Callable[..., Model], tmp_path: Path
) -> None:
    """Two images in a batch. Parts of the steps are of those that the strength leaves."""
    model = beside(models, name, task)
    own, begun = PICTURES[0].decoded(), PICTURES[1].decoded().resize(OBLONG)
    mask = Image.new("L", OBLONG)
    mask.paste(255, (4, 4, 30, 20))
    masks = {"image": None, "inpaint": mask}
    theirs = {
        "image": [begun] * 2, "control_image": [own] * 2, "strength": 0.6,
        "control_guidance_start": 0.2, "control_guidance_end": 0.7,
        "controlnet_conditioning_scale": 0.8, "guess_mode": guess,
        **({} if task == "image" else {"mask_image": [mask] * 2}),
    }  # fmt: skip
    asked: dict[str, Any] = {
        "count": 2, "steps": 8, "image": begun, "mask": masks[task], "strength": 0.6,
    }  # fmt: skip
    with model.ours(tmp_path / "bundle") as ours:
        shown = [Control(PICTURES[0], scale=0.8, start=0.2, end=0.7)]
        assert model.difference(ours, shown, theirs, guess_mode=guess, **asked) <= 1
        assert model.difference(ours, [], theirs, **asked) > 1


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_where_a_part_is_painted_alone_the_same_part_is_shown(
    name: str, models: Callable[..., Model], tmp_path: Path
) -> None:
    model = beside(models, name, "inpaint")
    begun, mask = PICTURES[1].decoded(), Image.new("L", PICTURES[1].size)
    mask.paste(255, (20, 12, 44, 25))
    theirs = {
        "image": begun, "mask_image": mask, "control_image": PICTURES[0].decoded(),
        "strength": 0.6, "padding_mask_crop": 3, "controlnet_conditioning_scale": 1.0,
    }  # fmt: skip
    asked: dict[str, Any] = {
        "steps": 5, "image": begun, "mask": mask, "strength": 0.6, "mask_padding": 3,
    }  # fmt: skip
    with model.ours(tmp_path / "bundle") as ours:
        assert model.difference(ours, [Control(PICTURES[0])], theirs, **asked) <= 1
        other = Image.new("L", mask.size)
        other.paste(255, (2, 2, 20, 10))
        requests = [
            Request("a", 1, image=begun, mask=one, mask_padding=3, controls=(Control(PICTURES[0]),))
            for one in (mask, other)
        ]
        with pytest.raises(UsageError, match="must paint the same part"):
            ours.generate(requests)
