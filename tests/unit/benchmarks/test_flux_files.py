"""Random weights of FLUX.1, and its files for stable-diffusion.cpp."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgesd.errors import EdgesdError

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
gguf = pytest.importorskip("gguf")

pytestmark = pytest.mark.integration


def _tiny() -> Any:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        guidance_embeds=True,
        axes_dims_rope=(8, 12, 12),
    )


def _written(folder: Path, shard_bytes: int = 1 << 30) -> Any:
    """Random weights in `folder`, and what diffusers loads of them."""
    from benchmarks.random_weights import write_random

    with torch.device("meta"):
        net = _tiny()
    folder.mkdir()
    net.save_config(folder)
    write_random(folder, "diffusion_pytorch_model", net, shard_bytes)
    return type(net).from_pretrained(folder, local_files_only=True, torch_dtype=torch.bfloat16)


def test_random_weights_are_loaded_from_shards_as_from_one_file(tmp_path: Path) -> None:
    whole = _written(tmp_path / "whole")
    parts = _written(tmp_path / "parts", shard_bytes=100_000)
    names = {path.name for path in (tmp_path / "parts").glob("*.safetensors")}
    index = json.loads(
        (tmp_path / "parts/diffusion_pytorch_model.safetensors.index.json").read_text()
    )
    assert len(names) > 2 and set(index["weight_map"].values()) == names
    state = parts.state_dict()
    for name, tensor in whole.state_dict().items():
        assert tensor.dtype == torch.bfloat16 and torch.equal(tensor, state[name])
    size = sum(2 * tensor.numel() for tensor in state.values())
    assert index["metadata"]["total_size"] == size


def test_random_weights_keep_the_size_of_activations(tmp_path: Path) -> None:
    state = _written(tmp_path / "net").state_dict()
    matrix = state["transformer_blocks.0.ff.net.2.weight"].float()
    assert float(matrix.std()) == pytest.approx(matrix.shape[1] ** -0.5, rel=0.05)
    assert float(state["transformer_blocks.0.attn.norm_q.weight"].float().mean()) == pytest.approx(
        1, abs=0.02
    )
    first, second = (
        state[f"single_transformer_blocks.0.attn.to_{x}.weight"].float().flatten() for x in "qk"
    )
    assert abs(float(torch.corrcoef(torch.stack([first, second]))[0, 1])) < 0.1


def test_t5_is_written_without_what_it_shares(tmp_path: Path) -> None:
    from safetensors.torch import load_file
    from transformers import T5Config, T5EncoderModel

    from benchmarks.random_weights import write_random

    config = T5Config(vocab_size=50, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4)
    with torch.device("meta"):
        net = T5EncoderModel(config)
    config.save_pretrained(tmp_path)
    write_random(tmp_path, "model", net)
    tensors = load_file(tmp_path / "model.safetensors")
    assert "shared.weight" in tensors and "encoder.embed_tokens.weight" not in tensors
    loaded = T5EncoderModel.from_pretrained(tmp_path, local_files_only=True)
    assert torch.equal(loaded.encoder.embed_tokens.weight.bfloat16(), tensors["shared.weight"])


def test_names_for_the_peer_are_those_that_diffusers_converts_back() -> None:
    """Of the true width, which diffusers' conversion takes for granted: numbers in the tensors'
    places say which of the source's they are."""
    from diffusers import FluxTransformer2DModel
    from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers

    from benchmarks.flux_gguf import author_names

    with torch.device("meta"):
        net = FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True)
    state = net.state_dict()
    shapes = {name: (len(tensor), *(1 for _ in tensor.shape[1:])) for name, tensor in state.items()}
    source = {name: torch.full(shape, float(n)) for n, (name, shape) in enumerate(shapes.items())}
    theirs = {
        made.name: torch.cat([source[name] for name in made.sources])
        for made in author_names(shapes)
    }
    back = convert_flux_transformer_checkpoint_to_diffusers(dict(theirs))
    assert back.keys() == state.keys()
    for name, tensor in source.items():
        assert torch.equal(back[name], tensor), name
    swapped = {name for made in author_names(shapes) if made.halves for name in made.sources}
    assert swapped == {"norm_out.linear.weight", "norm_out.linear.bias"}
    with pytest.raises(EdgesdError, match="up_blocks"):
        author_names({"up_blocks.0.weight": (3, 3)})


def test_layers_of_blocks_alone_are_in_few_bits_for_the_peer(tmp_path: Path) -> None:
    from benchmarks.flux_gguf import convert_transformer

    net = _written(tmp_path / "net")
    path = tmp_path / "net.gguf"
    convert_transformer(tmp_path / "net", "q4_0", path)
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    kinds = {name: tensor.tensor_type.name for name, tensor in found.items()}
    assert kinds["double_blocks.0.img_attn.qkv.weight"] == "Q4_0"
    assert kinds["single_blocks.0.linear2.weight"] == "Q4_0"
    assert kinds["img_in.weight"] == "F16"
    assert kinds["double_blocks.0.img_attn.norm.query_norm.scale"] == "F32"
    joined = found["single_blocks.0.linear1.weight"]
    values = gguf.dequantize(joined.data, joined.tensor_type)
    state = {name: tensor.float().numpy() for name, tensor in net.state_dict().items()}
    first = state["single_transformer_blocks.0.attn.to_q.weight"]
    assert np.abs(values[: len(first)] - first).mean() < 0.1 * np.abs(first).mean()
    shift, scale = np.split(found["final_layer.adaLN_modulation.1.weight"].data, 2)
    ours = state["norm_out.linear.weight"]
    assert np.allclose(np.concatenate([scale, shift]), ours, atol=1e-3)
