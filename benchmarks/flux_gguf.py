"""FLUX.1's networks for stable-diffusion.cpp: GGUF files with the author's names, made tensor by
tensor of a diffusers folder, so that the memory holds one.

Layers of blocks are in 8 or 4 bits, all else in fp16 or fp32: what the program's own converter
does, which wants a model in one file and takes the memory of what it makes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgesd.errors import EdgesdError
from edgesd.files import atomic_path

_BLOCKS = {
    "norm1.linear": "img_mod.lin",
    "norm1_context.linear": "txt_mod.lin",
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
    "attn.norm_q": "img_attn.norm.query_norm",
    "attn.norm_k": "img_attn.norm.key_norm",
    "attn.norm_added_q": "txt_attn.norm.query_norm",
    "attn.norm_added_k": "txt_attn.norm.key_norm",
    "ff.net.0.proj": "img_mlp.0",
    "ff.net.2": "img_mlp.2",
    "ff_context.net.0.proj": "txt_mlp.0",
    "ff_context.net.2": "txt_mlp.2",
}
_SINGLE = {
    "norm.linear": "modulation.lin",
    "attn.norm_q": "norm.query_norm",
    "attn.norm_k": "norm.key_norm",
    "proj_out": "linear2",
}
_JOINED = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}
_JOINED_SINGLE = {"linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")}
_OUTSIDE = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    "proj_out": "final_layer.linear",
}
_LAST = "norm_out.linear", "final_layer.adaLN_modulation.1"
"""diffusers has scale and shift the other way round."""

_TRANSFORMER = re.compile(r"(double|single)_blocks\..*\.weight")
_T5 = re.compile(r"encoder\.block\..*(SelfAttention\.[qkvo]|DenseReluDense\.w\w+)\.weight")
_KINDS = {"q8_0": "Q8_0", "q4_0": "Q4_0", "f16": "F16"}


@dataclass(frozen=True)
class _Made:
    """A tensor of the file: made of tensors of the source, one below the other. halves: the two of
    it change places."""

    name: str
    sources: tuple[str, ...]
    halves: bool = False


def author_names(names: Mapping[str, Any]) -> list[_Made]:
    """What the author of FLUX.1 calls the tensors that diffusers calls `names`. Raises EdgesdError
    for one that isn't FLUX.1's."""
    made: dict[str, _Made] = {}
    for name in names:
        path, _, last = name.rpartition(".")
        match = re.fullmatch(r"(single_)?transformer_blocks\.(\d+)\.(.+)", path)
        if match:
            single, number, inside = match.groups()
            prefix = f"{'single' if single else 'double'}_blocks.{number}."
            simple, joined = (_SINGLE, _JOINED_SINGLE) if single else (_BLOCKS, _JOINED)
            here = path.removesuffix(inside)
            parts = {part: (to, all_) for to, all_ in joined.items() for part in all_}
            if inside in parts:
                to, all_ = parts[inside]
                new = f"{prefix}{to}.{last}"
                made[new] = _Made(new, tuple(f"{here}{part}.{last}" for part in all_))
                continue
            if inside in simple:
                scale = "norm.query" in simple[inside] or "norm.key" in simple[inside]
                new = f"{prefix}{simple[inside]}.{'scale' if scale else last}"
                made[new] = _Made(new, (name,))
                continue
        elif path in _OUTSIDE:
            new = f"{_OUTSIDE[path]}.{last}"
            made[new] = _Made(new, (name,))
            continue
        elif path == _LAST[0]:
            new = f"{_LAST[1]}.{last}"
            made[new] = _Made(new, (name,), halves=True)
            continue
        raise EdgesdError(f"FLUX.1's transformer has no {name}")
    return list(made.values())


def convert_transformer(folder: Path, kind: str, path: Path) -> None:
    """Write the transformer in the diffusers folder `folder` as `path`. kind: a key of _KINDS."""
    with _Tensors(folder) as tensors:
        _write(tensors, author_names(tensors.files), _TRANSFORMER, kind, path, "flux")


def convert_t5(folder: Path, kind: str, path: Path) -> None:
    """The same of T5, whose names stay."""
    with _Tensors(folder) as tensors:
        made = [_Made(name, (name,)) for name in tensors.files]
        _write(tensors, made, _T5, kind, path, "t5encoder")


class _Tensors:
    """The tensors of all .safetensors files of a folder; files: name -> the file it is in."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __enter__(self) -> _Tensors:
        from safetensors import safe_open

        paths = sorted(self._folder.glob("*.safetensors"))
        opened: list[Any] = [safe_open(path, "pt") for path in paths]
        self.files: dict[str, Any] = {name: file for file in opened for name in file.keys()}  # noqa: SIM118
        return self

    def __exit__(self, *_: object) -> None:
        self.files.clear()

    def shape(self, made: _Made) -> tuple[int, ...]:
        """Of a tensor that is made."""
        shapes = [tuple(self.files[name].get_slice(name).get_shape()) for name in made.sources]
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])

    def values(self, made: _Made) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Its values in fp32."""
        import torch

        parts = [self.files[name].get_tensor(name) for name in made.sources]
        whole = torch.cat(parts) if len(parts) > 1 else parts[0]
        if made.halves:
            whole = torch.cat(whole.chunk(2)[::-1])
        array: np.ndarray[Any, np.dtype[np.float32]] = whole.float().numpy()
        return array


def _write(
    tensors: _Tensors,
    made: list[_Made],
    quantized: re.Pattern[str],
    kind: str,
    path: Path,
    architecture: str,
) -> None:
    """quantized: names of the tensors that are stored as `kind`."""
    import gguf

    kinds = gguf.GGMLQuantizationType

    def type_of(one: _Made) -> Any:
        if quantized.fullmatch(one.name) and len(tensors.shape(one)) == 2:
            return kinds[_KINDS[kind]]
        return kinds.F16 if len(tensors.shape(one)) == 2 else kinds.F32

    with atomic_path(path) as part:
        writer = gguf.GGUFWriter(part, architecture)
        for one in made:
            shape, type_ = tensors.shape(one), type_of(one)
            stored = gguf.quant_shape_to_byte_shape(shape, type_)
            writer.add_tensor_info(
                one.name, stored, np.dtype(np.uint8), int(np.prod(stored)), raw_dtype=type_
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for one in made:
            writer.write_tensor_data(
                gguf.quantize(tensors.values(one), type_of(one)).view(np.uint8)
            )
        writer.close()
