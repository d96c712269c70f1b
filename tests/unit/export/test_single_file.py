"""Single files: which model they hold, that it is the same as in a folder, and what is refused."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
from safetensors.torch import load_file, save_file  # noqa: E402

from edgesd.errors import InputError, UsageError  # noqa: E402
from edgesd.export import source as source_module  # noqa: E402
from edgesd.export.families.parts.clip import load_tokenizer  # noqa: E402
from edgesd.export.families.parts.weights import load_network, shell  # noqa: E402
from edgesd.export.mapped import state_of  # noqa: E402
from edgesd.export.pipeline import export_spec  # noqa: E402
from edgesd.export.source import ModelSource, is_hub_id, resolve_network, resolve_source  # noqa: E402
from edgesd.export.source.layouts import ConfigFolder, clip_vocabulary, known_layouts, lay_out  # noqa: E402
from edgesd.export.source.tensor_file import TensorFile  # noqa: E402
from edgesd.runtime.requests import Request  # noqa: E402
from tests.models import EMOJI  # noqa: E402
from tests.single_files import (  # noqa: E402
    ldm_unet,
    ldm_vae,
    open_clip,
    openai_clip,
    without_weights,
    write_single_file,
)
from tests.tiny_pipelines import on_torch, write_tiny  # noqa: E402

KINDS = ("sd", "sd2-v", "sdxl", "sd-inpaint")


class Forms:
    """A tiny pipeline in both forms: `folder`, and the single file with `configs`."""

    def __init__(self, name: str, root: Path) -> None:
        self.folder = write_tiny(name, root / "folder")
        self.file = write_single_file(self.folder, root / "model.safetensors")
        self.configs = without_weights(Path(shutil.copytree(self.folder, root / "configs")))

    def open(self) -> ModelSource:
        return resolve_source(self.file, self.configs)


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Forms]:
    return {name: Forms(name, tmp_path_factory.mktemp(name)) for name in KINDS}


@pytest.mark.parametrize("name", KINDS)
def test_weights_are_those_of_the_folder(forms: dict[str, Forms], name: str) -> None:
    form = forms[name]
    ours = export_spec(form.open())
    theirs = export_spec(resolve_source(form.folder))
    assert [c.spec for c in ours.components] == [c.spec for c in theirs.components]
    assert ours.pipeline.wiring == theirs.pipeline.wiring
    for component, other in zip(ours.components, theirs.components, strict=True):
        expected = state_of(other.load())
        found = state_of(component.load())
        assert found.keys() == expected.keys()
        for key, tensor in found.items():
            assert tensor.dtype == expected[key].dtype
            assert torch.equal(tensor, expected[key]), key


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_images_are_those_of_the_folder(forms: dict[str, Forms], tmp_path: Path, name: str) -> None:
    form = forms[name]
    images = []
    for index, source in enumerate((form.open(), resolve_source(form.folder))):
        pipeline = on_torch(source, export_spec(source), tmp_path / str(index))
        request = Request("a red cat", seed=3, num_inference_steps=3)
        images.append(np.asarray(pipeline.generate([request])[0]))
    assert np.array_equal(*images)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_keep_their_type(forms: dict[str, Forms], tmp_path: Path, dtype: Any) -> None:
    form, path = forms["sd"], tmp_path / "model.safetensors"
    save_file({name: t.to(dtype) for name, t in load_file(form.file).items()}, path)
    module = export_spec(resolve_source(path, form.configs)).components[1].load()
    expected = load_file(form.folder / "unet" / "diffusion_pytorch_model.safetensors")
    for name, tensor in state_of(module).items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, expected[name.removeprefix("net.")].to(dtype))
    sample = torch.zeros(1, 4, 8, 8)
    assert module(sample, torch.ones(1), torch.zeros(1, 77, 16)).dtype == torch.float32


def published(layout: str) -> tuple[ConfigFolder, dict[str, Any]]:
    """The configs of a published model, and its weights, which take no memory, under the names that
    its authors gave them."""
    folder = lay_out(layout)
    state: dict[str, Any] = {}
    for path in sorted(folder.root.glob("*/config.json")):
        config = json.loads(path.read_text())
        with torch.device("meta"):
            if path.parent.name == "unet":
                state |= ldm_unet(
                    diffusers.UNet2DConditionModel.from_config(config).state_dict(), config
                )
            elif path.parent.name == "vae":
                state |= ldm_vae(diffusers.AutoencoderKL.from_config(config).state_dict(), config)
            else:
                (class_name,) = config["architectures"]
                net = getattr(transformers, class_name)(transformers.CLIPTextConfig(**config))
                prefix = TEXT_ENCODERS[layout, path.parent.name]
                write = open_clip if prefix.endswith(".model.") else openai_clip
                state |= write(net.state_dict(), prefix)
    return folder, state


TEXT_ENCODERS = {
    ("v1", "text_encoder"): "cond_stage_model.transformer.",
    ("v2", "text_encoder"): "cond_stage_model.model.",
    ("xl_base", "text_encoder"): "conditioner.embedders.0.transformer.",
    ("xl_base", "text_encoder_2"): "conditioner.embedders.1.model.",
    ("xl_refiner", "text_encoder_2"): "conditioner.embedders.0.model.",
}
MILLIONS = {
    "v1": {"unet": 859.5, "vae": 83.7, "text_encoder": 123.1},
    "v2": {"unet": 865.9, "vae": 83.7, "text_encoder": 340.4},
    "xl_base": {"unet": 2567.5, "vae": 83.7, "text_encoder": 123.1, "text_encoder_2": 694.7},
    "xl_refiner": {"unet": 2259.5, "vae": 83.7, "text_encoder_2": 694.7},
}
"""Weights of the published models, in millions."""


def sparse_file(path: Path, state: Mapping[str, Any], **metadata: str) -> Path:
    """A .safetensors file of tensors in 16 bits that takes no room on the disk: all are zeros."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name, tensor in state.items():
        begin, end = end, end + 2 * tensor.numel()
        header[name] = {"dtype": "F16", "shape": [*tensor.shape], "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return path


@pytest.mark.parametrize("layout", MILLIONS)
def test_published_models_are_known_by_their_weights(
    layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, state = published(layout)
    monkeypatch.setattr(TensorFile, "load", lambda file, names: {n: state[n] for n in names})
    source = resolve_source(sparse_file(tmp_path / "model.safetensors", state))
    millions = {name: source.parameters(name) / 1e6 for name in MILLIONS[layout]}
    assert millions == pytest.approx(MILLIONS[layout], abs=0.1)
    for component in MILLIONS[layout]:
        class_name = source.class_of(component)
        cls = getattr(diffusers, class_name, None) or getattr(transformers, class_name)
        net = shell(source, component, cls)
        found = source.state(component, net)
        assert found is not None
        assert {name: t.shape for name, t in found.items()} == {
            name: t.shape for name, t in net.state_dict().items()
        }


def test_what_2_x_is_taken_for_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _, state = published("v2")
    resolve_source(sparse_file(tmp_path / "a.safetensors", state))
    assert "for 2-base give --config, for SD-Turbo --variant turbo" in caplog.text
    caplog.clear()
    said = {"modelspec.prediction_type": "epsilon"}
    resolve_source(sparse_file(tmp_path / "b.safetensors", state, **said))
    assert not caplog.text


def test_every_layout_is_tested() -> None:
    assert set(known_layouts()) == {layout for layout, _ in TEXT_ENCODERS}


def test_the_vocabulary_is_clips() -> None:
    vocabulary = clip_vocabulary()
    assert len(vocabulary) == 49408
    assert [*vocabulary.values()] == [*range(49408)]
    folder = lay_out("xl_base")
    for name, pad in (("tokenizer", 49407), ("tokenizer_2", 0)):
        tokenizer = load_tokenizer(folder.root / name)
        ids = tokenizer("a photo of a cat", padding="max_length").input_ids
        assert ids == [49406, 320, 1125, 539, 320, 2368, 49407, *[pad] * 70]
        # From OpenCLIP's own tokenizer.
        words = "It's Ünïcode — naïve 日本"
        expected = [585, 568, 6522, 77, 35689, 3217, 2005, 1097, 35689, 563, 39121, 19277, 361]
        assert tokenizer(words).input_ids[1:-1] == expected


def test_the_folder_of_configs_goes_with_its_source() -> None:
    folder = lay_out("v1")
    root = folder.root
    assert (root / "tokenizer" / "vocab.json").is_file()
    del folder
    gc.collect()
    assert not root.exists()


FIRST = "model.diffusion_model.input_blocks.0.0.weight"


def shape(*dims: int) -> Any:
    return torch.empty(dims, device="meta")


@pytest.fixture(scope="module")
def v1(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Names and shapes of Stable Diffusion 1.x."""
    return published("v1")[1]


@pytest.mark.parametrize(
    ("marks", "metadata", "expected"),
    [
        ((), {}, {}),
        (("v_pred",), {}, {"prediction_type": "v_prediction"}),
        (
            ("v_pred", "ztsnr"),
            {},
            {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
        ),
        ((), {"modelspec.prediction_type": "v"}, {"prediction_type": "v_prediction"}),
        ((), {"modelspec.prediction_type": "epsilon"}, {"prediction_type": "epsilon"}),
        ((), {"modelspec.prediction_type": "x"}, {}),
    ],
)
def test_what_a_file_says_of_its_training(
    v1: dict[str, Any],
    tmp_path: Path,
    marks: tuple[str, ...],
    metadata: dict[str, str],
    expected: dict[str, object],
) -> None:
    state = v1 | {name: torch.empty(0, device="meta") for name in marks}
    source = resolve_source(sparse_file(tmp_path / "model.safetensors", state, **metadata))
    config = source.config("scheduler/scheduler_config.json")
    named = ("prediction_type", "rescale_betas_zero_snr")
    assert {name: config[name] for name in named if name in config} == expected


def test_names_and_hashes(forms: dict[str, Forms], tmp_path: Path) -> None:
    form = forms["sd"]
    source = form.open()
    assert source.public_name == "model"
    assert source.licence_name() == "unknown"
    assert source.licence("licence").files == ()
    assert source.model_card() is None
    renamed = shutil.copyfile(form.file, tmp_path / "other.safetensors")
    assert resolve_source(renamed, form.configs).sha256() == source.sha256()
    spec = {"modelspec.license": "CreativeML\n Open RAIL++-M"}
    said = write_single_file(form.folder, tmp_path / "said.safetensors", **spec)
    assert resolve_source(said, form.configs).licence_name() == "CreativeML Open RAIL++-M"
    assert resolve_source(said, form.configs).sha256() != source.sha256()


def test_configs_are_for_single_files(forms: dict[str, Forms]) -> None:
    with pytest.raises(UsageError, match="is no single file: --config"):
        resolve_source(forms["sd"].folder, forms["sd"].configs)


def test_a_network_that_stands_in(forms: dict[str, Forms], tmp_path: Path) -> None:
    form = forms["sd"]
    other = resolve_network(str(EMOJI), "vae")
    source = replace(form.open(), others={"vae": other})
    assert source.class_of("vae") == "AutoencoderTiny"
    assert source.parameters("vae") == other.parameters("vae")
    assert source.sha256() != form.open().sha256()
    decoder = export_spec(source).components[-1].load()
    assert type(decoder.net).__name__ == "AutoencoderTiny"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {"lora_unet_down.alpha": shape(1)}, "is a LoRA"),
        (lambda s: {"down_blocks.0.weight": shape(1)}, "begins with down_blocks.*whole check"),
        (lambda s: {}, "holds no weights"),
        (lambda s: {**s, FIRST: shape(320, 9, 3, 3)}, "for inpainting: give --config FOLDER"),
        (lambda s: {**s, FIRST: shape()}, "isn't a checkpoint that diffusers knows"),
        (lambda s: {FIRST: s[FIRST]}, "of an unknown build.*--config FOLDER"),
        (
            lambda s: {**s, "control_model.time_embed.0.weight": shape(1)},
            "is a ControlNet: .*--controlnet",
        ),
    ],
)
def test_other_files_are_refused(
    v1: dict[str, Any], tmp_path: Path, change: Any, message: str
) -> None:
    path = sparse_file(tmp_path / "model.safetensors", change(dict(v1)))
    with pytest.raises(InputError, match=message) as error:
        resolve_source(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("without", "more", "component", "message"),
    [
        ("first_stage_model.", {}, "vae", "has no vae: expected weights named first_stage_model"),
        ("cond_stage_model.", {}, "text_encoder", "has no text_encoder"),
        ("model.diffusion_model.out.", {}, "unet", "its unet lacks conv_norm_out.weight"),
        ("first_stage_model.decoder.conv_in", {}, "vae", "its vae lacks decoder.conv_in.weight"),
        (
            "-",
            {"model.diffusion_model.out.0.weight": torch.ones(3)},
            "unet",
            r"a conv_norm_out.weight of shape \[3\], and its config asks for \[16\]",
        ),
        (
            "-",
            {"model.diffusion_model.time_embed.cond_proj.weight": torch.ones(3)},
            "unet",
            "conversion doesn't know .*cond_proj",
        ),
        (
            "-",
            {"cond_stage_model.transformer.text_model.encoder.layers.3.x": torch.ones(3)},
            "text_encoder",
            r"has (text_model\.)?encoder.layers.3.x, which its config doesn't ask for",
        ),
        (
            "-",
            {"model.diffusion_model.out.0.bias": torch.full((16,), float("nan"))},
            "unet",
            "conv_norm_out.bias holds NaN or infinite weights",
        ),
        (
            "-",
            {"model.diffusion_model.out.0.bias": torch.ones(16, dtype=torch.int8)},
            "unet",
            r"out\.0\.bias is stored as I8",
        ),
    ],
)
def test_weights_that_do_not_fit(
    forms: dict[str, Forms],
    tmp_path: Path,
    without: str,
    more: dict[str, Any],
    component: str,
    message: str,
) -> None:
    form = forms["sd"]
    path = write_single_file(form.folder, tmp_path / "model.safetensors", more, [without])
    source = resolve_source(path, form.configs)
    cls = getattr(diffusers, source.class_of(component), transformers.CLIPTextModel)
    with pytest.raises(InputError, match=message) as error:
        load_network(source, component, cls)
    assert "\n" not in str(error.value)


def test_extra_tensors_of_text_encoders_are_left_out(
    forms: dict[str, Forms], tmp_path: Path
) -> None:
    form = forms["sd"]
    prefix = "cond_stage_model.transformer.text_model.embeddings."
    more = {f"{prefix}position_ids": torch.arange(77), "model_ema.decay": torch.ones(1)}
    path = write_single_file(form.folder, tmp_path / "model.safetensors", more)
    export_spec(resolve_source(path, form.configs)).components[0].load()


def test_older_names_of_text_encoders(forms: dict[str, Forms], tmp_path: Path) -> None:
    form, path = forms["sd"], tmp_path / "model.safetensors"
    older = {
        n.replace("transformer.text_model.", "transformer."): t
        for n, t in load_file(form.file).items()
    }
    save_file(older, path)
    ours, theirs = (
        export_spec(source).components[0].load()
        for source in (resolve_source(path, form.configs), form.open())
    )
    expected = state_of(theirs)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in state_of(ours).items())


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:4],
        lambda data: data[:200],
        lambda data: data[:-1],
        lambda data: data + b"x",
        lambda data: (1 << 60).to_bytes(8, "little") + data[8:],
        lambda data: data[:8] + b"[" + data[9:],
        lambda data: data.replace(b'"shape":[16]', b'"shape":[17]', 1),
        lambda data: data.replace(b'"shape":[16]', b'"shape":[-1]', 1),
        lambda data: data.replace(b'"dtype":"F32"', b'"dtype":"Q32"', 1),
        lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
    ],
)
def test_broken_files(forms: dict[str, Forms], tmp_path: Path, damage: Any) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(damage(forms["sd"].file.read_bytes()))
    with pytest.raises(InputError) as error:
        resolve_source(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["model.ckpt", "model.PT"])
def test_pickles_are_not_opened(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(InputError, match=r"is a pickle.*convert it to \.safetensors"):
        resolve_source(tmp_path / name)


def test_a_file_of_the_hub(forms: dict[str, Forms], monkeypatch: pytest.MonkeyPatch) -> None:
    form, asked = forms["sd"], []

    def download_file(repo_id: str, name: str) -> Path:
        asked.append((repo_id, name))
        return form.file

    monkeypatch.setattr(source_module, "download_file", download_file)
    for name in ("owner/name/model.safetensors", "owner/name/folder/model.fp16.safetensors"):
        assert is_hub_id(name)
        assert resolve_source(name, form.configs).public_name == name
    assert asked == [
        ("owner/name", "model.safetensors"),
        ("owner/name", "folder/model.fp16.safetensors"),
    ]
    for name in ("owner/../model.safetensors", "./a/b/c.safetensors", "a/b/../c.safetensors"):
        with pytest.raises(InputError, match="doesn't exist"):
            resolve_source(name)
