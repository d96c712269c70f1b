"""Estimates a network's bytes on disk and in memory on a CPU. docs/planner.md derives each.

All take a workload as ONNX Runtime runs it (export/cost/cpu_lowering.py) and the layers' schemes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from edgesd.export.cost.arena import arena_bytes
from edgesd.export.cost.cpu_lowering import EDGESD_FORMS, EDGESD_ROWS, FUSED, MATMUL_NBITS
from edgesd.export.cost.workload import Operation, Workload
from edgesd.export.quantize.assign import LayerScheme
from edgesd.export.quantize.layers import Layer, layer_bytes

NODE_BYTES = 16_000
"""Memory of a session for each operation: ONNX Runtime's graph, kernels and their names."""

NODE_FILE_BYTES = 700
"""Bytes for each operation in the graph's file."""

_BRANCH_NODES = 4
"""Operations of a low-rank branch: two factors become fp32, and two products."""

OTHER_FILES_BYTES = 400_000
"""Tokenizer, manifest, licences."""

_BUILD_BYTES, _BUILD_PER_WEIGHT, _BUILD_PER_PIXEL = 700 << 20, 3.2, 4000
"""Memory of a build, at most: torch and its libraries; for each weight of the largest network,
what calibration records of its layers; for each pixel, of the decoder's calibration. Weights
themselves stay in the checkpoint's files, and are made fp32 layer by layer. A build of SDXL at
1024x1024 took 7.2 GB where this gives 8.1."""

_BUILD_MOST = 3_200_000_000
"""What calibration records of a network at most: its covariances and samples are limited."""

_PACKED_BLOCKS = 1.1
"""MatMulNBits' packed weights, as a part of those on disk (scales become fp32)."""

_UNPACKED, _UNPACKING = 2.1, 0.65
"""Bytes for each 4-bit weight of a convolution in ONNX Runtime's own operators: those in 8 bits,
unpacked and packed; what unpacking takes besides (measured)."""

_PASSING = 1.5
"""Bytes that are mapped in `stream` for each weight of the largest layer: what runs, and what of
those before isn't given back yet (measured, the same in 4 and 8 bits)."""

_BLOCK = 64
"""Keys of a block in our attention; its heads are padded to 16 values."""


@dataclass(frozen=True)
class Memory:
    """Bytes that one component takes. weights: what stays of them once loaded; loading: what there
    is besides while they are loaded; streamed: what stays of them in `stream`; in_file: of that,
    what lies in its file; anew: what runs unpack of them at their beginning. activations: what runs
    touch; workspace: of our kernels, which they keep; graph: of the session itself."""

    weights: int
    loading: int
    streamed: int
    in_file: int
    anew: int
    activations: int
    workspace: int
    graph: int


def build_bytes(parameters: int, pixels: int) -> int:
    """Memory of a build. parameters: of the largest network; pixels: of an image."""
    recorded = min(_BUILD_MOST, _BUILD_PER_WEIGHT * parameters)
    return int(_BUILD_BYTES + recorded + _BUILD_PER_PIXEL * pixels)


def file_bytes(
    workload: Workload, choices: Mapping[Layer, LayerScheme], per_weight: int, smoothed: bool
) -> int:
    """Bytes of a component's weights on disk. per_weight: of what isn't a quantized layer's."""
    layers = sum(layer_bytes(layer, choice, smoothed) for layer, choice in choices.items())
    rest = workload.parameters - sum(layer.rows * layer.columns for layer in choices)
    return layers + per_weight * rest


def part_bytes(workload: Workload, choices: Mapping[Layer, LayerScheme]) -> int:
    """Bytes on disk of the layers of a part of a network."""
    layers = {op.layer for op in workload.operations if op.layer is not None}
    return sum(_stored(layer, choices) for layer in layers)


def _stored(layer: Layer, choices: Mapping[Layer, LayerScheme]) -> int:
    if layer in choices:
        return layer_bytes(layer, choices[layer])
    return 4 * layer.rows * layer.columns


def memory(
    workloads: Sequence[Workload],
    choices: Mapping[Layer, LayerScheme],
    on_disk: int,
    behind: int = 0,
) -> Memory:
    """Memory of a component. workloads: as lowered, one for each run in a row; they may differ in
    size. on_disk: bytes of its weights' file. behind: bytes of what is made of the outputs while
    the component is still loaded.

    Our kernels use weights where they are mapped. ONNX Runtime's leave the file after loading:
    what stays are packed copies, and of what it unpacks (Cast, DequantizeLinear) the results. In
    `stream`, beside our kernels, codes are unpacked in each run, one layer's at a time.
    """
    workload = workloads[0]
    mapped = kept = unpacked = twice = loading = largest = nodes = codes = 0
    anew: list[int] = []
    rest = on_disk
    for op in workload.operations:
        nodes += op.form != FUSED
        if op.layer is None or op.form == FUSED:
            continue
        count, choice = op.layer.rows * op.layer.columns, choices.get(op.layer)
        stored = _stored(op.layer, choices)
        rest -= stored
        if op.layer.kind == "embedding":
            continue  # rows of it alone are read
        nodes += _BRANCH_NODES if choice is not None and choice.rank else 0
        if op.form in EDGESD_FORMS:
            mapped += stored
            largest = max(largest, count)
        elif op.form == MATMUL_NBITS:
            kept += int(_PACKED_BLOCKS * stored)
        elif op.form == "int8" and choice and choice.weight_bits == 4:
            kept += int(_UNPACKED * count)
            unpacked += int(_UNPACKED * count)
            loading += int(_UNPACKING * count)
        elif op.form == "int8":
            kept += count
        else:
            kept += 4 * count
            if op.layer in choices:
                anew.append(4 * count)
                codes += stored
            # 16 bits or codes are unpacked, and a convolution's weights laid out in blocks.
            unpacked += 4 * count if op.layer in choices or op.kind == "conv" else 0
            twice += stored if op.layer not in choices and op.kind == "conv" else 0
    kept += max(0, rest)
    passing = min(mapped, int(_PASSING * largest))
    if not (mapped and anew):
        anew, codes = [0], 0
    unfolded = kept - sum(anew) + max(anew) + codes
    return Memory(
        weights=kept + mapped,
        loading=loading,
        streamed=unfolded + twice + passing,
        # ONNX Runtime's operators take from the file what they need not unpack.
        in_file=kept - unpacked + twice + passing + codes,
        anew=max(anew),
        # Inputs and outputs are bound to arrays, and what comes out is copied.
        activations=arena_bytes(workloads) + 2 * max(map(_outside, workloads)) + behind,
        workspace=max(_workspace(op) for each in workloads for op in each.operations),
        graph=NODE_BYTES * nodes,
    )


def _outside(workload: Workload) -> int:
    return sum(workload.sizes[value] for value in (*workload.inputs, *workload.outputs))


def _workspace(op: Operation) -> int:
    """Bytes that our kernels take for one operation: its input in 8 bits; keys and values."""
    if op.form not in EDGESD_FORMS:
        return 0
    if op.kind == "attention":
        batch, heads, _, keys, width = op.heads
        blocks = -(-keys // _BLOCK) * _BLOCK
        return batch * heads * blocks * (-(-width // 4) * 4 + -(-(width + 1) // 16) * 16 + 8)
    assert op.layer is not None
    if op.form == EDGESD_ROWS:
        return 4 * op.rows * op.layer.columns
    if op.kind == "linear":
        return op.rows * op.layer.columns
    # Each output pixel has a pixel of the input, but for strides, and padding at the edges.
    pixels = op.rows * op.layer.strides[0] * op.layer.strides[1]
    return pixels * op.layer.channels
