"""The torch side: attention replacement computes the same, and bad weights are refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from edgesd.errors import InputError  # noqa: E402
from edgesd.export.attention import replace_attention  # noqa: E402
from edgesd.export.parity import example_inputs  # noqa: E402
from edgesd.export.source import resolve_source  # noqa: E402

pytestmark = pytest.mark.integration

EMOJI = Path(__file__).resolve().parents[3] / "models" / "emoji"


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
        wanted = component(model, "vae_decoder").load().state_dict()
        tensors = load_file(plain)
        plain.rename(folder / "diffusion_pytorch_model.fp16.safetensors")
        found = component(model, "vae_decoder").load().state_dict()
        torch.testing.assert_close(found, wanted)
        (folder / "diffusion_pytorch_model.fp16.safetensors").unlink()
        torch.save(tensors, folder / "diffusion_pytorch_model.bin")
        found = component(model, "vae_decoder").load().state_dict()
        torch.testing.assert_close(found, wanted)
