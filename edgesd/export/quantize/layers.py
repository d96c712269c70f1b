"""Finds the layers of a graph that can be quantized, and describes a quantized layer.

A layer's weight is a matrix W [N, K]: N outputs, K inputs. A convolution is the product with its
input's patches (im2col), tap by tap: k = (row * kernel_w + column) * C + channel. A group of the
weight lies along K. One description serves every backend.
"""

from __future__ import annotations

import json
import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from edgesd.errors import EdgesdError, UsageError
from edgesd.files import atomic_write
from edgesd.runtime.arrays import Float
from edgesd.spec.scheme import Scheme, parse_scheme

Float16 = npt.NDArray[np.float16]
Codes = npt.NDArray[np.int8]

MIN_WEIGHTS = 1024
"""Smaller weights stay as they are: they save nothing."""

GELU_FLOOR = 0.171875
"""What makes any value of GELU positive: a little more than its least, which is -0.1700 in its
exact form and in that of the hyperbolic tangent."""

PART = "edgesd.part"
"""In a node's meta: the columns that it has of a layer which was split (passes/split_concat.py)."""

_WEIGHT_INPUT = {"Conv": 1, "MatMul": 1, "Gemm": 1, "Gather": 0}


@dataclass(frozen=True)
class Layer:
    """A layer of a graph whose weight can be quantized.

    name: of the torch module below its component's network. node: of its ONNX node. shape: of the
    weight, outputs first: [N, C, kh, kw], [N, K] or [rows, C] for an embedding. kernel, strides,
    pads (top, left, bottom, right): of a conv. one_row: a linear that sees one vector per run, the
    timestep's, and not one per token. part: columns (first, behind the last) of the module's
    weight, where the layer is a part of it, which has the module's name and a number. floor: what
    makes all values of the input positive; 0 where nothing is known to. source: the value that it
    reads, where other linears do, too; "" where none does. end: the network's way in or out, and
    not a convolution.
    """

    component: str
    name: str
    node: str
    kind: str
    shape: tuple[int, ...]
    strides: tuple[int, int] = (1, 1)
    pads: tuple[int, int, int, int] = (0, 0, 0, 0)
    one_row: bool = False
    part: tuple[int, int] | None = None
    floor: float = 0.0
    source: str = ""
    end: bool = False

    @property
    def module(self) -> str:
        """The torch module that the weight is of."""
        return self.name if self.part is None else self.name.rpartition(".")[0]

    @property
    def kernel(self) -> tuple[int, int]:
        """Rows and columns of a conv's kernel; (1, 1) for others."""
        return (self.shape[2], self.shape[3]) if self.kind == "conv" else (1, 1)

    @property
    def channels(self) -> int:
        """Input channels C: K is C times the number of taps."""
        return self.shape[1]

    @property
    def rows(self) -> int:
        """N of the matrix [N, K]."""
        return self.shape[0]

    @property
    def columns(self) -> int:
        """K of the matrix [N, K]."""
        return math.prod(self.shape[1:])


def find_layers(component: str, model: ir.Model, least: int = MIN_WEIGHTS) -> list[Layer]:
    """All layers of `model` whose weights can be quantized, in the graph's order.

    A weight that several nodes share, a grouped or dilated convolution, and anything of fewer than
    `least` weights is left out.
    """
    found = []
    for node in model.graph:
        weight = weight_of(node)
        if weight is None or weight.const_value is None or len(weight.uses()) != 1:
            continue
        tensor = weight.const_value
        if tensor.dtype != ir.DataType.FLOAT or tensor.size < least:
            continue
        layer = _layer(component, node, tuple(tensor.shape.numpy()))
        if layer is not None:
            found.append(replace(layer, part=node.meta.get(PART), floor=_floor(node, layer)))
    names, shared = {layer.node: layer.name for layer in found}, _shared_inputs(model, found)
    steps = [
        ((), (), "")
        if node.op_type == "Shape"
        # sizes, which are no values of the network
        else (node.inputs, node.outputs, names.get(node.name or "", ""))
        for node in model.graph
    ]
    ends = ends_of(steps, model.graph.inputs, model.graph.outputs, found)
    return [replace(layer, source=shared.get(layer.node, ""), end=layer in ends) for layer in found]


def _floor(node: ir.Node, layer: Layer) -> float:
    """See Layer."""
    x = node.inputs[0] if layer.kind == "linear" and not layer.one_row else None
    maker = None if x is None else x.producer()
    return GELU_FLOOR if maker is not None and maker.op_type == "Gelu" else 0.0


def _convolutional(layers: Sequence[Layer]) -> bool:
    """Whether a network is one of convolutions, and not of transformer blocks behind one."""
    return sum(layer.kind == "conv" for layer in layers) > 1


def _shared_inputs(model: ir.Model, layers: Sequence[Layer]) -> dict[str, str]:
    """Nodes of linears for tokens -> the value that they read, where several read it. None in a
    network of convolutions: smoothing them together gains nothing there, and cost the worst of 24
    images 0.5 to 0.9 dB."""
    if _convolutional(layers):
        return {}
    nodes = {layer.node for layer in layers if layer.kind == "linear" and not layer.one_row}
    readers: dict[str, list[str]] = {}
    for node in model.graph:
        x = node.inputs[0] if node.name in nodes else None
        if x is not None and x.name:
            readers.setdefault(x.name, []).append(node.name or "")
    return {node: x for x, several in readers.items() if len(several) > 1 for node in several}


Step = tuple[Iterable[Hashable], Iterable[Hashable], str]
"""Values that are read, values that are made of them, and the layer's name, "" where it is none."""


def ends_of(
    steps: Iterable[Step],
    inputs: Iterable[Hashable],
    outputs: Iterable[Hashable],
    layers: Sequence[Layer],
) -> set[Layer]:
    """The linears for tokens among `layers` that alone read one of a network's inputs, or alone
    lead to its outputs; none in a network of convolutions, whose ends these are."""
    if _convolutional(layers):
        return set()
    # What a value is made of: inputs of the network, and layers, with no other layer in between.
    made: dict[Hashable, frozenset[Hashable]] = {value: frozenset([value]) for value in inputs}
    readers: dict[Hashable, set[Hashable]] = {value: set() for value in made}
    for reads, writes, name in steps:
        of = frozenset[Hashable]().union(*(made.get(value, ()) for value in reads))
        if name:
            for source in of & readers.keys():
                readers[source].add(name)
            of = frozenset([name])
        made.update(dict.fromkeys(writes, of))
    leading = {name for value in outputs for name in made.get(value, ())}
    names = {name for group in (*readers.values(), leading) if len(group) == 1 for name in group}
    return {la for la in layers if la.name in names and la.kind == "linear" and not la.one_row}


def weight_of(node: ir.Node) -> ir.Value | None:
    """The initializer that is the weight of a Conv, MatMul, Gemm or Gather; None for others."""
    index = _WEIGHT_INPUT.get(node.op_type)
    if index is None or node.domain != "" or len(node.inputs) <= index:
        return None
    value = node.inputs[index]
    return value if value is not None and value.is_initializer() else None


def _layer(component: str, node: ir.Node, shape: tuple[int, ...]) -> Layer | None:
    path = (node.name or "").rpartition("/")[0]
    if not path:
        return None
    if node.op_type == "Conv":
        dilations = _ints(node, "dilations", (1, 1))
        if _int(node, "group", 1) != 1 or len(shape) != 4 or any(d != 1 for d in dilations):
            return None
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        if bias is not None and bias.const_value is None:
            return None
        if "auto_pad" in node.attributes and node.attributes["auto_pad"].as_string() != "NOTSET":
            return None
        strides, pads = _ints(node, "strides", (1, 1)), _ints(node, "pads", (0, 0, 0, 0))
        return Layer(
            component,
            path,
            node.name or "",
            "conv",
            shape,
            strides=(strides[0], strides[1]),
            pads=(pads[0], pads[1], pads[2], pads[3]),
        )
    if len(shape) != 2:
        return None
    if node.op_type == "Gather":
        if _int(node, "axis", 0) != 0:
            return None
        return Layer(component, path, node.name or "", "embedding", shape)
    if node.op_type == "MatMul":
        return Layer(component, path, node.name or "", "linear", shape[::-1])
    plain = _float(node, "alpha", 1) == 1 and _float(node, "beta", 1) == 1
    if _int(node, "transA", 0) or not plain:
        return None
    shape = shape if _int(node, "transB", 0) else shape[::-1]
    # torch exports a linear as Gemm when its input has two dimensions: [batch, channels].
    return Layer(component, path, node.name or "", "linear", shape, one_row=True)


def matrix_of(node: ir.Node, layer: Layer) -> Float:
    """The layer's weight as the matrix [N, K], fp32."""
    value = weight_of(node)
    assert value is not None and value.const_value is not None
    weight = np.asarray(value.const_value.numpy(), np.float32)
    if layer.kind == "conv":
        return np.ascontiguousarray(weight.transpose(0, 2, 3, 1)).reshape(layer.rows, -1)
    transposed = node.op_type == "MatMul" or (
        node.op_type == "Gemm" and not _int(node, "transB", 0)
    )
    return np.ascontiguousarray(weight.T if transposed else weight)


@dataclass(frozen=True)
class Activations:
    """The number format of a layer's input.

    mode "none": floating point. "dynamic": 8 bits, asymmetric, range of the current tensor.
    "static": 8 bits, `scale` [T] and `zero_point` [T] for each timestep recorded (T = 1: one for
    all; asymmetric), and `symmetric_scale` [1], for backends that take nothing else. "group": a
    scale per `group` channels of each row, `bits` wide: symmetric, or, with `shift` [C], unsigned
    codes of the input plus it, which is what makes all values positive.
    """

    mode: str = "none"
    bits: int = 16
    group: int = 0
    scale: Float | None = None
    zero_point: npt.NDArray[np.uint8] | None = None
    symmetric_scale: Float | None = None
    shift: Float | None = None


@dataclass(frozen=True)
class PackedCodes:
    """Codes of 4 bits, two to a byte, along rows that end in whole bytes: as they lie in a file,
    which stays mapped. shape [N, K]: of the codes. packed uint8 [N, ceil(K / 2)]."""

    packed: npt.NDArray[np.uint8]
    shape: tuple[int, int]

    @property
    def size(self) -> int:
        """Number of codes."""
        return self.shape[0] * self.shape[1]

    def unpacked(self) -> Codes:
        """The codes int8 [N, K]."""
        return unpack_int4(self.packed)[:, : self.shape[1]]


@dataclass(frozen=True)
class QuantizedLayer:
    """W x is computed as codes * scales applied to x / smooth, plus up (down (x / smooth)).

    stored: the codes int8 [N, K], 8 or 4 bits wide, as they are kept. scales [N, G] float16, G
    groups of `group` values along K, the last one shorter where K isn't a multiple; one group of
    all K for 8 bits. smooth [C] fp32: what each input channel is divided by, or None. down [r, K],
    up [N, r] float16: the branch. error: RMS of the change of the output over RMS of the output, on
    calibrated rows.
    """

    layer: Layer
    scheme: Scheme
    method: str
    stored: Codes | PackedCodes
    scales: Float16
    group: int
    smooth: Float | None = None
    down: Float16 | None = None
    up: Float16 | None = None
    activations: Activations = Activations()
    error: float = 0.0

    @property
    def codes(self) -> Codes:
        """The codes int8 [N, K]; of packed ones made anew, so that no layer holds them."""
        stored = self.stored
        return stored.unpacked() if isinstance(stored, PackedCodes) else stored

    @property
    def rank(self) -> int:
        """Rank of the branch; 0 without one."""
        return 0 if self.down is None else len(self.down)

    def residual(self) -> Float:
        """Codes times scales [N, K]: what multiplies the quantized, smoothed input."""
        return dequantize(self.codes, self.scales, self.group)

    def branch(self) -> Float:
        """up @ down [N, K], zeros without a branch."""
        if self.down is None or self.up is None:
            return np.zeros(self.stored.shape, np.float32)
        return self.up.astype(np.float32) @ self.down.astype(np.float32)

    def effective_weight(self) -> Float:
        """The weight [N, K] that unquantized inputs see: smoothing undone."""
        total = self.residual() + self.branch() if self.rank else self.residual()
        return total if self.smooth is None else total / spread(self.smooth, total.shape[1])

    def bytes(self) -> int:
        """Codes, scales, smoothing and branch on disk."""
        scheme = msgspec.structs.replace(self.scheme, rank=self.rank)
        return layer_bytes(self.layer, scheme, self.smooth is not None)


def layer_bytes(layer: Layer, scheme: Scheme | None, smoothed: bool = False) -> int:
    """Bytes on disk of a layer's weight: codes, scales, smoothing and branch; None: in fp16.

    smoothed: with a factor for each input channel (svdquant).
    """
    rows, columns = layer.rows, layer.columns
    if scheme is None:
        return 2 * rows * columns
    groups, width = 1, columns
    if scheme.weight_bits == 4:
        groups = -(-columns // scheme.group)
        # MatMulNBits has whole groups: the last one is filled up.
        width = groups * scheme.group if layer.kind == "linear" else columns
    rank = min(scheme.rank, rows, columns)
    smooth = 4 * layer.channels if smoothed and layer.kind != "embedding" else 0
    branch = 2 * rank * (rows + columns)
    return rows * width * scheme.weight_bits // 8 + 2 * rows * groups + branch + smooth


def dequantize(codes: Codes, scales: Float16, group: int) -> Float:
    """Codes [N, K] times their groups' scales [N, G] -> [N, K]."""
    columns = codes.shape[1]
    wide = np.repeat(scales.astype(np.float32), group, axis=1)[:, :columns]
    return codes.astype(np.float32) * wide


def spread(per_channel: Float, columns: int) -> Float:
    """Values [C] repeated for every tap -> [K]."""
    return np.tile(per_channel, columns // len(per_channel))


def pack_int4(codes: Codes) -> npt.NDArray[np.uint8]:
    """Codes -8 to 7 [..., K even] -> [..., K / 2] bytes, two's complement, the first value low."""
    nibbles = codes.view(np.uint8) & np.uint8(15)
    packed: npt.NDArray[np.uint8] = nibbles[..., 0::2] | (nibbles[..., 1::2] << np.uint8(4))
    return packed


def unpack_int4(packed: npt.NDArray[np.uint8]) -> Codes:
    """The inverse of pack_int4: [..., B] bytes -> codes [..., 2 B]."""
    codes = np.empty((*packed.shape[:-1], 2 * packed.shape[-1]), np.int8)
    signed = packed.view(np.int8)
    codes[..., 0::2] = (signed << 4) >> 4
    codes[..., 1::2] = signed >> 4
    return codes


def _packed(quantized: QuantizedLayer) -> npt.NDArray[Any]:
    """The codes as they lie in a file: of 4 bits two to a byte."""
    stored = quantized.stored
    if isinstance(stored, PackedCodes):
        return stored.packed
    if quantized.scheme.weight_bits != 4:
        return stored
    return pack_int4(np.pad(np.ascontiguousarray(stored), ((0, 0), (0, stored.shape[1] % 2))))


def save_layer(quantized: QuantizedLayer, path: Path) -> None:
    """Write a layer to `path` (safetensors), whole or not at all; equal layers, equal bytes."""
    act = quantized.activations
    tensors: dict[str, npt.NDArray[Any]] = {}
    for name, part in (
        ("codes", _packed(quantized)),
        ("scales", quantized.scales),
        ("smooth", quantized.smooth),
        ("down", quantized.down),
        ("up", quantized.up),
        ("act_scale", act.scale),
        ("act_zero_point", act.zero_point),
        ("act_symmetric_scale", act.symmetric_scale),
        ("act_shift", act.shift),
    ):
        if part is not None:
            tensors[name] = np.ascontiguousarray(part)
    meta = {
        "layer": vars(quantized.layer),
        "scheme": str(quantized.scheme),
        "method": quantized.method,
        "group": quantized.group,
        "error": quantized.error,
        "mode": act.mode,
        "bits": act.bits,
        "act_group": act.group,
    }
    with atomic_write(path) as file:
        file.write(save(tensors, {"edgesd": json.dumps(meta, sort_keys=True)}))


def load_layer(path: Path) -> QuantizedLayer:
    """Read what `save_layer` wrote; codes and factors stay mapped. Raises EdgesdError when the
    file is damaged."""
    try:
        with safe_open(path, "pt") as file:
            meta = json.loads(file.metadata()["edgesd"])
            parts = {name: file.get_tensor(name).numpy() for name in file.keys()}  # noqa: SIM118
        return _layer_from(meta, parts)
    except (SafetensorError, UsageError, OSError, KeyError, TypeError, ValueError) as exc:
        raise EdgesdError(f"{path} can't be read ({exc}): remove it and run again") from exc


def _layer_from(meta: dict[str, Any], parts: dict[str, npt.NDArray[Any]]) -> QuantizedLayer:
    fields: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in meta["layer"].items()
    }
    layer, scheme, codes = Layer(**fields), parse_scheme(meta["scheme"]), parts["codes"]
    four = scheme.weight_bits == 4
    if codes.shape != (layer.rows, -(-layer.columns // 2) if four else layer.columns):
        raise ValueError(f"its codes are {list(codes.shape)}")
    return QuantizedLayer(
        layer=layer,
        scheme=scheme,
        method=meta["method"],
        stored=PackedCodes(codes, (layer.rows, layer.columns)) if four else codes,
        scales=parts["scales"],
        group=meta["group"],
        smooth=parts.get("smooth"),
        down=parts.get("down"),
        up=parts.get("up"),
        activations=Activations(
            mode=meta["mode"],
            bits=meta["bits"],
            group=meta["act_group"],
            scale=parts.get("act_scale"),
            zero_point=parts.get("act_zero_point"),
            symmetric_scale=parts.get("act_symmetric_scale"),
            shift=parts.get("act_shift"),
        ),
        error=meta["error"],
    )


def _int(node: ir.Node, name: str, default: int) -> int:
    return node.attributes[name].as_int() if name in node.attributes else default


def _float(node: ir.Node, name: str, default: float) -> float:
    return node.attributes[name].as_float() if name in node.attributes else default


def _ints(node: ir.Node, name: str, default: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(node.attributes[name].as_ints()) if name in node.attributes else default
