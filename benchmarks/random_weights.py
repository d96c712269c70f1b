"""Random weights of a network of any size, as sharded .safetensors in bf16, a few MB in memory.

A network of which nothing but names and shapes is known (on torch's meta device) is enough.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor, nn

from edgesd.files import atomic_write

SHARD_BYTES = 5_000_000_000
"""A file holds no more, but for one tensor that is larger."""

_POOL = (1 << 23) + 9
"""Numbers that are drawn. Tensors are read from them, each from where the one before ended: a prime
length, so that no rows of a weight are alike."""

_NARROW = {"SelfAttention.q.": 1 / 8, "token_embedding.": 0.02, "position_embedding.": 0.02}
"""What weights are smaller by than keeps the size of activations, by a part of their names. T5
doesn't scale the products of its queries with its keys."""

Shapes = Mapping[str, tuple[int, ...]]


def write_random(folder: Path, stem: str, net: nn.Module, shard_bytes: int = SHARD_BYTES) -> None:
    """Write weights of `net` to `folder`: STEM.safetensors, or STEM-0000N-of-0000M.safetensors and
    their index. The same each time. net: on the meta device."""
    shapes = _shapes(net)
    shards = list(_shards(shapes, shard_bytes))
    names = [f"{stem}.safetensors"]
    if len(shards) > 1:
        names = [
            f"{stem}-{n:05}-of-{len(shards):05}.safetensors" for n in range(1, 1 + len(shards))
        ]
        files = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        size = 2 * sum(map(math.prod, shapes.values()))
        index = {"metadata": {"total_size": size}, "weight_map": files}
        with atomic_write(folder / f"{stem}.safetensors.index.json") as file:
            file.write(json.dumps(index, indent=2).encode())
    pool = _Pool()
    for name, shard in zip(names, shards, strict=True):
        with atomic_write(folder / name) as file:
            _write_shard(file, shard, pool)


def _shapes(net: nn.Module) -> Shapes:
    """The network's tensors; of those that are shared, the first alone, as in published files."""
    seen: set[int] = set()
    found = {}
    for name, tensor in net.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            found[name] = tuple(tensor.shape)
    return found


def _shards(shapes: Shapes, most: int) -> Iterator[dict[str, tuple[int, ...]]]:
    shard: dict[str, tuple[int, ...]] = {}
    size = 0
    for name, shape in shapes.items():
        taken = 2 * math.prod(shape)
        if shard and size + taken > most:
            yield shard
            shard, size = {}, 0
        shard[name] = shape
        size += taken
    yield shard


def _write_shard(file: BinaryIO, shapes: Shapes, pool: _Pool) -> None:
    """The format: bytes of the header [8, little-endian], the header in JSON, the tensors."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for name, shape in shapes.items():
        for part in pool.tensor(name, shape):
            file.write(part.view(torch.int16).numpy().data)


class _Pool:
    """Numbers of a normal distribution, handed out in bf16."""

    def __init__(self) -> None:
        self._drawn = torch.randn(_POOL, generator=torch.Generator().manual_seed(0))
        self._scaled: dict[float, Tensor] = {}
        self._at = 0

    def tensor(self, name: str, shape: tuple[int, ...]) -> Iterator[Tensor]:
        """The values of a tensor, in parts: weights that keep the size of activations, factors of
        normalizations about 1, and small biases."""
        count = math.prod(shape)
        if len(shape) < 2:
            offset = 1.0 if name.endswith("weight") else 0.0
            yield (self._drawn[torch.arange(count) % _POOL] * 0.02 + offset).bfloat16()
            return
        deviation = 1 / math.sqrt(math.prod(shape[1:]))
        if name == "shared.weight":
            deviation = 1.0
        for within, factor in _NARROW.items():
            if within in name:
                deviation *= factor
        if deviation not in self._scaled:
            self._scaled[deviation] = (self._drawn * deviation).bfloat16()
        while count:
            part = self._scaled[deviation][self._at : self._at + count]
            yield part
            count -= len(part)
            self._at = (self._at + len(part)) % _POOL
