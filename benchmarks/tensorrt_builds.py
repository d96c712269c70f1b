"""Plans that TensorRT-RTX builds of a pipeline, without a GPU: size, time, memory of each.

python -m benchmarks.tensorrt_builds MODEL --work FOLDER [--precisions NAME ...] [--sm sm_86]
    [--quick] [--layers] [--json FILE]

Every row is one component of a bundle that `edgesd build` makes for a Jetson: its graph passes the
lint, and TensorRT-RTX builds it for a desktop GPU of the same generation. That is a strong check of
the graph, and no statement about a Jetson. --layers: the largest layers of Stable Diffusion 1.5,
one by one; bytes of the plan per weight tell whether quantization survived.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

from benchmarks.common import environment, parser, run, table, write_json
from edgesd.engines.tensorrt import BuildSpec, PlanReport, build_plan
from edgesd.export.backends.tensorrt import LOWERING
from edgesd.export.backends.tensorrt_lint import lint
from edgesd.export.calibrate import LayerStats
from edgesd.export.external_data import GRAPH_FILE, write_model
from edgesd.export.quantize.layers import find_layers, matrix_of
from edgesd.export.quantize.methods import get_method
from edgesd.export.quantize.quantize import quantize_layer
from edgesd.recipes import BuildOptions, LocalFolders, QuantOptions, build
from edgesd.runtime.bundle import open_bundle
from edgesd.spec.scheme import FLOATING, parse_scheme

TARGET = "jetson-agx-orin-64gb"
PRECISIONS = ("fp16", "bf16", "w8a8", "w4a16-g64-lr32")
LAYERS = {
    "3x3 convolution, 1280 to 1280": (1280, 1280, 3, 3),
    "1x1 convolution, 2560 to 1280": (1280, 2560, 1, 1),
    "linear, 1280 to 10240": (10240, 1280),
    "linear, 1280 to 1280": (1280, 1280),
}
_SPOT = 8


class Row(NamedTuple):
    """One plan. graph_mb, plan_mb: on disk, 10^6 bytes. gpu_mb, run_mb: memory of a GPU that its
    weights, and its activations, will take, as TensorRT says. peak_mb: of the process that built
    it; import_mb: of the same with TensorRT loaded and nothing read."""

    what: str
    precision: str
    weights_m: float
    graph_mb: float
    plan_mb: float
    bytes_per_weight: float
    gpu_mb: float
    run_mb: float
    seconds: float
    peak_mb: float
    import_mb: float


def row(what: str, precision: str, weights: int, graph_bytes: int, report: PlanReport) -> Row:
    """The figures of one report."""
    return Row(
        what=what,
        precision=precision,
        weights_m=weights / 1e6,
        graph_mb=graph_bytes / 1e6,
        plan_mb=report.plan_bytes / 1e6,
        bytes_per_weight=report.plan_bytes / weights,
        gpu_mb=(report.weight_bytes or 0) / 1e6,
        run_mb=(report.activation_bytes or 0) / 1e6,
        seconds=report.seconds,
        peak_mb=report.peak_bytes / 1e6,
        import_mb=report.import_bytes / 1e6,
    )


def weights_of(path: Path) -> int:
    """Weights of a graph that computes in floating point: elements of its float initializers."""
    model = ir.load(path)
    values = (value.const_value for value in model.graph.initializers.values())
    return sum(tensor.size for tensor in values if tensor and tensor.dtype.is_floating_point())


def pipeline_rows(model: str, precisions: list[str], work: Path, sm: str, quick: bool) -> list[Row]:
    """All components in all precisions."""
    rows = []
    how = QuantOptions(quality_prompts=())
    if quick:
        how = replace(how, method="rtn", calibration_prompts=("a red apple",), steps=2)
    for precision in precisions:
        out = work / "bundle"
        shutil.rmtree(out, ignore_errors=True)
        options = BuildOptions(TARGET, precision, LOWERING.name, quantization=how)
        built = build(model, options, out, LocalFolders(work))
        bundle = open_bundle(out)
        counted = built.reference or bundle
        for name, engine in bundle.manifest.engines.items():
            graph = out / engine.path
            weights = weights_of(counted.path / counted.manifest.engines[name].path)
            for finding in lint(graph):
                print(f"{name} {precision}: {finding}", flush=True)
            plan = work / "component.plan"
            report = build_plan(graph, BuildSpec(name, "tensorrt_rtx", sm), plan)
            rows.append(row(name, precision, weights, bundle.weight_bytes(name), report))
            print(table(Row._fields, rows[-1:]).splitlines()[-1], flush=True)
            plan.unlink()
        shutil.rmtree(out)
    return rows


def layer_rows(precisions: list[str], work: Path, sm: str) -> list[Row]:
    """Each of LAYERS in each precision, random weights, as a graph of its own."""
    rows = []
    for what, shape in LAYERS.items():
        for precision in precisions:
            folder = work / "layer"
            shutil.rmtree(folder, ignore_errors=True)
            write_model(_layer(shape, precision), folder)
            size = sum(path.stat().st_size for path in folder.iterdir())
            spec = BuildSpec("layer", "tensorrt_rtx", sm)
            report = build_plan(folder / GRAPH_FILE, spec, work / "layer.plan")
            rows.append(row(what, precision, int(np.prod(shape)), size, report))
            print(table(Row._fields, rows[-1:]).splitlines()[-1], flush=True)
    return rows


def _layer(shape: tuple[int, ...], precision: str) -> ir.Model:
    """A graph of one layer with a weight of that shape, outputs first."""
    rng = np.random.default_rng(0)
    conv = len(shape) == 4
    weight = rng.standard_normal(shape, dtype=np.float32) / np.float32(np.sqrt(np.prod(shape[1:])))
    attributes: dict[str, Any] = {}
    if conv:
        attributes = {"kernel_shape": shape[2:], "pads": [shape[2] // 2] * 4}
    dims = [2, shape[1], _SPOT, _SPOT] if conv else [2, _SPOT * _SPOT, shape[1]]
    node = helper.make_node(
        "Conv" if conv else "MatMul", ["x", "w"], ["y"], name="layer/op", **attributes
    )
    graph = helper.make_graph(
        [node],
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, dims)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(weight if conv else np.ascontiguousarray(weight.T), "w")],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    model = ir.serde.deserialize_model(onnx.shape_inference.infer_shapes(proto))
    if precision in FLOATING:
        LOWERING.lower(model, precision)
        return model
    (layer,) = find_layers("unet", model)
    found = matrix_of(model.graph[0], layer)
    rows = rng.standard_normal((64, layer.columns)).astype(np.float16)
    stats = LayerStats(
        low=np.full((1, layer.channels), -4, np.float32),
        high=np.full((1, layer.channels), 4, np.float32),
        blocks=tuple(
            np.eye(min(1280, layer.columns - at), dtype=np.float32) * 64
            for at in range(0, layer.columns, 1280)
        ),
        count=64,
        rows=rows,
        row_steps=np.zeros(64, np.int64),
    )
    method = get_method("rtn", static=True)
    quantized = quantize_layer(layer, found, stats, parse_scheme(precision), method)
    LOWERING.lower_quantized(model, {"layer/op": quantized}, (), None)
    return model


def main() -> None:
    made = parser(__doc__)
    made.add_argument("model", nargs="?", help="a folder, a hub id, or demo")
    made.add_argument("--work", type=Path, required=True, help="folder for what is kept")
    made.add_argument("--precisions", nargs="+", default=list(PRECISIONS))
    made.add_argument("--sm", default="sm_86", help="GPU that TensorRT-RTX builds for")
    made.add_argument(
        "--quick", action="store_true", help="round to nearest after two steps: sizes stay the same"
    )
    made.add_argument("--layers", action="store_true", help="the largest layers, one by one")
    given = made.parse_args()
    rows = layer_rows(given.precisions, given.work, given.sm) if given.layers else []
    if given.model:
        rows += pipeline_rows(given.model, given.precisions, given.work, given.sm, given.quick)
    print()
    print(table(Row._fields, rows))
    write_json(
        given.json,
        {
            "environment": environment("onnx"),
            "sm": given.sm,
            "rows": [found._asdict() for found in rows],
        },
    )


if __name__ == "__main__":
    run(main)
