"""One table of fusions: the passes that fuse and the cost model apply it alike."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

import pytest

ir = pytest.importorskip("onnx_ir")
torch = pytest.importorskip("torch")

from torch import Tensor, nn  # noqa: E402

from edgesd.export.cost.cpu_lowering import lower_workload  # noqa: E402
from edgesd.export.cost.workload import Operation, Workload, trace  # noqa: E402
from edgesd.export.families import Component  # noqa: E402
from edgesd.export.families.parts.flux_transformer import (  # noqa: E402
    FluxTransformer,
    modulation_width,
)
from edgesd.export.passes.fusions import FUSIONS, LORA, Fusion  # noqa: E402
from edgesd.export.passes.own_kernels import INPUTS, OwnKernels  # noqa: E402
from edgesd.export.quantize.layers import find_layers, matrix_of  # noqa: E402
from edgesd.export.quantize.quantize import rounded_layer  # noqa: E402
from edgesd.export.to_onnx import graph_from_module  # noqa: E402
from edgesd.runtime import kernels  # noqa: E402
from edgesd.spec.pipeline import ComponentSpec, TensorSpec  # noqa: E402
from edgesd.spec.scheme import parse_scheme  # noqa: E402
from tests.quantizing import Fused, fused_in  # noqa: E402
from tests.tiny_pipelines import WIDTH, flux_transformer  # noqa: E402

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("one_thread")]

WIDE = 32
Table = tuple[Fusion, ...]


class Named(nn.Module):
    """As families wrap networks: the layers' names are those within `net`."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Network()

    def forward(self, x: Tensor, time: Tensor, rows: Tensor) -> tuple[Tensor, ...]:
        found: tuple[Tensor, ...] = self.net(x, time, rows)
        return found


class Network(nn.Module):
    """A layer beside each fusion, named like it, and layers beside what can't be fused."""

    def __init__(self) -> None:
        super().__init__()
        convs = ("offset", "residual", "relu", "upsample", "silu", "group_norm")
        for name in (*convs, "sums", "all_before", "backwards", "normed_twice", "read_twice"):
            setattr(self, name, nn.Conv2d(WIDE, WIDE, 3, padding=1))
        for name in ("bias", "bare", "rows"):
            setattr(self, name, nn.Linear(WIDE, WIDE, bias=name != "bare"))
        self.geglu = nn.Linear(WIDE, 2 * WIDE)
        for name in ("gelu", "gate", "exact", "gate_of_rows"):
            setattr(self, name, nn.Linear(WIDE, WIDE, bias=False))
        self.tanh = nn.Linear(WIDE, 2 * WIDE)
        norms = ("group_norm", "all_before", "backwards", "normed_twice")
        self.norms = nn.ModuleDict({name: nn.GroupNorm(4, WIDE) for name in norms})

    def forward(self, x: Tensor, time: Tensor, rows: Tensor) -> tuple[Tensor, ...]:
        silu, norms, up = nn.functional.silu, self.norms, nn.functional.interpolate
        # Equal operations on equal values become one in a graph.
        x1, x2, x3, x4, x5 = (x * float(number) for number in range(2, 7))
        left, right = self.geglu(rows).chunk(2, -1)
        coarse, other = self.tanh(rows).chunk(2, -1)
        normed = norms["normed_twice"](x4)
        twice = self.read_twice(x)
        summed = self.sums(x) + time[:, :, None, None] + x
        return (
            self.offset(x) + time[:, :, None, None],
            self.residual(x) + x,
            nn.functional.relu(self.relu(x)),
            self.upsample(up(x, scale_factor=2.0)),
            self.silu(silu(x1)),
            self.group_norm(norms["group_norm"](x2)),
            nn.functional.relu(summed) + x,
            self.all_before(up(silu(norms["all_before"](x3)), scale_factor=2.0)),
            self.backwards(norms["backwards"](silu(x5))),
            self.normed_twice(normed),
            normed,
            nn.functional.relu(twice) + twice,
            self.bias(rows),
            self.bare(rows) + rows,
            self.rows(rows) + rows + rows,
            left * nn.functional.gelu(right),
            coarse * nn.functional.gelu(other, approximate="tanh"),
            nn.functional.gelu(self.gelu(rows), approximate="tanh"),
            nn.functional.gelu(self.exact(rows)),
            rows + time[:, None] * self.gate(rows),
            rows + rows * self.gate_of_rows(rows),
        )


EXPECTED: dict[str, set[str]] = {
    **{fusion.name: {fusion.name} for fusion in FUSIONS},
    "geglu": {"bias", "geglu"},
    "sums": {"offset", "residual", "relu"},
    "all_before": {"upsample", "silu", "group_norm"},
    "backwards": {"group_norm"},  # SiLU lies before the normalization
    "normed_twice": set(),
    "read_twice": set(),
    "bare": {"residual"},
    "rows": {"bias", "residual"},  # one sum of two
    "exact": set(),
    "gate_of_rows": set(),  # a factor of each value isn't the timestep's
    "tanh": {"bias"},  # an approximation isn't what the kernel computes
}


@pytest.fixture(scope="module")
def network() -> tuple[Any, Workload]:
    """Exported, and traced."""
    torch.manual_seed(0)
    inputs = (
        TensorSpec("x", "float32", ("batch", WIDE, "height", "width")),
        TensorSpec("time", "float32", ("batch", WIDE)),
        TensorSpec("rows", "float32", ("batch", "tokens", WIDE)),
    )
    example = (torch.zeros(1, WIDE, 4, 4), torch.zeros(1, WIDE), torch.zeros(1, 8, WIDE))
    with torch.no_grad():
        made = Network()(*example)
    image, rows = ("batch", WIDE, "high", "wide"), ("batch", "tokens", WIDE)
    outputs = tuple(
        TensorSpec(f"y{number}", "float32", image if value.dim() == 4 else rows)
        for number, value in enumerate(made)
    )

    def load(weights: bool = True) -> nn.Module:
        with torch.device("cpu" if weights else "meta"):
            return Named().eval()

    sizes = {"batch": 2, "height": 8, "width": 8, "tokens": 16}
    component = Component(ComponentSpec("unet", inputs, outputs), load, (sizes,))
    return graph_from_module(load(), component, "ort-mha"), trace(component, sizes)


def lowered(graph: Any, scheme: str, fusions: Iterable[Fusion] = FUSIONS) -> Any:
    """A copy of the graph for edgesd's own kernels."""
    model = graph.clone()
    nodes = {node.name: node for node in model.graph}
    layers = {
        layer.node: rounded_layer(layer, matrix_of(nodes[layer.node], layer), parse_scheme(scheme))
        for layer in find_layers("unet", model)
    }
    OwnKernels(layers, None, fusions=fusions)(model)
    return model


def fused_by_cost_model(
    workload: Workload, scheme: str, fusions: Iterable[Fusion] = FUSIONS
) -> Fused:
    schemes = {layer: parse_scheme(scheme) for layer in workload.layers}
    found = lower_workload(workload, schemes, True, True, fusions=fusions).operations
    return {op.layer.name: set(op.fused) for op in found if op.layer is not None}


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8-g32", "w4a8-g32-lr4"])
def test_pass_and_cost_model_fuse_the_same(network: tuple[Any, Workload], scheme: str) -> None:
    graph, workload = network
    branches = "lr" in scheme
    found = fused_in(lowered(graph, scheme).graph, branches)
    assert fused_by_cost_model(workload, scheme) == found
    # A convolution's low-rank branch comes in where another branch's values would; and it reads the
    # input, so that this isn't read once.
    before = {fusion.name for fusion in FUSIONS if fusion.side == "prologue"}
    convolutions = {layer.name for layer in workload.layers if layer.kind == "conv"}
    left_out = {"residual", *before} if branches else set()
    behind_them = {"sums": {"relu"}} if branches else {}
    for layer, names in EXPECTED.items():
        less = left_out if layer in convolutions else set()
        assert found[layer] == names - less - behind_them.get(layer, set()), layer


@pytest.mark.parametrize("fusion", FUSIONS, ids=lambda fusion: fusion.name)
def test_an_entry_less_changes_both(network: tuple[Any, Workload], fusion: Fusion) -> None:
    graph, workload = network
    fewer = [other for other in FUSIONS if other is not fusion]
    whole = fused_in(lowered(graph, "w8a8").graph)
    found = fused_in(lowered(graph, "w8a8", fewer).graph)
    assert fusion.name in whole[fusion.name]
    assert not any(fusion.name in names for names in found.values())
    assert fused_by_cost_model(workload, "w8a8", fewer) == found


@pytest.mark.parametrize("fusion", FUSIONS, ids=lambda fusion: fusion.name)
def test_what_is_not_fused_is_an_operation_of_its_own(
    network: tuple[Any, Workload], fusion: Fusion
) -> None:
    _, workload = network
    schemes = {layer: parse_scheme("w8a8") for layer in workload.layers}

    def count(fusions: Iterable[Fusion]) -> int:
        return len(lower_workload(workload, schemes, True, True, fusions=fusions).operations)

    assert count([other for other in FUSIONS if other is not fusion]) > count(FUSIONS)


def test_the_operators_have_what_the_table_names() -> None:
    """In kernels/ops.cpp: inputs at the places where the passes put them, and the attributes."""
    source = (kernels.SOURCES / "ops.cpp").read_text()
    parts = {name: source.index(f"\nstruct {name} {{") for name in (*INPUTS, "QuantAttention")}
    for name, inputs in INPUTS.items():
        begin = parts[name]
        body = source[begin : min(end for end in parts.values() if end > begin)]
        kind = {"QuantConv": "conv", "QuantLinear": "linear"}[name]
        assert f"INPUTS = {len(inputs)}," in body
        for fusion in (*FUSIONS, LORA):
            if kind not in fusion.layers:
                continue
            for given in fusion.inputs:
                place = inputs.index(given)
                assert re.search(rf'run\.(floats\({place}, "{given}"|{given}\({place}),', body)
            for attribute in fusion.attributes:
                assert f'kernel.integer("{attribute}"' in body


def joint_attention(read: bool) -> Workload:
    """Two tensors' queries and keys (0 to 3), normalized, joined and rotated (by 6, 7); values (4,
    5) joined. read: the joined queries are read by somebody else, too."""
    operations = [
        *(Operation("rms_norm", (value,), (10 + value,)) for value in range(4)),
        *(Operation("concat", (a, a + 1), (20 + a,)) for a in (10, 12)),
        Operation("concat", (4, 5), (34,)),
        *(Operation("rotary", (value, 6, 7), (10 + value,)) for value in (30, 32)),
        Operation("attention", (40, 42, 34), (50,), heads=(1, 2, 16, 16, 8)),
    ]
    outputs = (50, 30) if read else (50,)
    return Workload("transformer", tuple(operations), (1024,) * 51, tuple(range(8)), outputs, 0)


@pytest.mark.parametrize("attention", [True, False])
@pytest.mark.parametrize("read", [True, False])
def test_what_comes_before_attention_becomes_part_of_it(read: bool, attention: bool) -> None:
    workload = joint_attention(read)
    found = lower_workload(workload, {}, True, attention).operations
    if not attention:
        assert [op.kind for op in found] == [op.kind for op in workload.operations]
    elif read:
        assert [op.kind for op in found] == ["rms_norm"] * 2 + ["concat", "attention"]
        assert set(found[-1].reads) == {30, 2, 3, 4, 5, 6, 7}
    else:
        (op,) = found
        assert set(op.reads) == set(range(8))


@pytest.fixture(scope="module")
def flux() -> tuple[Any, Workload]:
    """A FLUX transformer with two blocks of each kind, exported, and traced."""
    torch.manual_seed(0)
    net = flux_transformer().eval().requires_grad_(False)
    image = ("batch", 4, "height", "width")
    inputs = (
        TensorSpec("sample", "float32", image),
        TensorSpec("encoder_hidden_states", "float32", ("batch", 6, 2 * WIDTH)),
        TensorSpec("modulation", "float32", ("batch", modulation_width(net.config))),
    )
    outputs = (TensorSpec("noise_pred", "float32", image),)

    def load(weights: bool = True) -> nn.Module:
        if weights:
            return FluxTransformer(net, 16, 8).eval()
        with torch.device("meta"):
            return FluxTransformer(flux_transformer().eval(), 16, 8, "meta").eval()

    sizes = {"batch": 2, "height": 8, "width": 12}
    component = Component(ComponentSpec("transformer", inputs, outputs), load, (sizes,))
    workload = trace(component, sizes)
    return graph_from_module(load(), component, "ort-mha"), workload


def test_blocks_of_flux_become_layers_and_attention(flux: tuple[Any, Workload]) -> None:
    graph, workload = flux
    own = lowered(graph, "w4a8-g16")
    counts = Counter(node.op_type for node in own.graph)
    assert counts["QuantAttention"] == 4
    assert counts["RotaryEmbedding"] == counts["SimplifiedLayerNormalization"] == 0
    assert counts["Gelu"] == 0
    fused = fused_in(own.graph)
    assert sum("gate" in names for names in fused.values()) == 2 * 4 + 2
    assert sum("gelu" in names for names in fused.values()) == 2 * 2 + 2
    schemes = {layer: parse_scheme("w4a8-g16") for layer in workload.layers}
    found = lower_workload(workload, schemes, True, True).operations
    assert not {op.kind for op in found} & {"rotary", "rms_norm", "gelu_tanh"}
    told = {op.layer.name: set(op.fused) for op in found if op.layer is not None}
    assert {name: names for name, names in told.items() if name in fused} == fused
