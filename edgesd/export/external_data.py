"""Writes a model with its weights in one file beside it, in pages that can be mapped."""

from __future__ import annotations

from pathlib import Path
from typing import Any, BinaryIO

import onnx_ir as ir

from edgesd.files import atomic_write

GRAPH_FILE = "model.onnx"
WEIGHTS_FILE = "weights.bin"

EXTERNAL_BYTES = 1024
"""Smaller tensors stay inside the graph file."""

_PAGE, _PAGE_FROM, _LINE = 4096, 65536, 64


def write_model(model: ir.Model, folder: Path) -> None:
    """Write folder/model.onnx and folder/weights.bin, each whole or not at all.

    Tensors of 64 KiB and more begin at multiples of 4096 bytes, others at multiples of 64. They
    are written one by one, and afterwards `model` refers to the file: memory that only it held is
    free. Only initializers of the main graph are external, by plain entries: location, offset,
    length. Raises ResourceError when the disk is full, InputError when `folder` can't be written.
    """
    with atomic_write(folder / WEIGHTS_FILE) as file:
        for value in model.graph.initializers.values():
            tensor = value.const_value
            if tensor is not None and tensor.nbytes >= EXTERNAL_BYTES:
                value.const_value = _append(file, tensor, value.name or "", folder)
    with atomic_write(folder / GRAPH_FILE) as file:
        file.write(ir.serde.serialize_model(model).SerializeToString())


def _append(file: BinaryIO, tensor: Any, name: str, folder: Path) -> ir.ExternalTensor:
    align = _PAGE if tensor.nbytes >= _PAGE_FROM else _LINE
    file.write(b"\0" * (-file.tell() % align))
    offset = file.tell()
    file.write(tensor.tobytes())
    return ir.ExternalTensor(
        WEIGHTS_FILE,
        offset,
        file.tell() - offset,
        tensor.dtype,
        shape=ir.Shape(tensor.shape.numpy()),
        name=name,
        base_dir=folder,
    )
