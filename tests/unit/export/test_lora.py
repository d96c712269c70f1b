"""LoRA files: read under the names of all programs, placed in a model, merged; what can't be is
refused in one line."""

from __future__ import annotations

import copy
import json
import pickle
import random
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
from torch import nn  # noqa: E402

from edgesd.errors import InputError, UsageError  # noqa: E402
from edgesd.export import source_graphs  # noqa: E402
from edgesd.export.families import Component  # noqa: E402
from edgesd.export.families.parts.lora import (  # noqa: E402
    lora_edits,
    place,
    shapes_of,
)
from edgesd.export.lora.read import read_lora  # noqa: E402
from edgesd.export.lora.update import Lora, LowRank, Magnitude, Update  # noqa: E402
from edgesd.export.mapped import Edited, edit_mapped, hold_mapped, state_of  # noqa: E402
from edgesd.export.parity import check_parity, reference_cases  # noqa: E402
from edgesd.export.passes.values import array_of  # noqa: E402
from edgesd.export.pipeline import export_spec  # noqa: E402
from edgesd.export.to_onnx import graph_from_module  # noqa: E402
from edgesd.recipes.like import Like  # noqa: E402
from edgesd.recipes.sources import open_model  # noqa: E402
from edgesd.runtime.bundle import Bundle  # noqa: E402
from edgesd.spec.build import (  # noqa: E402
    BuildOptions,
    BuildRecord,
    LoraReference,
    ModelReference,
)
from edgesd.spec.pipeline import ComponentSpec, TensorSpec  # noqa: E402
from edgesd.text import shown  # noqa: E402
from tests.loras import Tensors, encoders, kohya_lora, peft_lora, save  # noqa: E402
from tests.single_files import ldm_unet  # noqa: E402
from tests.support import assert_refused, run_cli, with_lora_slot  # noqa: E402
from tests.tiny_pipelines import sdxl_unet, tiny, unet, write_tiny  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def pipelines() -> Mapping[str, Any]:
    return {name: tiny(name) for name in ("sd", "sdxl")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny("sd", tmp_path_factory.mktemp("tiny") / "sd")


def networks(pipeline: Any) -> dict[str, Any]:
    shapes = {name: shapes_of(net) for name, net in encoders(pipeline).items()}
    return {"unet": shapes_of(pipeline.unet), **shapes}


def values(shape: tuple[int, ...], seed: int = 0) -> Any:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def merged(lora: Lora, net: nn.Module, component: str = "unet") -> dict[str, Any]:
    """A network's weights with a LoRA."""
    source: Any = SimpleNamespace(loras=(lora,))
    edits, state = lora_edits(source, component, net), dict(net.named_parameters())
    return {name: edits[name](value) if name in edits else value for name, value in state.items()}


def equal(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    assert found.keys() == wanted.keys()
    return all(torch.allclose(found[n], wanted[n], rtol=1e-5, atol=1e-6) for n in wanted)


# --- Names of programs ---


def _old(name: str) -> str:
    """As diffusers' releases before 0.20 named attention."""
    for attention in ("attn1", "attn2"):
        name = name.replace(f"{attention}.", f"{attention}.processor.")
    for new, old in {
        "q_proj": "to_q",
        "k_proj": "to_k",
        "v_proj": "to_v",
        "out_proj": "to_out",
    }.items():
        name = name.replace(new, old)
    name = name.replace("to_out.0", "to_out")
    return name.replace(".lora_A.weight", "_lora.down.weight").replace(
        ".lora_B.weight", "_lora.up.weight"
    )


def _suffixes(name: str, down: str, up: str) -> str:
    return name.replace(".lora_A.weight", down).replace(".lora_B.weight", up)


def _kohya(name: str) -> str:
    for ours, theirs in {"unet": "unet", "text_encoder_2": "te2", "text_encoder": "te1"}.items():
        if name.startswith(f"{ours}."):
            layer, part = name.removeprefix(f"{ours}.").split(".lora_")
            if ours != "unet" and not layer.startswith("text_model."):
                layer = f"text_model.{layer}"
            end = "down" if part.startswith("A") else "up"
            return f"lora_{theirs}_{layer.replace('.', '_')}.lora_{end}.weight"
    raise AssertionError(name)


DIALECTS: Mapping[str, Callable[[str], str]] = {
    "in memory": lambda name: name.replace(".weight", ".default.weight"),
    "diffusers": lambda name: _suffixes(name, ".lora.down.weight", ".lora.up.weight"),
    "linear layer": lambda name: _suffixes(
        name, ".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"
    ),
    "old": _old,
    "kohya": _kohya,
    "wrapped": lambda name: name.replace(".encoder.layers", ".text_model.encoder.layers").replace(
        "text_model.text_model", "text_model"
    ),
}


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_names_of_all_programs_mean_the_same(
    name: str, dialect: str, pipelines: Mapping[str, Any], tmp_path: Path
) -> None:
    pipeline = pipelines[name]
    plain = peft_lora(pipeline, text=True)
    other = {DIALECTS[dialect](key): tensor for key, tensor in plain.items()}
    assert not plain.keys() & other.keys() or dialect == "wrapped"
    files = save(tmp_path / "1.safetensors", plain), save(tmp_path / "2.safetensors", other)
    one, two = (place(read_lora(str(file)), name, networks(pipeline)) for file in files)
    assert len(one) == len(plain) // 2
    assert {(p.component, p.layer) for p in one} == {(p.component, p.layer) for p in two}
    changes = [
        {(p.component, p.layer): p.update.product.computed() for p in each} for each in (one, two)
    ]
    assert all(torch.equal(changes[1][key], change) for key, change in changes[0].items())
    wanted = {key.removesuffix(".lora_A.weight") for key in plain if "lora_A" in key}
    assert {f"{p.component}.{p.layer}" for p in one} == wanted


def _as_sd_1() -> Any:
    """With attention where Stable Diffusion 1.x has it, on the way up behind a level without."""
    downs, ups = ("CrossAttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
    return unet(down_block_types=downs, up_block_types=ups, layers_per_block=2)


@pytest.mark.parametrize("make", [unet, sdxl_unet, _as_sd_1])
def test_names_of_the_models_authors(make: Callable[[], Any], tmp_path: Path) -> None:
    """As Kohya's scripts name SDXL's layers, and as whole checkpoints do."""
    unet = make()
    layers = {
        key.removesuffix(".weight"): value
        for key, value in unet.state_dict().items()
        if key.endswith(".weight") and value.ndim > 1
    }
    numbers = {f"{layer}.weight": torch.tensor(i) for i, layer in enumerate(layers)}
    names = {int(n): key for key, n in ldm_unet(numbers, unet.config).items()}
    theirs = {layer: names[i].removesuffix(".weight") for i, layer in enumerate(layers)}
    assert len(theirs) == len(layers)
    for dotted in (True, False):
        tensors: Tensors = {}
        for layer, key in theirs.items():
            if not dotted:
                key = "lora_unet_" + key.removeprefix("model.diffusion_model.").replace(".", "_")
            out, into, *kernel = layers[layer].shape
            tensors[f"{key}.lora_down.weight"] = values((2, into, *kernel))
            tensors[f"{key}.lora_up.weight"] = values((out, 2, *(1 for _ in kernel)))
        lora = read_lora(str(save(tmp_path / "x.safetensors", tensors)))
        placed = place(lora, "toy", {"unet": shapes_of(unet)})
        found = {one.layer: one.update.layer for one in placed}
        assert found.keys() == layers.keys()
        assert dotted == all(theirs[layer] == key for layer, key in found.items())


def test_peft_s_own_files_need_its_config(pipelines: Mapping[str, Any], tmp_path: Path) -> None:
    tensors = peft_lora(pipelines["sd"])
    tensors = {f"base_model.model.{k.removeprefix('unet.')}": v for k, v in tensors.items()}
    file = save(tmp_path / "adapter_model.safetensors", tensors)
    with pytest.raises(InputError, match=r"no adapter_config\.json beside it"):
        read_lora(str(file))
    config = tmp_path / "adapter_config.json"
    found = {}
    for text in ({"r": 4, "lora_alpha": 2}, {"r": 4, "lora_alpha": 2, "use_rslora": True}):
        config.write_text(json.dumps(text))
        lora = read_lora(str(file))
        assert len(place(lora, "sd", networks(pipelines["sd"]))) == len(tensors) // 2
        found[lora.sha256] = {update.scale for update in lora.updates}
    assert [*found.values()] == [{0.5}, {1.0}]
    config.write_text(json.dumps({"r": 4, "init_lora_weights": "pissa_niter_4"}))
    with pytest.raises(InputError, match="changed the model's own weights"):
        read_lora(str(file))
    config.write_text(json.dumps({"peft_type": "IA3", "r": 4}))
    with pytest.raises(InputError, match="peft_type is IA3"):
        read_lora(str(file))


def test_alpha_in_diffusers_metadata(pipelines: Mapping[str, Any], tmp_path: Path) -> None:
    """diffusers writes peft's config into the file, and its own loader reads it there."""
    tensors, key = (
        peft_lora(pipelines["sd"]),
        "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
    )
    config = {"unet.r": 4, "unet.lora_alpha": 8, "unet.alpha_pattern": {f"^{key}": 1}}
    file = save(tmp_path / "x.safetensors", tensors, lora_adapter_metadata=json.dumps(config))
    scales = {update.layer: update.scale for update in read_lora(str(file)).updates}
    assert scales.pop(f"unet.{key}") == 0.25
    assert {*scales.values()} == {2.0}


# --- Formulas ---


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 20)
        self.conv = nn.Conv2d(12, 8, 3)
        self.small = nn.Conv2d(6, 4, 1, bias=False)


def toy() -> Any:
    torch.manual_seed(0)
    return Toy().eval().requires_grad_(False)


LAYERS = ["linear", "conv", "small"]
CONFIGS: Mapping[str, Any] = {
    "lora": lambda: peft.LoraConfig(r=3, lora_alpha=5, target_modules=LAYERS),
    "pattern": lambda: peft.LoraConfig(
        r=3,
        lora_alpha=5,
        rank_pattern={"conv": 2},
        alpha_pattern={"^linear": 7},
        target_modules=LAYERS,
    ),
    "rslora": lambda: peft.LoraConfig(r=4, lora_alpha=5, use_rslora=True, target_modules=LAYERS),
    "bias": lambda: peft.LoraConfig(r=3, lora_alpha=5, lora_bias=True, target_modules=LAYERS[:2]),
    "dora": lambda: peft.LoraConfig(r=3, lora_alpha=5, use_dora=True, target_modules=LAYERS),
    "loha": lambda: peft.LoHaConfig(r=3, alpha=5, target_modules=LAYERS),
    "loha tucker": lambda: peft.LoHaConfig(
        r=3, alpha=5, use_effective_conv2d=True, target_modules=LAYERS
    ),
    "lokr": lambda: peft.LoKrConfig(r=2, alpha=5, target_modules=LAYERS, decompose_both=True),
    "lokr whole": lambda: peft.LoKrConfig(r=64, alpha=5, target_modules=LAYERS),
    "lokr tucker": lambda: peft.LoKrConfig(
        r=2, alpha=5, use_effective_conv2d=True, decompose_factor=2, target_modules=LAYERS
    ),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_merged_as_peft_merges(kind: str, tmp_path: Path) -> None:
    model = peft.get_peft_model(toy(), CONFIGS[kind]())
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "base_layer" not in name and parameter.requires_grad:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(tmp_path)
    wanted = dict(model.merge_and_unload().named_parameters())
    lora = read_lora(str(tmp_path / "adapter_model.safetensors"))
    assert len(lora.updates) == (2 if kind == "bias" else 3)
    found = merged(lora, toy())
    assert equal(found, wanted)
    assert not any(
        torch.equal(found[f"{layer}.weight"], value)
        for layer in LAYERS[:2]
        for value in [toy().get_parameter(f"{layer}.weight")]
    )
    again = read_lora(f"{tmp_path / 'adapter_model.safetensors'}:0")
    assert equal(merged(again, toy()), dict(toy().named_parameters())) or kind == "dora"


def test_dora_at_half_the_scale(tmp_path: Path) -> None:
    """As in peft, whose magnitudes are of the scaled sum."""
    model = peft.get_peft_model(toy(), CONFIGS["dora"]())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter += 0.3 * values(tuple(parameter.shape))
    model.save_pretrained(tmp_path)
    for module in model.modules():
        if hasattr(module, "scale_layer"):
            module.scale_layer(0.5)
    wanted = dict(model.merge_and_unload().named_parameters())
    assert equal(merged(read_lora(f"{tmp_path / 'adapter_model.safetensors'}:.5"), toy()), wanted)


def test_lycoris_formulas(tmp_path: Path) -> None:
    """Kohya's names, each beside its plain formula."""
    net, a, b, c, d = (
        toy(),
        values((20, 3), 1),
        values((3, 12), 2),
        values((20, 3), 3),
        values((3, 12), 4),
    )
    one, two = values((2, 3), 5), values((10, 4), 6)
    core, down, up = values((3, 3, 3, 3), 7), values((3, 12, 1, 1), 8), values((8, 3, 1, 1), 9)
    rows, columns = values((20, 1), 10), values((1, 12), 11)
    flat = values((8, 2), 12), values((2, 12 * 9), 13)
    weight = {name: value.clone() for name, value in net.named_parameters()}
    linear, conv = weight["linear.weight"], weight["conv.weight"]
    alpha = torch.tensor(6.0)
    cases: list[tuple[str, Tensors, Any]] = [
        ("linear", {"lora_up": a, "lora_down": b, "alpha": alpha}, linear + 2 * a @ b),
        ("linear", {"lora_up": a, "lora_down": b}, linear + a @ b),
        (
            "linear",
            {"lora_up": a, "lora_down": b, "alpha": torch.tensor(6)},
            linear + 2 * a @ b,
        ),
        (
            "linear",
            {"lora_up": a, "lora_down": b, "dora_scale": rows},
            rows * (linear + a @ b) / (linear + a @ b).norm(dim=1, keepdim=True),
        ),
        (
            "linear",
            {"lora_up": a, "lora_down": b, "dora_scale": columns},
            columns * (linear + a @ b) / (linear + a @ b).norm(dim=0, keepdim=True),
        ),
        (
            "linear",
            {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": c, "hada_w2_b": d, "alpha": alpha},
            linear + 2 * (a @ b) * (c @ d),
        ),
        ("linear", {"lokr_w1": one, "lokr_w2": two, "alpha": alpha}, linear + torch.kron(one, two)),
        (
            "linear",
            {"lokr_w1": one, "lokr_w2_a": two[:, :3], "lokr_w2_b": two[:3], "alpha": alpha},
            linear + 2 * torch.kron(one, two[:, :3] @ two[:3]),
        ),
        (
            "conv",
            {"lora_up": up, "lora_down": down, "lora_mid": core, "alpha": alpha},
            conv + 2 * torch.einsum("or,rskl,si->oikl", up[..., 0, 0], core, down[..., 0, 0]),
        ),
        (
            "conv",
            {f"hada_w{n}_{s}": f for n in "12" for s, f in zip("ab", flat, strict=True)},
            conv + ((flat[0] @ flat[1]) ** 2).reshape(conv.shape),
        ),
        ("conv", {"diff": conv * 0.5}, conv * 1.5),
    ]  # fmt: skip
    for number, (layer, parts, wanted) in enumerate(cases):
        tensors = {
            f"lora_unet_{layer}.{part}{'.weight' if part.startswith('lora_') else ''}": value
            for part, value in parts.items()
        }
        lora = read_lora(str(save(tmp_path / f"{number}.safetensors", tensors)))
        assert torch.allclose(merged(lora, net)[f"{layer}.weight"], wanted, atol=1e-5), number
    tensors = {"lora_unet_conv.diff_b": values((8,)), "lora_unet_linear.diff": linear}
    lora = read_lora(f"{save(tmp_path / 'bias.safetensors', tensors)}:0.5")
    found = merged(lora, net)
    assert torch.allclose(found["conv.bias"], weight["conv.bias"] + 0.5 * values((8,)))
    assert torch.allclose(found["linear.weight"], 1.5 * linear)


def test_loras_are_merged_in_their_order() -> None:
    """A magnitude is that of what earlier ones made."""
    net = toy()
    pair = LowRank(values((2, 12), 1), values((20, 2), 2))
    first = Lora("a", "", 1.0, (Update("linear", pair),), ())
    second = Lora("b", "", 1.0, (Update("linear", pair, 1.0, Magnitude(torch.ones(20))),), ())
    for order, ones in (((first, second), True), ((second, first), False)):
        source: Any = SimpleNamespace(loras=order)
        found = lora_edits(source, "unet", net)["linear.weight"](net.linear.weight)
        assert torch.allclose(found.norm(dim=1), torch.ones(20)) is ones


# --- Models ---


def test_only_what_it_changes_is_made_anew(tmp_path: Path) -> None:
    """Other weights stay mapped in the checkpoint's file and type."""
    pipeline = tiny("sd")
    half = tmp_path / "half"
    pipeline.to(torch.float16).save_pretrained(half)
    file = save(tmp_path / "x.safetensors", kohya_lora(tiny("sd")))
    plain = state_of(part(open_model(str(half)), "unet"))
    state = state_of(part(open_model(str(half), loras=[f"{file}:0.5"]), "unet"))
    touched = {name for name, value in state.items() if isinstance(value, Edited)}
    assert {"to_q", "to_k", "to_v", "0", "conv1", "conv2"} == {n.split(".")[-2] for n in touched}
    assert all(name.endswith(".weight") for name in touched)
    for name, value in state.items():
        if name in touched:
            assert (value.float().dtype, value.shape) == (torch.float32, plain[name].shape)
            assert not torch.equal(value.float(), plain[name].float())
        else:
            assert value.dtype == torch.float16
            assert torch.equal(value, plain[name])


class Wide(nn.Module):
    """Of weights that graphs read from the checkpoint when they are asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(128, 96)

    def forward(self, x: Any) -> Any:
        return self.linear(x)


def test_graphs_have_it_whether_they_hold_their_weights_or_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = LowRank(values((2, 128), 1), values((96, 2), 2))
    update = Update("linear", pair, 1.0, None, values((96,), 3))
    source: Any = SimpleNamespace(loras=(Lora("a", "", 0.5, (update,), ()),))
    torch.manual_seed(0)
    plain = Wide().half().requires_grad_(False)

    def load(weights: bool = True) -> Any:
        net = copy.deepcopy(plain).eval()
        hold_mapped(net)
        edit_mapped(net, lora_edits(source, "unet", net))
        return net

    weight = plain.linear.weight.float() + 0.5 * pair.computed()
    bias = plain.linear.bias.float() + 0.5 * values((96,), 3)
    x = values((2, 128), 4)
    assert torch.allclose(load()(x), x @ weight.T + bias, atol=1e-4)
    tensors = TensorSpec("x", "float32", (2, 128)), TensorSpec("y", "float32", (2, 96))
    component = Component(ComponentSpec("toy", tensors[:1], tensors[1:]), load, ({}, {}))
    for limit in (1 << 30, 0):
        monkeypatch.setattr(source_graphs, "REFER_BYTES", limit)
        folder, module = tmp_path / str(limit), load()
        (folder / "toy").mkdir(parents=True)
        cases = reference_cases(module, component)
        model = graph_from_module(module, component, "ort-mha")
        elsewhere = source_graphs.write_source_graph(model, folder / "toy", {}, cases)
        assert bool(elsewhere) is (limit == 0)
        path = folder / "toy" / "model.onnx"
        found = check_parity(path, component, cases, "fp32", elsewhere=elsewhere)
        assert found.rel_rms < 1e-5
        graphs = source_graphs.SourceGraphs(folder, [component])
        found = [array_of(v) for v in graphs.load("toy").graph.initializers.values()]
        for wanted in (weight.numpy(), bias.numpy()):
            assert any(
                a.size == wanted.size
                and np.allclose(np.sort(a, None), np.sort(wanted, None), atol=1e-6)
                for a in found
            )


def part(source: Any, name: str) -> Any:
    export = export_spec(source)
    return next(c for c in export.components if c.spec.name == name).load()


def test_what_is_kept_is_named_after_it(folder: Path, tmp_path: Path) -> None:
    one = save(tmp_path / "1.safetensors", peft_lora(tiny("sd"), seed=1))
    two = save(tmp_path / "2.safetensors", peft_lora(tiny("sd"), seed=2))
    given = [[], [one], [f"{one}:0.5"], [two], [one, two], [two, one]]
    sources = [open_model(str(folder), loras=[str(file) for file in each]) for each in given]
    assert len({source.sha256() for source in sources}) == len(given)
    assert sources[1].sha256() == open_model(str(folder), loras=[f"{one}:1"]).sha256()
    assert len({export_spec(source).pipeline.source_sha256 for source in sources[:3]}) == 3
    source = open_model(str(folder), loras=[str(one)])
    source.sha256()
    source.check_unchanged()
    save(one, peft_lora(tiny("sd"), seed=3))
    with pytest.raises(InputError, match="was changed"):
        source.check_unchanged()


def test_what_has_no_place_is_named(pipelines: Mapping[str, Any], tmp_path: Path) -> None:
    pair = {"lora_down.weight": values((2, 16)), "lora_up.weight": values((16, 2))}

    def refused(tensors: Mapping[str, Any], words: str, name: str = "sd", **metadata: str) -> None:
        lora = read_lora(str(save(tmp_path / "x.safetensors", tensors, **metadata)))
        with pytest.raises(InputError, match=words):
            place(lora, name, networks(pipelines[name]))

    more = {f"lora_unet_extra_{n}.{key}": value for n in range(5) for key, value in pair.items()}
    good = kohya_lora(pipelines["sd"])
    refused(good | more, r"sd has no lora_unet_extra_0, .*_2 and 2 more \(5 of \d+ layers\): give")
    refused({f"vae.conv_in.{k}": v for k, v in pair.items()}, r"has no vae\.conv_in \(1 of 1")
    refused(
        {f"lora_te2_text_model_encoder_layers_0_mlp_fc1.{k}": v for k, v in pair.items()},
        "Diffusion XL",
    )
    refused(
        {f"transformer.single_blocks.0.linear1.{k}": v for k, v in pair.items()}, "for FLUX: give"
    )
    # The first attention to text has the width of the text encoders.
    key = next(k for k in good if "attn2_to_k.lora_down" in k)
    for width, base in ((768, "1.x"), (1024, "2.x"), (2048, "XL")):
        refused(
            good | {key: values((4, width))}, rf"\[32, {width}\], .*one for Stable Diffusion {base}"
        )
    refused(
        {f"lora_unet_mid_block_resnets_0_conv1.{k}": v for k, v in pair.items()},
        "'stable-diffusion-v3'",
        **{"modelspec.architecture": "stable-diffusion-v3"},
    )
    # Text encoders of one width, and names that don't tell which of them.
    layer = next(n for n in networks(pipelines["sdxl"])["text_encoder"] if "q_proj.weight" in n)
    refused(
        {
            f"lycoris_{layer.removesuffix('.weight').replace('.', '_')}.{k}": v
            for k, v in pair.items()
        },
        "could be of text_encoder and text_encoder_2",
        "sdxl",
    )
    twice = {f"lora_unet_mid_block_attentions_0_proj_in.{k}": values((32, 32)) for k in pair}
    twice |= {f"unet.mid_block.attentions.0.proj_in.{k}": values((32, 32)) for k in pair}
    refused(twice, "more than once")
    bias = {"lora_unet_conv_in.diff_b": values((3,))}
    refused(bias, "bias of 3 values, and conv_in of sd has 16")


def test_values_that_overflow_are_refused_when_merged(folder: Path, tmp_path: Path) -> None:
    tensors = {k: v * 1e30 for k, v in peft_lora(tiny("sd")).items()}
    file = save(tmp_path / "x.safetensors", tensors)
    unet = part(open_model(str(folder), loras=[str(file)]), "unet")
    with pytest.raises(InputError, match=r"x\.safetensors: .*becomes NaN or infinite"):
        [value.float() for value in state_of(unet).values()]


def test_scales_on_the_command_line(tmp_path: Path) -> None:
    tensors = {
        "lora_unet_x.lora_down.weight": values((2, 3)),
        "lora_unet_x.lora_up.weight": values((4, 2)),
    }
    file = save(tmp_path / "a.safetensors", tensors)
    odd = save(tmp_path / "a:2.safetensors", tensors)
    assert [read_lora(str(f)).scale for f in (file, f"{file}:0.5", f"{file}:-1", odd)] == [
        1,
        0.5,
        -1,
        1,
    ]
    for scale in ("x", "nan", "inf", "101", "", "1e999"):
        with pytest.raises(InputError, match="no scale: give FILE or FILE:SCALE"):
            read_lora(f"{file}:{scale}")
    with pytest.raises(InputError, match="no such file"):
        read_lora(str(tmp_path / "none.safetensors:1"))
    with pytest.raises(InputError, match="is a folder"):
        read_lora(str(tmp_path))


# --- Kinds of models ---


def hinted(folder: Path, loras: list[str], variant: Any = None) -> Any:
    source = replace(open_model(str(folder), loras=loras), variant=variant)
    pipeline = export_spec(source).pipeline
    return pipeline.scheduler.name, pipeline.num_inference_steps, pipeline.guidance_scale


def test_a_lora_may_say_what_it_makes_of_a_model(folder: Path, tmp_path: Path) -> None:
    tensors = peft_lora(tiny("sd"))
    own = hinted(folder, [])
    file = save(tmp_path / "lcm-lora.safetensors", tensors)
    assert hinted(folder, [str(file)]) == own  # its name tells nothing
    assert hinted(folder, [str(file)], "lcm") == ("lcm", 4, 1.0)
    told = save(tmp_path / "a.safetensors", tensors, edgesd=json.dumps({"variant": "lcm"}))
    assert hinted(folder, [str(told)]) == ("lcm", 4, 1.0)
    assert hinted(folder, [f"{told}:0"]) == own
    assert hinted(folder, [str(told)], "base") == own
    (tmp_path / "edgesd.json").write_text('{"variant": "lightning", "num_inference_steps": 2}')
    assert hinted(folder, [str(file)]) == ("euler", 2, 1.0)
    other = tmp_path / "other"
    other.mkdir()
    third = save(other / "b.safetensors", tensors, edgesd=json.dumps({"variant": "lcm"}))
    with pytest.raises(InputError, match=r"different steps or kinds.*--variant"):
        hinted(folder, [str(file), str(third)])
    assert hinted(folder, [str(file), str(third)], "lcm") == ("lcm", 4, 1.0)
    # Beside a pipeline's files it is the pipeline's.
    (tmp_path / "model_index.json").write_text("{}")
    assert read_lora(str(file)).hints == {}
    (other / "edgesd.json").write_text('{"clip_skip": 1}')
    with pytest.raises(InputError, match="clip_skip"):
        read_lora(str(third))


def test_a_bundle_says_what_was_merged(miniature: Any) -> None:
    record = BuildRecord(
        ModelReference("demo", "demo", "0" * 64),
        BuildOptions("x86-64-cpu"),
        loras=(LoraReference("style.safetensors", "a" * 64, 0.5),),
    )
    like = Like(Path("other"), miniature.manifest, record)
    like.check_loras(["style.safetensors:0.5"])
    with pytest.raises(
        UsageError, match=r"style\.safetensors:0\.5 \(sha256 a{16}.*--lora FILE:SCALE"
    ):
        like.check_loras([])


# --- Files of strangers ---


def test_one_line_for_what_is_refused(tmp_path: Path) -> None:
    build = ("build", "demo", "--target", "x86-64-cpu", "-o", tmp_path / "out", "--lora")
    for name in ("a.pt", "a.bin", "a.ckpt", "a.pth"):
        (tmp_path / name).write_bytes(pickle.dumps({"x": 1}))
        assert_refused(run_cli(*build, f"{tmp_path / name}:0.5"), "is a pickle", "docs/lora.md")
    unplaced = save(
        tmp_path / "a.safetensors",
        {"lora_unet_\x1b[31mred.lora_down.weight": values((2, 3)),
         "lora_unet_\x1b[31mred.lora_up.weight": values((4, 2))},
    )  # fmt: skip
    outcome = run_cli(*build, unplaced)
    assert_refused(outcome, "emoji has no", "(1 of 1 layers)")
    assert "\x1b" not in outcome.err
    assert not (tmp_path / "out").exists()


PAIR = {
    "lora_unet_linear.lora_down.weight": values((3, 12), 1),
    "lora_unet_linear.lora_up.weight": values((20, 3), 2),
    "lora_unet_linear.alpha": torch.tensor(3.0),
}
DOWN, UP, ALPHA = PAIR
HADAMARD = {
    f"lora_unet_linear.hada_w{n}_{side}": values((20, 3) if side == "a" else (3, 12), int(n))
    for n in "12"
    for side in "ab"
}
KRONECKER = {
    "lora_unet_linear.lokr_w1": values((2, 3)),
    "lora_unet_linear.lokr_w2": values((10, 4)),
}


def raw(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    """A .safetensors file. header: JSON, or the bytes that stand in its place."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def broken_files(whole: bytes) -> Iterator[tuple[str, bytes]]:
    """Files that can't be LoRAs, from one that is."""
    (length,) = struct.unpack("<Q", whole[:8])
    header, data = json.loads(whole[8 : 8 + length]), whole[8 + length :]
    for count in [*range(0, 8 + length, 11), *range(8 + length, len(whole), 40)]:
        yield f"cut at {count}", whole[:count]
    for wrong in (0, 1, length - 1, length + 1, 1 << 31, (1 << 63) - 1, (1 << 64) - 1):
        yield f"length {wrong}", struct.pack("<Q", wrong) + whole[8:]
    for text in (b"", b"{", b"[]", b"null", b"{}", b'"x"', b"\xff" * 9, b"[" * 5000, b'{"a":1}'):
        yield f"header {text[:9]!r}", raw(text, data)
    entry = header[DOWN]
    for changes in (
        {"dtype": "F33"}, {"dtype": 1}, {"dtype": "F8_E4M3"}, {"dtype": "I8"}, {"dtype": "BOOL"},
        {"shape": [-1, 12]}, {"shape": [3, 13]}, {"shape": "x"}, {"shape": [1 << 62, 1 << 62]},
        {"shape": [0, 12]}, {"shape": []}, {"shape": [3] + [1] * 9}, {"shape": [36]},
        {"data_offsets": [0, 1 << 60]}, {"data_offsets": [10, 0]}, {"data_offsets": [-4, 140]},
        {"data_offsets": [0, 0]}, {"data_offsets": "x"},
    ):  # fmt: skip
        yield str(changes), raw({**header, DOWN: {**entry, **changes}}, data)
    yield "metadata of numbers", raw({**header, "__metadata__": {"a": 1}}, data)
    yield "trailing bytes", whole + b"x" * 9
    for name in (
        "", "x", "lora_down.weight", "lora_unet_linear.lora_down", "lora_unet_linear.weight",
        "lora_unet_linear\n.lora_down.weight", "\x1b]0;x\x07.lora_down",
        "a" * 600 + ".lora_down.weight",
        "lora_unet_linear.oft_blocks", "bundle_emb.x.string_to_param.*",
        "lora_unet_linear.on_input",
        "lora_unet_linear.a1.weight", "lora_controlnet",
        "base_model.model.linear.base_layer.weight",
        "model.diffusion_model.input_blocks.0.0.weight", "lora_unet_linear.lora_up.weight.x",
    ):  # fmt: skip
        renamed = {name if key == DOWN else key: value for key, value in header.items()}
        yield f"name {name[:40]!r}", raw(renamed, data)


def wrong_tensors() -> Iterator[tuple[str, Tensors, dict[str, str]]]:
    """What safetensors takes, and no LoRA has: tensors and metadata."""
    for bad in (float("nan"), float("inf"), -float("inf")):
        for name, tensor in PAIR.items():
            spoilt = tensor.clone()
            spoilt.view(-1)[-1] = bad
            yield f"{bad} in {name}", {**PAIR, name: spoilt}, {}
            yield f"{bad} in {name}, half", {**PAIR, name: spoilt.bfloat16()}, {}
    for name, shapes in {
        DOWN: ((2, 12), (3,), (3, 12, 1), (12, 3), (3, 12, 1, 1, 1), (1, 3, 12)),
        UP: ((20, 2), (20,), (20, 3, 3, 3), (3, 20), (20, 3, 1, 1, 1)),
        ALPHA: ((2,), (1, 3)),
    }.items():
        for shape in shapes:
            yield f"{name} {shape}", {**PAIR, name: values(shape)}, {}
    for name in PAIR:
        if name != ALPHA:
            yield f"no {name}", {key: t for key, t in PAIR.items() if key != name}, {}
    yield "alpha alone", {ALPHA: PAIR[ALPHA]}, {}
    yield "none", {}, {}
    for name, shape in (
        ("dora_scale", (19, 1)),
        ("dora_scale", (1, 13)),
        ("lora_mid.weight", (3, 3)),
    ):
        yield f"{name} {shape}", {**PAIR, f"lora_unet_linear.{name}": values(shape)}, {}
    both = {
        f"lora_unet_linear.{n}": values((20, 1)) for n in ("dora_scale", "lora_magnitude_vector")
    }
    yield "two magnitudes", PAIR | both, {}
    yield "two names", {**PAIR, "lora_unet_linear.lora.down.weight": PAIR[DOWN]}, {}
    yield "two kinds", PAIR | HADAMARD, {}
    yield "difference with alpha", {"a.diff": values((2, 2)), "a.alpha": torch.tensor(1.0)}, {}
    yield "a number", {"a.diff": torch.tensor(1.0)}, {}
    for product in (HADAMARD, KRONECKER):
        for name, tensor in product.items():
            yield f"no {name}", {key: t for key, t in product.items() if key != name}, {}
            yield f"{name} flat", {**product, name: tensor.flatten()}, {}
            if "hada" in name:
                yield f"{name} of another rank", {**product, name: tensor[:-1, :-1]}, {}
    core = values((3, 3, 3))
    yield "core", {**HADAMARD, **{f"lora_unet_linear.hada_t{n}": core for n in "12"}}, {}
    yield "one core", {**HADAMARD, "lora_unet_linear.hada_t1": values((3, 3, 3, 3))}, {}
    yield "core of a whole", {**KRONECKER, "lora_unet_linear.lokr_t2": values((3, 3, 3, 3))}, {}
    for text in (
        "", "x", "[]", "{" * 9000, '{"unet.r": 0}', '{"unet.r": NaN}', '{"unet.r": 1e999}',
        '{"unet.r": "4"}',
        '{"unet.r": true}', '{"unet.lora_alpha": 4}', '{"unet.r": 4, "unet.lora_alpha": Infinity}',
        '{"unet.r": 4, "unet.alpha_pattern": [1]}', '{"unet.r": 4, "unet.rank_pattern": {"a": 0}}',
        '{"unet.r": 4, "unet.rank_pattern": {".*q": 8}}',
        '{"unet.r": 4, "unet.peft_type": "OFT"}', '{"unet.r": 4, "unet.peft_type": ["LORA"]}',
        '{"unet.r": 4, "unet.init_lora_weights": "olora"}', '{"unet.r": ' + "9" * 5000 + "}",
    ):  # fmt: skip
        yield f"config {text[:40]}", PAIR, {"lora_adapter_metadata": text}
    for text in ("x", "[]", '{"variant": "x"}', '{"num_inference_steps": 0}', '{"name": 1}'):
        yield f"hints {text}", PAIR, {"edgesd": text}


def refusal(file: Path, what: str) -> str:
    try:
        read_lora(str(file))
    except InputError as exc:
        return str(exc)
    pytest.fail(f"taken: {what}")


def test_hostile_files(miniature: Bundle, tmp_path: Path) -> None:
    """Each is refused by the command in the reader's own line, and nothing is written."""
    whole = save(tmp_path / "whole.safetensors", PAIR)
    found = merged(read_lora(str(whole)), toy())
    assert not torch.equal(found["linear.weight"], toy().linear.weight)
    bundle = with_lora_slot(miniature, tmp_path / "slots").path
    path, count = tmp_path / "x.safetensors", 0

    def check(what: str) -> None:
        nonlocal count
        line = refusal(path, what)
        assert len(line) < 800, what
        outcome = run_cli("lora", "convert", path, "--for", bundle)
        assert_refused(outcome)
        assert (outcome.code, outcome.out) == (InputError.exit_code, ""), what
        assert outcome.err.split() == f"edgesd: {shown(' '.join(line.split()))}".split(), what
        assert not path.with_suffix(".lora").exists(), what
        count += 1

    for what, content in broken_files(whole.read_bytes()):
        path.write_bytes(content)
        check(what)
    for what, tensors, metadata in wrong_tensors():
        save(path, tensors, **metadata)
        check(what)
    assert count >= 150
    assert {entry.name for entry in tmp_path.iterdir()} == {whole.name, bundle.name, path.name}


def test_files_with_flipped_bytes(tmp_path: Path) -> None:
    """They are refused, or are LoRAs of other names and values, whose merged weights are finite."""
    whole, path = (
        save(tmp_path / "whole.safetensors", PAIR).read_bytes(),
        tmp_path / "x.safetensors",
    )
    chance, refused = random.Random(7), 0
    for _ in range(150):
        content = bytearray(whole)
        content[chance.randrange(len(whole) if chance.random() < 0.3 else 350)] ^= (
            1 << chance.randrange(8)
        )
        path.write_bytes(content)
        try:
            lora = read_lora(str(path))
            place(lora, "toy", {"unet": shapes_of(toy())})
            assert all(bool(torch.isfinite(w).all()) for w in merged(lora, toy()).values())
        except InputError as exc:
            assert len(str(exc)) < 800
            refused += 1
    assert 50 < refused < 150
