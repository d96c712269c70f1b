"""FLUX in a single file, and LoRAs for it: under the authors' names and all programs' after them,
they are what diffusers makes of them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytest.importorskip("peft")
from diffusers.loaders import lora_conversion_utils as converters  # noqa: E402
from diffusers.loaders.single_file_utils import (  # noqa: E402
    convert_flux_transformer_checkpoint_to_diffusers,
)
from safetensors.torch import load_file, save_file  # noqa: E402

from edgesd.errors import InputError  # noqa: E402
from edgesd.export.families.parts.flux_names import diffusers_state  # noqa: E402
from edgesd.export.families.parts.lora import Placed, lora_edits, place, shapes_of  # noqa: E402
from edgesd.export.families.parts.weights import load_network  # noqa: E402
from edgesd.export.lora.read import read_lora, read_loras  # noqa: E402
from edgesd.export.lora.update import LowRank  # noqa: E402
from edgesd.export.mapped import state_of  # noqa: E402
from edgesd.export.pipeline import export_spec  # noqa: E402
from edgesd.export.source import ModelSource, resolve_source  # noqa: E402
from edgesd.runtime.requests import Control, Request  # noqa: E402
from tests.flux_names import authors_norms, authors_rows, authors_state  # noqa: E402
from tests.image_tasks import HINT  # noqa: E402
from tests.loras import Tensors, save  # noqa: E402
from tests.support import random_picture  # noqa: E402
from tests.tiny_pipelines import diffusers_images, on_torch, tiny, write_tiny  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
_DENOISER = "model.diffusion_model."
_SMALL = {"width": 40, "height": 24}
_DOUBLES, _SINGLES, _WIDTH = 19, 38, 3072


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny("flux-dev", tmp_path_factory.mktemp("tiny") / "flux-dev")


@pytest.fixture(scope="module")
def authors(folder: Path) -> Tensors:
    """The transformer in bf16."""
    state = load_file(next((folder / "transformer").glob("*.safetensors")))
    return {name: value.bfloat16() for name, value in authors_state(state).items()}


@pytest.fixture(scope="module")
def true_shapes() -> Mapping[str, tuple[int, ...]]:
    """Of the weights of FLUX.1-dev."""
    with torch.device("meta"):
        return shapes_of(diffusers.FluxTransformer2DModel(guidance_embeds=True))


def own_transformer(source: ModelSource) -> Mapping[str, Any]:
    return state_of(load_network(source, "transformer", diffusers.FluxTransformer2DModel))


def test_conversion_is_that_of_diffusers(true_shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Of all names at the true width, to which diffusers' is tied; each row has one value."""
    made: Tensors = {}
    for name, rows in authors_rows(_DOUBLES, _SINGLES, _WIDTH, 64, guidance=True).items():
        made[f"{name}.weight"], made[f"{name}.bias"] = torch.randn(rows, 1), torch.randn(rows)
    made |= {name: torch.randn(128) for name in authors_norms(_DOUBLES, _SINGLES)}
    found = diffusers_state(made, true_shapes)
    wanted = convert_flux_transformer_checkpoint_to_diffusers(dict(made))
    assert found.keys() == wanted.keys() == true_shapes.keys()
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
    # Rows of a fused layer aren't copied.
    qkv = made["double_blocks.7.img_attn.qkv.weight"]
    assert found["transformer_blocks.7.attn.to_v.weight"].data_ptr() == qkv[2 * _WIDTH :].data_ptr()


@pytest.mark.parametrize("form", ["authors", "whole", "diffusers"])
def test_a_single_file_is_the_folder(
    form: str, folder: Path, authors: Tensors, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = load_file(next((folder / "transformer").glob("*.safetensors")))
    tensors = {
        "authors": authors,
        "whole": {f"{_DENOISER}{name}": value for name, value in authors.items()}
        | {"vae.decoder.conv_in.bias": torch.ones(3), "text_encoders.t5xxl.x": torch.ones(3)},
        "diffusers": {name: value.bfloat16() for name, value in state.items()},
    }[form]
    configs = Path(shutil.copytree(folder, tmp_path / "configs"))
    next((configs / "transformer").glob("*.safetensors")).unlink()
    file = save(tmp_path / "flux1.safetensors", tensors)
    source = resolve_source(file, configs)
    found = own_transformer(source)
    assert found.keys() == state.keys()
    for name, value in state.items():
        assert found[name].dtype == torch.bfloat16
        assert torch.equal(found[name], value.bfloat16()), name
    for other in ("text_encoder", "vae"):
        assert source.parameters(other) == resolve_source(folder).parameters(other)
    assert source.parameters("transformer") == sum(value.numel() for value in state.values())
    assert source.public_name == "flux1"
    assert ("its transformer alone is read" in caplog.text) == (form == "whole")
    # What all is made from counts, the folder's weights, too.
    before = source.sha256()
    vae = next((configs / "vae").glob("*.safetensors"))
    save_file({name: value + 1 for name, value in load_file(vae).items()}, vae)
    assert resolve_source(file, configs).sha256() != before


def test_images_of_a_single_file(folder: Path, authors: Tensors, tmp_path: Path) -> None:
    source = resolve_source(save(tmp_path / "flux1.safetensors", authors), folder)
    pipeline = on_torch(source, export_spec(source), tmp_path / "made")
    (image,) = pipeline.generate([Request("a red cat", 3, num_inference_steps=2, **_SMALL)])
    theirs = tiny("flux-dev")
    theirs.transformer.bfloat16().float()
    wanted = diffusers_images(theirs, ["a red cat"], [3], num_inference_steps=2, **_SMALL)[0]
    assert np.abs(np.int32(image) - np.int32(wanted)).max() <= 1


def test_shards_in_16_bits_are_read_as_they_are(folder: Path, tmp_path: Path) -> None:
    sharded = Path(shutil.copytree(folder, tmp_path / "sharded"))
    next((sharded / "transformer").glob("*.safetensors")).unlink()
    net = tiny("flux-dev").transformer.bfloat16()
    net.save_pretrained(sharded / "transformer", max_shard_size="100KB")
    assert len([*(sharded / "transformer").glob("*.safetensors")]) > 1
    found = own_transformer(resolve_source(sharded))
    wanted = net.state_dict()
    assert found.keys() == wanted.keys()
    assert all(value.dtype == torch.bfloat16 for value in found.values())
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


def _without(name: str) -> Callable[[Tensors], Tensors]:
    return lambda state: {key: value for key, value in state.items() if key != name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            _without("double_blocks.1.txt_attn.qkv.bias"),
            "lacks transformer_blocks.1.attn.add_q",
        ),
        (_without("guidance_in.in_layer.weight"), "lacks time_text_embed.guidance_embedder.linear"),
        (_without("single_blocks.0.norm.key_norm.scale"), "lacks single_transformer_blocks.0.attn"),
        (lambda s: s | {"single_blocks.0.linear1.weight": torch.ones(3, 32)}, "lacks single_tra"),
        (lambda s: s | {"single_blocks.0.linear2.bias": torch.ones(3)}, r"proj_out\.bias of shape"),
        (
            lambda s: s | {"single_blocks.2.linear2.bias": torch.ones(3)},
            "has single_blocks.2.linea",
        ),
        (lambda s: s | {"x\x1b[2J.weight": torch.ones(3)}, "which its config doesn't ask for"),
        (
            lambda s: s | {"img_in.bias": s["img_in.bias"] * float("nan")},
            "x_embedder.bias holds NaN or infinite",
        ),
        (
            lambda s: s | {"img_in.weight": s["img_in.weight"].to(torch.float8_e4m3fn)},
            "img_in.weight is stored as F8_E4M3: .*give the file that it was quantized from",
        ),
    ],
)
def test_files_that_do_not_fit(
    change: Any, message: str, folder: Path, authors: Tensors, tmp_path: Path
) -> None:
    source = resolve_source(save(tmp_path / "x.safetensors", change(dict(authors))), folder)
    with pytest.raises(InputError, match=message) as error:
        own_transformer(source)
    assert "\n" not in str(error.value)
    if "NaN" not in message:  # all else is in the file's header: it is told before other work
        with pytest.raises(InputError, match=message):
            export_spec(source)


def test_a_single_file_needs_its_model(folder: Path, authors: Tensors, tmp_path: Path) -> None:
    file = save(tmp_path / "x.safetensors", authors)
    with pytest.raises(InputError, match="a transformer of FLUX: give --config FOLDER"):
        resolve_source(file)
    with pytest.raises(InputError, match="is no model of that"):
        resolve_source(file, write_tiny("sd", tmp_path / "sd"))
    schnell = write_tiny("flux-schnell", tmp_path / "schnell")
    with pytest.raises(InputError, match=r"has guidance_in.*schnell doesn't fit"):
        export_spec(resolve_source(file, schnell))
    other = save(tmp_path / "y.safetensors", {f"{_DENOISER}out.0.bias": torch.ones(3)})
    with pytest.raises(InputError, match="has no transformer: expected weights named"):
        own_transformer(resolve_source(other, folder))


def low_rank(shapes: Mapping[str, tuple[int, int]], names: tuple[str, str], rank: int) -> Tensors:
    """Factors for layers. shapes: outputs and inputs of each. names: ends of the two."""
    generator = torch.Generator().manual_seed(5)
    found: Tensors = {}
    for layer, (outputs, inputs) in shapes.items():
        found[layer + names[0]] = torch.randn(rank, inputs, generator=generator) * 0.3
        found[layer + names[1]] = torch.randn(outputs, rank, generator=generator) * 0.3
    return found


def placed(
    tensors: Tensors, shapes: Mapping[str, tuple[int, ...]], path: Path
) -> dict[str, tuple[Any, Any]]:
    """Layer -> down and scaled up."""
    found: tuple[Placed, ...] = place(
        read_lora(str(save(path, tensors))), "dev", {"transformer": shapes}
    )
    made = {}
    for one in found:
        assert isinstance(one.update.product, LowRank)
        made[one.layer] = one.update.product.down, one.update.product.up * one.update.scale
    assert len(made) == len(found)
    return made


def _inputs(name: str, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Of a layer of the authors, in FLUX.1-dev."""
    if name.endswith(("mlp.2", "linear2")):
        return 4 * _WIDTH + _WIDTH * name.endswith("linear2")
    outside = {"img_in": 64, "txt_in": 4096, "vector_in.in_layer": 768}
    return outside.get(name, 256 if name.endswith("in_layer") else _WIDTH)


def _kohya(rows: Mapping[str, int], inputs: Mapping[str, int]) -> Tensors:
    flat = {f"lora_unet_{name.replace('.', '_')}": (rows[name], inputs[name]) for name in rows}
    made = low_rank(flat, (".lora_down.weight", ".lora_up.weight"), 2)
    # diffusers loses the alpha of the last layers, and edgesd doesn't.
    return made | {f"{name}.alpha": torch.tensor(0.5) for name in flat if "_final_" not in name}


def _fal(rows: Mapping[str, int], inputs: Mapping[str, int]) -> Tensors:
    named = {f"base_model.model.{name}": (rows[name], inputs[name]) for name in rows}
    return low_rank(named, (".lora_A.weight", ".lora_B.weight"), 1)


@pytest.mark.parametrize(
    ("make", "convert"),
    [
        (_kohya, converters._convert_kohya_flux_lora_to_diffusers),
        (_fal, converters._convert_fal_kontext_lora_to_diffusers),
    ],
)
def test_loras_of_all_layers_are_what_diffusers_makes_of_them(
    make: Any, convert: Any, true_shapes: Mapping[str, tuple[int, ...]], tmp_path: Path
) -> None:
    """At the true width, to which its conversions are tied."""
    rows = authors_rows(_DOUBLES, _SINGLES, _WIDTH, 64, guidance=make is _kohya)
    if make is _fal:  # whose conversion knows these alone
        rows = {
            name: count for name, count in rows.items() if "_in" not in name and "adaLN" not in name
        }
    inputs = {name: _inputs(name, true_shapes) for name in rows}
    tensors = make(rows, inputs)
    found = placed(tensors, true_shapes, tmp_path / "x.safetensors")
    wanted = {name.removeprefix("transformer."): v for name, v in convert(dict(tensors)).items()}
    assert {name.rpartition(".lora_")[0] for name in wanted} == found.keys()
    for layer, (down, up) in found.items():
        probe = torch.randn(down.shape[1])
        theirs = wanted[f"{layer}.lora_B.weight"] @ (wanted[f"{layer}.lora_A.weight"] @ probe)
        assert torch.allclose(up @ (down @ probe), theirs, rtol=1e-4, atol=1e-3), layer


def _xlabs(width: int) -> Tensors:
    """Of the tiny network's first blocks, as XLabs' processors have them."""
    shapes = {}
    for stream in "12":
        block = "double_blocks.0.processor"
        shapes[f"{block}.qkv_lora{stream}"] = (3 * width, width)
        shapes[f"{block}.proj_lora{stream}"] = (width, width)
    shapes["single_blocks.1.processor.qkv_lora"] = (3 * width, width)
    shapes["single_blocks.1.processor.proj_lora"] = (width, 5 * width)
    return low_rank(shapes, (".down.weight", ".up.weight"), 2)


def _peft(width: int) -> Tensors:
    """Of layers of the tiny network and of both text encoders, as peft names them."""
    net = "transformer"
    shapes = {
        f"{net}.transformer_blocks.0.attn.add_k_proj": (width, width),
        f"{net}.transformer_blocks.1.ff_context.net.2": (width, 4 * width),
        f"{net}.transformer_blocks.1.norm1.linear": (6 * width, width),
        f"{net}.single_transformer_blocks.0.proj_mlp": (4 * width, width),
        f"{net}.single_transformer_blocks.0.norm.linear": (3 * width, width),
        "text_encoder.encoder.layers.1.self_attn.v_proj": (width // 2, width // 2),
    }
    return low_rank(shapes, (".lora_A.weight", ".lora_B.weight"), 2)


@pytest.mark.parametrize("make", [_xlabs, _peft])
def test_images_are_those_of_diffusers(make: Any, folder: Path, tmp_path: Path) -> None:
    theirs = tiny("flux-dev")
    tensors = make(theirs.transformer.inner_dim)
    file = save(tmp_path / "x.safetensors", tensors)
    asked = {"num_inference_steps": 2, **_SMALL}
    plain = diffusers_images(theirs, ["a red cat"], [3], **asked)[0]
    theirs.load_lora_weights(dict(tensors))
    wanted = diffusers_images(theirs, ["a red cat"], [3], **asked)[0]
    for index, (scale, image) in enumerate((("", wanted), (":0", plain))):
        source = replace(resolve_source(folder), loras=read_loras([f"{file}{scale}"]))
        pipeline = on_torch(source, export_spec(source), tmp_path / str(index))
        (ours,) = pipeline.generate([Request("a red cat", seed=3, **asked)])
        assert np.abs(np.int32(ours) - np.int32(image)).max() <= 1
    assert np.abs(np.int32(wanted) - np.int32(plain)).max() > 8


def test_changes_of_fused_layers_are_cut(folder: Path, tmp_path: Path) -> None:
    """LoKr, whole differences and their biases, and magnitudes: each layer has its rows."""
    net = tiny("flux-dev").transformer
    shapes, width = shapes_of(net), net.inner_dim
    fused, single = "lora_unet_double_blocks_0_img_attn_qkv", "lora_unet_single_blocks_0_linear1"
    last = "lora_unet_final_layer_adaLN_modulation_1"
    torch.manual_seed(3)
    tensors = {
        f"{fused}.diff": torch.randn(3 * width, width),
        f"{fused}.diff_b": torch.randn(3 * width),
        f"{single}.lokr_w1": torch.randn(7, 4),
        f"{single}.lokr_w2": torch.randn(width, width // 4),
        f"{last}.lora_down.weight": torch.randn(2, width),
        f"{last}.lora_up.weight": torch.randn(2 * width, 2),
        f"{last}.dora_scale": torch.rand(2 * width, 1),
    }
    lora = read_lora(str(save(tmp_path / "x.safetensors", tensors)))
    source = replace(resolve_source(folder), loras=(lora,))
    place(lora, "dev", {"transformer": shapes})
    edits = lora_edits(source, "transformer", net)
    state = {name: value.detach() for name, value in net.state_dict().items()}
    theirs = authors_state(state)
    theirs["double_blocks.0.img_attn.qkv.weight"] += tensors[f"{fused}.diff"]
    theirs["double_blocks.0.img_attn.qkv.bias"] += tensors[f"{fused}.diff_b"]
    theirs["single_blocks.0.linear1.weight"] += torch.kron(
        tensors[f"{single}.lokr_w1"], tensors[f"{single}.lokr_w2"]
    )
    head = "final_layer.adaLN_modulation.1.weight"
    sums = theirs[head] + tensors[f"{last}.lora_up.weight"] @ tensors[f"{last}.lora_down.weight"]
    theirs[head] = tensors[f"{last}.dora_scale"] * sums / sums.norm(dim=1, keepdim=True)
    changed = {name: edit(state[name]) for name, edit in edits.items()}
    assert len(changed) == 3 * 2 + 4 + 1
    for name, value in authors_state(state | changed).items():
        assert torch.allclose(value, theirs[name], rtol=1e-5, atol=1e-5), name


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            {"double_blocks.0.img_attn.qkv.lora_A.weight": (2, 32), "@lora_B": (95, 2)},
            r"shape \[95, 32\], and those of dev have \[96, 32\].*for a FLUX of another size",
        ),
        (
            {"double_blocks.9.img_attn.qkv.lora_A.weight": (2, 32), "@lora_B": (96, 2)},
            "dev has no double_blocks.9.img_attn.qkv .*for a FLUX of another size",
        ),
        (
            {"transformer.context_embedder.lora_A.weight": (2, 7), "@lora_B": (32, 2)},
            r"shape \[32, 7\], and .*it looks like one for another model with a transformer:",
        ),
        (
            {
                "transformer.single_transformer_blocks.0.attn.to_k.lora_A.weight": (2, 64),
                "@lora_B": (64, 2),
            },
            r"shape \[64, 64\], and those of dev have \[32, 32\].*for a FLUX of another size",
        ),
        (
            {"double_blocks.0.img_attn.qkv.diff_b": (7,)},
            "a bias of 7 values, and .*to_v of dev has",
        ),
        (
            {
                "double_blocks.0.img_attn.qkv.lora_down.weight": (2, 32),
                "double_blocks.0.img_attn.qkv.lora_up.weight": (96, 2),
                "double_blocks.0.img_attn.qkv.dora_scale": (1, 32),
            },
            r"magnitudes of inputs \(DoRA\), which can't be cut",
        ),
        (
            {
                "final_layer.adaLN_modulation.1.lora_down.weight": (2, 32),
                "final_layer.adaLN_modulation.1.lora_up.weight": (64, 2),
                "final_layer.adaLN_modulation.1.dora_scale": (1, 32),
            },
            r"magnitudes of inputs \(DoRA\), which can't be cut",
        ),
    ],
)
def test_loras_that_do_not_fit(
    tensors: Mapping[str, tuple[int, ...]], message: str, tmp_path: Path
) -> None:
    first = next(iter(tensors))
    named = {
        first.replace("lora_A", key[1:]) if key.startswith("@") else key: torch.ones(shape)
        for key, shape in tensors.items()
    }
    shapes = shapes_of(tiny("flux-dev").transformer)
    lora = read_lora(str(save(tmp_path / "x.safetensors", named)))
    with pytest.raises(InputError, match=message) as error:
        place(lora, "dev", {"transformer": shapes})
    assert "\n" not in str(error.value)


def test_names_of_other_programs(folder: Path, tmp_path: Path) -> None:
    """One layer of each network under all prefixes that it may have."""
    pipeline = tiny("flux-dev")
    networks = {
        name: shapes_of(getattr(pipeline, name))
        for name in ("transformer", "text_encoder", "text_encoder_2")
    }
    block = "single_transformer_blocks.0.attn.to_k"
    fused = "single_blocks.0.linear1"
    query = "encoder.block.1.layer.0.SelfAttention.q"
    proj = "encoder.layers.1.self_attn.q_proj"
    for prefix, layer, component, count in (
        ("transformer.", block, "transformer", 1),
        ("lora_transformer_", block.replace(".", "_"), "transformer", 1),
        ("diffusion_model.", fused, "transformer", 4),
        ("base_model.model.", fused, "transformer", 4),
        ("", fused, "transformer", 4),
        ("lora_te1_", f"text_model.{proj}".replace(".", "_"), "text_encoder", 1),
        ("lora_te3_", query.replace(".", "_"), "text_encoder_2", 1),
        ("text_encoder_2.", query, "text_encoder_2", 1),
    ):
        one = {"transformer": block, "text_encoder": proj, "text_encoder_2": query}[component]
        columns = networks[component][f"{one}.weight"][1]
        rows = columns * (7 if count > 1 else 1)
        marked = {"base_model.model.double_blocks.0.img_mlp.0.diff_b": torch.ones(4 * columns)}
        tensors = low_rank(
            {prefix + layer: (rows, columns)}, (".lora_A.weight", ".lora_B.weight"), 2
        )
        more = marked if prefix == "base_model.model." else {}
        lora = read_lora(str(save(tmp_path / "x.safetensors", tensors | more)))
        found = [each for each in place(lora, "dev", networks) if each.update.product is not None]
        assert {each.component for each in found} == {component} and len(found) == count, prefix
        assert all(each.update.scale == 1 for each in found)


def test_names_of_peft_have_its_config(tmp_path: Path) -> None:
    """Also for a model of FLUX's authors; fal's files come without one."""
    name = "base_model.model.double_blocks.0.img_mlp.0"
    file = save(
        tmp_path / "adapter_model.safetensors",
        low_rank({name: (4, 8)}, (".lora_A.weight", ".lora_B.weight"), 2),
    )
    assert read_lora(str(file)).updates[0].scale == 1
    (tmp_path / "adapter_config.json").write_text('{"r": 2, "lora_alpha": 6}')
    assert read_lora(str(file)).updates[0].scale == 3


_CONTROL = {
    "img_in": "transformer.x_embedder",
    "double_blocks.0.txt_attn.proj": "transformer.transformer_blocks.0.attn.to_add_out",
    "double_blocks.1.img_attn.norm.query_norm.scale": (
        "transformer.transformer_blocks.1.attn.norm_q.weight"
    ),
    "single_blocks.0.norm.key_norm.scale": (
        "transformer.single_transformer_blocks.0.attn.norm_k.weight"
    ),
}
"""What a Control-LoRA changes, by the authors' names -> by diffusers'."""


def control_lora(authors: bool) -> Tensors:
    """For the tiny network: factors and biases of linears, and norms as they become."""
    shapes = {"img_in": (32, 2 * 16), "double_blocks.0.txt_attn.proj": (32, 32)}
    found = low_rank(shapes, (".lora_A.weight", ".lora_B.weight"), 2)
    found |= {f"{name}.lora_B.bias": torch.linspace(-1, 1, 32) for name in shapes}
    found |= {name: torch.linspace(0.5, 2, 16) for name in _CONTROL if "norm" in name}
    if authors:
        return found
    return {
        next(name.replace(one, other) for one, other in _CONTROL.items() if one in name): value
        for name, value in found.items()
    }


@pytest.mark.parametrize("authors", [True, False])
def test_a_control_lora_makes_a_control_model(authors: bool, folder: Path, tmp_path: Path) -> None:
    parts = tiny("flux-dev").components
    for unused in ("image_encoder", "feature_extractor"):
        parts.pop(unused)
    theirs = diffusers.FluxControlPipeline(**parts)
    theirs.load_lora_weights(control_lora(authors=False))
    asked = {"num_inference_steps": 2, **_SMALL}
    wanted = diffusers_images(theirs, ["a red cat"], [3], control_image=[HINT.decoded()], **asked)[
        0
    ]
    file = save(tmp_path / "x.safetensors", control_lora(authors))
    source = replace(resolve_source(folder), loras=read_loras([str(file)]))
    export = export_spec(source)
    assert export.pipeline.wiring.tasks == ("control",)
    pipeline = on_torch(source, export, tmp_path / "made")
    found = [
        pipeline.generate([Request("a red cat", seed=3, controls=(Control(hint),), **asked)])[0]
        for hint in (HINT, random_picture(2, (63, 45)))
    ]
    off = [np.abs(np.int32(image) - np.int32(wanted)).max() for image in found]
    assert off[0] <= 1 < off[1]


def test_a_control_lora_is_merged_alone(folder: Path, tmp_path: Path) -> None:
    file = save(tmp_path / "x.safetensors", control_lora(authors=True))
    net = tiny("flux-dev").transformer
    lora = read_lora(f"{file}:0")
    shapes = shapes_of(net)
    linears = {name: shape for name, shape in shapes.items() if len(shape) > 1}
    for known in shapes, linears:  # slots tell the latter
        with pytest.raises(InputError, match=r"a Control-LoRA\), which dev doesn't.*build --lora"):
            place(lora, "dev", {"transformer": known})
    source = replace(resolve_source(folder), loras=(lora,))
    before = dict(net.state_dict())
    for name, edit in lora_edits(source, "transformer", net).items():
        assert torch.equal(edit(before[name]), before[name])
