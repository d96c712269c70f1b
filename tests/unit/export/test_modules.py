"""The torch side: attention replacement computes the same, and bad weights are refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from edgesd.errors import InputError  # noqa: E402
from edgesd.export.attention import replace_attention  # noqa: E402
from edgesd.export.cost.workload import trace  # noqa: E402
from edgesd.export.external_data import write_model  # noqa: E402
from edgesd.export.mapped import state_of  # noqa: E402
from edgesd.export.parity import check_parity, example_inputs, reference_cases  # noqa: E402
from edgesd.export.source import resolve_source  # noqa: E402
from edgesd.spec.pipeline import ShapeSpec  # noqa: E402
from tests.models import EMOJI, write_configs  # noqa: E402

pytestmark = pytest.mark.integration


def component(root: Path, name: str) -> Any:
    source = resolve_source(root)
    return next(c for c in source.family.export_spec(source, None).components if c.name == name)


def outputs(module: Any, part: Any) -> Any:
    inputs = example_inputs(part, part.sizes[-1], seed=1)
    with torch.inference_mode():
        return module(*(torch.from_numpy(array) for array in inputs.values()))


@pytest.mark.parametrize("lowering", ["ort-mha", "sdpa"])
@pytest.mark.parametrize(("name", "attentions"), [("text_encoder", 2), ("unet", 14)])
def test_replaced_attention_computes_the_same(name: str, attentions: int, lowering: Any) -> None:
    part = component(EMOJI, name)
    module = part.load()
    before = outputs(module, part)
    assert replace_attention(module, lowering) == attentions
    torch.testing.assert_close(outputs(module, part), before, rtol=1e-4, atol=1e-5)


def test_decoder_and_encoder_are_the_pipelines_own() -> None:
    from diffusers import AutoencoderTiny

    from edgesd.export.families.parts.vae import vae_decoder, vae_encoder

    net = AutoencoderTiny.from_pretrained(EMOJI / "vae").float()
    source = resolve_source(EMOJI)
    spec = source.family.export_spec(source, None, None, 1)
    part, encoder = (
        make(source, "part", spec.pipeline.latent, spec.pipeline.shape)
        for make in (vae_decoder, vae_encoder)
    )
    latents = torch.from_numpy(example_inputs(part, part.sizes[0], seed=1)["latents"])
    with torch.inference_mode():
        wanted = net.decode(latents / net.config.scaling_factor).sample
        torch.testing.assert_close(part.load()(latents), wanted)
        encoded = net.encode(wanted).latents * net.config.scaling_factor
        torch.testing.assert_close(encoder.load()(wanted), encoded)


def test_kl_autoencoder(tmp_path: Path) -> None:
    from diffusers import AutoencoderKL

    from edgesd.export.families.parts.vae import VaeDecoder, VaeEncoder
    from edgesd.spec.pipeline import LatentSpec

    torch.manual_seed(0)
    net = AutoencoderKL(block_out_channels=(32,), norm_num_groups=8, scaling_factor=0.5).eval()
    latent = LatentSpec(4, 1, scaling_factor=0.5, shift_factor=0.25)
    image = torch.rand(1, 3, 8, 8)
    with torch.inference_mode():
        posterior = net.encode(image).latent_dist
        mean, std = VaeEncoder(net, latent)(image)
        torch.testing.assert_close(mean, (posterior.mean - 0.25) * 0.5)
        torch.testing.assert_close(std, posterior.std * 0.5)
        again = VaeDecoder(net, latent)(mean)
        torch.testing.assert_close(again, net.decode(posterior.mean).sample)


def test_latents_with_a_mean_and_a_std_of_each_channel(tmp_path: Path) -> None:
    """As diffusers' pipelines of Stable Diffusion XL have it, for Playground's autoencoder."""
    from edgesd.export.families.parts.vae import VaeEncoder, latent_spec, vae_decoder
    from edgesd.export.to_onnx import graph_from_module

    mean, std = (-1.6, 0.2, 0.05, -2.0), (8.4, 5.1, 5.9, 0.5)
    root = write_configs(tmp_path / "model", index={"vae": ["diffusers", "AutoencoderKL"]})
    torch.manual_seed(0)
    net = diffusers.AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        scaling_factor=0.5,
        latents_mean=mean,
        latents_std=std,
    ).eval()
    net.save_pretrained(root / "vae")
    source = resolve_source(root)
    latent = latent_spec(source, net.config, 4, 2, per_channel=True)
    assert (latent.mean, latent.std) == (mean, std)
    assert latent_spec(source, net.config, 4, 2).mean is None
    for wrong in ((1.0,) * 3, (1.0, 1.0, 0.0, 1.0), (float("nan"),) * 4):
        with pytest.raises(InputError, match=r"latents_std are .* expected 4 numbers each"):
            latent_spec(source, {**net.config, "latents_std": wrong}, 4, 2, per_channel=True)
    shape = ShapeSpec(32, 32, 2, dynamic=True, multiple_of=2)
    part = vae_decoder(source, "vae_decoder", latent, shape)
    image = torch.rand(1, 3, 32, 32)
    means, stds = (torch.tensor(each).view(1, 4, 1, 1) for each in (mean, std))
    with torch.inference_mode():
        posterior = net.encode(image).latent_dist
        found, spread = VaeEncoder(net, latent)(image)
        torch.testing.assert_close(found, (posterior.mean - means) * 0.5 / stds)
        torch.testing.assert_close(spread, posterior.std * 0.5 / stds)
        decoded = part.load()(found)
        torch.testing.assert_close(decoded, net.decode(found * stds / 0.5 + means).sample)
    module = part.load()
    cases = reference_cases(module, part)
    write_model(graph_from_module(module, part, "ort-mha"), tmp_path / "graph")
    assert check_parity(tmp_path / "graph" / "model.onnx", part, cases, "fp32").rel_rms < 1e-5
    assert trace(part, {"batch": 1, "height": 4, "width": 4}).parameters


class TestBrokenWeights:
    @pytest.fixture
    def model(self, tmp_path: Path) -> Path:
        return Path(shutil.copytree(EMOJI, tmp_path / "model"))

    @staticmethod
    def rewrite(path: Path, change: Any) -> None:
        from safetensors.numpy import load_file, save_file

        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})

    @pytest.mark.parametrize("bad", [np.nan, np.inf])
    def test_not_finite(self, model: Path, bad: float) -> None:
        def poison(tensors: dict[str, Any]) -> None:
            tensors["conv_in.weight"][0, 0, 0, 0] = bad

        self.rewrite(model / "unet" / "diffusion_pytorch_model.safetensors", poison)
        with pytest.raises(InputError, match=r"conv_in\.weight holds NaN or infinite"):
            component(model, "unet").load()

    def test_missing_tensor(self, model: Path) -> None:
        self.rewrite(
            model / "unet" / "diffusion_pytorch_model.safetensors",
            lambda tensors: tensors.pop("conv_in.weight"),
        )
        with pytest.raises(InputError, match=r"lack conv_in\.weight"):
            component(model, "unet").load()

    @pytest.mark.parametrize(
        "name",
        ["text_encoder/model", "unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model"],
    )
    @pytest.mark.parametrize("content", [b"", b"\x10" * 100, None])
    def test_unreadable(self, model: Path, name: str, content: bytes | None) -> None:
        path = model / f"{name}.safetensors"
        path.write_bytes(path.read_bytes()[:-1000] if content is None else content)
        part = name.split("/")[0].replace("vae", "vae_decoder")
        with pytest.raises(InputError, match="cannot load the weights") as caught:
            component(model, part).load()
        assert "\n" not in str(caught.value)

    def test_fp16_variant_and_pickles(self, model: Path) -> None:
        from safetensors.torch import load_file

        folder = model / "vae"
        plain = folder / "diffusion_pytorch_model.safetensors"
        wanted = state_of(component(model, "vae_decoder").load())
        tensors = load_file(plain)
        plain.rename(folder / "diffusion_pytorch_model.fp16.safetensors")
        found = state_of(component(model, "vae_decoder").load())
        torch.testing.assert_close(found, wanted)
        (folder / "diffusion_pytorch_model.fp16.safetensors").unlink()
        torch.save(tensors, folder / "diffusion_pytorch_model.bin")
        found = state_of(component(model, "vae_decoder").load())
        torch.testing.assert_close(found, wanted, check_dtype=False)  # not mapped
