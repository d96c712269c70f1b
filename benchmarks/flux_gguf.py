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
from edgesd.export.families.parts.flux_names import authors_layers, authors_norms
from edgesd.files import atomic_path

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


def author_names(shapes: Mapping[str, tuple[int, ...]]) -> list[_Made]:
    """What the author of FLUX.1 calls the tensors that diffusers calls by the names of `shapes`.
    Raises EdgesdError for one that isn't FLUX.1's."""
    named = [
        _Made(f"{name}.{end}", tuple(f"{part.layer}.{end}" for part in rows), rows[0].swapped)
        for name, rows in authors_layers(shapes).items()
        for end in ("weight", "bias")
    ]
    named += [_Made(name, (ours,)) for name, ours in authors_norms(shapes).items()]
    made = [one for one in named if shapes.keys() >= {*one.sources}]
    known = {source for one in made for source in one.sources}
    if unknown := [name for name in shapes if name not in known]:
        raise EdgesdError(f"FLUX.1's transformer has no {unknown[0]}")
    return made


def convert_transformer(folder: Path, kind: str, path: Path) -> None:
    """Write the transformer in the diffusers folder `folder` as `path`. kind: a key of _KINDS."""
    with _Tensors(folder) as tensors:
        shapes = {name: tensors.shape(_Made(name, (name,))) for name in tensors.files}
        _write(tensors, author_names(shapes), _TRANSFORMER, kind, path, "flux")


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
