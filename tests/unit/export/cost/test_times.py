"""One model of time: seconds of a machine, and what schemes are compared by, agree."""

from __future__ import annotations

import itertools

import pytest

from edgesd.export.cost.cpu_lowering import lower_workload
from edgesd.export.cost.times import RELATIVE_TIME, relative_time, seconds
from edgesd.export.cost.workload import Operation, Workload
from edgesd.export.quantize.assign import LayerScheme
from edgesd.export.quantize.layers import Layer
from edgesd.runtime.rates import Rate, Rates, Speed
from edgesd.spec.scheme import parse_scheme

LAYERS = [
    Layer("unet", "line", "line/MatMul", "linear", (640, 320)),
    Layer("unet", "conv", "conv/Conv", "conv", (64, 32, 3, 3), pads=(1, 1, 1, 1)),
]
SCHEMES = ("w8a8", "w8a16", "w4a8-g64", "w4a16-g64", None)
ROWS = 1024


def machine(eight_bits: bool) -> Speed:
    """One whose kernels take what RELATIVE_TIME says, in nanoseconds. eight_bits: of activations,
    by which MatMulNBits differs."""
    each = {
        "fp32": RELATIVE_TIME["fp32"],
        "int8": RELATIVE_TIME["int8"],
        "matmul_nbits": RELATIVE_TIME["nbits8" if eight_bits else "nbits16"],
    }
    rates = [
        Rate(kind, form, (10, 10, 10), 1e-6 * time)
        for kind, (form, time) in itertools.product(("conv", "linear"), each.items())
    ]
    return Speed(Rates("a machine", "1", None, 0, 0, tuple(rates)))


def alone(layer: Layer) -> Workload:
    """A network of one layer."""
    macs = ROWS * layer.rows * layer.columns
    op = Operation(layer.kind, (0,), (1,), layer, macs=macs, rows=ROWS)
    size = 4 * ROWS * layer.columns
    return Workload("unet", (op,), (size, 4 * ROWS * layer.rows), (0,), (1,), macs // ROWS)


def scheme_of(name: str | None) -> LayerScheme:
    return None if name is None else parse_scheme(name)


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.kind)
def test_relative_times_are_those_of_a_machine_with_such_kernels(
    layer: Layer, name: str | None
) -> None:
    scheme = scheme_of(name)
    work = lower_workload(alone(layer), {layer: scheme}, False, False)
    speed = machine(scheme is None or scheme.activation_bits == 8)
    assert seconds(work, speed) == pytest.approx(1e-9 * relative_time(layer, scheme, ROWS))


def test_a_branch_and_wide_activations_take_time() -> None:
    line = LAYERS[0]
    times = [
        relative_time(line, scheme_of(name), 100)
        for name in ("w8a8", "w4a8-g64", "w4a8-g64-lr8", None)
    ]
    assert times[0] < times[1] < times[2] and times[0] < times[3]
    assert relative_time(line, parse_scheme("w8a8"), 200) == 2 * times[0]
