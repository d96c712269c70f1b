"""Reads and moves the external-data references of a serialized ONNX model, without `onnx`.

ONNX Runtime memory-maps weights that lie in a file of their own; weights handed over in memory are
copied (measured: RSS doubles). In a one-file bundle the weights are a slice of that one file, so
each reference `(location, offset)` is rewritten to point into it before the model is loaded.

Field numbers are those of onnx.proto (ModelProto.graph = 7, GraphProto.initializer = 5,
TensorProto.external_data = 13, StringStringEntryProto.key = 1 and .value = 2); the encoding is that
of the Protocol Buffers specification ("Encoding", wire types 0, 1, 2 and 5).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from edgesd.errors import BundleError

_GRAPH, _INITIALIZER, _EXTERNAL_DATA, _KEY, _VALUE = 7, 5, 13, 1, 2
_LENGTH_DELIMITED = 2

Relocation = Callable[[str, int], tuple[str, int]]
"""(location, offset in bytes) -> the new (location, offset)."""


def relocate_external_data(model: bytes, move: Relocation) -> bytes:
    """Return `model` with each initializer's external data moved by `move`.

    Raises BundleError when `model` isn't a serialized ModelProto.
    """

    def in_tensor(tensor: memoryview) -> bytes:
        entries = {
            key: value
            for number, body in _fields(tensor)
            if number == _EXTERNAL_DATA
            for key, value in [_entry(body)]
        }
        if not entries:
            return bytes(tensor)
        location, offset = move(entries["location"], int(entries.get("offset", "0")))
        entries |= {"location": location, "offset": str(offset)}
        kept = _rewrite(tensor, {_EXTERNAL_DATA: lambda _: None})
        return kept + b"".join(
            _field(_EXTERNAL_DATA, _field(_KEY, k.encode()) + _field(_VALUE, v.encode()))
            for k, v in entries.items()
        )

    def in_graph(graph: memoryview) -> bytes:
        return _rewrite(graph, {_INITIALIZER: in_tensor})

    try:
        return _rewrite(memoryview(model), {_GRAPH: in_graph})
    except (IndexError, KeyError, ValueError, UnicodeDecodeError) as exc:
        raise BundleError(f"the graph isn't a readable ONNX model ({exc})") from exc


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
