"""`edgesd build --vae`: an autoencoder of the same latents in place of the model's own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from edgesd.export.source import resolve_source  # noqa: E402
from edgesd.recipes.sources import open_model  # noqa: E402
from edgesd.runtime.bundle import Bundle, open_bundle  # noqa: E402
from edgesd.runtime.pipeline import Pipeline  # noqa: E402
from edgesd.runtime.requests import Request  # noqa: E402
from tests.models import edit  # noqa: E402
from tests.support import assert_refused, run_cli  # noqa: E402
from tests.tiny_pipelines import LEVELS, diffusers_images, tiny  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


def kl(levels: int = 4, channels: int = 4) -> Any:
    """A small autoencoder of random weights, whose images aren't of one colour."""
    torch.manual_seed(1)
    net = diffusers.AutoencoderKL(
        block_out_channels=(8,) * levels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        norm_num_groups=4,
        latent_channels=channels,
        scaling_factor=0.4,
    )
    with torch.no_grad():
        net.decoder.conv_out.weight *= 6
    return net.eval()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pipeline with an autoencoder of another class, and papers of its own."""
    folder, pipeline = tmp_path_factory.mktemp("model") / "sd", tiny("sd")
    pipeline.vae = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(16, 16),
        decoder_block_out_channels=(16, 16),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )
    pipeline.save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\nA card.\n")
    (folder / "NOTICE").write_text("Words of a notice.\n")
    return folder


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vae") / "small-kl"
    kl(len(LEVELS)).save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\nA card.\n")
    (folder / "LICENSE").write_text("Words of a licence.\n")
    return folder


@pytest.fixture(scope="module")
def bundle(model: Path, vae: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    out = tmp_path_factory.mktemp("bundle") / "out"
    made = run_cli("build", model, "--vae", vae, "--target", "x86-64-cpu", "-o", out)
    assert made.code == 0, made.err
    return open_bundle(out)


def test_images_are_those_of_diffusers_with_that_autoencoder(bundle: Bundle, vae: Path) -> None:
    theirs = tiny("sd")
    theirs.vae = diffusers.AutoencoderKL.from_pretrained(vae)
    with Pipeline(bundle) as pipeline:
        request = Request("a red apple", 3, num_inference_steps=3, guidance_scale=3.0)
        found = np.asarray(pipeline.generate([request])[0], int)
    (wanted,) = diffusers_images(
        theirs, ["a red apple"], [3], num_inference_steps=3, guidance_scale=3.0
    )
    assert np.abs(found - np.asarray(wanted, int)).max() <= 1
    assert found.std() > 5


def test_the_bundle_says_whose_autoencoder_it_has(bundle: Bundle, model: Path, vae: Path) -> None:
    manifest = bundle.manifest
    assert manifest.pipeline.latent.scaling_factor == 0.4
    assert manifest.licence.name == "apache-2.0; vae: mit"
    assert {"licence/NOTICE", "licence/vae/LICENSE"} <= {*manifest.licence.files}
    assert {"licence/README.md", "licence/vae/README.md"} <= manifest.files.keys()
    assert manifest.build is not None and manifest.build.vae is not None
    assert (manifest.build.vae.kind, manifest.build.vae.name) == ("folder", "small-kl")
    source = open_model(str(model), vae=str(vae))
    assert manifest.build.vae.sha256 == source.others["vae"].network_sha256("vae")
    assert manifest.pipeline.source_sha256 == source.sha256() != resolve_source(model).sha256()


def test_another_bundle_like_it_needs_the_same_folder(
    bundle: Bundle, model: Path, tmp_path: Path
) -> None:
    refused = run_cli("build", model, "--like", bundle.path, "-o", tmp_path / "out")
    assert_refused(refused, "an autoencoder called 'small-kl'", "say where it is: --vae MODEL")


def test_the_autoencoder_of_a_pipeline_is_taken(model: Path, vae: Path, tmp_path: Path) -> None:
    pipeline = shutil.copytree(model, tmp_path / "pipeline")
    shutil.rmtree(pipeline / "vae")
    shutil.copytree(vae, pipeline / "vae")
    edit(pipeline / "model_index.json", vae=["diffusers", "AutoencoderKL"])
    source, alone = (open_model(str(model), vae=str(path)) for path in (pipeline, vae))
    assert source.class_of("vae") == alone.class_of("vae") == "AutoencoderKL"
    assert source.sha256() == alone.sha256()
    assert source.parameters("vae") == alone.parameters("vae")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: kl(levels=3), "it has 4 pixels to a side of a latent, and the latents of"),
        (lambda: kl(channels=16), "it has 16 channels, and the latents of"),
        (
            lambda: diffusers.AutoencoderDC(
                encoder_block_out_channels=(8,) * 4,
                decoder_block_out_channels=(8,) * 4,
                encoder_layers_per_block=(1,) * 4,
                decoder_layers_per_block=(1,) * 4,
                encoder_block_types="ResBlock",
                decoder_block_types="ResBlock",
                encoder_qkv_multiscales=((),) * 4,
                decoder_qkv_multiscales=((),) * 4,
                attention_head_dim=8,
                latent_channels=4,
            ),
            "vae is a AutoencoderDC of diffusers, which isn't supported",
        ),
        (lambda: diffusers.UNet2DModel(block_out_channels=(32,) * 4), "vae is a UNet2DModel of"),
    ],
)
def test_an_autoencoder_of_other_latents_is_refused(make: Any, words: str, tmp_path: Path) -> None:
    make().save_pretrained(tmp_path / "vae")
    refused = run_cli("plan", "demo", "--vae", tmp_path / "vae", "--target", "x86-64-cpu")
    assert_refused(refused, words)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "has neither config.json nor model_index.json"),
        ({"config.json": "{}"}, "names no class of diffusers"),
        ({"config.json": '{"_class_name": ["a", "b"]}'}, "names no class of diffusers"),
        ({"config.json": "["}, "config.json"),
        (
            {"config.json": json.dumps({"_class_name": "AutoencoderKL", "latent_channels": 10**9})},
            "it has 1000000000 channels",
        ),
        ("file", "is a file: expected the folder of one network"),
        ("missing", "doesn't exist: give the folder of one network"),
    ],
)
def test_what_is_no_network_is_told_so(content: Any, words: str, tmp_path: Path) -> None:
    folder = tmp_path / "vae"
    if content == "file":
        folder.touch()
    elif content != "missing":
        folder.mkdir()
        for name, text in (content or {}).items():
            (folder / name).write_text(text)
    refused = run_cli("plan", "demo", "--vae", folder, "--target", "x86-64-cpu")
    assert_refused(refused, words)


def test_a_network_without_weights_can_be_planned_and_not_built(tmp_path: Path) -> None:
    folder, out = tmp_path / "vae", tmp_path / "out.edgesd"
    folder.mkdir()
    config = {"_class_name": "AutoencoderTiny", "block_out_channels": [8] * 4}
    (folder / "config.json").write_text(json.dumps(config))
    asked = ("demo", "--vae", folder, "--target", "x86-64-cpu")
    assert run_cli("plan", *asked).code == 0
    refused = run_cli("build", *asked, "-o", out)
    assert refused.code == 3 and "has no weights" in refused.err.splitlines()[-1]
    assert not out.exists()
