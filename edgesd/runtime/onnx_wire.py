"""Rewrites serialized ONNX models without `onnx`: where their weights lie, and 16 bits as 32.

ONNX Runtime memory-maps weights that lie in a file of their own; weights handed over in memory are
copied (measured: RSS doubles). So each reference `(location, offset)` is rewritten to point to the
file that was verified, and into it where that is a one-file bundle, before the model is loaded.

A model may have such references in other places, too: in attributes, subgraphs, functions. edgesd
writes none there, and their targets wouldn't be verified, so they are refused.

Field numbers are those of onnx.proto; the encoding is that of the Protocol Buffers specification
("Encoding", wire types 0, 1, 2 and 5).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from edgesd.errors import BundleError

_GRAPH, _INITIALIZER, _EXTERNAL_DATA, _KEY, _VALUE = 7, 5, 13, 1, 2
"""ModelProto.graph, GraphProto.initializer, TensorProto.external_data, and the two fields of
StringStringEntryProto."""
_LENGTH_DELIMITED = 2

_NODE, _VALUE_INFO, _TENSOR_TYPE, _TENSOR_NAME = 1, 13, 2, 8
_NODE_IN, _NODE_OUT, _OPERATOR, _ATTRIBUTE, _ATTRIBUTE_INT = 1, 2, 4, 5, 3
_FLOAT, _FLOAT16, _BFLOAT16 = 1, 10, 16
"""GraphProto.node, .value_info; TensorProto.data_type, .name; NodeProto.input, .output, .op_type,
.attribute; AttributeProto.i; values of TensorProto.DataType."""

_INNER: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
}
"""Messages in which a TensorProto can lie: field number -> the message in it."""
_MOST_NESTED = 100

_ENTRIES = {"location", "offset", "length", "checksum"}
"""Keys of external_data that are known. Others may ask a library to read more than the tensor."""

Relocation = Callable[[str, int, int], tuple[str, int]]
"""(location, offset in bytes, length in bytes) -> the new (location, offset)."""


def relocate_external_data(model: bytes, move: Relocation) -> bytes:
    """Return `model` with each initializer's external data moved by `move`.

    Raises BundleError when `model` isn't a serialized ModelProto, refers to external data from
    anywhere but its main graph's initializers, or by anything but a location, an offset and a
    length.
    """
    moved = 0

    def in_tensor(tensor: memoryview) -> bytes:
        nonlocal moved
        entries = _external_data(tensor)
        if not entries:
            return bytes(tensor)
        moved += 1
        length = _number(entries, "length")
        location, offset = move(entries["location"], _number(entries, "offset", "0"), length)
        entries = {"location": location, "offset": str(offset), "length": str(length)}
        kept = _rewrite(tensor, {_EXTERNAL_DATA: lambda _: None})
        return kept + b"".join(
            _field(_EXTERNAL_DATA, _field(_KEY, k.encode()) + _field(_VALUE, v.encode()))
            for k, v in entries.items()
        )

    def in_graph(graph: memoryview) -> bytes:
        return _rewrite(graph, {_INITIALIZER: in_tensor})

    with _readable():
        found = _rewrite(memoryview(model), {_GRAPH: in_graph})
        # Each reference has "location" in it: most models need no second, longer look.
        if model.count(b"location") != moved and _references(memoryview(model), "model") != moved:
            raise BundleError(
                "the graph refers to a file other than its weights, which isn't verified"
                ": build the bundle again"
            )
    return found


def bf16_in_fp32(model: bytes) -> bytes:
    """`model` with fp32 in place of the bf16 that it computes in, of the same weights.

    ONNX Runtime has no arithmetic in bf16 on CPUs, and unlike fp16's it doesn't replace it. Weights
    stay bf16 in their file, with a Cast behind each; Casts to bf16 become Casts to fp32. Raises
    BundleError as `relocate_external_data` does.
    """
    return _in_fp32(model, _BFLOAT16, b"/bf16")


def fp16_in_fp32(model: bytes) -> bytes:
    """The same of fp16. ONNX Runtime replaces its arithmetic by itself, but not always where values
    are moved: behind a Slice, what exceeds fp16 can be infinite, and what is made of it NaN."""
    return _in_fp32(model, _FLOAT16, b"/fp16")


def _in_fp32(model: bytes, half: int, suffix: bytes) -> bytes:
    """half: the type that becomes fp32. suffix: of the names of its weights."""
    casts: list[bytes] = []

    def in_tensor(tensor: memoryview) -> bytes:
        if _number_of(tensor, _TENSOR_TYPE) != half:
            return bytes(tensor)
        name = next(bytes(body) for number, body in _fields(tensor) if number == _TENSOR_NAME)
        casts.append(_field(_NODE, _cast(name + suffix, name)))
        return _rewrite(tensor, {_TENSOR_NAME: lambda body: bytes(body) + suffix})

    def in_node(node: memoryview) -> bytes:
        if b"Cast" not in [bytes(body) for number, body in _fields(node) if number == _OPERATOR]:
            return bytes(node)

        def in_attribute(attribute: memoryview) -> bytes:
            halved = _number_of(attribute, _ATTRIBUTE_INT) == half
            return _TO_FLOAT if halved else bytes(attribute)

        return _rewrite(node, {_ATTRIBUTE: in_attribute})

    def in_graph(graph: memoryview) -> bytes:
        edits: dict[int, Callable[[memoryview], bytes | None]] = {
            _NODE: in_node,
            _INITIALIZER: in_tensor,
            _VALUE_INFO: lambda _: None,  # of the types that values had
        }
        rest = _rewrite(graph, edits)
        return b"".join(casts) + rest  # Casts before the nodes that read them

    with _readable():
        return _rewrite(memoryview(model), {_GRAPH: in_graph})


_TO_FLOAT = b"\x0a\x02to\x18\x01\xa0\x01\x02"
"""AttributeProto: name "to", i FLOAT, type INT."""


def _cast(source: bytes, out: bytes) -> bytes:
    """NodeProto of a Cast to fp32."""
    named = _field(_NODE_IN, source) + _field(_NODE_OUT, out)
    return named + _field(_OPERATOR, b"Cast") + _field(_ATTRIBUTE, _TO_FLOAT)


def _number_of(message: memoryview, wanted: int) -> int | None:
    """The last varint in the field `wanted`."""
    found = None
    for number, start, body in _spans(message):
        if number == wanted and body is None:
            _, at = _varint(message, start)
            found, _ = _varint(message, at)
    return found


@contextmanager
def _readable() -> Iterator[None]:
    try:
        yield
    except (IndexError, KeyError, StopIteration, ValueError) as exc:
        raise BundleError(f"the graph isn't a readable ONNX model ({exc})") from exc


def _references(message: memoryview, kind: str, depth: int = 0) -> int:
    """Number of tensors with external data anywhere in a message of `_INNER`."""
    if kind == "tensor":
        return 1 if _external_data(message) else 0
    if depth > _MOST_NESTED:
        raise ValueError("its subgraphs are nested too deeply")
    inner = _INNER[kind]
    return sum(
        _references(body, inner[number], depth + 1)
        for number, body in _fields(message)
        if number in inner
    )


def _external_data(tensor: memoryview) -> dict[str, str]:
    entries = dict(_entry(body) for number, body in _fields(tensor) if number == _EXTERNAL_DATA)
    if unknown := entries.keys() - _ENTRIES:
        raise ValueError(f"external data with {min(unknown)!r}")
    return entries


def _number(entries: dict[str, str], key: str, default: str | None = None) -> int:
    text = entries.get(key, default)
    if text is None or not (text.isascii() and text.isdigit() and len(text) < 20):
        raise ValueError(f"external data with the {key} {text!r}")
    return int(text)


def _rewrite(message: memoryview, edits: dict[int, Callable[[memoryview], bytes | None]]) -> bytes:
    """Copy `message`, replacing the body of each length-delimited field in `edits` (None: drop)."""
    out = bytearray()
    done = 0
    for number, start, body in _spans(message):
        if number in edits and body is not None:
            out += message[done:start]
            new = edits[number](body)
            if new is not None:
                out += _field(number, new)
            done = start + _head_length(message, start) + len(body)
    out += message[done:]
    return bytes(out)


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    return ((number, body) for number, _, body in _spans(message) if body is not None)


def _spans(message: memoryview) -> Iterator[tuple[int, int, memoryview | None]]:
    """Each field's number, start of its tag, and body (None unless length-delimited)."""
    at = 0
    while at < len(message):
        start = at
        tag, at = _varint(message, at)
        number, wire_type = tag >> 3, tag & 7
        body = None
        if wire_type == 0:
            _, at = _varint(message, at)
        elif wire_type == 1:
            at += 8
        elif wire_type == _LENGTH_DELIMITED:
            length, at = _varint(message, at)
            body = message[at : at + length]
            at += length
        elif wire_type == 5:
            at += 4
        else:
            raise ValueError(f"wire type {wire_type}")
        if number == 0 or at > len(message):
            raise ValueError("truncated field")
        yield number, start, body


def _head_length(message: memoryview, start: int) -> int:
    _, at = _varint(message, start)
    _, at = _varint(message, at)
    return at - start


def _entry(body: memoryview) -> tuple[str, str]:
    parts = {number: bytes(value).decode() for number, value in _fields(body)}
    return parts[_KEY], parts.get(_VALUE, "")


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("varint too long")


def _encode_varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _field(number: int, body: bytes) -> bytes:
    return _encode_varint(number << 3 | _LENGTH_DELIMITED) + _encode_varint(len(body)) + body
