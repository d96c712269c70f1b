"""diffusers' pipelines as single files, under the names that the models' authors gave the weights.

The tables are those of the authors' code (CompVis' ldm, Stability's sgm, OpenCLIP), written down
apart from diffusers' conversion, which they invert.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

State = Mapping[str, Tensor]

_UNET_TOP = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}
_OPEN_CLIP = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.": "ln_final.",
    "encoder.layers.": "transformer.resblocks.",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def _renamed(name: str, table: Mapping[str, str]) -> str:
    for ours, theirs in table.items():
        name = name.replace(ours, theirs)
    return name


def ldm_unet(state: State, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The UNet, below model.diffusion_model."""
    per_level, up_types = config["layers_per_block"], config["up_block_types"]

    def renamed(name: str) -> str:
        for ours, theirs in _UNET_TOP.items():
            if name.startswith(f"{ours}."):
                name = theirs + name.removeprefix(ours)
                return (
                    _renamed(name, _RESNET)
                    if theirs in ("middle_block.0", "middle_block.2")
                    else name
                )
        match = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.*)", name)
        assert match, name
        side, kind, rest = match[1], match[3], match[5]
        level, layer = int(match[2]), int(match[4])
        block = level * (per_level + 1) + layer + (side == "down")
        blocks = "input_blocks" if side == "down" else "output_blocks"
        if kind == "downsamplers":
            return f"{blocks}.{(level + 1) * (per_level + 1)}.0.{rest.replace('conv.', 'op.')}"
        if kind == "upsamplers":
            place = 2 if "CrossAttn" in up_types[level] else 1
            return f"{blocks}.{block + per_level}.{place}.{rest}"
        if kind == "resnets":
            return f"{blocks}.{block}.0.{_renamed(rest, _RESNET)}"
        return f"{blocks}.{block}.1.{rest}"

    return {f"model.diffusion_model.{renamed(name)}": tensor for name, tensor in state.items()}


def ldm_vae(state: State, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The autoencoder, below first_stage_model, whose attention has convolutions of 1x1."""
    last = len(config["block_out_channels"]) - 1
    found = {}
    for name, tensor in state.items():
        name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
        name = re.sub(r"down_blocks\.(\d+)\.", r"down.\1.", name)
        name = re.sub(r"up_blocks\.(\d+)\.", lambda m: f"up.{last - int(m[1])}.", name)
        name = re.sub(r"resnets\.(\d+)", r"block.\1", name)
        name = re.sub(r"(down|up)samplers\.0", r"\1sample", name)
        name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        if "mid_block.attentions.0" in name:
            name = name.replace("mid_block.attentions.0", "mid.attn_1")
            name = _renamed(name, _VAE_ATTENTION)
            if tensor.ndim == 2:
                tensor = tensor[:, :, None, None]
        found[f"first_stage_model.{name}"] = tensor
    return found


def openai_clip(state: State, prefix: str) -> dict[str, Tensor]:
    """A text encoder as transformers named it, below `prefix`."""
    return {f"{prefix}text_model.{_bare(name)}": tensor for name, tensor in state.items()}


def open_clip(state: State, prefix: str) -> dict[str, Tensor]:
    """A text encoder as OpenCLIP names it, below `prefix`: queries, keys and values are one matrix,
    and the projection is transposed."""
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        bare = _bare(name)
        if match := re.fullmatch(r"(.*)\.self_attn\.([qkv])_proj\.(weight|bias)", bare):
            if match[2] == "q":
                parts = [state[name.replace("q_proj", f"{x}_proj")] for x in "qkv"]
                place = _renamed(match[1], _OPEN_CLIP)
                found[f"{place}.attn.in_proj_{match[3]}"] = torch.cat(parts)
        elif bare == "text_projection.weight":
            found["text_projection"] = tensor.T.contiguous()
        else:
            found[_renamed(bare, _OPEN_CLIP)] = tensor
    return {f"{prefix}{name}": tensor for name, tensor in found.items()}


def _bare(name: str) -> str:
    return name.removeprefix("text_model.")


def ldm_state(folder: Path) -> dict[str, Tensor]:
    """All weights of a Stable Diffusion pipeline in a diffusers folder, under their first names."""

    def state(component: str) -> dict[str, Tensor]:
        return load_file(next((folder / component).glob("*.safetensors")))

    def config(component: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((folder / component / "config.json").read_text())
        return found

    found = ldm_unet(state("unet"), config("unet")) | ldm_vae(state("vae"), config("vae"))
    first, second = (folder / name for name in ("text_encoder", "text_encoder_2"))
    if not second.is_dir():
        if config("text_encoder")["hidden_act"] == "gelu":  # of 2.x
            return found | open_clip(state("text_encoder"), "cond_stage_model.model.")
        return found | openai_clip(state("text_encoder"), "cond_stage_model.transformer.")
    if first.is_dir():
        found |= openai_clip(state("text_encoder"), "conditioner.embedders.0.transformer.")
    place = int(first.is_dir())
    return found | open_clip(state("text_encoder_2"), f"conditioner.embedders.{place}.model.")


def write_single_file(
    folder: Path,
    path: Path,
    more: State | None = None,
    without: Iterable[str] = (),
    **metadata: str,
) -> Path:
    """The pipeline in `folder` as the new file `path`. more: other tensors in it. without: what the
    names of those that are left out begin with."""
    left_out = tuple(without)
    state = {n: t for n, t in ldm_state(folder).items() if not n.startswith(left_out)}
    save_file({n: t.contiguous() for n, t in {**state, **(more or {})}.items()}, path, metadata)
    return path


def without_weights(folder: Path) -> Path:
    """The diffusers folder with its configs and tokenizers alone."""
    for path in folder.rglob("*.safetensors"):
        path.unlink()
    return folder
