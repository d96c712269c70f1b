"""Names of FLUX's layers in its authors' code, in which single files and most LoRAs have them.

Some of the authors' linears are several of diffusers', whose weights are rows of theirs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

TRANSFORMER, MODULATION = "transformer", "modulation"
"""Components that are one network in checkpoints, the former."""

WEIGHT = ".weight"

_OUTSIDE = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "proj_out": "final_layer.linear",
}
_HEAD = ("norm_out.linear", "final_layer.adaLN_modulation.1")
"""diffusers has scale and shift where the authors have shift and scale."""

_DOUBLE = {
    "norm1.linear": "img_mod.lin",
    "norm1_context.linear": "txt_mod.lin",
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
    "ff.net.0.proj": "img_mlp.0",
    "ff.net.2": "img_mlp.2",
    "ff_context.net.0.proj": "txt_mlp.0",
    "ff_context.net.2": "txt_mlp.2",
}
_SINGLE = {"norm.linear": "modulation.lin", "proj_out": "linear2"}
_FUSED_DOUBLE = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}
_FUSED_SINGLE = {"linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")}

_DOUBLE_NORMS = {
    "attn.norm_q": "img_attn.norm.query_norm",
    "attn.norm_k": "img_attn.norm.key_norm",
    "attn.norm_added_q": "txt_attn.norm.query_norm",
    "attn.norm_added_k": "txt_attn.norm.key_norm",
}
_SINGLE_NORMS = {"attn.norm_q": "norm.query_norm", "attn.norm_k": "norm.key_norm"}
_SCALE = ".scale"
"""What the authors call the weight of a norm."""

_XLABS_DOUBLE = {
    "qkv_lora1": "img_attn.qkv",
    "qkv_lora2": "txt_attn.qkv",
    "proj_lora1": "img_attn.proj",
    "proj_lora2": "txt_attn.proj",
}
"""What XLabs' LoRAs, whose processors stand in for attention, call layers of a double block."""
_XLABS_SINGLE = {"qkv": ("attn.to_q", "attn.to_k", "attn.to_v"), "proj": ("proj_out",)}


class Rows(NamedTuple):
    """A layer of diffusers, whose weights are `size` rows, from `first` on, of another one's.

    swapped: with the halves of these rows in the other order.
    """

    layer: str
    first: int
    size: int
    swapped: bool = False

    def of(self, tensor: Tensor) -> Tensor:
        """tensor [rows, ...] -> [size, ...]: a view, unless swapped."""
        import torch

        rows = tensor[self.first : self.first + self.size]
        return torch.cat(rows.chunk(2)[::-1]) if self.swapped else rows


def authors_layers(
    shapes: Mapping[str, tuple[int, ...]], xlabs: bool = False
) -> dict[str, tuple[Rows, ...]]:
    """The authors' layers, and what has each one's rows. shapes: of the weights of diffusers'
    network, by their names; of those of another network, nothing comes back. xlabs: these layers
    by XLabs' names, too."""
    found: dict[str, tuple[Rows, ...]] = {}

    def add(name: str, layers: tuple[str, ...], swapped: bool = False) -> None:
        rows: list[Rows] = []
        first = 0
        for layer in layers:
            if (shape := shapes.get(layer + WEIGHT)) is None:
                return
            rows.append(Rows(layer, first, shape[0], swapped))
            first += shape[0]
        found[name] = tuple(rows)

    for theirs, single, double in _blocks(shapes):
        block, plain = f"{theirs}.", _DOUBLE if double else _SINGLE
        fused = {**(_FUSED_DOUBLE if double else _FUSED_SINGLE)}
        fused |= {name: (layer,) for layer, name in plain.items()}
        if xlabs:
            fused |= (
                {alias: fused[name] for alias, name in _XLABS_DOUBLE.items()}
                if double
                else _XLABS_SINGLE
            )
        for name, layers in fused.items():
            add(block + name, tuple(f"{single}.{layer}" for layer in layers))
    if any(name.startswith("single_blocks.") for name in found):
        for layer, name in _OUTSIDE.items():
            add(name, (layer,))
        add(_HEAD[1], (_HEAD[0],), swapped=True)
    return found


def diffusers_state(
    found: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Tensor]:
    """Weights by the authors' names -> by diffusers', as views of the same. shapes: of the weights
    of diffusers' network. What has neither name stays as it is."""
    layers, norms = authors_layers(shapes), authors_norms(shapes)
    state: dict[str, Tensor] = {}
    for name, tensor in found.items():
        layer, dot, end = name.rpartition(".")
        rows = layers.get(layer, ())
        if name in norms:
            state[norms[name]] = tensor
        elif rows and tensor.ndim and tensor.shape[0] == sum(one.size for one in rows):
            state |= {f"{one.layer}{dot}{end}": one.of(tensor) for one in rows}
        elif len(rows) == 1:  # of another size than the config's, which is the caller's to tell
            state[f"{rows[0].layer}{dot}{end}"] = tensor
        else:
            state[name] = tensor
    return state


def authors_norms(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """The authors' names of weights of norms -> diffusers'."""
    return {
        f"{theirs}.{name}{_SCALE}": f"{ours}.{norm}{WEIGHT}"
        for theirs, ours, double in _blocks(shapes)
        for norm, name in (_DOUBLE_NORMS if double else _SINGLE_NORMS).items()
    }


def _blocks(shapes: Mapping[str, tuple[int, ...]]) -> list[tuple[str, str, bool]]:
    """Blocks of a network: their names in the authors' code and in diffusers', and whether they are
    double."""
    found: dict[tuple[str, str, bool], None] = {}
    for name in shapes:
        kind, _, rest = name.partition(".")
        number = rest.partition(".")[0]
        if kind == "transformer_blocks":
            found[f"double_blocks.{number}", f"{kind}.{number}", True] = None
        elif kind == "single_transformer_blocks":
            found[f"single_blocks.{number}", f"{kind}.{number}", False] = None
    return list(found)
