"""Every kind of pipeline makes diffusers' images, and a mistake in its description is noticed.

The networks are the torch modules that would be exported: parity of graphs with them is tested
elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import msgspec
import numpy as np
import pytest
from PIL import Image

pytest.importorskip("torch")

from edgesd.errors import InputError, ParityError, UsageError
from edgesd.export.families import ExportSpec, sdxl
from edgesd.export.families.parts import clip
from edgesd.export.own_pipeline import check_own_pipeline
from edgesd.export.pipeline import export_spec
from edgesd.export.source import ModelSource, resolve_source
from edgesd.runtime import conditioning
from edgesd.runtime.denoise import Step
from edgesd.runtime.pipeline import Pipeline
from edgesd.runtime.refined import Refined
from edgesd.runtime.requests import CompleteMicro, Micro, Request
from edgesd.runtime.tokenizer import PromptTokenizer, tokenizer_of
from tests.tiny_pipelines import NEW_WORD, PIPELINES, diffusers_images, on_torch, tiny, write_tiny

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

STEPS = 3
PROMPTS = (f"a red apple {NEW_WORD} on a house", "the blue cat")
SEEDS = (5, 6)
SIZES = ((32, 32), (40, 24))
"""Width and height."""

OBLONG = SIZES[1]
LENGTH = "max_sequence_length"
"""Argument of diffusers' FluxPipeline: tokens that T5 gets."""

FROM_PROMPTS = [
    name
    for name in PIPELINES
    if name not in ("sdxl-refiner", "sd-inpaint", "sdxl-inpaint", "flux-fill", "flux-control")
]


class Model(NamedTuple):
    """A tiny pipeline: as diffusers made it, as a model on disk, and what is exported of it."""

    theirs: Any
    source: ModelSource
    export: ExportSpec

    def ours(self, folder: Path) -> Pipeline:
        """edgesd's pipeline of it, with the bundle in the new `folder`."""
        return on_torch(self.source, self.export, folder)

    def difference(
        self,
        ours: Pipeline,
        count: int = 1,
        size: tuple[int, int] = OBLONG,
        theirs: Mapping[str, Any] | None = None,
        **asked: Any,
    ) -> int:
        """The largest difference of `count` images in one batch from diffusers', 0 to 255. theirs,
        asked: further arguments of diffusers' call, and of the requests."""
        width, height = size
        prompts, seeds = PROMPTS[:count], SEEDS[:count]
        spec = self.export.pipeline
        options = {"guidance_scale": spec.guidance_scale, **(theirs or {})}
        if spec.family == "flux":
            options.setdefault(LENGTH, spec.wiring.tokenizers["tokenizer_2"].max_tokens)
        negative = options.pop("negative_prompt", None)
        if negative is not None:
            options["negative_prompt"] = [negative] * count
        wanted = diffusers_images(
            self.theirs,
            prompts,
            seeds,
            num_inference_steps=STEPS,
            width=width,
            height=height,
            **options,
        )
        request = Request("", 0, negative, STEPS, height=height, width=width)
        request = replace(request, **asked)
        requests = [
            replace(request, prompt=prompt, seed=seed)
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        pairs = zip(ours.generate(requests), wanted, strict=True)
        return max(int(np.abs(np.int32(one) - np.int32(other)).max()) for one, other in pairs)


def opened(name: str, folder: Path) -> Model:
    source = resolve_source(write_tiny(name, folder))
    return Model(tiny(name), source, export_spec(source))


@pytest.fixture(scope="module")
def sdxl_model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return opened("sdxl", tmp_path_factory.mktemp("tiny") / "sdxl")


@pytest.fixture(scope="module")
def refiner(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return opened("sdxl-refiner", tmp_path_factory.mktemp("tiny") / "refiner")


@pytest.fixture
def sdxl_pipeline(sdxl_model: Model, tmp_path: Path) -> Pipeline:
    return sdxl_model.ours(tmp_path / "bundle")


def tokenizers(pipeline: Pipeline) -> dict[str, PromptTokenizer]:
    folders = pipeline.spec.wiring.tokenizers
    return {folder: tokenizer_of(pipeline.bundle, folder) for folder in folders}


@pytest.mark.parametrize("name", FROM_PROMPTS)
def test_images_are_those_of_diffusers(name: str, tmp_path: Path) -> None:
    model = opened(name, tmp_path / name)
    with model.ours(tmp_path / "bundle") as pipeline:
        check_own_pipeline(model.export, tokenizers(pipeline))
        for size in SIZES:
            for count in 1, 2:
                assert model.difference(pipeline, count, size) <= 1


@pytest.mark.parametrize("end", [0.8, 0.4])
@pytest.mark.parametrize(("count", "size"), [(1, SIZES[0]), (2, OBLONG)])
def test_a_refiner_goes_on_as_diffusers_does(
    sdxl_model: Model, refiner: Model, end: float, count: int, size: tuple[int, int], tmp_path: Path
) -> None:
    """Latents that diffusers' base model hands to its refiner, and ours to ours."""
    width, height = size
    options = {"num_inference_steps": 10, "guidance_scale": 5.0}
    prompts, seeds = PROMPTS[:count], SEEDS[:count]
    latents = diffusers_images(
        sdxl_model.theirs, prompts, seeds, **options, width=width, height=height,
        denoising_end=end, output_type="latent",
    )  # fmt: skip
    wanted = diffusers_images(
        refiner.theirs, prompts, seeds, **options, image=latents, denoising_start=end,
        aesthetic_score=7.5, negative_aesthetic_score=1.5,
    )  # fmt: skip
    with (
        sdxl_model.ours(tmp_path / "base") as base,
        refiner.ours(tmp_path / "refiner") as second,
    ):
        check_own_pipeline(refiner.export, tokenizers(second))
        both = Refined(base, second)
        request = Request(
            "", 0, None, 10, height=height, width=width, denoising_end=end,
            micro=Micro(aesthetic_score=7.5), negative_micro=Micro(aesthetic_score=1.5),
        )  # fmt: skip
        requests = [
            both.complete(replace(request, prompt=prompt, seed=seed))
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        found = both.generate(requests)
        alone = base.generate([replace(one, denoising_end=None) for one in requests])
    for one, other, begun in zip(found, wanted, alone, strict=True):
        assert int(np.abs(np.int32(one) - np.int32(other)).max()) <= 1
        assert int(np.abs(np.int32(one) - np.int32(begun)).max()) > 10


@pytest.mark.parametrize(("strength", "end"), [(0.7, 0.6), (1.0, 0.8)])
def test_a_refiner_goes_on_with_an_image_as_diffusers_does(
    sdxl_model: Model, refiner: Model, strength: float, end: float, tmp_path: Path
) -> None:
    import diffusers

    width, height = OBLONG
    values = np.random.default_rng(0).integers(0, 256, (height // 8, width // 8, 3), np.uint8)
    picture = Image.fromarray(values).resize(OBLONG)
    options = {"num_inference_steps": 10, "guidance_scale": 5.0}
    img2img = diffusers.StableDiffusionXLImg2ImgPipeline(
        **sdxl_model.theirs.components, add_watermarker=False
    )
    img2img.set_progress_bar_config(disable=True)
    latents = diffusers_images(
        img2img, PROMPTS, SEEDS, **options, image=[picture] * 2, strength=strength,
        denoising_end=end, output_type="latent",
    )  # fmt: skip
    wanted = diffusers_images(
        refiner.theirs, PROMPTS, SEEDS, **options, image=latents, denoising_start=end
    )
    export = export_spec(sdxl_model.source, tasks=("image",))
    steps: list[Step] = []
    with (
        on_torch(sdxl_model.source, export, tmp_path / "base") as base,
        refiner.ours(tmp_path / "refiner") as second,
    ):
        both = Refined(base, second)
        request = Request(
            "", 0, None, 10, image=picture, strength=strength, denoising_end=end
        )  # fmt: skip
        requests = [
            both.complete(replace(request, prompt=prompt, seed=seed))
            for prompt, seed in zip(PROMPTS, SEEDS, strict=True)
        ]
        found = both.generate(requests, steps.append)
        late = replace(request, strength=round(1 - end, 1), prompt="a")
        with pytest.raises(UsageError, match="begins where the refiner goes on"):
            both.complete(late)
        with pytest.raises(UsageError, match="leave --refiner or --mask out"):
            both.complete(replace(request, mask=Image.new("L", OBLONG, 255)))
    taken = round(10 * strength)
    assert [(step.index, step.count) for step in steps] == [(i, taken) for i in range(taken)]
    for one, other in zip(found, wanted, strict=True):
        assert int(np.abs(np.int32(one) - np.int32(other)).max()) <= 1


@pytest.mark.parametrize(
    ("theirs", "asked"),
    [
        ({"negative_prompt": ""}, {}),
        ({"negative_prompt": "a dog"}, {}),
        ({"guidance_rescale": 0.7}, {"guidance_rescale": 0.7}),
        (
            {"original_size": (48, 64), "crops_coords_top_left": (7, 3), "target_size": (20, 10)},
            {"micro": Micro((64, 48), (3, 7), (10, 20))},
        ),
        (
            {
                "negative_original_size": (48, 64),
                "negative_crops_coords_top_left": (7, 3),
                "negative_target_size": (20, 10),
            },
            {"negative_micro": Micro((64, 48), (3, 7), (10, 20))},
        ),
        ({"prompt_2": ["a tree"]}, {"prompt_2": "a tree"}),
        (
            {"negative_prompt": "a dog", "negative_prompt_2": ["the sea"]},
            {"negative_prompt_2": "the sea"},
        ),
    ],
    ids=["no words", "negative", "rescaled", "sizes", "other sizes", "second", "both negative"],
)
def test_all_that_sdxl_is_asked_for_is_what_diffusers_makes_of_it(
    theirs: dict[str, Any], asked: dict[str, Any], sdxl_model: Model, sdxl_pipeline: Pipeline
) -> None:
    with sdxl_pipeline as pipeline:
        assert sdxl_model.difference(pipeline, theirs=theirs, **asked) <= 1
        assert sdxl_model.difference(pipeline, theirs=theirs) > 1 or not asked


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_layers_that_are_left_out_are_those_of_diffusers(name: str, tmp_path: Path) -> None:
    """Without a negative prompt that is encoded: diffusers leaves no layer of that out."""
    model = opened(name, tmp_path / name)
    own = replace(model.source, clip_skip=1)
    model = model._replace(source=own, export=export_spec(own))
    encoder = model.theirs.text_encoder
    # Where diffusers looks for the norm: transformers has moved it.
    encoder.text_model = SimpleNamespace(final_layer_norm=encoder.final_layer_norm)
    with model.ours(tmp_path / "bundle") as pipeline:
        check_own_pipeline(model.export, tokenizers(pipeline))
        guidance = 1.0 if name == "sd" else 5.0
        theirs = {"guidance_scale": guidance}
        assert model.difference(pipeline, theirs={**theirs, "clip_skip": 1}, **theirs) <= 1
        assert model.difference(pipeline, theirs=theirs, **theirs) > 1
    with pytest.raises(InputError, match=r"has 3 layers, and . can't be left out"):
        export_spec(replace(own, clip_skip=3))


# Mutations: the image differs, and where diffusers' own pipeline shows it, the build ends.


right_ids = conditioning._size_ids


def swapped_ids(micro: CompleteMicro, count: int) -> dict[Any, Any]:
    """Width before height, of the original size."""
    made = right_ids(micro, count)
    return {fill: values[:, [1, 0, *range(2, values.shape[1])]] for fill, values in made.items()}


@pytest.mark.parametrize("size", ["as the image's", "given"])
def test_swapped_size_ids_are_noticed(
    size: str,
    sdxl_model: Model,
    sdxl_pipeline: Pipeline,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(conditioning, "_size_ids", swapped_ids)
    given = size == "given"
    theirs = {"original_size": (64, 1024)} if given else {}
    asked = {"micro": Micro((1024, 64))} if given else {}
    with sdxl_pipeline as pipeline:
        assert sdxl_model.difference(pipeline, theirs=theirs, **asked) > 1
        with pytest.raises(ParityError, match="time_ids of unet"):
            check_own_pipeline(sdxl_model.export, tokenizers(pipeline))


@pytest.mark.parametrize("name", ["sdxl", "sdxl-encoded-negative"])
def test_zeros_for_no_words_and_no_words_for_zeros_are_noticed(name: str, tmp_path: Path) -> None:
    model = opened(name, tmp_path / name)
    spec = model.export.pipeline
    wiring = msgspec.structs.replace(spec.wiring, zero_negative=not spec.wiring.zero_negative)
    wrong = replace(model.export, pipeline=msgspec.structs.replace(spec, wiring=wiring))
    model = model._replace(export=wrong)
    with model.ours(tmp_path / "bundle") as pipeline:
        assert model.difference(pipeline) > 1
        with pytest.raises(ParityError, match=r"(encoder_hidden_states|text_embeds) of unet"):
            check_own_pipeline(wrong, tokenizers(pipeline))


@pytest.mark.parametrize("behind", [0, 2])
def test_another_hidden_layer_is_noticed(
    behind: int, sdxl_model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sdxl, "_PENULTIMATE", behind)
    model = sdxl_model._replace(export=export_spec(sdxl_model.source))
    with model.ours(tmp_path / "bundle") as pipeline:
        assert model.difference(pipeline) > 1
        with pytest.raises(ParityError):
            check_own_pipeline(model.export, tokenizers(pipeline))


def test_a_norm_that_is_not_there_is_noticed(
    sdxl_model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Normed(clip.TextEncoder):
        def __init__(self, net: Any, dropped: int, normed: bool) -> None:
            super().__init__(net, dropped, not normed)

    monkeypatch.setattr(clip, "TextEncoder", Normed)
    with sdxl_model.ours(tmp_path / "bundle") as pipeline:
        assert sdxl_model.difference(pipeline) > 1


@pytest.mark.parametrize("folder", ["tokenizer", "tokenizer_2"])
def test_another_padding_is_noticed(
    folder: str, sdxl_model: Model, sdxl_pipeline: Pipeline
) -> None:
    with sdxl_pipeline as pipeline:
        found = tokenizers(pipeline)
        spec = found[folder].spec
        other = spec.eos_id if spec.pad_id != spec.eos_id else 0
        found[folder].spec = msgspec.structs.replace(spec, pad_id=other)
        pipeline._prompts._tokenizers = found
        assert sdxl_model.difference(pipeline) > 1
        with pytest.raises(ParityError, match=f"{folder}: .* token ids"):
            check_own_pipeline(sdxl_model.export, found)


@pytest.mark.parametrize("name", ["sdxl-word", "sdxl-word-old-eos"])
def test_another_end_of_the_text_is_noticed(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which token's state is the text's embedding: with either rule, images show the other."""
    model = opened(name, tmp_path / name)

    class Other(clip.ProjectedTextEncoder):
        def __init__(self, net: Any, behind: int) -> None:
            super().__init__(net, behind)
            self.eos = net.config.vocab_size - 2 if self.eos is None else None

    monkeypatch.setattr(clip, "ProjectedTextEncoder", Other)
    with model.ours(tmp_path / "bundle") as pipeline:
        assert model.difference(pipeline) > 1
