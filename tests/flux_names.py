"""FLUX's transformer under its authors' names, as their code (flux/model.py) lays it out, written
down apart from edgesd's tables and diffusers' conversions."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def authors_rows(
    doubles: int, singles: int, width: int, channels: int, guidance: bool
) -> dict[str, int]:
    """Linears of the authors' network, and how many outputs each has."""
    embedders = ("time_in", "vector_in", *(("guidance_in",) if guidance else ()))
    rows = {"img_in": width, "txt_in": width, "final_layer.linear": channels}
    rows["final_layer.adaLN_modulation.1"] = 2 * width
    rows |= {f"{name}.{end}_layer": width for name in embedders for end in ("in", "out")}
    for block in range(doubles):
        for stream in ("img", "txt"):
            name = f"double_blocks.{block}.{stream}"
            rows |= {f"{name}_mod.lin": 6 * width, f"{name}_attn.qkv": 3 * width}
            rows |= {f"{name}_attn.proj": width, f"{name}_mlp.0": 4 * width, f"{name}_mlp.2": width}
    for block in range(singles):
        name = f"single_blocks.{block}"
        rows |= {f"{name}.linear1": 7 * width, f"{name}.linear2": width}
        rows[f"{name}.modulation.lin"] = 3 * width
    return rows


def authors_norms(doubles: int, singles: int) -> list[str]:
    """Weights of the authors' norms."""
    norms = ("query_norm", "key_norm")
    found = [
        f"double_blocks.{block}.{stream}_attn.norm.{norm}.scale"
        for block in range(doubles)
        for stream in ("img", "txt")
        for norm in norms
    ]
    return found + [
        f"single_blocks.{b}.norm.{norm}.scale" for b in range(singles) for norm in norms
    ]


def authors_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of diffusers' network under the authors' names."""
    left = dict(state)
    made: dict[str, Tensor] = {}

    def move(name: str, *layers: str) -> None:
        for end in ("weight", "bias"):
            made[f"{name}.{end}"] = torch.cat([left.pop(f"{layer}.{end}") for layer in layers])

    def norms(name: str, layer: str, added: str = "") -> None:
        made[f"{name}.query_norm.scale"] = left.pop(f"{layer}.norm_{added}q.weight")
        made[f"{name}.key_norm.scale"] = left.pop(f"{layer}.norm_{added}k.weight")

    block = 0
    while f"transformer_blocks.{block}.norm1.linear.weight" in left:
        ours, theirs = f"transformer_blocks.{block}", f"double_blocks.{block}"
        for stream, text, feed in (("img", "", "ff"), ("txt", "_context", "ff_context")):
            move(f"{theirs}.{stream}_mod.lin", f"{ours}.norm1{text}.linear")
            move(f"{theirs}.{stream}_mlp.0", f"{ours}.{feed}.net.0.proj")
            move(f"{theirs}.{stream}_mlp.2", f"{ours}.{feed}.net.2")
        image = [f"{ours}.attn.to_{part}" for part in "qkv"]
        move(f"{theirs}.img_attn.qkv", *image)
        move(f"{theirs}.txt_attn.qkv", *(f"{ours}.attn.add_{part}_proj" for part in "qkv"))
        move(f"{theirs}.img_attn.proj", f"{ours}.attn.to_out.0")
        move(f"{theirs}.txt_attn.proj", f"{ours}.attn.to_add_out")
        norms(f"{theirs}.img_attn.norm", f"{ours}.attn")
        norms(f"{theirs}.txt_attn.norm", f"{ours}.attn", "added_")
        block += 1
    block = 0
    while f"single_transformer_blocks.{block}.norm.linear.weight" in left:
        ours, theirs = f"single_transformer_blocks.{block}", f"single_blocks.{block}"
        move(f"{theirs}.modulation.lin", f"{ours}.norm.linear")
        parts = [f"{ours}.attn.to_{part}" for part in "qkv"]
        move(f"{theirs}.linear1", *parts, f"{ours}.proj_mlp")
        move(f"{theirs}.linear2", f"{ours}.proj_out")
        norms(f"{theirs}.norm", f"{ours}.attn")
        block += 1
    for ours, theirs in (("timestep", "time"), ("text", "vector"), ("guidance", "guidance")):
        if f"time_text_embed.{ours}_embedder.linear_1.weight" in left:
            move(f"{theirs}_in.in_layer", f"time_text_embed.{ours}_embedder.linear_1")
            move(f"{theirs}_in.out_layer", f"time_text_embed.{ours}_embedder.linear_2")
    move("img_in", "x_embedder")
    move("txt_in", "context_embedder")
    move("final_layer.linear", "proj_out")
    for end in ("weight", "bias"):
        scale, shift = left.pop(f"norm_out.linear.{end}").chunk(2)
        made[f"final_layer.adaLN_modulation.1.{end}"] = torch.cat([shift, scale])
    assert not left
    return made
