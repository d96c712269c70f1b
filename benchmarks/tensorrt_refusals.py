"""What edgesd's lint says of graphs that TensorRT refuses, beside TensorRT-RTX's own words.

python -m benchmarks.tensorrt_refusals [--json FILE]

Each graph has one fault. Needs `pip install tensorrt-rtx`, and no GPU.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from benchmarks.common import parser, run, table, write_json
from edgesd.engines.tensorrt import BuildSpec, build_plan
from edgesd.errors import EdgesdError
from edgesd.export.backends.tensorrt_lint import lint

Arrays = Mapping[str, npt.NDArray[Any]]
SM = "sm_86"
_HALF = TensorProto.FLOAT16
_N = 64


class Row(NamedTuple):
    """One graph: the rules that found its fault, what they say, and what TensorRT says."""

    graph: str
    rules: str
    lint: str
    tensorrt: str


def graph(
    nodes: list[NodeProto],
    arrays: Arrays,
    x: tuple[int, list[Any]] = (_HALF, [1, _N]),
    y: int = _HALF,
    opset: int = 21,
) -> ModelProto:
    """Nodes between the input x and the output y."""
    return helper.make_model(
        helper.make_graph(
            nodes,
            "graph",
            [helper.make_tensor_value_info("x", *x)],
            [helper.make_tensor_value_info("y", y, None)],
            [numpy_helper.from_array(np.ascontiguousarray(a), n) for n, a in arrays.items()],
        ),
        opset_imports=[helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)],
        ir_version=10,
    )


def _dq(*inputs: str, **attributes: Any) -> NodeProto:
    return helper.make_node("DequantizeLinear", inputs, ["d"], name="layer/DQ", **attributes)


def _op(kind: str, *inputs: str, **attributes: Any) -> NodeProto:
    return helper.make_node(kind, inputs, ["y"], name=f"layer/{kind}", **attributes)


def _activation(zero: npt.NDArray[Any]) -> tuple[list[NodeProto], Arrays]:
    """x quantized with that zero point (whose type is the codes'), times a weight."""
    quantize = helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], name="layer/Q")
    weight = np.ones((_N, _N), np.float16)
    arrays = {"s": np.array(0.1, np.float16), "z": zero, "w": weight}
    return [quantize, _dq("q", "s", "z"), _op("MatMul", "d", "w")], arrays


def _weight(
    codes: npt.NDArray[Any], scales: npt.NDArray[Any], op: str = "MatMul", **attributes: Any
) -> tuple[list[NodeProto], Arrays]:
    """x times dequantized codes."""
    nodes = [_dq("c", "s", **attributes), _op(op, "x", "d")]
    return nodes, {"c": codes, "s": scales}


def faults() -> dict[str, ModelProto]:
    """Name -> a graph with that fault."""
    eight = np.ones((_N, _N), np.int8)
    four = np.ones((_N, _N, 3, 3), np.int8).astype(ml_dtypes.int4)
    scales = np.full(_N, 0.1, np.float16)
    flip = helper.make_node("Transpose", ["c"], ["t"], name="layer/Transpose")
    open_codes = [flip, _dq("t", "s", axis=1), _op("MatMul", "x", "d")]
    unsigned = [_dq("c", "s", "z", axis=1), _op("MatMul", "x", "d")]
    image = (_HALF, [1, _N, 8, 8])
    dynamic = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"], name="layer/Dynamic"),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"], name="layer/DQ"),
    ]
    half = np.ones((_N, _N), np.float16)
    nan = np.full((_N, _N), np.nan, np.float16)
    tokens = (_HALF, [1, 4, _N])
    fp8 = np.array(0, np.float32).astype(ml_dtypes.float8_e4m3fn)
    return {
        "zero point of 3": graph(*_activation(np.array(3, np.int8))),
        "unsigned activations": graph(*_activation(np.array(0, np.uint8))),
        "int4 activations": graph(*_activation(np.array(0, np.int8).astype(ml_dtypes.int4))),
        "fp8 activations": graph(*_activation(fp8)),
        "unsigned weights": graph(
            unsigned,
            {"c": eight.astype(np.uint8), "s": scales, "z": np.zeros(_N, np.uint8)},
        ),
        "blocks of a convolution": graph(
            *_weight(four, np.full((_N, 2, 3, 3), 0.1, np.float16), "Conv", axis=1, block_size=32),
            image,
        ),
        "fp32 scales, fp16 activations": graph(
            *_weight(eight, scales.astype(np.float32), axis=1),
        ),
        "a scale of 0": graph(*_weight(eight, np.zeros(_N, np.float16), axis=1)),
        "a negative scale": graph(*_weight(eight, -scales, axis=1)),
        "codes transposed": graph(open_codes, {"c": eight, "s": scales}),
        "two types added": graph([_op("Add", "x", "w")], {"w": np.ones(_N, np.float32)}),
        "ranges at run time": graph(dynamic, {}, (TensorProto.FLOAT, [1, _N]), TensorProto.FLOAT),
        "fused attention": graph(
            [_op("MultiHeadAttention", "x", "x", "x", domain="com.microsoft", num_heads=2)],
            {},
            tokens,
        ),
        "attention of opset 23": graph(
            [_op("Attention", "x", "x", "x", q_num_heads=2, kv_num_heads=2)], {}, tokens, opset=23
        ),
        "RMS norm of ONNX Runtime": graph(
            [_op("SimplifiedLayerNormalization", "x", "w", axis=-1)], {"w": half[0]}, tokens
        ),
        "rotary embedding of opset 23": graph(
            [_op("RotaryEmbedding", "x", "c", "s", num_heads=2)],
            {"c": np.ones((1, 4, _N // 4), np.float16), "s": np.ones((1, 4, _N // 4), np.float16)},
            tokens,
            opset=23,
        ),
        "any number of rows, no profile": graph(
            [_op("MatMul", "x", "w")], {"w": half}, (_HALF, ["rows", _N])
        ),
        "NaN among the weights": graph([_op("MatMul", "x", "w")], {"w": nan}),
    }


def measure(name: str, model: ModelProto, folder: Path) -> Row:
    """Ask both."""
    path = folder / "model.onnx"
    onnx.save(model, path)
    found = lint(path)
    try:
        report = build_plan(path, BuildSpec("layer", "tensorrt_rtx", SM), folder / "layer.plan")
        words = "builds it" + (f"; warns: {report.warnings[0]}" if report.warnings else "")
    except EdgesdError as exc:
        words = str(exc)
    return Row(name, ", ".join(f.rule for f in found), "; ".join(map(str, found)), words)


def main() -> None:
    given = parser(__doc__).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = [measure(name, model, Path(folder)) for name, model in faults().items()]
    print(table(Row._fields, rows))
    write_json(given.json, {"sm": SM, "rows": [row._asdict() for row in rows]})


if __name__ == "__main__":
    run(main)
