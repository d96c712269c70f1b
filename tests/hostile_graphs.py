"""Graphs of edgesd's own operators, valid ones and such as an attacker would write.

`python -m tests.hostile_graphs` runs CASES, and with SEED FIRST LAST the graphs FIRST to LAST of a
seed, with the library that EDGESD_KERNELS names, and prints two lines for each: an answer has to be
whole, and the same each time. test_kernels_sanitized.py puts sanitizers beneath it.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper

from edgesd.runtime import kernels
from edgesd.runtime.backends.onnxruntime import session_options

FLOAT, FLOAT16, INT8, UINT8, INT4 = (
    getattr(TensorProto, name) for name in ("FLOAT", "FLOAT16", "INT8", "UINT8", "INT4")
)
TYPES = (FLOAT, FLOAT16, INT8, UINT8, INT4, TensorProto.STRING, TensorProto.INT64, TensorProto.BOOL)
FILLED = b"\xcb" * 4
"""What the sanitizer fills new memory with, by its test's options: such a value of an answer was
never written."""

MOST_VALUES = 1 << 16  # of one tensor


@dataclass(frozen=True)
class Tensor:
    """An input. fill: a name of FILLS. constant: part of the graph, or fed."""

    type: int
    shape: tuple[int, ...]
    fill: str = "normal"
    constant: bool = True


@dataclass(frozen=True)
class Graph:
    """One operator: its attributes, and its inputs by place, None where one is left out."""

    op: str
    attributes: dict[str, Any]
    inputs: tuple[Tensor | None, ...]
    changes: tuple[str, ...] = field(default=())


FILLS: dict[str, Callable[[np.random.Generator, int], Any]] = {
    "normal": lambda rng, count: rng.normal(0.2, 1, count),
    "zeros": lambda rng, count: np.zeros(count),
    "nan": lambda rng, count: np.where(rng.random(count) < 0.2, np.nan, 1.0),
    "infinite": lambda rng, count: np.where(rng.random(count) < 0.2, -np.inf, 1.0),
    "largest": lambda rng, count: rng.choice([-3.4e38, 3.4e38], count),
    "smallest": lambda rng, count: rng.choice([-1e-45, 1e-45, 0.0], count),
    "negative": lambda rng, count: -rng.random(count),
}


# Valid ones.


def linear(
    n: int,
    k: int,
    rows: tuple[int, ...] = (4,),
    bits: int = 8,
    group: int = 1,
    layout: int = 0,
    gated: int = 0,
    bias: bool = True,
    residual: bool = False,
    rank: int | None = None,
    gelu: int = 0,
    gates: int = 0,
) -> Graph:
    """A QuantLinear of x [*rows, k]. rank: of a LoRA's factors, if there are any. gates: images
    that have one, if any does."""
    outputs = n // 2 if gated else n
    return Graph(
        "QuantLinear",
        {
            "bits": bits,
            "group": group,
            "layout": layout,
            "N": n,
            "K": k,
            "gated": gated,
            "gelu": gelu,
        },
        (
            Tensor(FLOAT, (*rows, k), constant=False),
            *weight(n, k, bits, group, layout),
            Tensor(FLOAT, (n,)) if bias else None,
            Tensor(FLOAT, (*rows, outputs), constant=False) if residual else None,
            None if rank is None else Tensor(FLOAT, (*rows, rank), constant=False),
            None if rank is None else Tensor(FLOAT, (rank, n), constant=False),
            Tensor(FLOAT, (gates, 1, outputs), constant=False) if gates else None,
        ),
    )


def conv(
    n: int,
    channels: int,
    size: tuple[int, int] = (8, 8),
    kernel: tuple[int, int] = (3, 3),
    strides: tuple[int, int] = (1, 1),
    pads: tuple[int, int, int, int] = (1, 1, 1, 1),
    batch: int = 1,
    bits: int = 8,
    group: int = 1,
    upsample: int = 1,
    groups: int = 1,
    normalized: bool = False,
    offset: bool = False,
    residual: bool = False,
    silu: int = 0,
    relu: int = 0,
) -> Graph:
    """A QuantConv of x [batch, channels, *size]."""
    k = channels * kernel[0] * kernel[1]
    out = [
        (size[i] * upsample + pads[i] + pads[i + 2] - kernel[i]) // strides[i] + 1 for i in (0, 1)
    ]
    per_channel = Tensor(FLOAT, (channels,)) if normalized else None
    return Graph(
        "QuantConv",
        {
            "bits": bits,
            "group": group,
            "layout": 0,
            "N": n,
            "K": k,
            "groups": groups,
            "kernel_shape": list(kernel),
            "strides": list(strides),
            "pads": list(pads),
            "upsample": upsample,
            "epsilon": 1e-5,
            "silu": silu,
            "relu": relu,
        },
        (
            Tensor(FLOAT, (batch, channels, *size), constant=False),
            *weight(n, k, bits, group, 0),
            Tensor(FLOAT, (n,)),
            Tensor(FLOAT, (batch, n, *out), constant=False) if residual else None,
            Tensor(FLOAT, (batch, n, 1, 1), constant=False) if offset else None,
            *(per_channel, per_channel),
        ),
    )


def attention(heads: int, width: int, queries: int = 8, keys: int = 8, batch: int = 1) -> Graph:
    """A QuantAttention of heads `width` wide."""
    wide = heads * width
    q, k = (Tensor(FLOAT, (batch, count, wide), constant=False) for count in (queries, keys))
    return Graph("QuantAttention", {"num_heads": heads, "scale": 0.1}, (q, k, k))


def joint(
    heads: int,
    width: int,
    tokens: tuple[int, ...] = (5, 8),
    batch: int = 1,
    normed: bool = True,
    rotated: bool = True,
) -> Graph:
    """A QuantAttention of tokens of one or two tensors, the first ones first, whose heads are
    normalized and rotated."""
    *first, rest = tokens

    def fed(*shape: int) -> Tensor:
        return Tensor(FLOAT, shape, constant=False)

    norm = Tensor(FLOAT, (width,)) if normed else None
    angles = fed(sum(tokens), width // 2) if rotated else None
    before = [fed(batch, *first, heads * width)] * 3 + [norm] * 2 if first else []
    return Graph(
        "QuantAttention",
        {"num_heads": heads, "scale": 0.1, "epsilon": 1e-6},
        (*[fed(batch, rest, heads * width)] * 3, norm, norm, angles, angles, *before),
    )


def few_rows(n: int, k: int, rows: tuple[int, ...] = (2,), group: int = 32, bits: int = 4) -> Graph:
    """A QuantRows of x [*rows, k]."""
    layout = int(bits == 4)
    codes, _, scales = weight(n, k, bits, group, layout)
    return Graph(
        "QuantRows",
        {"bits": bits, "group": group, "layout": layout, "N": n, "K": k},
        (Tensor(FLOAT, (*rows, k), constant=False), codes, scales or Tensor(FLOAT16, (n,))),
    )


def widen(shape: tuple[int, ...]) -> Graph:
    """A Widen of x."""
    return Graph(
        "Widen",
        {"values": math.prod(shape)},
        (Tensor(FLOAT16, shape), Tensor(FLOAT, (2,), constant=False)),
    )


def weight(n: int, k: int, bits: int, group: int, layout: int) -> tuple[Tensor | None, ...]:
    """Codes, scale and steps."""
    groups, scale = -(-k // group), Tensor(FLOAT, (n,))
    if bits == 8:
        return Tensor(INT8, (k, n)), scale, None
    if layout == 1:
        codes = Tensor(UINT8, (n, groups, group // 2))
        return codes, scale, Tensor(FLOAT16, (n, groups))
    return Tensor(INT4, (k, n)), scale, Tensor(FLOAT16, (groups, n))


def random_graph(rng: np.random.Generator, isa: str) -> Graph:
    """A valid graph for an instruction set."""

    def below(most: int, least: int = 1) -> int:
        return int(rng.integers(least, most))

    def maybe() -> bool:
        return bool(rng.integers(2))

    ops = ["linear", "conv", "attention", "widen", "rows"]
    op = rng.choice(ops, p=[0.35, 0.4, 0.15, 0.05, 0.05])
    if op == "widen":
        return widen(tuple(below(60, 0) for _ in range(below(4))))
    if op == "rows":
        rows = tuple(below(10, 0) for _ in range(below(3, 0)))
        group = int(rng.choice([16, 48, 64, 256]))
        return few_rows(below(100), below(300), rows, group, 4 if maybe() else 8)
    bits = 4 if isa in kernels.ONLY_4_BITS or maybe() else 8
    if op == "linear":
        layout = int(bits == 4 and maybe())
        gated = int(rng.random() < 0.3)
        rows = tuple(below(20) for _ in range(below(4)))
        return linear(
            n=below(100) * (1 + gated),
            k=below(200),
            rows=rows,
            gelu=int(maybe()),
            gates=rows[0] if rows and maybe() else below(2, 0),
            bits=bits,
            group=int(rng.choice([16, 32, 48, 64, 128])) if layout else below(80),
            layout=layout,
            gated=gated,
            bias=maybe(),
            residual=maybe(),
            rank=below(40, 0) if maybe() else None,
        )
    if op == "conv":
        kernel, groups = (below(5), below(5)), below(4)
        pads = [below(kernel[i % 2] + 1, 0) for i in range(4)]
        return conv(
            n=below(70),
            channels=groups * below(14),
            size=(below(14, kernel[0]), below(20, kernel[1])),
            kernel=kernel,
            strides=(below(4), below(4)),
            pads=(pads[0], pads[1], pads[2], pads[3]),
            batch=below(3),
            bits=bits,
            group=below(80),
            upsample=below(4),
            groups=groups,
            normalized=maybe(),
            offset=maybe(),
            residual=maybe(),
            silu=below(2, 0),
            relu=below(2, 0),
        )
    if maybe():
        tokens = tuple(below(70) for _ in range(below(3)))
        return joint(below(5), 2 * below(81), tokens, below(3), maybe(), maybe())
    return attention(below(5), below(161), below(70), below(140), below(3))


# What an attacker changes.

INTEGERS = (
    *(0, 1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 31, 32, 33, 64, 127, 128, 255, 4096, 65535, 65536),
    *(2**20, 2**20 + 1, 2**31 - 4, 2**31 - 1, 2**31, 2**32, 2**32 + 3, 2**32 + 4, 2**33, 2**40),
    *(2**62, 2**63 - 1, -1, -2, -4, -(2**31), -(2**63)),
)
REALS = (0.0, -1.0, math.nan, math.inf, -math.inf, 1e-45, 3.4e38, -1e-45)


def integer(rng: np.random.Generator, old: object) -> int:
    """Another value for an attribute: near the old one, or far away."""
    base = old if isinstance(old, int) else 1
    near = (base + 1, base - 1, base * 2, base // 2, -base)
    choices = near if rng.random() < 0.5 else INTEGERS
    found = choices[rng.integers(len(choices))]
    return max(-(2**63), min(2**63 - 1, found))


def change_attribute(rng: np.random.Generator, graph: Graph) -> Graph:
    """Another number in an attribute, or in its list."""
    name = str(rng.choice(sorted(graph.attributes)))
    old = graph.attributes[name]
    new: Any
    if isinstance(old, list):
        new = list(old)
        if new:
            new[rng.integers(len(new))] = integer(rng, new[rng.integers(len(new))])
    else:
        new = REALS[rng.integers(len(REALS))] if isinstance(old, float) else integer(rng, old)
    return replace(graph, attributes={**graph.attributes, name: new})


def change_all_of_a_list(rng: np.random.Generator, graph: Graph) -> Graph:
    """One number in all places of a list, or a list of another length."""
    lists = [name for name, value in graph.attributes.items() if isinstance(value, list)]
    if not lists:
        return change_attribute(rng, graph)
    name = str(rng.choice(lists))
    old = graph.attributes[name]
    count = len(old) if rng.random() < 0.5 else int(rng.integers(0, 7))
    new = [integer(rng, old[0] if old else 1)] * count
    return replace(graph, attributes={**graph.attributes, name: new})


def change_kind_of_attribute(rng: np.random.Generator, graph: Graph) -> Graph:
    """An attribute that isn't there, or of another type."""
    name = str(rng.choice(sorted(graph.attributes)))
    others = (None, 1.5, 1, "text", [1.5], [2, 3], [])
    new = others[rng.integers(len(others))]
    attributes = {**graph.attributes, name: new}
    if new is None:
        del attributes[name]
    return replace(graph, attributes=attributes)


def change_weight(rng: np.random.Generator, graph: Graph) -> Graph:
    """N, K, group or bits, and codes, scale and steps that fit it: the rest doesn't."""
    attributes = dict(graph.attributes)
    if not {"N", "K", "group", "bits", "layout"} <= {
        name for name, value in attributes.items() if isinstance(value, int)
    }:
        return change_attribute(rng, graph)
    name = str(rng.choice(["N", "K", "group", "bits", "layout"]))
    attributes[name] = {"bits": 12 - attributes["bits"], "layout": 1 - attributes["layout"]}.get(
        name, int(rng.integers(1, 300))
    )
    n, k, bits, group = (attributes[key] for key in ("N", "K", "bits", "group"))
    if min(n, k, group) < 1 or max(n, k, group) > MOST_VALUES:
        return change_attribute(rng, graph)
    fitting = weight(n, k, bits, group, attributes["layout"])
    return replace(
        graph, attributes=attributes, inputs=(graph.inputs[0], *fitting, *graph.inputs[4:])
    )


def change_shape(rng: np.random.Generator, graph: Graph) -> Graph:
    """Another dimension of an input, more of them, fewer, or none of its values."""
    place, tensor = an_input(rng, graph)
    shape = list(tensor.shape)
    at = int(rng.integers(len(shape))) if shape else 0
    what = rng.choice(["near", "none", "one", "far", "more", "fewer", "turned", "huge"])
    if what == "more":
        shape.insert(at, int(rng.integers(0, 3)))
    elif what == "turned":
        shape.reverse()
    elif what == "huge":
        shape = [0, 2**40]
    elif shape:
        old = shape.pop(at)
        if what != "fewer":
            new = {"near": old + int(rng.choice([-1, 1])), "none": 0, "one": 1}
            shape.insert(at, max(0, new.get(str(what), int(rng.integers(0, 200)))))
    return put(graph, place, replace(tensor, shape=tuple(shape)))


def change_type(rng: np.random.Generator, graph: Graph) -> Graph:
    """Values of another type."""
    place, tensor = an_input(rng, graph)
    return put(graph, place, replace(tensor, type=TYPES[rng.integers(len(TYPES))]))


def change_values(rng: np.random.Generator, graph: Graph) -> Graph:
    """Values that are no numbers, or the largest, in one input."""
    place, tensor = an_input(rng, graph)
    return put(graph, place, replace(tensor, fill=str(rng.choice(list(FILLS)))))


def change_where(rng: np.random.Generator, graph: Graph) -> Graph:
    """A constant that is fed, or an input that is constant."""
    place, tensor = an_input(rng, graph)
    return put(graph, place, replace(tensor, constant=not tensor.constant))


def change_presence(rng: np.random.Generator, graph: Graph) -> Graph:
    """An input that is left out, one that is there twice, or a list that ends early."""
    if rng.random() < 0.3:
        return replace(graph, inputs=graph.inputs[: int(rng.integers(1, len(graph.inputs) + 1))])
    place = int(rng.integers(len(graph.inputs)))
    other = graph.inputs[rng.integers(len(graph.inputs))] if rng.random() < 0.5 else None
    return put(graph, place, other)


CHANGES = (
    *(change_attribute, change_attribute, change_all_of_a_list, change_kind_of_attribute),
    *(change_weight, change_shape, change_shape, change_type, change_values, change_where),
    change_presence,
)


def an_input(rng: np.random.Generator, graph: Graph) -> tuple[int, Tensor]:
    """The place of an input that is there, and the input."""
    there = [(i, tensor) for i, tensor in enumerate(graph.inputs) if tensor is not None]
    return there[rng.integers(len(there))] if there else (0, Tensor(FLOAT, (1,)))


def put(graph: Graph, place: int, tensor: Tensor | None) -> Graph:
    """The graph with another input at a place."""
    inputs = list(graph.inputs)
    inputs[place] = tensor
    return replace(graph, inputs=tuple(inputs))


def hostile_graph(seed: int, index: int, isa: str) -> Graph:
    """The graph `index` of a seed: one of eight as it should be, others changed."""
    rng = np.random.default_rng([seed, index])
    graph = random_graph(rng, isa)
    for _ in range(0 if index % 8 == 0 else 1 + int(rng.integers(3))):
        change = CHANGES[rng.integers(len(CHANGES))]
        changed = change(rng, graph)
        if all(
            t is None or t.shape[-1:] == (2**40,) or math.prod(t.shape) <= MOST_VALUES * 4
            for t in changed.inputs
        ):
            graph = replace(changed, changes=(*graph.changes, change.__name__))
    return graph


# Running one.


def values(tensor: Tensor, seed: int) -> np.ndarray[Any, Any]:
    """What a tensor holds; an int4 one as its packed bytes."""
    rng, count = np.random.default_rng(seed), math.prod(tensor.shape)
    if tensor.type == INT4:
        return rng.integers(0, 256, (count + 1) // 2).astype(np.uint8)
    if tensor.type == TensorProto.STRING:
        return np.array(["text"] * count, object).reshape(tensor.shape)
    kind = helper.tensor_dtype_to_np_dtype(tensor.type)
    with np.errstate(all="ignore"):
        if kind.kind == "f":
            found = (
                np.abs(FILLS["normal"](rng, count))
                if tensor.fill == "normal" and (tensor.type == FLOAT16)
                else FILLS[tensor.fill](rng, count)
            )
        else:
            found = rng.integers(-128, 128, count)
        return np.asarray(found).astype(kind).reshape(tensor.shape)


def model_of(graph: Graph, seed: int) -> tuple[bytes, dict[str, np.ndarray[Any, Any]]]:
    """The graph as ONNX, and what is fed to it."""
    names, constants, fed, infos = [], [], {}, []
    for place, tensor in enumerate(graph.inputs):
        name = f"input{place}" if tensor is not None else ""
        names.append(name)
        if tensor is None:
            continue
        found = values(tensor, seed + place)
        if tensor.type == INT4 or tensor.constant:
            raw = tensor.type != TensorProto.STRING
            held = found.tobytes() if raw else found.ravel().tolist()
            constants.append(helper.make_tensor(name, tensor.type, tensor.shape, held, raw=raw))
        else:
            fed[name] = found
            shape = [None] * len(tensor.shape)
            infos.append(helper.make_tensor_value_info(name, tensor.type, shape))
    node = helper.make_node(graph.op, names, ["y"], domain="edgesd")
    node.attribute.extend(
        onnx.AttributeProto(name=name, type=onnx.AttributeProto.INTS)
        if value == []
        else helper.make_attribute(name, value)
        for name, value in graph.attributes.items()
    )
    made = helper.make_graph(
        [node],
        "hostile",
        infos,
        [helper.make_tensor_value_info("y", FLOAT, None)],
        constants,
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("edgesd", 1)]
    model = helper.make_model(made, opset_imports=opsets, ir_version=10)
    return model.SerializeToString(), fed


def answer(graph: Graph, seed: int = 0, streamed: bool = False) -> np.ndarray[Any, Any]:
    """What the operator answers, twice the same.

    Raises AssertionError where it isn't, or holds what nobody wrote, and ONNX Runtime's errors.
    """
    model, fed = model_of(graph, seed)
    options = session_options(2, kernels.library())
    options.enable_cpu_mem_arena = False  # each tensor is an allocation that a sanitizer knows
    with kernels.keeping_weights(0 if streamed else None):
        session = onnxruntime.InferenceSession(model, options, ["CPUExecutionProvider"])
    first, second = (session.run(None, fed)[0] for _ in range(2))
    assert first.tobytes() == second.tobytes(), "two runs differ"
    left = first.ravel().view(np.uint32) == np.frombuffer(FILLED, np.uint32)[0]
    assert not left.any(), f"{left.sum()} of {left.size} values were never written"
    return np.asarray(first)


def with_attributes(graph: Graph, **attributes: object) -> Graph:
    """The graph with other attributes."""
    return replace(graph, attributes={**graph.attributes, **attributes})


BLOCKS = linear(32, 64, bits=4, group=32, layout=1)
CASES: dict[str, tuple[Graph, str]] = {
    "linear": (linear(64, 64), "ran"),
    "linear of 4 bits": (linear(64, 64, bits=4, group=32), "ran"),
    "blocks": (BLOCKS, "ran"),
    "conv": (conv(16, 16), "ran"),
    "attention": (attention(4, 16), "ran"),
    "widen": (widen((3, 5)), "ran"),
    "widen nothing": (widen((0, 5)), "ran"),
    "widen more than there is": (
        with_attributes(widen((3, 5)), values=10**6),
        "x is [3, 5], not of",
    ),
    "widen less": (with_attributes(widen((3, 5)), values=14), "x is [3, 5], not of 14"),
    "widen fp32": (put(widen((3, 5)), 0, Tensor(FLOAT, (3, 5))), "tensor(float)"),
    "widen beyond all": (with_attributes(widen((3, 5)), values=2**41), "values is 2199023255552"),
    "few rows": (few_rows(33, 70), "ran"),
    "few rows of 8 bits": (few_rows(33, 70, bits=8), "ran"),
    "few rows none": (few_rows(33, 70, (0,)), "ran"),
    "rows of 8 bits": (with_attributes(few_rows(33, 70), bits=8), "blocks of outputs are of 4"),
    "rows of another layout": (
        with_attributes(few_rows(33, 70), layout=0),
        "4 bits lie in blocks",
    ),
    "rows of a large group": (few_rows(8, 8, group=2**16), "groups are too large"),
    "rows of more outputs": (with_attributes(few_rows(33, 70), N=10**6), "codes is [33, 3, 16]"),
    "rows of fewer scales": (
        put(few_rows(33, 70), 2, Tensor(FLOAT16, (33, 2))),
        "scales is [33, 2], not of 99",
    ),
    "rows of another K": (with_attributes(few_rows(33, 70), K=71), "x is [2, 70], not [..., K]"),
    "no rows": (linear(64, 64, rows=(0,)), "ran"),
    "no images": (conv(16, 16, batch=0), "ran"),
    "N of more codes": (
        with_attributes(linear(64, 64), N=4096),
        "codes is [64, 64], not of",
    ),
    "N beyond all": (with_attributes(linear(64, 64), N=10**8), "N is 100000000, not 1 to"),
    "N and K overflow": (with_attributes(linear(64, 64), N=2**32, K=2**32), "N is 4294967296"),
    "K of more codes": (with_attributes(linear(64, 64), K=128), "x is [4, 64], not [..., K]"),
    "one value of a bias": (put(linear(64, 64), 4, Tensor(FLOAT, (1,))), "bias is [1], not of 64"),
    "one value of a scale": (put(conv(16, 16), 2, Tensor(FLOAT, (1,))), "scale is [1], not of 16"),
    "no scale": (put(linear(64, 64), 2, None), "empty string"),
    "few steps": (
        put(linear(64, 64, bits=4), 3, Tensor(FLOAT16, (1,))),
        "steps is [1], not of 4096 values",
    ),
    "no steps": (put(linear(64, 64, bits=4), 3, None), "steps aren't there"),
    "steps of another type": (
        put(linear(64, 64, bits=4, group=64), 3, Tensor(FLOAT, (1, 64))),
        "steps isn't of the type",
    ),
    "codes of text": (
        put(linear(8, 8), 1, Tensor(TensorProto.STRING, (8, 8), constant=False)),
        "codes isn't of the type",
    ),
    "codes of 8 bits for 4": (
        put(linear(64, 64, bits=4, group=64), 1, Tensor(INT8, (64, 64))),
        "codes isn't of the type",
    ),
    "a group that 32 bits don't hold": (with_attributes(BLOCKS, group=2**32 + 32), "group is"),
    "a group of 3 in blocks": (with_attributes(BLOCKS, group=3), "groups of a multiple of 16"),
    "blocks of 8 bits": (with_attributes(linear(64, 64), layout=1), "blocks of outputs are of 4"),
    "blocks of more outputs": (with_attributes(BLOCKS, N=10**6), "codes is [32, 2, 16]"),
    "halves of an odd N": (linear(33, 64, gated=1), "gated, with an odd N"),
    "a residual of a row": (
        put(linear(64, 64, residual=True), 5, Tensor(FLOAT, (1, 64), constant=False)),
        "residual is [1, 64], not [4, 64] as y",
    ),
    "gates and gelu": (linear(8, 8, rows=(2, 3), gelu=1, gates=2), "ran"),
    "one gate of two images": (linear(8, 8, rows=(2, 3), gates=1), "ran"),
    "three gates of two images": (linear(8, 8, rows=(2, 3), gates=3), "gate is [3, 1, 8], not of"),
    "a gate of no images": (linear(8, 8, rows=(0, 3), gates=2), "gate is [2, 1, 8], not of 0"),
    "factors of which one is missing": (
        put(linear(64, 64, rank=4), 7, None),
        "of low and up only one is there",
    ),
    "factors of other rows": (
        put(linear(64, 64, rank=4), 6, Tensor(FLOAT, (3, 4), constant=False)),
        "low is [3, 4], not as x but its last",
    ),
    "factors of a larger rank than each other": (
        put(linear(64, 64, rank=4), 7, Tensor(FLOAT, (5, 64), constant=False)),
        "up is [5, 64], not of 256 values",
    ),
    "a stride of 0": (with_attributes(conv(16, 16), strides=[0, 1]), "strides is 0"),
    "a stride below 0": (with_attributes(conv(16, 16), strides=[-1, -1]), "strides is -1"),
    "pads below 0": (with_attributes(conv(16, 16), pads=[-6, -6, 8, 8]), "pads is -6"),
    "pads that wrap to nothing": (
        conv(16, 16, kernel=(1, 1), pads=(2**31 - 4,) * 4, strides=(2**31 - 1,) * 2),
        "strides is 2147483647",
    ),
    "pads beyond the kernel": (conv(16, 16, pads=(4, 4, 4, 4)), "pads are larger than the kernel"),
    "two pads": (with_attributes(conv(16, 16), pads=[1, 1]), "pads has 2 values, not 4"),
    "no pads": (
        Graph(
            "QuantConv",
            {name: old for name, old in conv(8, 8).attributes.items() if name != "pads"},
            conv(8, 8).inputs,
        ),
        "QuantConv: attribute pads can't be read",
    ),
    "a kernel below 0": (
        with_attributes(conv(16, 16), kernel_shape=[-3, -3]),
        "kernel_shape is",
    ),
    "a kernel that doesn't fit K": (
        with_attributes(conv(16, 16), kernel_shape=[3, 5]),
        "K isn't a multiple of kernel_shape [3, 5]",
    ),
    "a kernel larger than the image": (
        conv(16, 16, size=(2, 2), pads=(0, 0, 0, 0)),
        "smaller than the kernel",
    ),
    "upsampling by 0": (with_attributes(conv(16, 16), upsample=0), "upsample is 0"),
    "upsampling that 32 bits don't hold": (
        with_attributes(conv(16, 16), upsample=2**33),
        "upsample is 8589934592",
    ),
    "an image of no pixels": (conv(16, 16, size=(0, 8), kernel=(1, 1)), "x is [1, 16, 0, 8], not"),
    "groups that don't fit": (
        with_attributes(conv(16, 16, normalized=True), groups=3),
        "C isn't a multiple of the groups",
    ),
    "gamma alone": (put(conv(16, 16, normalized=True), 8, None), "there is no beta"),
    "an offset of one image": (
        put(conv(16, 16, batch=2, offset=True), 6, Tensor(FLOAT, (1, 16, 1, 1), constant=False)),
        "offset is [1, 16, 1, 1], not of 32",
    ),
    "an epsilon of NaN": (
        with_attributes(conv(16, 16), epsilon=math.nan),
        "epsilon isn't",
    ),
    "heads that 32 bits don't hold": (
        with_attributes(attention(4, 16), num_heads=2**32 + 4),
        "num_heads is 4294967300",
    ),
    "heads that don't divide": (with_attributes(attention(4, 16), num_heads=3), "aren't 3 heads"),
    "a head that is too wide": (attention(1, 161), "161 values aren't 1 heads of at most 160"),
    "no keys": (attention(4, 16, keys=0), "q, k and v are [1, 8, 64], [1, 0, 64] and"),
    "no values of a key": (
        put(attention(4, 16), 2, Tensor(FLOAT, (1, 4, 64), constant=False)),
        "q, k and v are [1, 8, 64], [1, 8, 64] and [1, 4, 64]",
    ),
    "no width": (attention(4, 0), "0 values aren't 4 heads"),
    "joint attention": (joint(3, 16), "ran"),
    "first tokens none": (joint(3, 16, tokens=(0, 8)), "ran"),
    "rotated, an odd width": (joint(2, 15, tokens=(8,)), "rotated, with other keys, or an odd"),
    "rotated, with other keys": (
        put(
            put(joint(2, 16, tokens=(8,)), 1, Tensor(FLOAT, (1, 9, 32), constant=False)),
            2,
            Tensor(FLOAT, (1, 9, 32), constant=False),
        ),
        "rotated, with other keys",
    ),
    "angles of fewer tokens": (
        put(joint(3, 16), 5, Tensor(FLOAT, (12, 8), constant=False)),
        "cos and sin are [12, 8] and [13, 8], not [13, 8]",
    ),
    "angles of half a pair": (put(joint(3, 16), 6, None), "of cos and sin only one is there"),
    "a norm of all heads": (
        put(joint(3, 16), 3, Tensor(FLOAT, (48,))),
        "q_norm is [48], not of 16",
    ),
    "first queries alone": (
        replace(joint(3, 16), inputs=joint(3, 16).inputs[:8]),
        "of first_q, first_k and first_v not all are there",
    ),
    "fewer first values": (
        put(joint(3, 16), 9, Tensor(FLOAT, (1, 4, 48), constant=False)),
        "first_q, first_k and first_v are [1, 5, 48], [1, 5, 48] and [1, 4, 48]",
    ),
    "first tokens of another batch": (
        replace(
            joint(3, 16),
            inputs=(
                *joint(3, 16).inputs[:7],
                *[Tensor(FLOAT, (2, 5, 48), constant=False)] * 3,
            ),
        ),
        "not as q, k and v but their tokens",
    ),
    "keys of another type": (
        put(attention(4, 16), 1, Tensor(FLOAT16, (1, 8, 64), constant=False)),
        "tensor(float16)",
    ),
    "an epsilon below 0": (with_attributes(joint(3, 16), epsilon=-1.0), "epsilon is negative"),
}
"""Name -> a graph, and a part of what is said of it. Where it is refused, the operators
would read or write memory that isn't theirs, divide by zero, or leave an answer as it was."""


def main(seed: int | None = None, first: int = 0, last: int = 0) -> None:
    """Run the graphs `first` to `last`, and print a line before each and one after it."""
    if seed is None:
        for name, (graph, _) in CASES.items():
            print(name, flush=True)
            print(outcome(graph))
        return
    isa = kernels.instruction_set()
    assert isa, "the library can't be used"
    for index in range(first, last):
        graph = hostile_graph(seed, index, isa)
        print(f"{index} {graph}", flush=True)
        said = outcome(graph, index)
        print(f"wrong: {said}, and is valid" if said != "ran" and not graph.changes else said)


def outcome(graph: Graph, index: int = 0) -> str:
    """One line: "ran", "refused: ..." with ONNX Runtime's words, or "wrong: ..."."""
    try:
        answer(graph, index, streamed=index % 3 == 0)
    except AssertionError as exc:
        return f"wrong: {exc}"
    except Exception as exc:  # noqa: BLE001 - ONNX Runtime has a class for each status
        said = " ".join(str(exc).split())
        return f"refused: {said}"
    return "ran"


if __name__ == "__main__":
    main(*map(int, sys.argv[1:4]))
