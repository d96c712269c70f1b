"""The table of fusions: the operators that edgesd's own kernels compute along with a layer.

The passes that fuse (own_kernels.py) and the cost model (export/cost/cpu_lowering.py) read it;
kernels/ops.cpp has the inputs and attributes that the entries name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from edgesd.export.quantize.layers import Layer

MAX_HEAD = 160
"""Widest head that the kernel of attention takes."""

MAX_K = 1 << 16
"""Values of a product of 8 bits whose sum 32 bits hold."""

Kind = Literal["linear", "conv"]
Operand = Literal["constant", "image", "output"]
"""What meets a layer's output: a constant [N], a value for each image and channel [B, N, 1, 1]
([B, 1, N] of a linear), or as many values as the output has."""

Pattern = Callable[..., Any]
"""Operators of a graph in the pattern language of onnxscript.rewriter: f(op, x, ...) -> the last
one's output. The inputs of Add and Mul may stand in either order."""

Bindings = Mapping[str, Any]
"""A match's values of the pattern's parameters, by name."""


@dataclass(frozen=True)
class Fusion:
    """Operators around a layer that its kernel computes along with it, each read by nothing else.

    name: also of the fused input, where it is a sum. side: an epilogue reads the layer's output x;
    a prologue makes the layer's input of x. layers: kinds of layer whose kernel can. exported: the
    operators as a graph has them. traced: kinds of operations of a Workload, in the order of the
    data; none where tracing has them within the layer (its bias). operands: what sums and gates
    take besides, in the order of `inputs` and of the data. inputs: of the kernel's operator, taken
    from the pattern's parameters of these names. attributes: what the operator gets; read: adds
    those that the match says, None where it doesn't fit after all. joined: of inputs that may be
    there already, the axis along which both become one. excludes: what can't be fused besides.
    last: nothing that follows is.
    """

    name: str
    side: Literal["prologue", "epilogue"]
    layers: tuple[Kind, ...]
    exported: Pattern
    traced: tuple[str, ...]
    operands: tuple[Operand, ...] = ()
    inputs: tuple[str, ...] = ()
    attributes: Mapping[str, int] = field(default_factory=dict)
    read: Callable[[Bindings], Mapping[str, int | float] | None] = lambda _: {}
    joined: Mapping[str, int] = field(default_factory=dict)
    excludes: tuple[str, ...] = ()
    last: bool = False


def _bias(op: Any, x: Any, bias: Any) -> Any:
    """A linear's bias: exported as an Add of its own."""
    return op.Add(x, bias)


def _lora(op: Any, x: Any, low: Any, up: Any) -> Any:
    """A slot's product (passes/lora_slots.py)."""
    return op.Add(x, op.MatMul(low, up))


def _residual(op: Any, x: Any, residual: Any) -> Any:
    """Another branch's values."""
    return op.Add(x, residual)


def _offset(op: Any, x: Any, offset: Any) -> Any:
    """The timestep's, of each channel."""
    return op.Add(x, offset)


def _gelu(op: Any, x: Any) -> Any:
    """gelu(x)."""
    return op.Gelu(x, _outputs=["gelu"])


def _gate(op: Any, x: Any, gate: Any, residual: Any) -> Any:
    """Another branch's values, and this one's times the timestep's of each channel."""
    return op.Add(op.Mul(x, gate), residual)


def _geglu(op: Any, x: Any) -> Any:
    """left * gelu(right) of the two halves of a linear's outputs."""
    left, right = op.Split(x, _outputs=2, _allow_other_inputs=True)
    return op.Mul(left, op.Gelu(right, _outputs=["gelu"]))


def _relu(op: Any, x: Any) -> Any:
    """max(x, 0)."""
    return op.Relu(x)


def _upsample(op: Any, x: Any) -> Any:
    """Four equal pixels of each."""
    return op.Resize(
        x,
        None,
        [1.0, 1.0, 2.0, 2.0],
        mode="nearest",
        coordinate_transformation_mode="asymmetric",
        nearest_mode="floor",
        _allow_other_inputs=True,
    )


def _silu(op: Any, x: Any) -> Any:
    """x * sigmoid(x)."""
    return op.Mul(x, op.Sigmoid(x))


def normalized_groups(
    op: Any, x: Any, flat: Any, ones: Any, zeros: Any, shape: Any, gamma: Any, beta: Any
) -> Any:
    """InstanceNormalization of groups of channels, then a factor and an offset for each channel."""
    normalized = op.InstanceNormalization(op.Reshape(x, flat), ones, zeros, _outputs=["normalized"])
    return op.Add(op.Mul(op.Reshape(normalized, shape), gamma), beta)


def _of_a_slot(found: Bindings) -> Mapping[str, int | float] | None:
    """Whether a product's right side is a graph's input: a LoRA's."""
    return {} if found["up"].is_graph_input() else None


def _tanh_gelu(found: Bindings) -> Mapping[str, int | float] | None:
    """Whether a GELU is the approximation by the hyperbolic tangent."""
    return None if _exact_gelu(found) is not None else {}


def _exact_gelu(found: Bindings) -> Mapping[str, int | float] | None:
    """Whether a GELU is the exact one: of GEGLU kernels don't compute the approximation."""
    approximate = found["gelu"].producer().attributes.get("approximate")
    return {} if approximate is None or approximate.as_string() == "none" else None


def groups_of(found: Bindings) -> Mapping[str, int | float] | None:
    """groups and epsilon of a group normalization of images [B, C, H, W]; gamma and beta must be
    constants [C, 1, 1], and what InstanceNormalization scales with ones and zeros."""
    ones, zeros, gamma, beta = (
        found[name].const_value for name in ("ones", "zeros", "gamma", "beta")
    )
    if ones is None or zeros is None or (ones.numpy() != 1).any() or zeros.numpy().any():
        return None
    for constant in (gamma, beta):
        if constant is None or len(constant.shape) != 3 or tuple(constant.shape[1:]) != (1, 1):
            return None
    epsilon = found["normalized"].producer().attributes.get("epsilon")
    return {"groups": ones.size, "epsilon": 1e-5 if epsilon is None else epsilon.as_float()}


FUSIONS = (
    # From the layer's output on.
    Fusion("bias", "epilogue", ("linear",), _bias, (), ("constant",), ("bias",)),
    Fusion("offset", "epilogue", ("conv",), _offset, ("add",), ("image",), ("offset",)),
    Fusion(
        "residual", "epilogue", ("conv", "linear"), _residual, ("add",), ("output",), ("residual",)
    ),
    Fusion(
        "gate",
        "epilogue",
        ("linear",),
        _gate,
        ("mul", "add"),
        ("image", "output"),
        ("gate", "residual"),
        excludes=("residual",),
        last=True,
    ),
    Fusion(
        "gelu",
        "epilogue",
        ("linear",),
        _gelu,
        ("gelu_tanh",),
        attributes={"gelu": 1},
        read=_tanh_gelu,
        excludes=("residual",),
        last=True,
    ),
    Fusion(
        "geglu",
        "epilogue",
        ("linear",),
        _geglu,
        ("split", "gelu", "mul"),
        attributes={"gated": 1},
        read=_exact_gelu,
        excludes=("residual",),
        last=True,
    ),
    Fusion("relu", "epilogue", ("conv",), _relu, ("relu",), attributes={"relu": 1}, last=True),
    # From the layer's input back, in this order.
    Fusion(
        "upsample",
        "prologue",
        ("conv",),
        _upsample,
        ("resize",),
        attributes={"upsample": 2},
    ),
    Fusion("silu", "prologue", ("conv",), _silu, ("silu",), attributes={"silu": 1}),
    Fusion(
        "group_norm",
        "prologue",
        ("conv",),
        normalized_groups,
        ("group_norm",),
        inputs=("gamma", "beta"),
        read=groups_of,
    ),
)
"""All fusions. Sums after a layer may come in any order, each once."""

LORA = Fusion(
    "lora",
    "epilogue",
    ("linear",),
    _lora,
    (),
    inputs=("low", "up"),
    read=_of_a_slot,
    joined={"low": -1, "up": 0},
)
"""Of slots, which no source has: the cost model knows them by their layers. Beside a low-rank
branch the factors of both are one's."""


def kernel_takes(layer: Layer) -> bool:
    """Whether edgesd's kernels take a layer of this shape with 8-bit inputs (kernels/ops.cpp): all
    real linears and convolutions are."""
    if layer.kind == "embedding":
        return False
    pads = zip(layer.pads, 2 * layer.kernel, strict=True) if layer.kind == "conv" else ()
    return layer.columns <= MAX_K and all(pad <= size for pad, size in pads)


def rows_taken(layer: Layer) -> bool:
    """Whether edgesd's kernel of a few rows takes a quantized layer, whose input stays as it is."""
    return layer.kind == "linear" and layer.one_row and layer.columns <= MAX_K


def attention_taken(width: int, causal: bool, biased: bool) -> bool:
    """Whether the kernel of attention in 8 bits takes heads of this width. biased: whether
    something is added to its scores."""
    return width <= MAX_HEAD and not causal and not biased
