"""Graphs for TensorRT: standard operators, every type in the graph (fp16 is arithmetic), symmetric
Q/DQ. They are checked before they are shipped: by a lint, and a build by TensorRT-RTX."""

from __future__ import annotations

import importlib.util
import logging
import shlex
from collections.abc import Collection, Mapping
from pathlib import Path

import msgspec
import onnx_ir as ir

from edgesd.engines.tensorrt import (
    PLAN_SUFFIX,
    BuildSpec,
    build_plan,
    plan_path,
)
from edgesd.errors import ResourceError
from edgesd.export.backends.base import Lowering
from edgesd.export.backends.tensorrt_lint import check_graph
from edgesd.export.passes.fp32_region import Fp32Region
from edgesd.export.passes.half_compute import HalfCompute
from edgesd.export.passes.lowering import Timesteps
from edgesd.export.passes.quantized_qdq import QuantizedQdq, stored_bytes
from edgesd.export.passes.standard_attention import StandardAttention
from edgesd.export.passes.standard_norms import StandardNorms, StandardRotary
from edgesd.export.passes.wide_sums import values_of, wide_sums
from edgesd.export.quantize.assign import LayerScheme
from edgesd.export.quantize.layers import Layer, QuantizedLayer
from edgesd.files import private_folder
from edgesd.runtime.backends.tensorrt import BACKEND
from edgesd.spec.bundle import Engine
from edgesd.spec.scheme import Precision
from edgesd.spec.target import Target

SCRIPT = "trtexec.sh"
"""File of a bundle: command lines of NVIDIA's tool that build the same plans."""

CHECK_SM = {"sm_87": "sm_86", "sm_110": "sm_120"}
"""A board's GPU -> the nearest one that TensorRT-RTX builds for: of one generation."""
CHECK_MODULE = "tensorrt_rtx"

_KERNEL_BYTES = 20_000_000
"""Of compiled kernels, beside the weights of a network: 11 to 20 MB were measured."""

_SCRATCH_BYTES, _AT_ONCE = 8_500_000, 8
"""Of a matrix product, and products of low-rank branches that run at once: plans of TensorRT-RTX
take 8.3 MB more than activations, and up to 70 MB with branches."""

_HALVES = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
_LINTED = "passed edgesd's lint"
_MIB = 1 << 20

_log = logging.getLogger(__name__)


class TensorRtLowering(Lowering):
    """Lowers graphs for TensorRT, with fixed shapes: such plans need least memory to build and
    run."""

    name = BACKEND.name
    fixed_shapes = True
    static_ranges = True
    fp16_arithmetic = True
    checks_engines = True

    def lower(self, model: ir.Model, precision: Precision) -> None:
        self._lower(model, precision, {})

    def _lower(
        self,
        model: ir.Model,
        precision: Precision,
        layers: Mapping[str, QuantizedLayer],
    ) -> None:
        StandardRotary()(model)
        StandardAttention()(model)
        sums = wide_sums(model) if precision == "fp16" else {}
        if precision in _HALVES:
            HalfCompute(_HALVES[precision])(model)
        if layers:
            QuantizedQdq(layers)(model)
        Fp32Region(values_of(sums))(model)
        StandardNorms()(model)

    def lower_quantized(
        self,
        model: ir.Model,
        layers: Mapping[str, QuantizedLayer],
        fp16_weights: Collection[str],
        timesteps: Timesteps | None,
    ) -> None:
        """See Lowering. All that isn't quantized is in fp16, and ranges are of all timesteps."""
        self._lower(model, "fp16", layers)

    def gpu_bytes(
        self, parameters: int, schemes: Mapping[Layer, LayerScheme], fp32: bool
    ) -> tuple[int, int] | None:
        """See Lowering. As plans hold weights: what is quantized stays so (docs/tensorrt.md)."""
        quantized = {layer: scheme for layer, scheme in schemes.items() if scheme is not None}
        rest = parameters - sum(layer.rows * layer.columns for layer in quantized)
        codes = sum(stored_bytes(layer, scheme) for layer, scheme in quantized.items())
        branches = any(scheme.rank for scheme in quantized.values())
        scratch = _SCRATCH_BYTES * (_AT_ONCE if branches else 1)
        return codes + (4 if fp32 else 2) * rest + _KERNEL_BYTES, scratch

    def files(self, engines: Mapping[str, Engine]) -> dict[str, bytes]:
        """See Lowering. A shell script, for the bundle's folder, that builds all plans."""
        lines = ["#!/bin/sh", "# The same plans by NVIDIA's tool, on the board.", "set -e"]
        lines += [
            trtexec(BuildSpec(name), engine.path, f"{name}{PLAN_SUFFIX}")
            for name, engine in engines.items()
        ]
        return {SCRIPT: ("\n".join(lines) + "\n").encode()}

    def check_engine(self, root: Path, engine: Engine, target: Target) -> Engine:
        """See Lowering. Where TensorRT-RTX is installed, the graph is built for the target's GPU,
        and the plan kept, or for a GPU like it, which is a check and no more."""
        graph, component = root / engine.path, engine.component
        check_graph(graph, component)
        linted = msgspec.structs.replace(engine, checked=_LINTED)
        sm = next((name for name in target.capabilities if name.startswith("sm_")), None)
        if sm is None or importlib.util.find_spec(CHECK_MODULE) is None:
            return linted
        near = CHECK_SM.get(sm, sm)
        with private_folder(graph.parent) as temporary:
            spec = BuildSpec(component, CHECK_MODULE, near)
            try:
                report = build_plan(graph, spec, temporary / "plan")
            except ResourceError as exc:  # this machine's fault, not the graph's
                _log.warning("%s", exc)
                return linted
            words = f"built for {near} by {CHECK_MODULE} {report.environment.version}"
            if near != sm:
                return msgspec.structs.replace(engine, checked=words)
            kept = root / plan_path(component)
            kept.parent.mkdir(exist_ok=True)
            (temporary / "plan").replace(kept)
        return msgspec.structs.replace(
            engine, checked=words, built_for=report.environment, plan=plan_path(component)
        )


def trtexec(spec: BuildSpec, graph: str, plan: str) -> str:
    """The command line of NVIDIA's tool that builds the same plan."""
    return shlex.join(
        [
            "trtexec",
            f"--onnx={graph}",
            f"--saveEngine={plan}",
            "--stronglyTyped",
            f"--memPoolSize=workspace:{spec.workspace_bytes // _MIB}M",
            f"--builderOptimizationLevel={spec.optimization_level}",
            "--skipInference",
        ]
    )


LOWERING = TensorRtLowering()
