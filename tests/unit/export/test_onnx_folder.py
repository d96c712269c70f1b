"""Folders of ONNX graphs: the weights are read back exactly, and held to the graphs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")
from onnx import TensorProto, helper  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from edgesd.errors import InputError  # noqa: E402
from edgesd.export.mapped import state_of  # noqa: E402
from edgesd.export.pipeline import export_spec  # noqa: E402
from edgesd.export.source import resolve_source  # noqa: E402
from edgesd.export.source.onnx_folder import OnnxFolder  # noqa: E402
from edgesd.recipes.sources import open_model  # noqa: E402
from edgesd.runtime.requests import Request  # noqa: E402
from tests.loras import peft_lora, save  # noqa: E402
from tests.models import edit  # noqa: E402
from tests.onnx_folders import write_onnx_folder  # noqa: E402
from tests.tiny_pipelines import on_torch, tiny, write_tiny  # noqa: E402

pytestmark = pytest.mark.integration
NAME = "sdxl"


@pytest.fixture(scope="module")
def diffusers_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(NAME, tmp_path_factory.mktemp("diffusers") / "model")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Graphs in optimum's form. Read-only."""
    return write_onnx_folder(tiny(NAME), tmp_path_factory.mktemp("exported") / "model")


@pytest.fixture
def folder(exported: Path, tmp_path: Path) -> Path:
    """A copy that a test may break."""
    return Path(shutil.copytree(exported, tmp_path / "model"))


def load(folder: Path, index: int) -> Any:
    """The network of a component: 0 and 1 are text encoders, 2 the UNet, 3 the decoder."""
    return export_spec(resolve_source(folder)).components[index].load()


def check_equal(folder: Path, other: Path) -> None:
    """Raise AssertionError unless both hold the same weights, in the same networks."""
    ours, theirs = (export_spec(resolve_source(each)) for each in (folder, other))
    assert [c.spec for c in ours.components] == [c.spec for c in theirs.components]
    assert ours.pipeline.wiring == theirs.pipeline.wiring
    assert ours.pipeline.scheduler == theirs.pipeline.scheduler
    for component, same in zip(ours.components, theirs.components, strict=True):
        found, expected = state_of(component.load()), state_of(same.load())
        assert found.keys() == expected.keys()
        for name, tensor in found.items():
            assert tensor.dtype == expected[name].dtype
            assert torch.equal(tensor, expected[name]), name


def test_a_lora_is_merged_behind_the_comparison_with_the_graphs(
    exported: Path, tmp_path: Path
) -> None:
    file = save(tmp_path / "x.safetensors", peft_lora(tiny(NAME)))
    export = export_spec(open_model(str(exported), loras=[str(file)]))
    found, plain = state_of(export.components[2].load()), state_of(load(exported, 2))
    changed = [name for name in plain if not torch.equal(found[name].float(), plain[name].float())]
    assert len(changed) == len(peft_lora(tiny(NAME))) // 2


def test_weights_are_those_of_the_networks(exported: Path, diffusers_folder: Path) -> None:
    assert type(resolve_source(exported)) is OnnxFolder
    check_equal(exported, diffusers_folder)


def test_images_are_those_of_the_networks(
    exported: Path, diffusers_folder: Path, tmp_path: Path
) -> None:
    images = []
    for index, folder in enumerate((exported, diffusers_folder)):
        source = resolve_source(folder)
        pipeline = on_torch(source, export_spec(source), tmp_path / str(index))
        request = Request("a red cat", seed=3, num_inference_steps=3)
        images.append(np.asarray(pipeline.generate([request])[0], np.int16))
    # Matrices lie in memory the other way round, and products are added in another order.
    assert np.abs(images[0] - images[1]).max() <= 1


def test_a_source_as_any_other(exported: Path, folder: Path) -> None:
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    (folder / "LICENSE").write_text("text")
    (folder / "edgesd.json").write_text('{"num_inference_steps": 7}')
    source = resolve_source(folder)
    assert source.public_name == "model"
    assert source.licence("licence").name == "mit"
    assert source.licence("licence").files == ("licence/LICENSE",)
    assert export_spec(source).pipeline.num_inference_steps == 7
    before = resolve_source(exported).sha256()
    assert source.sha256() == before
    graph = onnx.load(folder / "unet" / "model.onnx")
    graph.doc_string = "other"
    onnx.save(graph, folder / "unet" / "model.onnx")
    assert resolve_source(folder).sha256() != before


def test_weights_beside_the_graph(folder: Path, diffusers_folder: Path) -> None:
    path = folder / "unet" / "model.onnx"
    save_external(path, "model.onnx_data")
    assert path.with_name("model.onnx_data").is_file()
    expected = load_file(diffusers_folder / "unet" / "diffusion_pytorch_model.safetensors")
    for name, tensor in state_of(load(folder, 2)).items():
        assert torch.equal(tensor, expected[name.removeprefix("net.")])
    size = path.with_name("model.onnx_data").stat().st_size
    os.truncate(path.with_name("model.onnx_data"), size // 2)
    with pytest.raises(InputError, match=r"cannot read .*model\.onnx"):
        load(folder, 2)


def save_external(path: Path, name: str) -> None:
    onnx.save(onnx.load(path), path, save_as_external_data=True, location=name, size_threshold=0)


@pytest.mark.parametrize("place", ["../model.onnx_data", "/etc/passwd"])
def test_no_other_file_is_read(folder: Path, place: str) -> None:
    path = folder / "unet" / "model.onnx"
    save_external(path, "model.onnx_data")
    (folder / "model.onnx_data").write_bytes((folder / "unet" / "model.onnx_data").read_bytes())
    graph = onnx.load(path, load_external_data=False)
    for tensor in graph.graph.initializer:
        for entry in tensor.external_data:
            entry.value = place if entry.key == "location" else entry.value
    path.write_bytes(graph.SerializeToString())
    with pytest.raises(InputError, match=f"is in {place}, which isn't a file beside the graph"):
        load(folder, 2)


def fused(graph: Any) -> None:
    graph.node[5].op_type, graph.node[5].domain = "FusedGelu", "com.microsoft"


def quantized(graph: Any) -> None:
    graph.node[5].op_type = "DequantizeLinear"


def another_weight(graph: Any) -> None:
    """Unlike what the node's name says."""
    nodes = {node.name: node for node in graph.node}
    first, second = (
        nodes[f"/down_blocks.1/attentions.0/transformer_blocks.0/attn1/to_{x}/MatMul"] for x in "qk"
    )
    first.input[1], second.input[1] = second.input[1], first.input[1]
    first.name, second.name = second.name, first.name


def lost_name(graph: Any) -> None:
    for node in graph.node:
        if node.name.endswith("/to_q/MatMul"):
            node.name = "x"


def bytes_for_weights(graph: Any) -> None:
    weight = next(each for each in graph.initializer if each.name == "conv_in.weight")
    values = np.zeros([*weight.dims], np.int8)
    weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))


def broken_graph(graph: Any) -> None:
    graph.node[5].op_type = "NoSuchOperator"


def circle(graph: Any) -> None:
    """Of Identity nodes, before a node that has a weight."""
    node = next(node for node in graph.node if node.op_type == "Gemm")
    node.input[1] = "a"
    for name, source in (("a", "b"), ("b", "a")):
        graph.node.append(helper.make_node("Identity", [source], [name]))


def endless(graph: Any) -> None:
    graph.node[5].op_type = "Loop"


def constant_elsewhere(graph: Any) -> None:
    value = onnx.numpy_helper.from_array(np.zeros(2, np.float32), "c")
    value.ClearField("raw_data")
    value.data_location = TensorProto.EXTERNAL
    value.external_data.add(key="location", value="../../secret")
    graph.node.append(helper.make_node("Constant", [], ["c"], value=value))


def large_input(graph: Any) -> None:
    graph.input.append(helper.make_tensor_value_info("x", TensorProto.FLOAT, [1 << 30, 1 << 10]))


def other_output(graph: Any) -> None:
    output = graph.output[0]
    graph.node.append(helper.make_node("Identity", [output.name], ["x"]))
    graph.output[0].CopyFrom(helper.make_tensor_value_info("x", TensorProto.FLOAT, None))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (fused, "has a FusedGelu of com.microsoft: it was fused or quantized"),
        (quantized, "has a DequantizeLinear: it was fused or quantized"),
        (another_weight, r"out_sample differs by .* and 1e-04 is allowed"),
        (lost_name, r"the graphs of its unet lack .*to_q\.weight"),
        (bytes_for_weights, r"conv_in\.weight is stored as INT8"),
        (broken_graph, "can't be compared with UNet2DConditionModel"),
        (circle, "can't be compared"),
        (endless, "has a Loop"),
        (constant_elsewhere, "weight c is in .*secret"),
        (large_input, "x is of"),
        (other_output, "gives x: expected out_sample"),
    ],
)
def test_graphs_that_are_refused(folder: Path, change: Callable[[Any], None], message: str) -> None:
    path = folder / "unet" / "model.onnx"
    model = onnx.load(path)
    change(model.graph)
    onnx.save(model, path)
    with pytest.raises(InputError, match=message) as error:
        load(folder, 2)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("file", "fields", "index", "message"),
    [
        # What weights don't tell, and graphs do.
        ("unet/config.json", {"norm_num_groups": 2}, 2, "out_sample differs"),
        ("text_encoder_2/config.json", {"hidden_act": "relu"}, 1, "differs"),
        ("vae_decoder/config.json", {"norm_num_groups": 2}, 3, "differs"),
        ("unet/config.json", {"block_out_channels": [16, 64]}, 2, "has the shape .* its config"),
        ("text_encoder/config.json", {"num_hidden_layers": 4}, 0, r"lack .*layers\.3"),
        ("text_encoder/config.json", {"architectures": None}, 0, "names no class"),
        ("vae_decoder/config.json", {"_class_name": None}, 3, "names no class"),
    ],
)
def test_configs_that_do_not_fit(
    folder: Path, file: str, fields: dict[str, Any], index: int, message: str
) -> None:
    edit(folder / file, **fields)
    with pytest.raises(InputError, match=message) as error:
        load(folder, index)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("vae_encoder/model.onnx", r"vae_encoder/model\.onnx is missing"),
        ("unet/model.onnx", r"unet/model\.onnx is missing"),
        ("unet/config.json", r"unet/config\.json is missing"),
        ("tokenizer", "tokenizer lacks the tokenizer's files"),
    ],
)
def test_missing_files(folder: Path, missing: str, message: str) -> None:
    path = folder / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(InputError, match=message):
        export_spec(resolve_source(folder))


@pytest.mark.parametrize("content", [b"", b"\x08", b"version https://git-lfs.github.com/spec/v1\n"])
def test_broken_graphs(folder: Path, content: bytes) -> None:
    (folder / "unet" / "model.onnx").write_bytes(content)
    with pytest.raises(InputError, match="unet"):
        load(folder, 2)


@pytest.mark.slow
def test_weights_in_16_bits(tmp_path: Path, diffusers_folder: Path) -> None:
    folder = write_onnx_folder(tiny("sd"), tmp_path / "model", torch.float16)
    module = load(folder, 1)
    expected = {k: v.half() for k, v in tiny("sd").unet.state_dict().items()}
    for name, tensor in state_of(module).items():
        assert torch.equal(tensor, expected[name.removeprefix("net.")])


OPTIMUM = (
    "optimum==2.1.0",
    "optimum-onnx==0.1.0",
    "transformers==4.57.6",
    "diffusers==0.35.2",
    "tokenizers==0.22.2",
    "huggingface_hub==0.36.2",
)
"""Releases that go together; torch and onnx are those of the tests."""

EXPORT = """
import sys
from optimum.exporters.onnx import main_export
main_export(sys.argv[1], output=sys.argv[2], task="text-to-image", do_validation=False, opset=17)
"""


@pytest.fixture(scope="module")
def optimum(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of packages with optimum's exporter, which needs older ones than edgesd."""
    folder = tmp_path_factory.mktemp("optimum")
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder)]
    done = subprocess.run([*install, *OPTIMUM], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"optimum can't be installed: {done.stderr.strip()[-200:]}")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_what_optimum_exports(optimum: Path, tmp_path: Path, name: str) -> None:
    given = write_tiny(name, tmp_path / "given")
    older = Path(shutil.copytree(given, tmp_path / "older"))
    for folder in older.glob("tokenizer*"):
        write_older_tokenizer(folder)
    for folder in older.glob("text_encoder*"):
        write_older_names(folder / "model.safetensors")
    environment = {**os.environ, "PYTHONPATH": str(optimum)}
    out = tmp_path / "exported"
    subprocess.run(
        [sys.executable, "-c", EXPORT, str(older), str(out)],
        env=environment,
        check=True,
        capture_output=True,
    )
    check_equal(out, given)


def write_older_tokenizer(folder: Path) -> None:
    """As transformers 4 reads it."""
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = (pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"])
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))


def write_older_names(path: Path) -> None:
    """The weights of a text encoder as transformers 4 names them."""
    state = load_file(path)
    if not any(name.startswith("text_model.") for name in state):
        state = {f"text_model.{name}": tensor for name, tensor in state.items()}
    save_file(state, path, {"format": "pt"})
