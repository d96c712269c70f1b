"""An export spec takes its values from the libraries' own objects, and is compared with what
diffusers' own pipeline feeds its networks."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

from diffusers.utils import DummyObject  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from edgesd.errors import EdgesdError, InputError, ParityError  # noqa: E402
from edgesd.export.families import ExportSpec  # noqa: E402
from edgesd.export.families.parts.clip import load_tokenizer  # noqa: E402
from edgesd.export.families.parts.unet import Unet  # noqa: E402
from edgesd.export.own_pipeline import check_own_pipeline  # noqa: E402
from edgesd.export.pipeline import export_spec  # noqa: E402
from edgesd.export.source import resolve_source  # noqa: E402
from edgesd.export.tokenizer import write_tokenizer  # noqa: E402
from edgesd.runtime.schedulers import SCHEDULERS, create_scheduler  # noqa: E402
from edgesd.runtime.tokenizer import PromptTokenizer  # noqa: E402
from tests.models import EMOJI, config_of, edit, write_configs  # noqa: E402

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("one_thread")]

KL = {
    "_class_name": "AutoencoderKL",
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "block_out_channels": [8, 8, 16],
    "norm_num_groups": 4,
}
SAMPLERS = sorted(name for name, cls in SCHEDULERS.items() if cls.process == "diffusion")
HAS = {
    name: not isinstance(getattr(diffusers, SCHEDULERS[name].diffusers_class), DummyObject)
    for name in SAMPLERS
}
"""Whether diffusers has a sampler here: two need packages of their own."""


def exported(folder: Path, **options: Any) -> ExportSpec:
    return export_spec(resolve_source(folder), **options)


def tokenizer_of(folder: Path, export: ExportSpec) -> PromptTokenizer:
    tokens = export.pipeline.wiring.tokenizers["tokenizer"].max_tokens
    files = write_tokenizer(
        folder / "tokenizer",
        folder / "written",
        tokens,
    )
    return PromptTokenizer(*files.values())


def check(folder: Path, **options: Any) -> ExportSpec:
    """The export spec of a folder, compared with diffusers' own pipeline."""
    export = exported(folder, **options)
    check_own_pipeline(export, {"tokenizer": tokenizer_of(folder, export)})
    return export


@pytest.fixture(scope="module")
def emoji_export() -> ExportSpec:
    return exported(EMOJI)


@pytest.fixture(scope="module")
def emoji_tokenizer() -> PromptTokenizer:
    spec = b'{"max_length": 77, "pad_id": 4095, "bos_id": 4094, "eos_id": 4095}'
    return PromptTokenizer((EMOJI / "tokenizer/tokenizer.json").read_bytes(), spec)


TOKENS = "wiring.tokenizers.tokenizer.max_tokens"


def at(value: object, path: str) -> object:
    for name in path.split("."):
        value = value[name] if isinstance(value, dict) else getattr(value, name)
    return value


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {"shape.height": 128, "shape.width": 128, TOKENS: 77}),
        (
            {"unet": {"_diffusers_version": "0.4.0", "sample_size": 32}},
            {"shape.height": 512, "shape.width": 512},
        ),
        (
            {"unet": {"_diffusers_version": "0.9.0", "sample_size": 32}},
            {"shape.height": 256, "shape.width": 256},
        ),
        (
            {"unet": {"_diffusers_version": "0.4.0", "sample_size": [12, 20]}},
            {"shape.height": 96, "shape.width": 160, "shape.multiple_of": 32},
        ),
        (
            {"unet": {"sample_size": [9, 13]}},
            {"shape.height": 72, "shape.width": 104, "shape.multiple_of": 8},
        ),
        ({"tokenizer": {"model_max_length": 64}}, {TOKENS: 64}),
        ({"tokenizer": {"pad_token": "!"}}, {}),
        (
            {"scheduler_": {"_class_name": "DDIMScheduler"}},
            {
                "scheduler.config.steps_offset": 1,
                "scheduler.config.clip_sample": False,
                "scheduler.config.beta_schedule": "linear",
                "scheduler.config.timestep_spacing": "leading",
            },
        ),
        (
            {"vae": {"scaling_factor": None, "shift_factor": 0.5}},
            {"latent.scaling_factor": 1.0, "latent.shift_factor": 0.0},
        ),
        (
            {"vae_": KL | {"shift_factor": 0.1}, "index": {"vae": ["diffusers", "AutoencoderKL"]}},
            {
                "latent.scaling_factor": 0.18215,
                "latent.shift_factor": 0.0,
                "latent.scale_factor": 4,
                "latent.levels": (16, 8, 8),
            },
        ),
        ({"unet": {"time_cond_proj_dim": 32}}, {}),
        ({"unet": {"cross_attention_dim": [128, 128, 128]}}, {}),
        ({"index": {"_class_name": "StableDiffusionImg2ImgPipeline"}}, {}),
        (
            {
                "index": {
                    "_class_name": "LatentConsistencyModelPipeline",
                    "scheduler": ["diffusers", "LCMScheduler"],
                },
                "scheduler_": {"_class_name": "LCMScheduler"},
                "unet": {"time_cond_proj_dim": 32, "sample_size": [8, 12]},
            },
            {
                "num_inference_steps": 4,
                "guidance_scale": 8.5,
                "scheduler.config.steps_offset": 0,
                "shape.width": 96,
            },
        ),
    ],
    ids=range(14),
)
def test_values_are_those_of_diffusers_own_pipeline(
    changes: dict[str, dict[str, Any]], expected: dict[str, object], tmp_path: Path
) -> None:
    export = check(write_configs(tmp_path / "model", **changes))
    assert {path: at(export.pipeline, path) for path in expected} == expected


def test_a_text_config_inside_of_another_is_found(tmp_path: Path) -> None:
    inner = {"hidden_size": 128, "num_attention_heads": 4, "vocab_size": 4096}
    inner |= {"intermediate_size": 512, "num_hidden_layers": 2}
    folder = write_configs(
        tmp_path / "model", text_encoder_={"model_type": "clip", "text_config": inner}
    )
    export = check(folder)
    assert export.pipeline.components["text_encoder"].outputs[0].shape == ("batch", 77, 128)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("own", ["DDIMScheduler", "UniPCMultistepScheduler"])
def test_another_sampler_takes_the_options_that_diffusers_hands_on(
    own: str, name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Among them none that the model's own scheduler has by default."""
    folder = write_configs(
        tmp_path / "model",
        index={"scheduler": ["diffusers", own]},
        scheduler_={"_class_name": own, "beta_schedule": "scaled_linear"},
    )
    check(folder, scheduler=name)
    warned = [name in message for message in caplog.messages]
    assert warned == ([] if HAS[name] else [True])


def test_own_options_hold_and_defaults_are_not_handed_on() -> None:
    """steps_offset as StableDiffusionPipeline sets it where a file doesn't give it."""
    config = {"_class_name": "DDIMScheduler", "steps_offset": 1, "timestep_spacing": "leading"}
    config["_use_default_values"] = ["steps_offset", "timestep_spacing"]
    own, other = create_scheduler("ddim", config), create_scheduler("pndm", config)
    for scheduler in (own, other):
        scheduler.set_timesteps(10)
    assert own.timesteps[-1] == 1 and other.timesteps[-1] == 0


def with_(export: ExportSpec, **fields: Any) -> ExportSpec:
    return replace(export, pipeline=msgspec.structs.replace(export.pipeline, **fields))


def scheduler(export: ExportSpec, **options: Any) -> ExportSpec:
    old = export.pipeline.scheduler
    return with_(export, scheduler=msgspec.structs.replace(old, config=old.config | options))


def part(export: ExportSpec, name: str, **fields: Any) -> ExportSpec:
    return with_(
        export, **{name: msgspec.structs.replace(getattr(export.pipeline, name), **fields)}
    )


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda p: part(p, "shape", height=160), "size is 128x160 pixels, in diffusers 128x128"),
        (lambda p: scheduler(p, timestep_spacing="leading"), "ddim: 20 steps have the timesteps"),
        (lambda p: scheduler(p, prediction_type="epsilon"), "the sample of step 2 of 20 differs"),
        (lambda p: scheduler(p, beta_end=0.02), "the sample of step 2 of 20"),
        (lambda p: part(p, "latent", scaling_factor=0.5), "what is decoded after 20 steps differs"),
        (lambda p: part(p, "latent", shift_factor=0.1), "what is decoded"),
    ],
    ids=range(6),
)
def test_a_plan_that_feeds_something_else_is_refused(
    spoil: Callable[[ExportSpec], ExportSpec],
    message: str,
    emoji_export: ExportSpec,
    emoji_tokenizer: PromptTokenizer,
) -> None:
    with pytest.raises(ParityError, match=message) as caught:
        check_own_pipeline(spoil(emoji_export), {"tokenizer": emoji_tokenizer})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "spec",
    [
        b'{"max_length": 77, "pad_id": 0, "bos_id": 4094, "eos_id": 4095}',
        b'{"max_length": 60, "pad_id": 4095, "bos_id": 4094, "eos_id": 4095}',
    ],
)
def test_a_tokenizer_that_gives_other_ids_is_refused(spec: bytes, emoji_export: ExportSpec) -> None:
    tokenizer = PromptTokenizer((EMOJI / "tokenizer/tokenizer.json").read_bytes(), spec)
    with pytest.raises(ParityError, match=r"tokenizer: .* diffusers feeds 77"):
        check_own_pipeline(emoji_export, {"tokenizer": tokenizer})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer": {"model_max_length": None}}, "model_max_length is missing.*set it to 77"),
        ({"tokenizer": {"model_max_length": 256}}, "model_max_length.*2 to 77"),
        ({"tokenizer": {"padding_side": "left"}}, "diffusers feeds 77"),
        ({"text_encoder": {"vocab_size": 4000}}, "ids up to 4095.*4000 only"),
        ({"index": {"unet": ["my_unet", "UNet2DConditionModel"]}}, "of my_unet, which isn't"),
        ({"index": {"tokenizer": ["transformers", "T5Tokenizer"]}}, "T5Tokenizer.*CLIPTokenizer"),
        ({"unet": {"sample_size": None}}, "sample_size is None.*--size"),
        ({"unet": {"sample_size": [8]}}, r"sample_size is \[8\]"),
        ({"unet": {"sample_size": [8, 0]}}, r"sample_size is \[8, 0\]"),
        ({"vae": {"scaling_factor": 0}}, "scaling_factor is 0"),
        ({"unet": {"encoder_hid_dim": 32}}, "encoder_hid_dim=32 isn't supported"),
        ({"unet": {"class_embed_type": "timestep"}}, "class_embed_type='timestep'"),
        ({"unet": {"up_block_types": ["UpBlock2D"]}}, "makes no UNet2DConditionModel"),
        ({"scheduler": {"beta_schedule": "none"}}, "beta_schedule = 'none': expected 'linear'"),
        ({"vae": {"out_channels": 4}}, "out_channels=4: only images of three colours"),
        ({"vae": {"in_channels": 1}}, "in_channels=1: only images of three colours"),
    ],
    ids=range(16),
)
def test_what_is_not_generated_as_diffusers_does_is_refused_by_name(
    changes: dict[str, dict[str, Any]], message: str, tmp_path: Path
) -> None:
    folder = write_configs(tmp_path / "model", **changes)
    with pytest.raises((InputError, ParityError), match=message) as caught:
        check(folder)
    assert "\n" not in str(caught.value)


OPTIONS: dict[str, list[Any]] = {
    "prediction_type": ["epsilon", "v_prediction", "sample"],
    "timestep_spacing": ["leading", "trailing", "linspace"],
    "steps_offset": [0, 1],
    "beta_schedule": ["linear", "scaled_linear", "squaredcos_cap_v2"],
    "set_alpha_to_one": [True, False],
    "rescale_betas_zero_snr": [False, True],
    "clip_sample": [False, True],
    "use_karras_sigmas": [False, True],
    "final_sigmas_type": ["zero", "sigma_min"],
    "skip_prk_steps": [True, False],
}


@pytest.mark.parametrize("seed", range(8))
def test_any_plan_that_is_made_is_what_diffusers_feeds(
    seed: int, emoji_tokenizer: PromptTokenizer, tmp_path: Path
) -> None:
    rng = random.Random(seed)
    samplers = [name for name in SAMPLERS if HAS[name]]
    name = SCHEDULERS[rng.choice(samplers)].diffusers_class
    options = {key: rng.choice(OPTIONS[key]) for key in rng.sample(sorted(OPTIONS), 4)}
    if options.get("beta_schedule") == "squaredcos_cap_v2":
        # Timesteps of karras sigmas are truncated then, at what the last bit of a root decides.
        options.pop("use_karras_sigmas", None)
    folder = write_configs(
        tmp_path / "model",
        index={"scheduler": ["diffusers", name]},
        scheduler_={"_class_name": name, **options},
        unet={"sample_size": rng.choice([8, 7, [5, 9]])},
    )
    try:
        export = exported(folder, scheduler=rng.choice([None, *samplers]))
    except EdgesdError:
        return  # an option that no board has, told before anything is built
    check_own_pipeline(export, {"tokenizer": emoji_tokenizer})


# Sizes.


@pytest.mark.parametrize("size", [(104, 72), (72, 136), (8, 8)])
def test_any_multiple_of_a_latent_can_be_built_alone(
    size: tuple[int, int], emoji_export: ExportSpec
) -> None:
    export = exported(EMOJI, size=size)
    shape = export.pipeline.shape
    assert (shape.width, shape.height, shape.dynamic) == (*size, False)
    assert emoji_export.pipeline.shape.multiple_of == 32  # graphs for any size double all the way


def test_upsampling_that_follows_the_skips_is_diffusers_own() -> None:
    torch.manual_seed(0)
    net = diffusers.UNet2DConditionModel(
        block_out_channels=(8, 8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=2,
    ).eval()
    sizes = [(4, 4), (5, 9), (9, 13), (1, 2), (7, 8), (12, 15), (16, 8)]
    given = [(torch.randn(1, 4, *s), torch.tensor([500.0]), torch.randn(1, 5, 8)) for s in sizes]
    with torch.inference_mode():
        wanted = [net(*inputs).sample for inputs in given]
        follows = Unet(net, follow=True)
        found = [follows(*inputs) for inputs in given]
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


# Textual inversion.


def with_tokens(folder: Path, tokens: list[Any]) -> Any:
    """Add tokens to the tokenizer of a folder of configs, as load_textual_inversion does."""
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer")
    tokenizer.add_tokens(tokens)
    tokenizer.save_pretrained(folder / "tokenizer")
    edit(config_of(folder, "text_encoder"), vocab_size=len(tokenizer))
    return tokenizer


def test_a_textual_inversion_of_several_vectors_is_fed_whole(tmp_path: Path) -> None:
    folder = write_configs(tmp_path / "model")
    with_tokens(folder, ["<cat-toy>", "<cat-toy>_1", "<cat-toy>_2", "<one>", "<Two>", "<Two>_1"])
    export = check(folder)
    tokenizer = tokenizer_of(folder, export)
    ids = tokenizer.encode("a <cat-toy> <one>")[0][0].tolist()
    assert [i for i in ids if i > 4095] == [4096, 4097, 4098, 4099]
    assert tokenizer.encode("word " * 74 + "<cat-toy>")[1] is not None, "two vectors are cut"


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"normalized": False},
        {"lstrip": True, "rstrip": True},
        {"single_word": True, "normalized": False},
        {"special": True},
    ],
    ids=str,
)
def test_tokens_with_flags_are_fed_as_diffusers_does(flags: dict[str, Any], tmp_path: Path) -> None:
    added = pytest.importorskip("tokenizers").AddedToken
    folder = write_configs(tmp_path / "model")
    names = ["<Cat>", "<Cat>_1", "sks", "sks_1", "ohwx"]
    with_tokens(folder, [added(name, **flags) for name in names])
    check(folder)


WORDS = st.sampled_from(
    [
        "<cat>",
        "<cat>_1",
        "<cat>_2",
        "<CAT>",
        "<cat>x",
        "<ca",
        "a",
        "Red",
        "<dog>",
        ",",
        "\n",
        "\u732b",
    ]
)


@pytest.fixture(scope="module")
def inverted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, PromptTokenizer]:
    """diffusers' own pipeline of a model with a textual inversion, and edgesd's tokenizer."""
    folder = write_configs(tmp_path_factory.mktemp("inverted") / "model")
    with_tokens(folder, ["<cat>", "<cat>_1", "<cat>_2", "<dog>"])
    export = exported(folder)
    return export.own().pipeline, tokenizer_of(folder, export)


@settings(max_examples=150, deadline=None)
@given(words=st.lists(WORDS, max_size=30), between=st.sampled_from([" ", "", "  "]))
def test_any_prompt_is_expanded_as_diffusers_does(
    words: list[str], between: str, inverted: tuple[Any, PromptTokenizer]
) -> None:
    own, tokenizer = inverted
    prompt = between.join(words)
    expanded = own.maybe_convert_prompt(prompt, own.tokenizer)
    wanted = own.tokenizer(expanded, padding="max_length", truncation=True).input_ids
    assert tokenizer.encode(prompt)[0][0].tolist() == wanted


def test_the_tokenizer_is_not_the_one_in_python_that_transformers_4_has_besides(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(transformers, "CLIPTokenizer", None)
    assert load_tokenizer(EMOJI / "tokenizer").backend_tokenizer.encode("a").ids
