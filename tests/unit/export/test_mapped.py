"""Networks that compute in fp32 with weights that stay in their files."""

from __future__ import annotations

import copy
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from torch import nn  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode  # noqa: E402

from edgesd.errors import EdgesdError  # noqa: E402
from edgesd.export import mapped  # noqa: E402
from edgesd.export.families import Component  # noqa: E402
from edgesd.export.mapped import hold_mapped, release, state_of  # noqa: E402
from edgesd.export.parity import example_inputs  # noqa: E402
from edgesd.export.passes.bind import BoundTensor  # noqa: E402
from edgesd.export.source import resolve_source  # noqa: E402
from edgesd.export.to_onnx import graph_from_module  # noqa: E402
from edgesd.spec.pipeline import ComponentSpec, TensorSpec  # noqa: E402
from tests.models import EMOJI  # noqa: E402

pytestmark = pytest.mark.integration
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


def component_of(root: Path, name: str = "unet") -> Component:
    source = resolve_source(root)
    components = source.family.export_spec(source, None, None, 1).components
    return next(component for component in components if component.name == name)


def outputs(module: Any, part: Component) -> Any:
    inputs = example_inputs(part, part.sizes[-1], seed=1)
    with torch.inference_mode():
        return module(*(torch.from_numpy(array) for array in inputs.values()))


def is_mapped(tensor: torch.Tensor, file: Path) -> bool:
    """Whether a tensor's values are those of the file, and no copy of them."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, last = (int(address, 16) for address in line.split()[0].split("-"))
        if first <= tensor.data_ptr() < last:
            return line.endswith(str(file))
    return False


class Toy(nn.Module):
    """A layer, a parameter of its own, and two layers that share a weight. [n, 4] -> [n, 4]"""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.register_buffer("shift", torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[0] == 0:
            raise ValueError("no rows")
        return self.second(self.first(x) * self.scale) + self.shift  # type: ignore[no-any-return]


@pytest.fixture
def toy() -> Toy:
    torch.manual_seed(0)
    return Toy().half().eval().requires_grad_(False)


def on_meta(module: nn.Module) -> bool:
    return all(p.is_meta and p.dtype == torch.float32 for p in module.parameters())


def test_computes_as_the_same_network_in_fp32(toy: Toy) -> None:
    wide, x = copy.deepcopy(toy).float(), torch.randn(3, 4)
    hold_mapped(toy)
    assert on_meta(toy)
    assert torch.equal(toy(x), wide(x))
    assert on_meta(toy)


@pytest.mark.parametrize("inference", [False, True])
def test_large_linears_compute_in_the_same_memory(
    inference: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mapped, "_LARGE", 100)
    monkeypatch.setattr(mapped, "_memory", threading.local())
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 40), nn.Linear(40, 4))
    net = net.bfloat16().requires_grad_(False)
    plain = copy.deepcopy(net).float()
    hold_mapped(net)
    x = torch.randn(3, 20)
    seen: list[int] = []
    for layer in net:
        layer.register_forward_hook(
            lambda module, *_: (
                seen.append(module.weight.data_ptr()) if isinstance(module, nn.Linear) else None
            ),
            prepend=True,
        )
    for _ in range(2):
        with torch.inference_mode(inference):
            found = net(x)
        assert torch.equal(found, plain(x))
    with torch.inference_mode(not inference):
        assert torch.equal(net(x), plain(x))
    assert seen[1] == seen[2] == seen[3] and mapped._memory.kept.numel() == 1200


def test_weights_leave_a_layer_that_fails(toy: Toy) -> None:
    hold_mapped(toy)
    with pytest.raises(ValueError, match="no rows"):
        toy(torch.zeros(0, 4))
    assert on_meta(toy)


def test_state(toy: Toy) -> None:
    wanted = dict(toy.state_dict())
    hold_mapped(toy)
    assert toy.first.weight is toy.second.weight
    for state in (state_of(toy), release(toy, FakeTensorMode())):
        assert set(state) == set(wanted)
        for name, tensor in state.items():
            assert torch.equal(tensor, wanted[name].to(tensor.dtype)), name
        assert state["first.weight"].dtype == torch.float16
    assert all(isinstance(tensor, FakeTensor) for tensor in toy.state_dict().values())
    assert toy.first.weight is toy.second.weight


@pytest.mark.parametrize("stored", ["float16", "bfloat16", "float32", "both"])
def test_files_of_all_types(stored: str, tmp_path: Path) -> None:
    """Mapped in the type that the file has, where it has one."""
    from safetensors.torch import load_file, save_file

    model = Path(shutil.copytree(EMOJI, tmp_path / "model"))
    types = [torch.float16, torch.float32] if stored == "both" else [getattr(torch, stored)]
    given = load_file(model / WEIGHTS)
    tensors = {n: t.to(types[i % len(types)]) for i, (n, t) in enumerate(given.items())}
    save_file(tensors, model / WEIGHTS, metadata={"format": "pt"})
    module = component_of(model).load()
    state = {name.removeprefix("net."): value for name, value in state_of(module).items()}
    assert set(state) == set(tensors)
    for name, tensor in state.items():
        assert tensor.dtype == (torch.float32 if stored == "both" else types[0])
        assert torch.equal(tensor, tensors[name].to(tensor.dtype))
    assert stored == "both" or all(is_mapped(tensor, model / WEIGHTS) for tensor in state.values())
    wide = {f"net.{name}": tensor.float() for name, tensor in tensors.items()}
    plain = component_of(EMOJI).load()
    release(plain, FakeTensorMode())
    plain.load_state_dict(wide, assign=True)
    assert torch.equal(outputs(module, component_of(model)), outputs(plain, component_of(model)))


def test_a_graph_reads_its_weights_where_they_are() -> None:
    component = component_of(EMOJI, "text_encoder")
    module = component.load()
    state = {name.removeprefix("net."): value for name, value in state_of(module).items()}
    model = graph_from_module(module, component, "ort-mha")
    bound = [v.const_value for v in model.graph.initializers.values()]
    bound = [tensor for tensor in bound if isinstance(tensor, BoundTensor)]
    assert sum(tensor.size for tensor in bound) > 0.9 * sum(t.numel() for t in state.values())
    for tensor in bound:
        wanted = state[tensor.source.removeprefix("net.")].float().numpy()
        assert np.array_equal(tensor.numpy(), wanted.T if tensor.transposed else wanted)
    assert any(tensor.transposed for tensor in bound)


def test_a_weight_without_values_is_an_error(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = ComponentSpec(
        "toy", (TensorSpec("x", "float32", (2, 4)),), (TensorSpec("y", "float32", (2, 4)),)
    )
    component = Component(spec, Toy, ({},))
    hold_mapped(toy)
    monkeypatch.setattr("edgesd.export.to_onnx.release", lambda *given: release(*given) and {})
    with pytest.raises(EdgesdError, match="is no weight of its network"):
        graph_from_module(toy, component, "ort-mha")


class Turned(nn.Module):
    """Weights that are read turned: a layer's, one that two nodes read, and one of three axes."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(128, 96, bias=False)
        self.twice = nn.Parameter(torch.randn(128, 128))
        self.cube = nn.Parameter(torch.randn(24, 32, 24))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layer(x + x @ self.twice.t() + x @ self.twice)
        cube = self.cube.permute(2, 0, 1) * y.sum()
        return y + cube.mean(0).mean(0).sum()  # type: ignore[no-any-return]


def test_weights_that_are_read_turned(tmp_path: Path) -> None:
    """Matrices are turned as they are read; whatever else is, in the graph."""
    from edgesd.export.external_data import write_model
    from edgesd.export.parity import check_parity, reference_cases

    torch.manual_seed(0)
    spec = ComponentSpec(
        "toy", (TensorSpec("x", "float32", (2, 128)),), (TensorSpec("y", "float32", (2, 96)),)
    )
    component = Component(spec, Turned, ({}, {}))
    module = Turned().eval().requires_grad_(False)
    hold_mapped(module)
    cases = reference_cases(module, component)
    write_model(graph_from_module(module, component, "ort-mha"), tmp_path)
    assert check_parity(tmp_path / "model.onnx", component, cases, "fp32").rel_rms < 1e-5
