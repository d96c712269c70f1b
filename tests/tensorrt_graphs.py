"""Small graphs that plans are built of."""

from __future__ import annotations

import numpy as np
import onnx

from benchmarks.tensorrt_refusals import graph


def product(dims: list[int | str]) -> onnx.ModelProto:
    """y = x @ w in fp16."""
    node = onnx.helper.make_node("MatMul", ["x", "w"], ["y"], name="layer/MatMul")
    weight = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float16)
    return graph([node], {"w": weight}, (onnx.TensorProto.FLOAT16, dims))
