"""Moving external data in a serialized model equals doing it with the onnx package."""

from __future__ import annotations

import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from edgesd.errors import BundleError
from edgesd.runtime.onnx_wire import bf16_in_fp32, relocate_external_data


def model_with(offsets: list[int], location: str) -> onnx.ModelProto:
    tensors = []
    for i, offset in enumerate(offsets):
        tensor = TensorProto(
            name=f"w{i}", data_type=1, dims=[2, 3], data_location=TensorProto.EXTERNAL
        )
        for key, value in (("location", location), ("offset", offset), ("length", 24)):
            tensor.external_data.add(key=key, value=str(value))
        tensors += [tensor, helper.make_tensor(f"inline{i}", 1, [2], [1.0, 2.0])]
    info = helper.make_tensor_value_info("x", 1, ["n"])
    graph = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"], doc_string="d" * 300)],
        "g",
        [info],
        [helper.make_tensor_value_info("y", 1, ["n"])],
        tensors,
    )
    return helper.make_model(graph)


@given(st.lists(st.integers(0, 2**40), max_size=4), st.text("abc/.", min_size=1, max_size=200))
def test_relocation(offsets: list[int], location: str) -> None:
    base = 3584
    moved = relocate_external_data(
        model_with(offsets, location).SerializeToString(),
        lambda where, offset, length: (where + ".edgesd", offset + base),
    )
    expected = model_with([offset + base for offset in offsets], location + ".edgesd")
    assert onnx.load_from_string(moved) == expected


@pytest.mark.parametrize("garbage", [b"\xff", b"\x3a\x05abc", b"\x3f", b"\x3a\x02\x2a\x09"])
def test_garbage_is_refused(garbage: bytes) -> None:
    model = model_with([0], "weights.bin").SerializeToString()
    with pytest.raises(BundleError, match="isn't a readable ONNX model"):
        relocate_external_data(model + garbage, lambda where, offset, length: (where, offset))


@pytest.mark.parametrize(
    "inside", [b"\xff", b"\x0a\x05ab", b"\x2a\x02\x10\x90", b"\x2a\x02\x10\x10"]
)
def test_what_cannot_be_read_for_bf16_is_refused(inside: bytes) -> None:
    model = b"\x3a" + bytes([len(inside)]) + inside  # the graph; the last: a weight without a name
    with pytest.raises(BundleError, match="isn't a readable ONNX model"):
        bf16_in_fp32(model)


def test_a_model_without_bf16_stays_as_it_is() -> None:
    model = model_with([8], "weights.bin").SerializeToString()
    assert onnx.load_from_string(bf16_in_fp32(model)) == onnx.load_from_string(model)


def external(**entries: object) -> TensorProto:
    """A tensor of 24 bytes that lies in weights.bin, `entries` changed."""
    tensor = TensorProto(name="w", data_type=1, dims=[2, 3], data_location=TensorProto.EXTERNAL)
    for key, value in ({"location": "weights.bin", "offset": 0, "length": 24} | entries).items():
        if value is not None:
            tensor.external_data.add(key=key, value=str(value))
    return tensor


def _one_node(node: onnx.NodeProto, *tensors: TensorProto) -> onnx.ModelProto:
    return helper.make_model(helper.make_graph([node], "g", [], [], list(tensors)))


def _in_subgraph() -> onnx.ModelProto:
    inner = helper.make_graph([], "inner", [], [], [external()])
    nested = helper.make_graph(
        [helper.make_node("If", ["x"], ["y"], then_branch=inner)], "b", [], []
    )
    return _one_node(helper.make_node("If", ["c"], ["d"], else_branch=nested))


def _in_function() -> onnx.ModelProto:
    model = _one_node(helper.make_node("F", ["x"], ["y"], domain="f"))
    node = helper.make_node("Constant", [], ["y"], value=external())
    model.functions.append(helper.make_function("f", "F", [], ["y"], [node], []))
    return model


def _in_sparse() -> onnx.ModelProto:
    model = _one_node(helper.make_node("Identity", ["w"], ["y"]))
    model.graph.sparse_initializer.append(onnx.SparseTensorProto(values=external(), dims=[6]))
    return model


ELSEWHERE = {
    "attribute": lambda: _one_node(helper.make_node("Constant", [], ["y"], value=external())),
    "list of an attribute": lambda: _one_node(
        helper.make_node("Constant", [], ["y"], value=[external(), external()])
    ),
    "sparse attribute": lambda: _one_node(
        helper.make_node(
            "Constant", [], ["y"], value=onnx.SparseTensorProto(values=external(), dims=[6])
        )
    ),
    "subgraph": _in_subgraph,
    "function": _in_function,
    "sparse initializer": _in_sparse,
    "attribute beside an initializer": lambda: _one_node(
        helper.make_node("Constant", [], ["y"], value=external()), external()
    ),
}


@pytest.mark.parametrize("place", ELSEWHERE)
def test_external_data_anywhere_but_in_the_main_graph_is_refused(place: str) -> None:
    model = ELSEWHERE[place]().SerializeToString()
    with pytest.raises(BundleError, match="a file other than its weights"):
        relocate_external_data(model, lambda where, offset, length: (where, offset))


def test_a_graph_may_speak_of_locations() -> None:
    node = helper.make_node("Constant", [], ["location"], name="location", value_float=1.0)
    model = _one_node(node, external())
    moved = relocate_external_data(model.SerializeToString(), lambda where, at, length: (where, at))
    assert onnx.load_from_string(moved) == model


@pytest.mark.parametrize(
    "entries",
    [
        *(
            {key: value}
            for key in ("offset", "length")
            for value in (-1, "1e3", "\u0663", "", 1 << 70)
        ),
        {"length": None},
        {"location": None},
        {"prepacked_0": "0;24;hash"},
    ],
    ids=str,
)
def test_a_reference_of_another_kind_is_refused(entries: dict[str, object]) -> None:
    model = _one_node(helper.make_node("Identity", ["w"], ["y"]), external(**entries))
    with pytest.raises(BundleError, match="isn't a readable ONNX model"):
        relocate_external_data(model.SerializeToString(), lambda where, offset, _: (where, offset))


def test_subgraphs_without_end_are_refused() -> None:
    inner = external().SerializeToString()
    graph = b"\x2a" + _length(inner)  # initializer
    for _ in range(300):
        attribute = b"\x32" + _length(graph)  # g
        graph = b"\x0a" + _length(b"\x2a" + _length(attribute))
    with pytest.raises(BundleError, match="nested too deeply"):
        relocate_external_data(b"\x3a" + _length(graph), lambda where, offset, _: (where, offset))


def _length(body: bytes) -> bytes:
    count, out = len(body), b""
    while count >= 0x80:
        out, count = out + bytes([count & 0x7F | 0x80]), count >> 7
    return out + bytes([count]) + body
