"""FLUX's sums over its layers, where they exceed fp16: kept in fp32, they give the fp32 result."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import numpy as np
import onnx
import onnx_ir as ir
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from edgesd.export.backends import onnxruntime, tensorrt  # noqa: E402
from edgesd.export.families.checkpoint import Checkpoint  # noqa: E402
from edgesd.export.families.parts.flux_transformer import (  # noqa: E402
    MODULATION,
    FluxTransformer,
    flux_transformer,
)
from edgesd.export.families.parts.shapes import fixed_shape  # noqa: E402
from edgesd.export.parity import relative_rms  # noqa: E402
from edgesd.export.passes.fp32_region import Fp32Region  # noqa: E402
from edgesd.export.passes.record_largest import LARGEST  # noqa: E402
from edgesd.export.passes.split_concat import SplitConcat  # noqa: E402
from edgesd.export.quiet import quiet  # noqa: E402
from edgesd.export.to_onnx import graph_from_module  # noqa: E402
from edgesd.recipes.fp16_ranges import LIMIT, measuring  # noqa: E402
from edgesd.runtime.arrays import Array  # noqa: E402
from edgesd.spec.pipeline import LatentSpec  # noqa: E402
from tests import tiny_pipelines  # noqa: E402
from tests.quantizing import evaluate, normal, rounded_layers, run_graph  # noqa: E402

TOKENS, SIDE = 12, 32
OUTPUTS = ("to_out.0", "to_add_out", ".net.2", "blocks.0.proj_out")
"""Linears whose results blocks add to their sums."""


def network(loud: float, peak: float) -> Any:
    """A double and a single block. loud: what weights of those linears are multiplied with; peak:
    what they add to one channel, which is always the same."""
    torch.manual_seed(0)
    net = tiny_pipelines.flux_transformer(num_layers=1, num_single_layers=1).eval()
    found = [module for name, module in net.named_modules() if name.endswith(OUTPUTS)]
    assert len(found) == 5
    with torch.no_grad():
        for module in found:
            module.weight *= loud
            module.bias[0] = peak
    return net


Case = tuple[bytes, Mapping[str, Array], Array]
"""A graph, its inputs, and what torch makes of them in fp32."""


def case(loud: float, peak: float = 0.0) -> Case:
    net = network(loud, peak)
    latents = LatentSpec(net.config.in_channels // 4, 8, 1.0)
    nothing = cast(Checkpoint, None)  # it is loaded already
    shape = fixed_shape((SIDE, SIDE), 1, 16, 16)
    component = flux_transformer(nothing, "transformer", net.config, TOKENS, shape, latents)
    module = FluxTransformer(net, 8, 8).eval()
    shapes = {each.name: cast(tuple[int, ...], each.shape) for each in component.spec.inputs}
    inputs = {name: normal(*size, seed=at) for at, (name, size) in enumerate(shapes.items())}
    inputs[MODULATION] = 1 + inputs[MODULATION] / 16
    with torch.no_grad():
        wanted = module(**{name: torch.from_numpy(value) for name, value in inputs.items()})
    with quiet():
        graph = graph_from_module(module, component, "ort-mha")
    return ir.to_proto(graph).SerializeToString(), inputs, np.asarray(wanted)


@pytest.fixture(scope="module")
def sums() -> Case:
    """Terms that fp16 holds, whose sum it doesn't."""
    return case(2e3, 26e3)


@pytest.fixture(scope="module")
def terms() -> Case:
    """It holds no term, either."""
    return case(1e5)


BOTH = pytest.mark.parametrize("name", ["sums", "terms"])


def model_of(case: Case) -> ir.Model:
    return ir.from_proto(onnx.load_from_string(case[0]))


def error_of(model: ir.Model, case: Case) -> float:
    """RMS of the difference from fp32, beside that of the output."""
    (found,) = evaluate(model, case[1])
    return relative_rms(found, case[2])


Lower = Callable[[ir.Model], None]


def protected(lower: Lower, case: Case) -> tuple[ir.Model, set[str]]:
    """The graph that `lower` writes, as fp16_ranges.py leaves it, and what it keeps in fp32."""
    model, seen = model_of(case), model_of(case)
    lower(seen)
    raw, names = measuring(seen)
    (sizes,) = run_graph(ir.from_proto(onnx.load_from_string(raw)), case[1], [LARGEST])
    found = {name for name, size in zip(names, sizes, strict=True) if not size <= LIMIT}
    lower(model)
    Fp32Region(found)(model)
    return model, found


def in_fp16(model: ir.Model) -> None:
    tensorrt.LOWERING.lower(model, "fp16")


@BOTH
def test_sums_beyond_fp16_stay_in_fp32(name: str, request: pytest.FixtureRequest) -> None:
    given: Case = request.getfixturevalue(name)
    plain = model_of(given)
    in_fp16(plain)
    assert not error_of(plain, given) < 0.5
    model, found = protected(in_fp16, given)
    assert error_of(model, given) < 0.01
    assert found
    wide = {
        node.name
        for node in model.graph
        if node.op_type == "MatMul" and node.outputs[0].dtype == ir.DataType.FLOAT
    }
    assert len(wide) == (0 if name == "sums" else 5), wide


@pytest.mark.parametrize(("scheme", "limit"), [("w4a16-g32-lr4", 0.2), ("w8a8", 0.1)])
@BOTH
def test_those_of_quantized_layers_do(
    name: str, scheme: str, limit: float, request: pytest.FixtureRequest
) -> None:
    given: Case = request.getfixturevalue(name)
    split = model_of(given)
    SplitConcat()(split)
    layers = rounded_layers(split, given[1], scheme, static=True)

    def quantized(model: ir.Model) -> None:
        SplitConcat()(model)
        tensorrt.LOWERING.lower_quantized(model, layers, (), None)

    plain = model_of(given)
    quantized(plain)
    assert not error_of(plain, given) < 0.5
    assert error_of(protected(quantized, given)[0], given) < limit


@pytest.mark.parametrize(("scheme", "limit"), [(None, 0.01), ("w8a8", 0.1), ("w4a8-g32-lr4", 0.3)])
def test_a_cpu_has_no_values_in_fp16(scheme: str | None, limit: float, terms: Case) -> None:
    """Weights alone are, and branches."""
    model = model_of(terms)
    if scheme is None:
        onnxruntime.LOWERING.lower(model, "fp16")
    else:
        SplitConcat()(model)
        layers = rounded_layers(model, terms[1], scheme)
        onnxruntime.LOWERING.lower_quantized(model, layers, (), None)
    halves = {value.dtype for value in model.graph.initializers.values()}
    assert scheme == "w8a8" or ir.DataType.FLOAT16 in halves
    (found,) = run_graph(model, terms[1], [model.graph.outputs[0].name or ""])
    assert relative_rms(found, terms[2]) < limit
    assert not measuring(model)[1]
