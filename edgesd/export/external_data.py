"""Writes a model with its weights in one file beside it, in pages that can be mapped."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import onnx_ir as ir

from edgesd.files import atomic_write

GRAPH_FILE = "model.onnx"
KERNELS_FILE = "kernels.onnx"
"""The same component's graph for edgesd's own kernels."""
WEIGHTS_FILE = "weights.bin"

EXTERNAL_BYTES = 1024
"""Smaller tensors stay inside the graph file."""

_CHECKPOINT = {False: "checkpoint:", True: "checkpoint-transposed:"}
"""Where weights are said to be that aren't in any file of the graph, before their names."""

_PAGE, _PAGE_FROM, _LINE = 4096, 65536, 64


def write_model(
    model: ir.Model, folder: Path, others: Mapping[str, ir.Model] | None = None
) -> None:
    """Write folder/model.onnx and folder/weights.bin, each whole or not at all.

    others: file name -> further graphs; weights that several have are in the file once.

    Tensors of 64 KiB and more begin at multiples of 4096 bytes, others at multiples of 64. They
    are written one by one, and afterwards `model` refers to the file: memory that only it held is
    free. Only initializers of the main graph are external, by plain entries: location, offset,
    length; those of `refer_to_checkpoint` stay what they are. Raises ResourceError when the disk is
    full, InputError when `folder` can't be written.
    """
    models = {GRAPH_FILE: model, **(others or {})}
    places: dict[bytes, int] = {}
    with atomic_write(folder / WEIGHTS_FILE) as file:
        for each in models.values():
            for value in each.graph.initializers.values():
                tensor = value.const_value
                if tensor is None or in_checkpoint(tensor):
                    continue
                if tensor.nbytes >= EXTERNAL_BYTES:
                    value.const_value = _append(file, tensor, value.name or "", folder, places)
    for name, each in models.items():
        with atomic_write(folder / name) as file:
            file.write(ir.serde.serialize_model(each).SerializeToString())


def split_files(count: int, kernels: bool = False) -> tuple[str, ...]:
    """Names of the graphs of a component's `count` parts (passes/split_autoencoder.py). kernels:
    of those for edgesd's own kernels."""
    names = ["head", *(f"middle-{number}" for number in range(1, count - 1)), "tail"]
    ending = "-kernels.onnx" if kernels else ".onnx"
    return tuple(f"{name}{ending}" for name in names[:count])


class InCheckpoint(NamedTuple):
    """The checkpoint's tensor that a graph's weight is. transposed: its two dimensions swapped."""

    name: str
    transposed: bool


def refer_to_checkpoint(
    tensor: ir.TensorProtocol, name: str, transposed: bool
) -> ir.ExternalTensor:
    """What says that `tensor` is the checkpoint's tensor `name`, which no file of the graph has."""
    return ir.ExternalTensor(
        f"{_CHECKPOINT[transposed]}{name}",
        0,
        tensor.nbytes,
        tensor.dtype,
        shape=ir.Shape(tensor.shape.numpy()),
        name=tensor.name or "",
    )


def in_checkpoint(tensor: ir.TensorProtocol | None) -> InCheckpoint | None:
    """What `refer_to_checkpoint` was told; None for a tensor of the graph's own."""
    if isinstance(tensor, ir.ExternalTensor):
        for transposed, prefix in _CHECKPOINT.items():
            if str(tensor.location).startswith(prefix):
                return InCheckpoint(str(tensor.location).removeprefix(prefix), transposed)
    return None


def weight_bytes(model: ir.Model) -> int:
    """Bytes of a graph's weights, as `write_model` writes them."""
    tensors = [value.const_value for value in model.graph.initializers.values()]
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def _append(
    file: BinaryIO, tensor: Any, name: str, folder: Path, places: dict[bytes, int]
) -> ir.ExternalTensor:
    """places: sha256 -> offset of what is in the file already."""
    align = _PAGE if tensor.nbytes >= _PAGE_FROM else _LINE
    data = tensor.tobytes()
    digest = hashlib.sha256(data).digest()
    if digest not in places:
        file.write(b"\0" * (-file.tell() % align))
        places[digest] = file.tell()
        file.write(data)
    offset = places[digest]
    return ir.ExternalTensor(
        WEIGHTS_FILE,
        offset,
        len(data),
        tensor.dtype,
        shape=ir.Shape(tensor.shape.numpy()),
        name=name,
        base_dir=folder,
    )
