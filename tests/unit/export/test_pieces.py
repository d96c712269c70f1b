"""Graphs that are run piece by piece."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("torch")

import onnx_ir as ir  # noqa: E402
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from edgesd.errors import ParityError  # noqa: E402
from edgesd.export import parity  # noqa: E402
from edgesd.export.external_data import write_model  # noqa: E402
from edgesd.export.families import Component  # noqa: E402
from edgesd.export.pieces import run_in_pieces, split  # noqa: E402
from edgesd.spec.pipeline import ComponentSpec, TensorSpec  # noqa: E402

WIDTH = 32
LAYER = 4 * WIDTH * WIDTH
"""Bytes of a layer in fp32."""


def graph(layers: int = 6) -> Any:
    """x [n, 32] -> y [n, 32] through layers, every second one's weight stored in fp16, each with
    what the first made added; and the sum of x and y."""
    rng = np.random.default_rng(0)
    nodes, weights, last = [], [], "x"
    for index in range(layers):
        weight = rng.normal(0, 0.2, (WIDTH, WIDTH)).astype(np.float32)
        name = f"w{index}"
        if index % 2:
            weights.append(numpy_helper.from_array(weight.astype(np.float16), name))
            nodes.append(helper.make_node("Cast", [name], [f"{name}f"], to=TensorProto.FLOAT))
            name = f"{name}f"
        else:
            weights.append(numpy_helper.from_array(weight, name))
        nodes.append(helper.make_node("MatMul", [last, name], [f"m{index}"], name=f"layer{index}"))
        nodes.append(helper.make_node("Add", [f"m{index}", "m0"], [f"a{index}"]))
        last = f"a{index}"
    nodes.append(helper.make_node("Identity", [last], ["y"]))
    nodes.append(helper.make_node("Add", [last, "x"], ["z"]))
    # The casts of all weights come first, as passes put them.
    nodes.sort(key=lambda node: node.op_type != "Cast")
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", WIDTH]) for name in "xyz"]
    made = helper.make_graph(nodes, "toy", ends[:1], ends[1:], weights)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    write_model(ir.serde.deserialize_model(graph()), tmp_path)
    assert (tmp_path / "weights.bin").stat().st_size >= 6 * LAYER // 2
    return tmp_path / "model.onnx"


CASES = [{"x": np.random.default_rng(n).normal(size=(n, WIDTH)).astype(np.float32)} for n in (1, 3)]


@pytest.mark.parametrize(
    ("piece_bytes", "count"), [(1 << 30, 1), (3 * LAYER, 2), (LAYER, 6), (1, 6)]
)
def test_pieces_compute_what_the_graph_does(file: Path, piece_bytes: int, count: int) -> None:
    """A weight is in one piece, or alone where it is larger than a piece."""
    pieces = split(onnx.load(file, load_external_data=False).graph, piece_bytes)
    assert len(pieces) == count
    assert [len(piece.weights) for piece in pieces] == [6 // count] * count
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    for inputs, found in zip(
        CASES, run_in_pieces(file, CASES, piece_bytes=piece_bytes), strict=True
    ):
        wanted = dict(zip("yz", session.run(["y", "z"], inputs), strict=True))
        assert set(found) == {"y", "z"}
        for name in wanted:
            np.testing.assert_allclose(found[name], wanted[name], rtol=1e-6)


def test_a_wrong_layer_is_seen(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever piece it is in."""
    monkeypatch.setattr(parity, "run_in_pieces", partial(run_in_pieces, piece_bytes=LAYER))
    spec = ComponentSpec(
        "toy",
        (TensorSpec("x", "float32", ("batch", WIDTH)),),
        tuple(TensorSpec(name, "float32", ("batch", WIDTH)) for name in "yz"),
    )
    toy = Component(spec, lambda: None, ({"batch": 1}, {"batch": 3}))  # type: ignore[arg-type, return-value]
    cases = [
        (inputs, tuple(out.values()))
        for inputs, out in zip(CASES, run_in_pieces(file, CASES), strict=True)
    ]
    assert parity.check_parity(file, toy, cases, "fp32").rel_rms == 0
    right = (file.parent / "weights.bin").read_bytes()
    for index in range(len(right) // (LAYER // 2)):
        wrong = bytearray(right)
        wrong[index * LAYER // 2 + 512 : index * LAYER // 2 + 600] = bytes(88)
        (file.parent / "weights.bin").write_bytes(wrong)
        with pytest.raises(ParityError, match="differs from its source"):
            parity.check_parity(file, toy, cases, "fp32")
