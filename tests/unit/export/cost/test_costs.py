"""Memory of a build, whatever the network's size; and of weights in `stream`."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("torch")

from edgesd.export.cost.costs import build_bytes, memory
from edgesd.export.cost.cpu_lowering import EDGESD_INT8
from edgesd.export.cost.workload import Operation, Workload
from edgesd.export.quantize.layers import Layer, layer_bytes
from edgesd.spec.scheme import parse_scheme

SDXL = 2_567_500_000


def test_weights_stay_in_their_files() -> None:
    assert build_bytes(SDXL, 1024 * 1024) == build_bytes(2 * SDXL, 1024 * 1024) < 10e9
    assert build_bytes(10**8, 0) < build_bytes(5 * 10**8, 0) < build_bytes(SDXL, 0)
    assert build_bytes(SDXL, 1) < build_bytes(SDXL, 512 * 512)


def test_what_our_kernels_do_not_run_is_unpacked_a_layer_at_a_time_in_stream() -> None:
    """Layers that see the timestep's row alone stay with ONNX Runtime."""
    rows = [
        Layer("unet", f"row{n}", f"row{n}", "linear", (n, 64), one_row=True) for n in (320, 640)
    ]
    large = Layer("unet", "large", "large", "linear", (2560, 640))
    scheme = parse_scheme("w8a8")
    choices = dict.fromkeys([*rows, large], scheme)
    forms = [*((row, "fp32") for row in rows), (large, EDGESD_INT8)]
    operations = tuple(
        Operation("linear", (at,), (at + 1,), layer, form=form)
        for at, (layer, form) in enumerate(forms)
    )
    on_disk = sum(layer_bytes(layer, scheme) for layer in choices)

    def found(*chosen: Operation) -> Any:
        return memory([Workload("unet", chosen, (4,) * 4, (0,), (3,), 0)], choices, on_disk)

    ours, stock = found(*operations), found(*operations[:2])
    unpacked, codes = [4 * 64 * n for n in (320, 640)], sum(layer_bytes(r, scheme) for r in rows)
    passing = layer_bytes(large, scheme)  # all that is mapped
    assert ours.weights == sum(unpacked) + layer_bytes(large, scheme)
    assert ours.streamed == max(unpacked) + codes + passing
    assert ours.in_file == codes + passing
    assert stock.streamed == stock.weights  # folded once
