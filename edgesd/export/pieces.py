"""Runs a graph in ONNX Runtime piece by piece, so that memory holds the weights of one piece.

A piece is a run of the graph's nodes, in its own order. What is computed of weights alone (the Cast
of one that is stored in 16 bits) is part of each piece that reads it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import onnx
import onnx_ir as ir
import torch

from edgesd.runtime.arrays import Array
from edgesd.runtime.backends.onnxruntime import session_options
from edgesd.runtime.onnx_wire import bf16_in_fp32

PIECE_BYTES = 1 << 29
"""Weights of a piece, floating-point ones as ONNX Runtime computes with them, in fp32. One weight
may be more."""

Values = Mapping[str, Array]
"""Arrays by the name that the graph has for them."""

_FOLDER = "session.model_external_initializers_file_folder_path"
_FLOATS = {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16}


class Piece(NamedTuple):
    """A part of a graph. nodes: in order. weights: initializers that they read. reads: what pieces
    before it make, or the graph's inputs. makes: all that its nodes give."""

    nodes: tuple[onnx.NodeProto, ...]
    weights: tuple[onnx.TensorProto, ...]
    reads: frozenset[str]
    makes: frozenset[str]


def run_in_pieces(
    graph: Path,
    cases: Iterable[Values],
    library: Path | None = None,
    elsewhere: Mapping[str, ir.TensorProtocol] | None = None,
    piece_bytes: int = PIECE_BYTES,
) -> list[Values]:
    """What the ONNX file `graph` makes of each of `cases`, its inputs: its outputs.

    library: of edgesd's own kernels. elsewhere: weights that its files don't hold, by name. Raises
    what ONNX Runtime raises.
    """
    raw = graph.read_bytes()
    model = onnx.load_model_from_string(raw if elsewhere else bf16_in_fp32(raw))
    return run_model_in_pieces(model, graph.parent, cases, library, elsewhere, piece_bytes)


def run_model_in_pieces(
    model: onnx.ModelProto,
    folder: Path,
    cases: Iterable[Values],
    library: Path | None = None,
    elsewhere: Mapping[str, ir.TensorProtocol] | None = None,
    piece_bytes: int = PIECE_BYTES,
) -> list[Values]:
    """The same of a model whose weights are in files of `folder`."""
    known: list[Values] = [dict(inputs) for inputs in cases]
    outputs = frozenset(value.name for value in model.graph.output)
    pieces = split(model.graph, piece_bytes)
    for index, piece in enumerate(pieces):
        later = outputs.union(*(each.reads for each in pieces[index + 1 :]))
        names = sorted(piece.makes & later)
        part = _model(model, piece, known[0], names)
        session = _session(part, folder, library, elsewhere or {})
        for place, values in enumerate(known):
            made = session.run(names, {name: values[name] for name in piece.reads})
            values = {**values, **dict(zip(names, made, strict=True))}
            known[place] = {name: value for name, value in values.items() if name in later}
        del session  # before the next one is made
    return known


def split(graph: onnx.GraphProto, piece_bytes: int) -> list[Piece]:
    """The graph in pieces whose weights take up to `piece_bytes`, in the order to run them."""
    weights = {tensor.name: tensor for tensor in graph.initializer}
    constants: dict[str, frozenset[str]] = {name: frozenset([name]) for name in weights}
    groups: list[list[onnx.NodeProto]] = []
    held: set[str] = set()
    for node in graph.node:
        read = frozenset().union(*(constants.get(name, ()) for name in node.input))
        if all(name in constants for name in node.input if name):
            constants.update({name: read.union(node.output) for name in node.output})
        elif groups and (read <= held or _bytes(weights, held | read) <= piece_bytes):
            groups[-1].append(node)
            held |= read
        else:
            groups.append([node])
            held = set(read)
    return [_piece(graph, nodes, constants, weights) for nodes in groups]


def _piece(
    graph: onnx.GraphProto,
    nodes: Sequence[onnx.NodeProto],
    constants: Mapping[str, frozenset[str]],
    weights: Mapping[str, onnx.TensorProto],
) -> Piece:
    inputs = {name for node in nodes for name in node.input if name}
    behind = frozenset().union(*(constants.get(name, ()) for name in inputs))
    before = [node for node in graph.node if behind.intersection(node.output)]
    made = frozenset(name for node in nodes for name in node.output if name)
    return Piece(
        nodes=(*before, *nodes),
        weights=tuple(tensor for name, tensor in weights.items() if name in behind),
        reads=frozenset(inputs) - made - constants.keys(),
        makes=made,
    )


def _model(
    model: onnx.ModelProto, piece: Piece, values: Values, outputs: Iterable[str]
) -> onnx.ModelProto:
    """A piece as a model of its own. values: what it reads, which its inputs are like."""
    inputs = [
        onnx.helper.make_tensor_value_info(
            name,
            onnx.helper.np_dtype_to_tensor_dtype(values[name].dtype),
            [None] * values[name].ndim,
        )
        for name in sorted(piece.reads)
    ]
    graph = onnx.helper.make_graph(
        piece.nodes,
        model.graph.name,
        inputs,
        [onnx.ValueInfoProto(name=name) for name in outputs],
        piece.weights,
    )
    # No copy of the whole model, whose weights may be within it.
    return onnx.helper.make_model(
        graph,
        ir_version=model.ir_version,
        opset_imports=model.opset_import,
        functions=model.functions,
    )


def _session(
    model: onnx.ModelProto,
    folder: Path,
    library: Path | None,
    elsewhere: Mapping[str, ir.TensorProtocol],
) -> Any:
    """A session of a model whose weights are in files of `folder`, or `elsewhere`."""
    import onnxruntime

    options = session_options(library=library)
    given = {t.name: elsewhere[t.name] for t in model.graph.initializer if t.name in elsewhere}
    if given:
        make = onnxruntime.OrtValue.ortvalue_from_numpy
        # torch turns a matrix in a third of numpy's time.
        values = [
            make(torch.from_numpy(tensor.numpy()).contiguous().numpy()) for tensor in given.values()
        ]
        options.add_external_initializers(list(given), values)
    options.add_session_config_entry(_FOLDER, str(folder))
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def _bytes(weights: Mapping[str, onnx.TensorProto], names: Iterable[str]) -> int:
    tensors = [weights[name] for name in names if name in weights]
    return sum(math.prod(t.dims) * (4 if t.data_type in _FLOATS else 1) for t in tensors)
