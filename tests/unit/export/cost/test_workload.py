"""What is traced of a network that isn't one of convolutions."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from edgesd.export.cost.arena import arena_bytes  # noqa: E402
from edgesd.export.cost.cpu_lowering import EDGESD_INT8, Slots, lower_workload  # noqa: E402
from edgesd.export.cost.workload import Workload, split_joined, trace  # noqa: E402
from edgesd.export.quantize.assign import planned  # noqa: E402
from edgesd.spec.pipeline import TensorSpec  # noqa: E402
from edgesd.spec.scheme import parse_scheme  # noqa: E402

D, WIDE, TOKENS = 64, 192, 512


class _Block(torch.nn.Module):  # type: ignore[name-defined, misc]
    """Like one of FLUX's single blocks, with a way in and a way out."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.net = torch.nn.ModuleDict(
            {
                "enter": torch.nn.Linear(16, D),
                "left": torch.nn.Linear(D, D),
                "wide": torch.nn.Linear(D, WIDE),
                "out": torch.nn.Linear(D + WIDE, D),
                "leave": torch.nn.Linear(D, 16),
            }
        )

    def forward(self, x: Any) -> Any:
        net = self.net
        h = net["enter"](x)
        parts = [net["left"](h), torch.nn.functional.gelu(net["wide"](h), approximate="tanh")]
        if self.dim == 1:
            return net["leave"](torch.cat([h, parts[0]], 1))
        return net["leave"](h + net["out"](torch.cat(parts, self.dim)))


def traced(dim: int = -1) -> Workload:
    component: Any = SimpleNamespace(
        name="transformer",
        load=lambda weights: _Block(dim).to("meta"),
        spec=SimpleNamespace(inputs=[TensorSpec("x", "float32", (1, TOKENS, 16))]),
    )
    return trace(component, {})


@pytest.mark.parametrize("dim", [-1, 2])
def test_a_linear_of_joined_values_is_two(dim: int) -> None:
    whole = traced(dim)
    split = split_joined(whole)
    assert [la.name for la in whole.layers] == ["enter", "left", "wide", "out", "leave"]
    layers = {la.name: la for la in split.layers}
    assert list(layers) == ["enter", "left", "wide", "out.0", "out.1", "leave"]
    assert layers["out.1"].part == (D, D + WIDE) and layers["out.1"].module == "out"
    assert "concat" not in {op.kind for op in split.operations}
    assert sum(op.macs for op in split.operations) == sum(op.macs for op in whole.operations)
    first, second = (op for op in split.operations if op.layer and op.layer.module == "out")
    assert first.writes[0] in second.reads and not first.biased and second.biased
    assert second.writes == next(o for o in whole.operations if o.layer == whole.layers[3]).writes


def test_rows_that_are_joined_stay_so() -> None:
    workload = traced(1)
    assert split_joined(workload).operations == workload.operations


def test_ends_stay_in_fp16() -> None:
    schemes = planned(split_joined(traced()).layers, parse_scheme("w4a8-g64"))
    kept = {layer.name for layer, scheme in schemes.items() if scheme is None}
    assert kept == {"enter", "leave"}


def test_kernels_add_a_part_to_the_other_and_need_no_joined_values() -> None:
    whole = traced()
    scheme = parse_scheme("w8a8")
    split = split_joined(whole)
    made = lower_workload(split, dict.fromkeys(split.layers, scheme), True, False)
    parts = [op for op in made.operations if op.layer and op.layer.module == "out"]
    assert [op.form for op in parts] == [EDGESD_INT8] * 2
    assert [set(op.fused) for op in parts] == [set(), {"residual", "bias"}]
    before = lower_workload(whole, dict.fromkeys(whole.layers, scheme), True, False)
    assert arena_bytes([made]) < arena_bytes([before])


def test_a_slot_of_a_layer_that_is_split_is_counted() -> None:
    split = split_joined(traced())
    slots = Slots(8, frozenset(["out"]))
    made = lower_workload(split, {}, False, False, slots=slots)
    assert sum(op.kind == "matmul" for op in made.operations) == 4
