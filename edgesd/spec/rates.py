"""How fast a machine is."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from edgesd.spec.base import MOST_DIMS, Bytes, Count, Spec
from edgesd.spec.pipeline import TensorSpec


class Probe(Spec, frozen=True):
    """A small graph that one kind of operation is timed with (runtime/rates.py).

    kind, form, size: see Rate. graph: its file. scheme: of its layer, where it needs edgesd's own
    kernels. weight_bytes: of its largest weight.
    """

    name: str
    kind: str
    form: str
    size: tuple[int, ...]
    graph: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    weight_bytes: int = 0
    scheme: str | None = None


class Rate(Spec, frozen=True):
    """Seconds that one operation takes on a machine.

    form: which kernel: fp32, int8 or nbits of ONNX Runtime, own8 or own4 of edgesd; "" for what
    has no weights. size: rows, K and N of a product; batch times heads, queries, keys and width of
    attention; elements of its output for others.
    """

    kind: str
    form: str
    size: Annotated[
        tuple[Annotated[int, Meta(ge=1, le=1 << 50)], ...],
        Meta(min_length=1, max_length=MOST_DIMS),
    ]
    seconds: Annotated[float, Meta(ge=1e-15, le=1e9)]


class Rates(Spec, frozen=True):
    """How fast a machine is, as `edgesd calibrate` measured it.

    instruction_set: of edgesd's own kernels, or None without. threads: per operator; 0 for all.
    process_bytes: resident memory of Python with ONNX Runtime and one small graph.
    """

    machine: str
    onnxruntime: str
    instruction_set: str | None
    threads: Count
    process_bytes: Bytes
    rates: tuple[Rate, ...]
