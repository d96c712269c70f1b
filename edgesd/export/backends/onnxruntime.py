"""Graphs for ONNX Runtime on CPUs: fused attention stays, fp16 is storage, and layers become the
CPU's own kernels, or edgesd's."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping

import onnx_ir as ir

from edgesd.export.backends.base import Lowering
from edgesd.export.passes.fp16_weights import Fp16Weights
from edgesd.export.passes.fusions import FUSIONS, Fusion
from edgesd.export.passes.lowering import Timesteps
from edgesd.export.passes.own_kernels import OwnKernels, has_kernels
from edgesd.export.passes.quantized_ort import QuantizedOrt
from edgesd.export.quantize.layers import QuantizedLayer
from edgesd.runtime.backends.onnxruntime import BACKEND
from edgesd.spec.scheme import Precision

_log = logging.getLogger(__name__)


class OnnxRuntimeLowering(Lowering):
    """Lowers graphs for ONNX Runtime on CPUs."""

    name = BACKEND.name
    splits_autoencoder = True
    own_kernels = True
    pools_attention = True

    def lower(self, model: ir.Model, precision: Precision) -> None:
        if precision != "fp16":
            return
        stored = Fp16Weights()
        stored(model)
        for name in stored.kept:
            _log.warning("%s: %s exceeds fp16 and stays in fp32", model.graph.name, name)

    def lower_quantized(
        self,
        model: ir.Model,
        layers: Mapping[str, QuantizedLayer],
        fp16_weights: Collection[str],
        timesteps: Timesteps | None,
    ) -> None:
        Fp16Weights(only=fp16_weights)(model)
        QuantizedOrt(layers, timesteps)(model)

    def lower_to_kernels(
        self,
        model: ir.Model,
        layers: Mapping[str, QuantizedLayer],
        fp16_weights: Collection[str],
        timesteps: Timesteps | None,
        attention: bool = True,
        fusions: Iterable[Fusion] = FUSIONS,
    ) -> bool:
        Fp16Weights(only=fp16_weights)(model)
        OwnKernels(layers, timesteps, attention, fusions)(model)
        return has_kernels(model)


LOWERING = OnnxRuntimeLowering()
