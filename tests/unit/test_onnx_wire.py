"""Moving external data in a serialized model equals doing it with the onnx package."""

from __future__ import annotations

import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from edgesd.errors import BundleError
from edgesd.runtime.onnx_wire import relocate_external_data


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
        lambda where, offset: (where + ".edgesd", offset + base),
    )
    expected = model_with([offset + base for offset in offsets], location + ".edgesd")
    assert onnx.load_from_string(moved) == expected


@pytest.mark.parametrize("garbage", [b"\xff", b"\x3a\x05abc", b"\x3f", b"\x3a\x02\x2a\x09"])
def test_garbage_is_refused(garbage: bytes) -> None:
    model = model_with([0], "weights.bin").SerializeToString()
    with pytest.raises(BundleError, match="isn't a readable ONNX model"):
        relocate_external_data(model + garbage, lambda a, b: (a, b))
