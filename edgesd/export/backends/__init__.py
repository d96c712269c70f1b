"""What an exported graph goes through for each backend: which passes, in which order.

onnxruntime: fused attention stays, fp16 is storage, layers become the CPU's own kernels.
tensorrt: standard operators, every type in the graph (fp16 is arithmetic), symmetric Q/DQ.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from edgesd.export.passes.fp16_compute import Fp16Compute
from edgesd.export.passes.fp16_weights import Fp16Weights
from edgesd.export.passes.own_kernels import PARTS, OwnKernels, has_kernels
from edgesd.export.passes.quantized_ort import QuantizedOrt
from edgesd.export.passes.quantized_qdq import QuantizedQdq
from edgesd.export.passes.standard_attention import StandardAttention
from edgesd.export.quantize.layers import QuantizedLayer
from edgesd.spec.scheme import Precision

ONNXRUNTIME, TENSORRT = "onnxruntime", "tensorrt"

_log = logging.getLogger(__name__)


def lower(model: ir.Model, precision: Precision, backend: str) -> None:
    """Rewrite an exported graph in place as `backend` takes it, in fp32 or fp16.

    Raises EdgesdError when the backend has no such graph.
    """
    if backend == TENSORRT:
        StandardAttention()(model)
        if precision == "fp16":
            Fp16Compute()(model)
    elif precision == "fp16":
        stored = Fp16Weights()
        stored(model)
        for name in stored.kept:
            _log.warning("%s: %s exceeds fp16 and stays in fp32", model.graph.name, name)


def lower_quantized(
    model: ir.Model,
    layers: Mapping[str, QuantizedLayer],
    fp16_weights: Collection[str],
    timesteps: npt.NDArray[np.float32] | None,
    backend: str,
) -> None:
    """The same with `layers` (by node name) quantized. fp16_weights: names of those in fp16.

    timesteps [T]: those that static ranges were recorded at; None where there are none.
    """
    if backend == TENSORRT:
        lower(model, "fp16", backend)
        QuantizedQdq(layers)(model)
    else:
        Fp16Weights(only=fp16_weights)(model)
        QuantizedOrt(layers, timesteps)(model)


def lower_to_kernels(
    model: ir.Model,
    layers: Mapping[str, QuantizedLayer],
    fp16_weights: Collection[str],
    timesteps: npt.NDArray[np.float32] | None,
    parts: Collection[str] = PARTS,
) -> bool:
    """The same for edgesd's own kernels on CPUs; False where none of them has anything to do.

    parts: see OwnKernels.
    """
    Fp16Weights(only=fp16_weights)(model)
    OwnKernels(layers, timesteps, parts)(model)
    return has_kernels(model)


def needs_static_ranges(backend: str) -> bool:
    """Whether 8-bit activations must have ranges recorded in calibration."""
    return backend == TENSORRT
