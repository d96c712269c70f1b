"""FLUX makes diffusers' images, and each mistake in its description is noticed.

As in test_same_images.py, networks are the torch modules that would be exported.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

torch = pytest.importorskip("torch")

from edgesd.errors import InputError, ParityError, UsageError  # noqa: E402
from edgesd.export.families import flux  # noqa: E402
from edgesd.export.families.parts import flux_transformer  # noqa: E402
from edgesd.export.own_pipeline import check_own_pipeline  # noqa: E402
from edgesd.export.pipeline import export_spec  # noqa: E402
from edgesd.export.source import resolve_source  # noqa: E402
from edgesd.runtime.flow import GuidanceMode  # noqa: E402
from edgesd.runtime.requests import Completion, Request, unused  # noqa: E402
from edgesd.runtime.schedulers.flow_euler import FlowEuler  # noqa: E402
from edgesd.runtime.settings import Settings  # noqa: E402
from edgesd.spec.pipeline import LatentSpec, SchedulerSpec  # noqa: E402
from tests.e2e.test_same_images import LENGTH, SIZES, Model, opened, tokenizers  # noqa: E402
from tests.tiny_pipelines import on_torch, write_tiny  # noqa: E402

LATENTS = torch.arange(2 * 4 * 8 * 12, dtype=torch.float32).reshape(2, 4, 8, 12)


@pytest.fixture(scope="module")
def dev(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return opened("flux-dev", tmp_path_factory.mktemp("tiny") / "flux-dev")


@pytest.fixture(scope="module")
def schnell(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return opened("flux-schnell", tmp_path_factory.mktemp("tiny") / "flux-schnell")


def changed(model: Model, **spec: Any) -> Model:
    """The model with other values in its pipeline's spec."""
    pipeline = msgspec.structs.replace(model.export.pipeline, **spec)
    return model._replace(export=replace(model.export, pipeline=pipeline))


def test_defaults_are_those_of_what_the_transformer_was_distilled_to(
    dev: Model, schnell: Model
) -> None:
    found = [
        (m.export.pipeline.num_inference_steps, m.export.pipeline.guidance_scale)
        for m in (dev, schnell)
    ]
    assert found == [(28, 3.5), (4, 0.0)]
    assert {m.export.judged_by for m in (dev, schnell)} == {"lpips"}
    lengths = [
        m.export.pipeline.wiring.tokenizers["tokenizer_2"].max_tokens for m in (dev, schnell)
    ]
    assert lengths == [512, 256]
    assert (dev.export.pipeline.shape.height, dev.export.pipeline.shape.multiple_of) == (256, 4)


def test_guidance_is_an_input_and_runs_the_transformer_once(dev: Model, tmp_path: Path) -> None:
    with dev.ours(tmp_path / "bundle") as pipeline:
        assert not pipeline.flow.guided(7.0)
        assert dev.difference(pipeline, theirs={"guidance_scale": 7.0}, guidance_scale=7.0) <= 1
        assert dev.difference(pipeline, theirs={"guidance_scale": 7.0}) > 1


@pytest.mark.parametrize("mode", ["batched", "sequential"])
def test_true_cfg_leads_away_from_the_negative_prompt(
    mode: GuidanceMode, dev: Model, tmp_path: Path
) -> None:
    theirs = {"negative_prompt": "a green house", "true_cfg_scale": 4.0}
    settings = Settings(made_here=True, guidance_mode=mode)
    with on_torch(dev.source, dev.export, tmp_path / "bundle", settings) as pipeline:
        assert dev.difference(pipeline, 2, theirs=theirs, true_cfg_scale=4.0) <= 1
        assert dev.difference(pipeline, 2, theirs=theirs) > 1
        with pytest.raises(UsageError, match="give --negative, too"):
            pipeline.complete(Request("a cat", 1, true_cfg_scale=4.0))
        for scale in 0.5, float("nan"), 1e9:
            with pytest.raises(UsageError, match="true_cfg_scale must be 1 to"):
                pipeline.complete(Request("a cat", 1, "", true_cfg_scale=scale))


def test_what_changes_no_image_is_told(dev: Model, schnell: Model) -> None:
    def told(model: Model, **asked: Any) -> list[str]:
        spec = model.export.pipeline
        return [*unused(spec, Completion(spec).complete(Request("a cat", 1, **asked)))]

    without = "isn't used: it is with --true-cfg above 1"
    asked = {"negative_prompt": "a dog", "guidance_rescale": 0.7}
    assert told(dev, **asked) == [f"the negative prompt {without}", f"--guidance-rescale {without}"]
    assert told(dev, **asked, true_cfg_scale=2.0) == []
    assert told(dev, negative_prompt="", guidance_scale=7.0) == []
    assert told(schnell, guidance_scale=3.5) == [
        "this model takes no guidance scale: --guidance isn't used"
    ]
    assert told(schnell, guidance_scale=0.0) == []


def test_sizes_that_no_bundle_has_are_refused(dev: Model) -> None:
    with pytest.raises(UsageError, match=r"width 62 isn't a multiple of 4: the nearest is 64$"):
        Completion(dev.export.pipeline).complete(Request("a cat", 1, width=62))


def test_the_second_prompt_is_for_t5(dev: Model, tmp_path: Path) -> None:
    second = "a tree in the sea " * 40
    theirs = {"prompt_2": [second]}
    with dev.ours(tmp_path / "bundle") as pipeline:
        assert dev.difference(pipeline, theirs=theirs, prompt_2=second) <= 1
        assert dev.difference(pipeline, theirs=theirs) > 1


def test_the_size_of_edgesd_json_is_the_default(tmp_path: Path) -> None:
    folder = write_tiny("flux-schnell", tmp_path / "model")
    hints = folder / "edgesd.json"
    hints.write_text(json.dumps({"width": 40, "height": 24, "num_inference_steps": 3}))
    model = opened_again(folder)
    shape = model.export.pipeline.shape
    assert (shape.width, shape.height, shape.dynamic) == (40, 24, True)
    with model.ours(tmp_path / "bundle") as pipeline:
        check_own_pipeline(model.export, tokenizers(pipeline))
    hints.write_text(json.dumps({"width": 42}))
    with pytest.raises(UsageError, match=r"edgesd\.json: width 42 isn't a multiple of 4"):
        opened_again(folder)
    hints.write_text(json.dumps({"width": 1 << 20}))
    with pytest.raises(InputError, match="width must be a number from 1 to 16384"):
        opened_again(folder)


def opened_again(folder: Path) -> Model:
    source = resolve_source(folder)
    return Model(None, source, export_spec(source))


def test_what_flux_has_none_of_is_refused(schnell: Model) -> None:
    source = schnell.source
    with pytest.raises(UsageError, match=r"FLUX has no variants.*leave --variant out"):
        export_spec(replace(source, variant="lcm"))
    with pytest.raises(UsageError, match="one chunk: leave --prompt-chunks out"):
        export_spec(source, (32, 32), chunks=2)
    with pytest.raises(InputError, match="scheduler euler doesn't fit a model made for FlowMatch"):
        export_spec(source, scheduler="euler")


@pytest.mark.parametrize(
    ("file", "field", "value", "message"),
    [
        ("transformer", "joint_attention_dim", 48, "embeddings of T5 of width 48, and T5 makes 32"),
        ("transformer", "pooled_projection_dim", 48, "of CLIP of width 48, and CLIP makes 16"),
        ("transformer", "in_channels", 64, "VAE has 4 latent channels and the denoiser 16"),
        ("transformer", "out_channels", 12, "takes 16 channels and returns 12"),
        ("transformer", "patch_size", 2, "in patches of 2"),
        ("transformer", "axes_dims_rope", [4, 6, 8], r"axes_dims_rope .* \[4, 6, 8\]: expected"),
        (
            "transformer",
            "axes_dims_rope",
            [-2, 8, 10],
            r"axes_dims_rope .* \[-2, 8, 10\]: expected",
        ),
        ("transformer", "axes_dims_rope", [4.0, 6, 6], r"axes_dims_rope .* \[4\.0, 6, 6\]: expec"),
        (
            "text_encoder_2",
            "relative_attention_max_distance",
            0,
            "max_distance is 0: expected more",
        ),
        ("vae", "shift_factor", None, "shift_factor is None: expected a number"),
    ],
)
def test_configs_that_do_not_fit_each_other_are_refused(
    file: str, field: str, value: object, message: str, tmp_path: Path
) -> None:
    folder = write_tiny("flux-schnell", tmp_path / "model")
    path = folder / file / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    with pytest.raises(InputError, match=message):
        opened_again(folder)


def test_tokens_are_those_of_diffusers() -> None:
    import diffusers

    theirs = diffusers.FluxPipeline._pack_latents(LATENTS, *LATENTS.shape)
    packed = flux_transformer.packed(LATENTS)
    assert torch.equal(packed, theirs)
    assert torch.equal(flux_transformer.unpacked(packed, 4, 6), LATENTS)


# Mutations: the image differs, and where diffusers' own pipeline shows it, the build ends.


def test_another_shift_of_the_schedule_is_noticed(
    dev: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = FlowEuler.dynamic_shift
    monkeypatch.setattr(FlowEuler, "dynamic_shift", lambda self, n: right(self, n) * 1.3)
    with dev.ours(tmp_path / "bundle") as pipeline:
        assert dev.difference(pipeline) > 1
        with pytest.raises(ParityError, match="have the timesteps"):
            check_own_pipeline(dev.export, tokenizers(pipeline))


def test_a_shift_by_the_number_of_latents_is_noticed(dev: Model, tmp_path: Path) -> None:
    latent = msgspec.structs.replace(dev.export.pipeline.latent, patch=1)
    model = changed(dev, latent=latent)
    with model.ours(tmp_path / "bundle") as pipeline:
        assert model.difference(pipeline) > 1
        with pytest.raises(ParityError, match="have the timesteps"):
            check_own_pipeline(model.export, tokenizers(pipeline))


def test_sigmas_of_the_scheduler_are_noticed(schnell: Model, tmp_path: Path) -> None:
    own = schnell.export.pipeline.scheduler
    model = changed(schnell, scheduler=SchedulerSpec(own.name, own.config))
    with model.ours(tmp_path / "bundle") as pipeline:
        assert model.difference(pipeline) > 1
        with pytest.raises(ParityError, match="have the timesteps"):
            check_own_pipeline(model.export, tokenizers(pipeline))


@pytest.mark.parametrize("field", ["shift_factor", "scaling_factor"])
def test_another_scale_of_latents_is_noticed(
    field: str, schnell: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgesd.export.families.parts import vae

    right = vae.latent_spec

    def wrong(*args: Any, **options: Any) -> LatentSpec:
        return msgspec.structs.replace(right(*args, **options), **{field: 0.9})

    monkeypatch.setattr(vae, "latent_spec", wrong)
    model = schnell._replace(export=export_spec(schnell.source))
    with model.ours(tmp_path / "bundle") as pipeline:
        assert model.difference(pipeline) > 1
        with pytest.raises(ParityError, match="what is decoded"):
            check_own_pipeline(model.export, tokenizers(pipeline))


def test_another_number_of_tokens_is_noticed(
    schnell: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flux, "_MAX_TOKENS", {False: 32})
    model = schnell._replace(export=export_spec(schnell.source))
    with model.ours(tmp_path / "bundle") as pipeline:
        assert model.difference(pipeline) <= 1
        assert model.difference(pipeline, theirs={LENGTH: 256}) > 1


Rotations = flux_transformer.FluxTransformer._rotations


def of_text(self: Any, height: int, width: int, tokens: int) -> Any:
    """The text is rotated, as the first rows of the image are."""
    return tuple(t.roll(-tokens, 0) for t in Rotations(self, height, width, tokens))


def transposed(self: Any, height: int, width: int, tokens: int) -> Any:
    """Rows for columns."""
    found = []
    for table in Rotations(self, width, height, tokens):
        image = table[tokens:].unflatten(0, (width, height)).transpose(0, 1).flatten(0, 1)
        found.append(torch.cat([table[:tokens], image]))
    return tuple(found)


@pytest.mark.parametrize("wrong", [of_text, transposed])
def test_other_places_of_tokens_are_noticed(
    wrong: Callable[..., Any], dev: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flux_transformer.FluxTransformer, "_rotations", wrong)
    with dev.ours(tmp_path / "bundle") as pipeline:
        assert dev.difference(pipeline, size=SIZES[0]) > 1


def by_place(latents: Any) -> Any:
    """The four places of a patch before the channels."""
    batch, channels, height, width = latents.shape
    blocks = latents.reshape(batch, channels, height // 2, 2, width // 2, 2)
    return blocks.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


@pytest.mark.parametrize(
    ("name", "value"), [("packed", by_place), ("_THOUSAND", 1.0)], ids=["packing", "guidance"]
)
def test_other_packing_and_guidance_are_noticed(
    name: str, value: object, dev: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with dev.ours(tmp_path / "bundle") as pipeline:
        monkeypatch.setattr(flux_transformer, name, value)
        assert dev.difference(pipeline) > 1
