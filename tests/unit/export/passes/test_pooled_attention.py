"""Pooled keys and values: the graph beside torch, what is pooled and what isn't."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

import onnx  # noqa: E402
import onnx_ir as ir  # noqa: E402
import onnxruntime  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from edgesd.export.backends.onnxruntime import LOWERING  # noqa: E402
from edgesd.export.external_data import write_model  # noqa: E402
from edgesd.export.families import Component  # noqa: E402
from edgesd.export.families.parts.unet import Unet  # noqa: E402
from edgesd.export.passes.pooled_attention import PooledAttention  # noqa: E402
from edgesd.export.quantize.layers import (  # noqa: E402
    QuantizedLayer,
    find_layers,
    load_layer,
    matrix_of,
    save_layer,
)
from edgesd.export.quantize.methods import get_method  # noqa: E402
from edgesd.export.quantize.quantize import quantize_layer  # noqa: E402
from edgesd.export.to_onnx import graph_from_module  # noqa: E402
from edgesd.runtime.backends.onnxruntime import session_options  # noqa: E402
from edgesd.spec.base import Dim  # noqa: E402
from edgesd.spec.pipeline import ComponentSpec, TensorSpec  # noqa: E402
from edgesd.spec.scheme import parse_scheme  # noqa: E402
from tests.quantizing import normal, record  # noqa: E402

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("one_thread")]

TOKENS, CONTEXT = 7, 32
TOP = ["down_blocks.0.attentions.0", "up_blocks.1.attentions.0", "up_blocks.1.attentions.1"]
LOWER = ["down_blocks.1.attentions.0", "up_blocks.0.attentions.0", "up_blocks.0.attentions.1"]
Feed = dict[str, Any]


BOTH: tuple[str, ...] = ("CrossAttn", "CrossAttn")
"""Which levels of a UNet have attention, the latents' own size first."""
THREE = ("", "CrossAttn", "CrossAttn")


def unet(levels: tuple[str, ...] = BOTH) -> Any:
    """Random weights, the same each time."""
    torch.manual_seed(0)
    net = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64, 64)[: len(levels)],
        down_block_types=tuple(f"{kind}DownBlock2D" for kind in levels),
        mid_block_type=None,
        up_block_types=tuple(f"{kind}UpBlock2D" for kind in reversed(levels)),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=2,
        cross_attention_dim=CONTEXT,
    )
    return net.eval().requires_grad_(False)


@cache
def exported(levels: tuple[str, ...], size: tuple[int, int] | None) -> onnx.ModelProto:
    batch: Dim = "batch" if size is None else 2
    height, width = size or ("height", "width")
    sample: tuple[Dim, ...] = (batch, 4, height, width)
    spec = ComponentSpec(
        "unet",
        (
            TensorSpec("sample", "float32", sample),
            TensorSpec("timestep", "float32", (1,)),
            TensorSpec("encoder_hidden_states", "float32", (batch, TOKENS, CONTEXT)),
        ),
        (TensorSpec("noise_pred", "float32", sample),),
    )
    example = {} if size else {"batch": 2, "height": 12, "width": 16}
    multiple = 2 ** (len(levels) - 1)
    net = unet(levels)
    component = Component(spec, lambda: net, (example,), {"height": multiple, "width": multiple})
    return ir.serde.serialize_model(graph_from_module(Unet(net), component, "ort-mha"))


def graph(size: tuple[int, int] | None, levels: tuple[str, ...] = BOTH) -> ir.Model:
    """Its graph, for images of any size or of a height and width in latents."""
    return ir.serde.deserialize_model(exported(levels, size))


def feed(height: int, width: int) -> Feed:
    return {
        "sample": normal(2, 4, height, width),
        "timestep": np.array([300], np.float32),
        "encoder_hidden_states": normal(2, TOKENS, CONTEXT, seed=1),
    }


def answer(model: ir.Model, folder: Path, given: Feed, library: Path | None = None) -> Any:
    write_model(model, folder)
    session = onnxruntime.InferenceSession(
        str(folder / "model.onnx"), session_options(1, library), ["CPUExecutionProvider"]
    )
    return session.run(None, given)[0]


def by_hand(net: Any, names: list[str], given: Feed) -> Any:
    """torch's answer when attn1 of these blocks has the means of 2x2 tokens for its context."""
    height, width = given["sample"].shape[2:]
    calls = 0

    def pooled(_: nn.Module, arguments: tuple[Tensor], named: Feed) -> tuple[tuple[Tensor], Feed]:
        nonlocal calls
        calls += 1
        (rows,) = arguments
        scale = int((height * width / rows.shape[1]) ** 0.5)
        image = rows.transpose(1, 2).unflatten(2, (height // scale, width // scale))
        context = nn.functional.avg_pool2d(image, 2).flatten(2).transpose(1, 2)
        return arguments, {**named, "encoder_hidden_states": context}

    hooks = [
        net.get_submodule(f"{name}.transformer_blocks.0.attn1").register_forward_pre_hook(
            pooled, with_kwargs=True
        )
        for name in names
    ]
    out = net(*(torch.from_numpy(array) for array in given.values()), return_dict=False)[0]
    for hook in hooks:
        hook.remove()
    assert calls == len(names)
    return out.numpy()


def off(ours: Any, wanted: Any) -> float:
    return float(np.sqrt(np.mean((ours - wanted) ** 2) / np.mean(wanted**2)))


def attentions(names: list[str]) -> tuple[str, ...]:
    return tuple(f"{name}.transformer_blocks.0.attn1/MultiHeadAttention" for name in names)


@pytest.mark.parametrize("size", [None, (8, 12)])
def test_the_graph_computes_what_torch_does_with_means(
    size: tuple[int, int] | None, tmp_path: Path
) -> None:
    net, given = unet(), feed(8, 12)
    wanted = by_hand(net, TOP, given)
    plain = by_hand(net, [], given)
    model = graph(size)
    rewrite = PooledAttention("sample")
    assert rewrite(model)
    assert rewrite.pooled == attentions(TOP)  # neither the lower level's, nor cross-attention
    found = answer(model, tmp_path, given)
    assert off(found, wanted) < 1e-5
    assert off(plain, wanted) > 1e-3
    if size is None:
        other = feed(2, 4)
        assert off(answer(model, tmp_path, other), by_hand(unet(), TOP, other)) < 1e-5


def test_shapes_in_between_are_right(tmp_path: Path) -> None:
    """ONNX Runtime would refuse a graph that says otherwise than it finds."""
    model = graph((8, 12))
    PooledAttention("sample")(model)
    for node in model.graph:
        if node.name in attentions(TOP + LOWER):
            assert node.inputs[0] is not None and node.inputs[1] is not None
            query, key = node.inputs[0].shape, node.inputs[1].shape
            tokens, few = (96, 24) if node.name in attentions(TOP) else (24, 24)
            assert query is not None and key is not None
            assert (query[1], key[1]) == (tokens, few)


@pytest.mark.parametrize("size", [pytest.param(None, marks=pytest.mark.slow), (4, 12)])
def test_the_largest_level_may_be_below_the_latents_size(
    size: tuple[int, int] | None, tmp_path: Path
) -> None:
    """With a third level below, whose rows may be odd, the second one's are even."""
    names = ["down_blocks.1.attentions.0", "up_blocks.1.attentions.0", "up_blocks.1.attentions.1"]
    given = feed(4, 12)
    wanted = by_hand(unet(THREE), names, given)
    model = graph(size, THREE)
    rewrite = PooledAttention("sample")
    assert rewrite(model) and rewrite.pooled == attentions(names)
    assert off(answer(model, tmp_path, given), wanted) < 1e-5


def test_what_may_have_an_odd_number_of_rows_is_left_alone() -> None:
    model = graph(None, ("", "CrossAttn"))
    before = ir.serde.serialize_model(model)
    rewrite = PooledAttention("sample")
    assert not rewrite(model) and rewrite.pooled == ()
    assert ir.serde.serialize_model(model) == before


def test_other_networks_are_left_alone() -> None:
    model = graph(None)
    model.graph.inputs[0].name = "latents"
    assert not PooledAttention("sample")(model)


def rounded(model: ir.Model, scheme: str, folder: Path) -> dict[str, QuantizedLayer]:
    """All linears of the transformers, by node."""
    nodes = {node.name: node for node in model.graph}
    out = {}
    for layer in find_layers("unet", model):
        if layer.kind != "linear" or layer.one_row:
            continue
        stats = record(layer, [normal(1, 64, layer.columns)])
        weight = matrix_of(nodes[layer.node], layer)
        made = quantize_layer(layer, weight, stats, parse_scheme(scheme), get_method("rtn"))
        save_layer(made, folder / "layer.safetensors")  # what is read doesn't refer to the graph
        out[layer.node] = load_layer(folder / "layer.safetensors")
    return out


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8-g32-lr4"])
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("size", [None, (8, 12)])
def test_quantized_layers_are_found_behind_the_means(
    own: bool, scheme: str, size: tuple[int, int] | None, own_kernels: Path | None, tmp_path: Path
) -> None:
    if own and own_kernels is None:
        pytest.skip("no compiler, or a processor without the instruction sets")
    given, net = feed(8, 12), unet()
    wanted = by_hand(net, TOP, given)
    model = graph(size)
    layers = rounded(model, scheme, tmp_path)
    assert PooledAttention("sample")(model)
    if own:
        assert LOWERING.lower_to_kernels(model, layers, set(), None)
        values = [n for n in model.graph if "to_v" in (n.name or "") and n.op_type == "QuantLinear"]
        assert len(values) == 2 * (len(TOP) + len(LOWER))
    else:
        LOWERING.lower_quantized(model, layers, set(), None)
    assert off(answer(model, tmp_path, given, own_kernels if own else None), wanted) < 0.03


def test_tokens_that_cannot_be_paired_are_left_alone() -> None:
    """9 x 13 latents: an image of 72 x 104 pixels, whose upsampling follows its skips."""
    model = graph((9, 13))
    rewrite = PooledAttention("sample")
    assert not rewrite(model) and rewrite.pooled == ()
