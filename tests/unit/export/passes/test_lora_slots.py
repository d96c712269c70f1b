"""Slots for LoRAs: where they are, what they add, and that they are nothing while empty."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import onnx_ir as ir  # noqa: E402
import onnxruntime  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from edgesd.export.backends import get_lowering  # noqa: E402
from edgesd.export.backends.tensorrt_lint import lint  # noqa: E402
from edgesd.export.external_data import write_model  # noqa: E402
from edgesd.export.families import Component  # noqa: E402
from edgesd.export.passes.lora_slots import AddLoraSlots  # noqa: E402
from edgesd.export.passes.own_kernels import DOMAIN, INPUTS, LINEAR  # noqa: E402
from edgesd.export.quantize.layers import find_layers, matrix_of  # noqa: E402
from edgesd.export.quantize.quantize import rounded_layer  # noqa: E402
from edgesd.export.to_onnx import graph_from_module  # noqa: E402
from edgesd.runtime.arrays import Array  # noqa: E402
from edgesd.runtime.backends.onnxruntime import session_options  # noqa: E402
from edgesd.runtime.lora import fill_slots  # noqa: E402
from edgesd.spec.lora import LoraSlots, slot_inputs  # noqa: E402
from edgesd.spec.pipeline import ComponentSpec, TensorSpec  # noqa: E402
from edgesd.spec.scheme import parse_scheme  # noqa: E402
from tests.quantizing import normal  # noqa: E402

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("one_thread")]

WIDE, RANK = 32, 6
SLOTS = {"proj_in": (32, 32), "key": (32, 32), "gate": (32, 256), "out": (128, 32)}
SCHEMES = ("w8a8", "w4a8-g32", "w4a8-g32-lr4", "w4a16-g32")


class Block(nn.Module):
    """A transformer's block: pixels, tokens, a gated feed-forward, a timestep."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(WIDE, WIDE, 3, padding=1)
        self.proj_in = nn.Conv2d(WIDE, WIDE, 1)
        self.key = nn.Linear(WIDE, WIDE, bias=False)
        self.gate = nn.Linear(WIDE, 8 * WIDE)
        self.out = nn.Linear(4 * WIDE, WIDE)
        self.time = nn.Linear(WIDE, WIDE)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        x = self.proj_in(self.conv(x) + self.time(time)[:, :, None, None])
        rows = x.flatten(2).transpose(1, 2)
        rows = self.key(rows) + rows
        left, right = self.gate(rows).chunk(2, -1)
        found: Tensor = self.out(left * nn.functional.gelu(right)) + rows
        return found


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net = Block()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        found: Tensor = self.net(x, time)
        return found


def exported(fixed: bool) -> Any:
    sizes = {} if fixed else {"batch": 2, "height": 4, "width": 6}
    shape: tuple[Any, ...] = (2, WIDE, 4, 6) if fixed else ("batch", WIDE, "height", "width")
    pixels: Any = 24 if fixed else "pixels"
    spec = ComponentSpec(
        "unet",
        (TensorSpec("x", "float32", shape), TensorSpec("time", "float32", (shape[0], WIDE))),
        (TensorSpec("y", "float32", (shape[0], pixels, WIDE)),),
    )
    component = Component(spec, lambda weights=True: Net().eval(), (sizes,))
    return graph_from_module(Net().eval(), component, "ort-mha")


@pytest.fixture(scope="module")
def graph() -> Any:
    return exported(fixed=False)


def with_slots(graph: Any, fixed: bool = False) -> tuple[Any, LoraSlots]:
    model, adding = graph.clone(), AddLoraSlots("unet", RANK, fixed)
    adding(model)
    assert adding.slots is not None
    return model, adding.slots


def test_linears_of_single_rows_have_slots_where_they_are_all_that_there_is(graph: Any) -> None:
    """In what makes a denoiser's modulation."""
    model, adding = graph.clone(), AddLoraSlots("unet", RANK, fixed=False, rows=True)
    adding(model)
    assert adding.slots is not None
    _, others = with_slots(graph)
    more = {s.name for s in adding.slots.layers} - {s.name for s in others.layers}
    rows = {layer.name for layer in find_layers("unet", graph, 1) if layer.one_row}
    assert rows and more == rows


def quantized(model: Any, scheme: str) -> dict[str, Any]:
    nodes = {node.name: node for node in model.graph}
    parsed = parse_scheme(scheme)
    return {
        layer.node: rounded_layer(layer, matrix_of(nodes[layer.node], layer), parsed)
        for layer in find_layers("unet", model)
    }


def factors(slots: LoraSlots, rank: int = RANK - 1) -> dict[str, Array]:
    found: dict[str, Array] = {}
    for index, slot in enumerate(slots.layers):
        down, up = slot_inputs(index)
        found[down] = normal(slot.inputs, rank, seed=index) * np.float32(0.15)
        found[up] = normal(rank, slot.outputs, seed=-1 - index & 255) * np.float32(0.15)
    return found


INPUT = {"x": normal(2, WIDE, 4, 6, seed=5), "time": normal(2, WIDE, seed=6)}


def run(model: Any, folder: Path, given: Mapping[str, Array], library: Path | None = None) -> Array:
    write_model(model, folder)
    session = onnxruntime.InferenceSession(
        str(folder / "model.onnx"), session_options(1, library), ["CPUExecutionProvider"]
    )
    found: Array = session.run(None, {**INPUT, **given})[0]
    return found


def merged(slots: LoraSlots, given: Mapping[str, Array]) -> Array:
    """What the source makes with the factors in its weights."""
    net = Net().eval()
    with torch.inference_mode():
        for index, slot in enumerate(slots.layers):
            weight = net.net.get_submodule(slot.name).weight
            down, up = (torch.from_numpy(given[name]) for name in slot_inputs(index))
            weight += (down @ up).T.reshape(weight.shape)
        made: Array = net(*(torch.from_numpy(array) for array in INPUT.values())).numpy()
    return made


def off(found: Array, wanted: Array) -> float:
    return float(np.sqrt(((found - wanted) ** 2).mean() / (wanted**2).mean()))


def test_linears_of_tokens_and_convolutions_of_a_pixel_have_slots(graph: Any) -> None:
    _, slots = with_slots(graph)
    assert {slot.name: (slot.inputs, slot.outputs) for slot in slots.layers} == SLOTS
    assert {other.name: other.shape for other in slots.others} == {
        "conv": (WIDE, WIDE, 3, 3),
        "time": (WIDE, WIDE),
    }


def test_a_slot_adds_what_merging_adds(graph: Any, tmp_path: Path) -> None:
    model, slots = with_slots(graph)
    plain = run(graph.clone(), tmp_path / "plain", {})
    assert np.array_equal(run(model.clone(), tmp_path / "a", fill_slots(slots, {})), plain)
    given = factors(slots)
    found = run(model, tmp_path / "b", fill_slots(slots, given))
    assert off(found, merged(slots, given)) < 1e-5 < off(plain, merged(slots, given))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_slots_of_quantized_layers(
    scheme: str, graph: Any, own_kernels: Path | None, tmp_path: Path
) -> None:
    """In ONNX Runtime's operators and in edgesd's: empty ones change no bit, full ones add to what
    the codes make."""
    layers, lowering = quantized(graph, scheme), get_lowering("onnxruntime")
    for own in (False, True) if own_kernels and scheme != "w8a8" else (False,):
        graphs = []
        for model in (graph.clone(), with_slots(graph)[0]):
            lower = lowering.lower_to_kernels if own else lowering.lower_quantized
            lower(model, layers, (), None)
            graphs.append(model)
        plain, model = graphs
        library = own_kernels if any(node.domain == DOMAIN for node in model.graph) else None
        _, slots = with_slots(graph)
        empty, given = fill_slots(slots, {}), factors(slots)
        folder = tmp_path / str(own)
        without = run(plain, folder / "plain", {}, library)
        assert np.array_equal(run(model.clone(), folder / "empty", empty, library), without)
        found = run(model, folder / "full", fill_slots(slots, given), library)
        with_loss, wanted = off(without, merged(slots, empty)), merged(slots, given)
        assert off(found, wanted) < 1.5 * with_loss < off(found, without)


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8-g32-lr4"])
def test_edgesds_kernels_add_a_slots_product_themselves(scheme: str, graph: Any) -> None:
    model, _ = with_slots(graph)
    get_lowering("onnxruntime").lower_to_kernels(model, quantized(graph, scheme), (), None)
    linears = [node for node in model.graph if node.op_type == LINEAR]
    places = [INPUTS[LINEAR].index(name) for name in ("low", "up")]
    assert len(linears) == 3
    assert all(node.inputs[place] is not None for node in linears for place in places)
    gated = next(node for node in linears if (node.name or "").startswith("gate"))
    assert gated.attributes["gated"].as_int() == 1


@pytest.mark.parametrize("scheme", ["fp32", "fp16", "w8a16", "w4a16-g32-lr4"])
def test_tensorrt_takes_graphs_with_slots_of_one_rank(scheme: str, tmp_path: Path) -> None:
    graph = exported(fixed=True)
    model, slots = with_slots(graph, fixed=True)
    lowering = get_lowering("tensorrt")
    if scheme.startswith("w"):
        lowering.lower_quantized(model, quantized(graph, scheme), (), None)
    else:
        lowering.lower(model, scheme)
    given = factors(slots)
    found = run(model, tmp_path, fill_slots(slots, given))
    assert not lint(tmp_path / "model.onnx")
    written = ir.load(tmp_path / "model.onnx")
    shapes = {value.name: list(value.shape or ()) for value in written.graph.inputs}
    for index, slot in enumerate(slots.layers):
        down, up = slot_inputs(index)
        assert (shapes[down], shapes[up]) == ([slot.inputs, RANK], [RANK, slot.outputs])
    assert off(found, merged(slots, given)) < {"fp32": 1e-5, "fp16": 5e-3}.get(scheme, 0.2)
