"""How long a network computes on a CPU: in seconds of a measured machine, or relative to others.

Both take a layer's time to be its multiplications times the time of one in the kernel that runs it.
"""

from __future__ import annotations

from edgesd.export.cost.cpu_lowering import EDGESD_FORMS, EDGESD_ROWS, FUSED, MATMUL_NBITS
from edgesd.export.cost.workload import Operation, Workload
from edgesd.export.quantize.assign import LayerScheme
from edgesd.export.quantize.layers import Layer
from edgesd.runtime.rates import Speed

_PASSING_SECONDS, _NOT_PACKED = 1e-4, 1.4
"""What `stream` costs: seconds for a layer of our kernels, whose pages come and go; and how much
longer ONNX Runtime's operators take with weights that aren't packed (both measured on x86-64)."""

_TIMED = {
    **dict.fromkeys(("mul", "sub", "div", "sigmoid", "quantize", "expand", "argmax"), "add"),
    **dict.fromkeys(("tanh", "exp", "sin", "cos", "pow", "sqrt", "gelu_tanh"), "gelu"),
    **dict.fromkeys(("split", "embedding", "slice"), "copy"),
    "resize_to_size": "resize",
}
"""Kinds that take as long as another, which is measured."""


RELATIVE_TIME = {"fp32": 3.0, "int8": 1.0, "nbits8": 2.5, "nbits16": 3.2, "simulated": 6.0}
"""Of a multiplication in each kind of ONNX Runtime's kernels, relative to int8:
`benchmarks/quantization.py` measures them. Machines differ; what matters is that 16-bit activations
and branches cost. nbits8, nbits16: MatMulNBits with activations of 8 and 16 bits."""


def relative_time(layer: Layer, scheme: LayerScheme, rows_per_run: int) -> float:
    """Time of a layer in one run, in int8 multiplications, on no machine in particular: what
    schemes are compared by before a board is known. rows_per_run: of its matrix product."""
    products = rows_per_run * layer.rows * layer.columns
    rank = 0 if scheme is None else min(scheme.rank, layer.rows, layer.columns)
    branch = rows_per_run * rank * (layer.rows + layer.columns)
    return products * RELATIVE_TIME[_kernel(layer, scheme)] + branch * RELATIVE_TIME["fp32"]


def _kernel(layer: Layer, scheme: LayerScheme) -> str:
    if scheme is None:
        return "fp32"
    if scheme.simulated:
        return "simulated"
    wide = scheme.activation_bits == 16
    if scheme.weight_bits == 4 and layer.kind == "linear":
        return "nbits16" if wide else "nbits8"
    return "fp32" if wide else "int8"


def seconds(workload: Workload, speed: Speed, streamed: bool = False) -> float:
    """Of one run of a lowered workload: the sum over its operations. streamed: weights stay in
    their file. Raises InputError."""
    total = 0.0
    for op in workload.operations:
        took = _seconds(workload, op, speed)
        if streamed and op.layer is not None and op.form in EDGESD_FORMS:
            took += _PASSING_SECONDS
        elif streamed and op.layer is not None and op.form in ("fp32", "int8", MATMUL_NBITS):
            took *= _NOT_PACKED
        total += took
    return total


def _seconds(workload: Workload, op: Operation, speed: Speed) -> float:
    if op.form == FUSED:
        return 0.0
    if op.kind == "attention":
        batch, heads, queries, keys, width = op.heads
        return speed.seconds("attention", op.form, (batch * heads, queries, keys, width))
    if op.kind in ("conv", "linear", "matmul"):
        outputs = max(1, workload.sizes[op.writes[0]] // (4 * max(1, op.rows)))
        columns = max(1, op.macs // max(1, op.rows * outputs))
        if op.layer is not None:
            columns, outputs = op.layer.columns, op.layer.rows
        kind = "conv" if op.kind == "conv" else "linear"
        form = MATMUL_NBITS if op.form == EDGESD_ROWS else op.form or "fp32"  # reading is all
        return speed.seconds(kind, form, (op.rows, columns, outputs))
    kind = _TIMED.get(op.kind, op.kind)
    elements = max(1, sum(workload.sizes[value] for value in op.writes) // 4)
    if not speed.knows(kind):
        kind = "add"
    return speed.seconds(kind, "", (elements,))


def multiplications(workload: Workload) -> dict[str, int]:
    """Multiplications of one run by kind of operation."""
    found: dict[str, int] = {}
    for op in workload.operations:
        if op.macs:
            found[op.kind] = found.get(op.kind, 0) + op.macs
    return found
