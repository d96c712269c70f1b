"""Traces a network's operations from its torch module, on shapes alone: no weight is loaded.

The module is made on torch's meta device and run once; every operation that reaches torch's
dispatcher is recorded with the sizes of what it reads and writes. That takes under a second for
any model, and needs its configs only.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from edgesd.errors import EdgesdError
from edgesd.export.attention import replace_attention
from edgesd.export.families import Component, Sizes
from edgesd.export.families.parts.inlets import on_meta
from edgesd.export.quantize.layers import MIN_WEIGHTS, Layer, ends_of
from edgesd.text import first_sentence

_ALIASES = frozenset(
    (
        *("view", "_unsafe_view", "reshape", "unsqueeze", "squeeze", "t"),
        *("detach", "alias", "clone", "contiguous", "lift_fresh", "_to_copy"),
        "constant_pad_nd",
    )
)
"""Operations whose output is their input: in a graph they move nothing. A clone follows a
permutation, which is where the graph copies; padding becomes that of a convolution."""

_IN_PLACE = frozenset(("add", "mul", "sub", "div", "relu", "sigmoid", "silu", "tanh", "exp"))
"""Operations whose output may lie where their input lay."""

_KINDS = {
    "native_group_norm": "group_norm",
    "native_layer_norm": "layer_norm",
    "cat": "concat",
    "upsample_nearest2d": "resize",
    "permute": "copy",
    "transpose": "copy",
    "slice": "copy",
}


@dataclass(frozen=True)
class Operation:
    """One operation. Values are numbers of a Workload's `sizes`.

    kind: conv, linear, attention, embedding, group_norm, layer_norm, silu, gelu, relu, add, mul,
    concat, split, resize (each pixel becomes four), copy, or torch's own name. layer: whose weight
    it multiplies with, or None. macs: multiplications. rows: of the matrix product, whose K and N
    the layer has. heads: of attention: batch, heads, queries, keys, width of a head. in_place: its
    output may lie where an input of the same size lay that nothing else reads. form: which kernel
    computes it, where that is decided (cpu_lowering.py). biased: a linear has a bias, which is an
    operation of its own in a graph; scores of attention have one. fused: names of the fusions
    (passes/fusions.py) that became part of a layer. spare: bytes that it allocates besides while it
    runs. widths: of a concat along the last axis, what each value has of it.
    """

    kind: str
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    layer: Layer | None = None
    macs: int = 0
    rows: int = 0
    heads: tuple[int, int, int, int, int] = (0, 0, 0, 0, 0)
    causal: bool = False
    in_place: bool = False
    form: str = ""
    biased: bool = False
    fused: tuple[str, ...] = ()
    spare: tuple[int, ...] = ()
    widths: tuple[int, ...] = ()


@dataclass(frozen=True)
class Workload:
    """All operations of a component in one run, in order. sizes: bytes of each value in fp32 (ids
    in int64); inputs, outputs: values that outlive the run. parameters: number of all weights."""

    component: str
    operations: tuple[Operation, ...]
    sizes: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    parameters: int

    @property
    def layers(self) -> list[Layer]:
        """Layers that can be quantized, in order, each once: those of a graph's find_layers."""
        found = (op.layer for op in self.operations if op.layer is not None)
        return [la for la in dict.fromkeys(found) if la.rows * la.columns >= MIN_WEIGHTS]

    def readers(self) -> dict[int, list[int]]:
        """Value -> places of the operations that read it."""
        found: dict[int, list[int]] = {}
        for place, op in enumerate(self.operations):
            for value in dict.fromkeys(op.reads):
                found.setdefault(value, []).append(place)
        return found


def split_workload(workload: Workload) -> tuple[Workload, ...]:
    """An autoencoder's workload in the parts that passes/split_autoencoder.py makes: a decoder's
    before and after its first upsampling, an encoder's after each downsampling."""
    operations = workload.operations
    ups = [i for i, op in enumerate(operations) if op.kind == "resize"][:1]
    downs = [i + 1 for i, op in enumerate(operations) if op.layer and max(op.layer.strides) > 1]
    cuts = ups or downs
    ends = [operations[i].reads[:1] if ups else operations[i - 1].writes for i in cuts]
    return tuple(
        replace(workload, operations=operations[begin:end], inputs=inputs, outputs=outputs)
        for begin, end, inputs, outputs in zip(
            (0, *cuts),
            (*cuts, len(operations)),
            (workload.inputs, *ends),
            (*ends, workload.outputs),
            strict=True,
        )
    )


def split_joined(workload: Workload) -> Workload:
    """The same with a linear of tokens of joined values as a linear for each of them, which adds up
    what those before it made, as passes/split_concat.py does for quantized graphs."""
    joined = {value: op for op in workload.operations if op.widths for value in op.writes}
    sizes, made = list(workload.sizes), list[Operation]()
    for op in workload.operations:
        before = joined.get(op.reads[0]) if op.kind == "linear" else None
        if before is None or op.layer is None or op.layer.one_row:
            made.append(op)
            continue
        start, total = 0, tuple[int, ...]()
        for index, (value, width) in enumerate(zip(before.reads, before.widths, strict=True)):
            last = index + 1 == len(before.widths)
            layer = replace(
                op.layer,
                name=f"{op.layer.name}.{index}",
                shape=(op.layer.rows, width),
                part=(start, start + width),
            )
            if not last:
                sizes.append(sizes[op.writes[0]])
            part = replace(
                op,
                reads=(value, *total),
                writes=op.writes if last else (len(sizes) - 1,),
                layer=layer,
                macs=op.macs * width // op.layer.columns,
                biased=op.biased and last,
                fused=("residual",) if total else (),
            )
            made.append(part)
            start, total = start + width, part.writes
    read = {value for op in made for value in op.reads} | set(workload.outputs)
    kept = tuple(op for op in made if not op.widths or read & set(op.writes))
    return replace(workload, operations=kept, sizes=tuple(sizes))


def trace(component: Component, sizes: Sizes) -> Workload:
    """What `component` does at `sizes` (a value for each symbolic dimension of its inputs).

    Raises EdgesdError when the network can't be run on shapes alone.
    """
    module = component.load(weights=False)
    replace_attention(module, "ort-mha")
    inputs = [on_meta(tensor, sizes) for tensor in component.spec.inputs]
    recorder = _OperationRecorder(component.name, module, inputs)
    try:
        with recorder, _RowsTogether(), torch.no_grad():
            out = module(*inputs)
    except Exception as exc:  # torch's own errors, of any kind
        raise EdgesdError(f"{component.name} can't be planned: {first_sentence(exc)}") from exc
    return recorder.workload(inputs, out if isinstance(out, tuple) else (out,))


class _RowsTogether(TorchFunctionMode):
    """Linears see all rows of their input as one matrix. Where these lie apart, as in a slice of
    several images' tokens, torch multiplies each image with a copy of the weight; graphs don't."""

    def __torch_function__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is functional.linear:
            args = (args[0].contiguous(), *args[1:])
        return func(*args, **(kwargs or {}))


class _OperationRecorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Numbers every value, and keeps the tensors: an id is of one object only while it lives."""

    def __init__(self, component: str, module: nn.Module, inputs: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._component = component
        self._parameters = {
            id(value): name.removeprefix("net.").rpartition(".")[0]
            for name, value in module.named_parameters()
        }
        self._count = sum(value.numel() for value in module.parameters())
        self._values: dict[int, int] = {}
        self._pads: dict[int, tuple[int, int, int, int]] = {}
        self._tokens: set[int] = set()  # ids of matrices whose rows are tokens
        self._kept: list[Tensor] = []
        self._sizes: list[int] = []
        self._operations: list[Operation] = []
        for tensor in inputs:
            self._new(tensor)

    def workload(self, inputs: Iterable[Tensor], outputs: Iterable[Tensor]) -> Workload:
        """The recorded operations, without those that lead to no output."""
        results = tuple(self._values[id(t)] for t in outputs)
        wanted, kept = set(results), []
        for op in reversed(self._operations):
            if wanted & set(op.writes):
                wanted |= set(op.reads)
                kept.append(op)
        values = tuple(self._values[id(t)] for t in inputs)
        return Workload(
            self._component,
            _with_ends(tuple(reversed(kept)), values, results),
            tuple(self._sizes),
            values,
            results,
            self._count,
        )

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.name().split("::")[1].split(".")[0].removesuffix("_")
        taken = [a for arg in args for a in (arg if isinstance(arg, list | tuple) else (arg,))]
        tensors = [a for a in taken if isinstance(a, Tensor)]
        if isinstance(out, Tensor) and (name in _ALIASES or _by_one(name, args)):
            self._alias(out, tensors[0])
            if out.ndim == 2 and (tensors[0].ndim > 2 or id(tensors[0]) in self._tokens):
                self._tokens.add(id(out))
            if name == "constant_pad_nd":
                left, right, above, below = args[1]
                self._pads[id(out)] = above, left, below, right
            return out
        made = [t for t in (out if isinstance(out, list | tuple) else (out,)) if t is not None]
        if name.startswith("native_"):
            made = made[:1]  # mean and deviation are of no use here
        if name == "gelu" and (kwargs or {}).get("approximate", "none") != "none":
            name = "gelu_tanh"
        self._record(name, args, tensors, made)
        return out

    def _record(
        self, name: str, args: tuple[Any, ...], tensors: list[Tensor], made: list[Tensor]
    ) -> None:
        reads = tuple(self._values[id(t)] for t in tensors if id(t) in self._values)
        writes = tuple(self._new(tensor) for tensor in made)
        op = Operation(_KINDS.get(name, name), reads, writes, in_place=name in _IN_PLACE)
        if name == "convolution":
            op = self._conv(op, args, made[0])
        elif name in ("mm", "addmm"):
            op = replace(self._linear(op, args[-2], args[-1]), biased=name == "addmm")
        elif name == "upsample_nearest2d" and args[2:] != (2.0, 2.0):
            op = replace(op, kind="resize_to_size")
        elif name == "cat" and args[1:] in ((-1,), (made[0].ndim - 1,)):
            op = replace(op, widths=tuple(tensor.shape[-1] for tensor in tensors))
        elif name == "multi_head_attention":
            op = _attention(op, args)
        elif name == "embedding":
            table = self._parameters[id(args[0])]
            layer = Layer(self._component, table, "", "embedding", tuple(args[0].shape))
            op = replace(op, layer=layer)
        self._operations.append(op)

    def _conv(self, op: Operation, args: tuple[Any, ...], out: Tensor) -> Operation:
        weight, stride, padding, groups = args[1], args[3], args[4], args[8]
        above, left, below, right = self._pads.get(id(args[0]), (0, 0, 0, 0))
        layer = Layer(
            self._component,
            self._parameters[id(weight)],
            "",
            "conv",
            tuple(weight.shape),
            (stride[0], stride[-1]),
            (above + padding[0], left + padding[-1], below + padding[0], right + padding[-1]),
        )
        rows = out.shape[0] * math.prod(out.shape[2:])
        # A grouped convolution has no place among the layers that are quantized.
        macs = rows * layer.rows * layer.columns
        return replace(op, kind="conv", layer=layer if groups == 1 else None, macs=macs, rows=rows)

    def _linear(self, op: Operation, left: Tensor, right: Tensor) -> Operation:
        name = self._parameters.get(id(right))
        rows, columns = left.shape
        macs = rows * columns * right.shape[1]
        if name is None:  # a product of two values
            return replace(op, kind="matmul", macs=macs, rows=rows)
        shape = (right.shape[1], columns)
        one_row = id(left) not in self._tokens  # as in a graph: its input has two dimensions
        layer = Layer(self._component, name, "", "linear", shape, one_row=one_row)
        return replace(op, kind="linear", layer=layer, macs=macs, rows=rows)

    def _new(self, tensor: Tensor) -> int:
        number = len(self._sizes)
        self._values[id(tensor)] = number
        self._kept.append(tensor)
        self._sizes.append(tensor.numel() * tensor.element_size())
        return number

    def _alias(self, out: Tensor, source: Tensor) -> None:
        self._kept.append(out)
        if id(source) in self._parameters:
            self._parameters[id(out)] = self._parameters[id(source)]
        elif id(source) in self._values:
            self._values[id(out)] = self._values[id(source)]


def _with_ends(
    operations: Sequence[Operation], inputs: Iterable[int], outputs: Iterable[int]
) -> tuple[Operation, ...]:
    """The same operations, whose layers say whether they are an end: see Layer."""
    layers = dict.fromkeys(op.layer for op in operations if op.layer is not None)
    large = [layer for layer in layers if layer.rows * layer.columns >= MIN_WEIGHTS]
    names = {layer.name for layer in large}
    steps = [
        (op.reads, op.writes, op.layer.name if op.layer and op.layer.name in names else "")
        for op in operations
    ]
    found = ends_of(steps, inputs, outputs, large)
    return tuple(
        replace(op, layer=replace(op.layer, end=True)) if op.layer in found else op
        for op in operations
    )


def _by_one(name: str, args: tuple[Any, ...]) -> bool:
    """Whether a factor is 1, which exporting leaves out."""
    return name in ("div", "mul") and not isinstance(args[1], Tensor) and args[1] == 1


def _attention(op: Operation, args: tuple[Any, ...]) -> Operation:
    query, key, value, heads, _, causal, *bias = args
    batch, tokens, width = query.shape
    macs = batch * tokens * key.shape[1] * (width + value.shape[2])
    shape = (batch, heads, tokens, key.shape[1], width // heads)
    biased = bias not in ([], [None])
    return replace(op, kind="attention", macs=macs, heads=shape, causal=causal, biased=biased)
