"""Stable Diffusion XL's configs: what is taken of them, and what is refused in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from edgesd.errors import InputError, UsageError
from edgesd.export.pipeline import export_spec
from edgesd.export.source import resolve_source
from edgesd.runtime.flow import flow_of
from edgesd.spec.pipeline import EncoderSpec, ImageTask, Task
from tests.models import config_of, edit
from tests.tiny_pipelines import write_tiny

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny("sdxl", tmp_path_factory.mktemp("tiny") / "sdxl")


@pytest.fixture
def model(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


def changed(component: str, **fields: Any) -> Callable[[Path], None]:
    return lambda model: edit(config_of(model, component), **fields)


def shorter_tokens(model: Path) -> None:
    edit(model / "tokenizer_2" / "tokenizer_config.json", model_max_length=64)


def two_skipped(model: Path) -> None:
    (model / "edgesd.json").write_text(json.dumps({"clip_skip": 2}))


WRONG: dict[str, tuple[Callable[[Path], None], str]] = {
    "a UNet that is told nothing": (
        changed("unet", addition_embed_type=None),
        r"addition_embed_type=None isn't supported.*has 'text_time'",
    ),
    "a UNet that is told more": (
        changed("unet", projection_class_embeddings_input_dim=68),
        "is told 68 values, and 6 sizes of 8 with a text embedding of 12 are 60",
    ),
    "a UNet of other texts": (
        changed("unet", cross_attention_dim=24),
        "width 24, and the text encoders make 32",
    ),
    "a UNet that sees depth": (changed("unet", in_channels=5), "takes 5 channels"),
    "encoders of other prompts": (
        shorter_tokens,
        r"different numbers of tokens \(text_encoder's 77 and text_encoder_2's 64\)",
    ),
    "an encoder of another class": (
        changed("index", text_encoder_2=["transformers", "CLIPTextModel"]),
        "text_encoder_2 is a CLIPTextModel .* valid: CLIPTextModelWithProjection",
    ),
    "one encoder": (changed("index", text_encoder_2=[None, None]), "has no text_encoder_2"),
    "too many layers left out": (
        two_skipped,
        "has 3 layers, and 3 can't be left out: give a smaller --clip-skip",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_refused_in_one_line(name: str, model: Path) -> None:
    change, words = WRONG[name]
    change(model)
    with pytest.raises(InputError, match=words) as caught:
        export_spec(resolve_source(model))
    assert len(str(caught.value).splitlines()) == 1


def test_an_sdxl_is_no_stable_diffusion(model: Path) -> None:
    edit(model / "model_index.json", _class_name="StableDiffusionPipeline")
    with pytest.raises(InputError, match="addition_embed_type='text_time' isn't supported"):
        export_spec(resolve_source(model))


def test_encoders_run_one_after_the_other(model: Path) -> None:
    flow = flow_of(export_spec(resolve_source(model)).pipeline)
    assert [[stage.component for stage in group] for group in flow.groups] == [
        ["text_encoder"],
        ["text_encoder_2"],
        ["unet"],
        ["vae_decoder"],
    ]


@pytest.mark.parametrize(
    ("asked", "tasks"),
    [
        ((), ("text",)),
        (("image",), ("text", "image")),
        (("inpaint",), ("text", "image", "inpaint")),
    ],
)
def test_tasks_that_are_asked_for_have_an_encoder(
    asked: tuple[ImageTask, ...], tasks: tuple[Task, ...], model: Path
) -> None:
    """With diffusers' own strengths; and in fp32 where the model says so."""
    export = export_spec(resolve_source(model), tasks=asked)
    wiring = export.pipeline.wiring
    assert wiring.tasks == tasks
    strengths: dict[Task, float] = {"image": 0.3, "inpaint": 0.9999}
    assert wiring.strengths == {task: strengths[task] for task in tasks[1:]}
    if asked:
        assert wiring.encoder == EncoderSpec("vae_encoder", "image", ("mean", "std"))
        assert export.components[-1].name == "vae_encoder" and export.components[-1].fp32
    else:
        assert wiring.encoder is None


def test_a_model_for_inpainting_has_that_task_alone(model: Path) -> None:
    edit(model / "unet/config.json", in_channels=9)
    for asked in (), ("inpaint",):
        wiring = export_spec(resolve_source(model), tasks=asked).pipeline.wiring
        assert (wiring.tasks, wiring.denoiser.concat) == (("inpaint",), ("mask", "masked"))
    with pytest.raises(UsageError, match="is for inpainting alone"):
        export_spec(resolve_source(model), tasks=("image",))


@pytest.mark.parametrize(
    ("index", "zeros"),
    [
        ({}, True),
        ({"force_zeros_for_empty_prompt": False}, False),
        ({"force_zeros_for_empty_prompt": None}, True),
    ],
)
def test_zeros_stand_for_no_negative_prompt_where_the_model_says_so(
    index: dict[str, Any], zeros: bool, model: Path
) -> None:
    edit(model / "model_index.json", **index)
    wiring = export_spec(resolve_source(model)).pipeline.wiring
    assert wiring.zero_negative is zeros


def layers(model: Path, clip_skip: int | None = None) -> list[int]:
    """Layers of both encoders in the graphs."""
    source = replace(resolve_source(model), clip_skip=clip_skip)
    first, second, *_ = export_spec(source).components
    return [
        len(first.load(weights=False).net.encoder.layers),  # type: ignore[union-attr,arg-type]
        len(second.load(weights=False).net.text_model.encoder.layers),  # type: ignore[union-attr,arg-type]
    ]


def test_layers_that_nothing_reads_are_not_exported(model: Path) -> None:
    assert layers(model) == [2, 3]
    assert layers(model, 1) == [1, 3]
    (model / "edgesd.json").write_text(json.dumps({"clip_skip": 1}))
    assert layers(model) == [1, 3]
    assert layers(model, 0) == [2, 3]  # the user's number holds


def test_a_pipeline_for_images_is_built_for_prompts(model: Path) -> None:
    own = export_spec(resolve_source(model)).pipeline
    edit(model / "model_index.json", _class_name="StableDiffusionXLImg2ImgPipeline")
    found = export_spec(resolve_source(model)).pipeline
    assert (found.family, found.wiring, found.guidance_scale) == ("sdxl", own.wiring, 5.0)
