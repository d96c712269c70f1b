"""From a diffusers folder to checked graphs: the embedded model, and variants of random weights."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

import onnx  # noqa: E402
import onnxruntime  # noqa: E402

from edgesd.errors import EdgesdError, InputError, ParityError  # noqa: E402
from edgesd.export import parity  # noqa: E402
from edgesd.export.external_data import write_model  # noqa: E402
from edgesd.export.families import Component  # noqa: E402
from edgesd.export.pipeline import export_pipeline, export_spec  # noqa: E402
from edgesd.export.source import resolve_source  # noqa: E402
from edgesd.export.to_onnx import graph_from_module  # noqa: E402
from edgesd.runtime.tokenizer import PromptTokenizer  # noqa: E402
from edgesd.spec.bundle import GraphSet  # noqa: E402
from tests.exports import Export  # noqa: E402
from tests.support import Recorded  # noqa: E402

EMOJI = Path(__file__).resolve().parents[2] / "models" / "emoji"

UNET = {
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": 128,
}


def variant(root: Path, unet: dict[str, Any], vae: Any, scheduler: Any) -> Path:
    """A pipeline folder: the embedded model's text side, the given networks, random weights."""
    torch.manual_seed(0)
    for name in ("text_encoder", "tokenizer"):
        shutil.copytree(EMOJI / name, root / name)
    diffusers.UNet2DConditionModel(**{**UNET, **unet}).save_pretrained(root / "unet")
    vae.save_pretrained(root / "vae")
    scheduler.save_pretrained(root / "scheduler")
    index = json.loads((EMOJI / "model_index.json").read_text())
    index["vae"] = ["diffusers", type(vae).__name__]
    index["scheduler"] = ["diffusers", type(scheduler).__name__]
    (root / "model_index.json").write_text(json.dumps(index))
    return root


@pytest.fixture(scope="module")
def emoji(
    kept_exports: Export, tmp_path_factory: pytest.TempPathFactory
) -> tuple[GraphSet, list[str]]:
    told = Recorded()
    source = resolve_source(EMOJI)
    graphs = kept_exports(
        source,
        export_spec(source),
        tmp_path_factory.mktemp("export") / "emoji",
        progress=told,
    )
    return graphs, told.lines


def ops(root: Path, component: str) -> Counter[str]:
    proto = onnx.load(root / component / "model.onnx", load_external_data=False)
    assert proto.ir_version <= 10
    assert all(o.version <= 21 for o in proto.opset_import)
    assert not any(node.metadata_props or node.doc_string for node in proto.graph.node)
    assert b"site-packages" not in proto.SerializeToString()
    return Counter(node.op_type for node in proto.graph.node)


def export_one(component: Component, root: Path, lowering: Any) -> Counter[str]:
    """Export a component below `root`, check its parity, and count its operators."""
    module = component.load()
    cases = parity.reference_cases(module, component)
    write_model(graph_from_module(module, component, lowering), root / component.name)
    graph = root / component.name / "model.onnx"
    assert parity.check_parity(graph, component, cases, "fp32").rel_rms < 1e-5
    return ops(root, component.name)


class TestEmbeddedModel:
    def test_graph_set(self, emoji: tuple[GraphSet, list[str]]) -> None:
        graphs, lines = emoji
        assert set(graphs.graphs) == {"text_encoder", "unet", "vae_decoder"}
        for graph in graphs.graphs.values():
            assert graph.parity.rel_rms < 1e-5
        of_unet = [line for line in lines if line.startswith("unet: ")]
        assert of_unet == ["unet: load", "unet: export", "unet: check"]
        assert set(graphs.assets) == {
            "licence/README.md",
            "licence/NOTICE",
            *(f"licence/LICENSES/{path.name}" for path in (EMOJI / "LICENSES").iterdir()),
            "tokenizer/tokenizer.json",
            "tokenizer/tokenizer_spec.json",
        }
        root = Path(graphs.root)
        files = {p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()}
        written = {f"{c}/{f}" for c in graphs.graphs for f in ("model.onnx", "weights.bin")}
        assert files == {*graphs.assets, *written}
        assert graphs.tools["torch"] == torch.__version__

    def test_attention_is_fused(self, emoji: tuple[GraphSet, list[str]]) -> None:
        root = Path(emoji[0].root)
        assert ops(root, "text_encoder")["MultiHeadAttention"] == 2
        assert ops(root, "unet")["MultiHeadAttention"] == 14
        assert ops(root, "unet")["Softmax"] == 0

    @pytest.mark.parametrize("component", ["text_encoder", "unet", "vae_decoder"])
    def test_graphs_are_as_the_spec_says(
        self, emoji: tuple[GraphSet, list[str]], component: str
    ) -> None:
        graphs, _ = emoji
        spec = graphs.pipeline.components[component]
        session = onnxruntime.InferenceSession(
            str(Path(graphs.root) / graphs.graphs[component].path)
        )
        assert [(i.name, tuple(i.shape)) for i in session.get_inputs()] == [
            (t.name, t.shape) for t in spec.inputs
        ]
        assert [o.name for o in session.get_outputs()] == [t.name for t in spec.outputs]

    def test_any_size_and_batch(self, emoji: tuple[GraphSet, list[str]]) -> None:
        graphs, _ = emoji
        session = onnxruntime.InferenceSession(str(Path(graphs.root) / "unet" / "model.onnx"))
        for batch, height, width in ((1, 4, 4), (3, 8, 20), (1, 24, 4)):
            inputs = {
                "sample": np.zeros((batch, 4, height, width), np.float32),
                "timestep": np.array([7], np.float32),
                "encoder_hidden_states": np.zeros((batch, 77, 128), np.float32),
            }
            (out,) = session.run(None, inputs)
            assert out.shape == (batch, 4, height, width)

    def test_tokenizer(self, emoji: tuple[GraphSet, list[str]]) -> None:
        folder = Path(emoji[0].root) / "tokenizer"
        tokenizer = PromptTokenizer(
            (folder / "tokenizer.json").read_bytes(), (folder / "tokenizer_spec.json").read_bytes()
        )
        ids, cut = tokenizer.encode("a red apple")
        assert ids.shape == (1, 77) and cut is None
        assert (ids[0, 0], ids[0, -1]) == (4094, 4095)


def test_sd2_like_with_kl_autoencoder_in_fp16(tmp_path: Path) -> None:
    """SD 2.x: linear projections, heads per block, v prediction, a "!" as padding."""
    model = variant(
        tmp_path / "model",
        {"use_linear_projection": True, "upcast_attention": True, "attention_head_dim": [2, 4]},
        diffusers.AutoencoderKL(
            block_out_channels=(16, 32),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=8,
        ),
        diffusers.DDIMScheduler(prediction_type="v_prediction"),
    )
    config = model / "tokenizer" / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "pad_token": "!"}))
    source = resolve_source(model)
    graphs = export_pipeline(source, export_spec(source, (16, 32)), tmp_path / "out", "fp16")
    for graph in graphs.graphs.values():
        assert graph.precision == "fp16" and graph.parity.rel_rms < 5e-3
    shape = graphs.pipeline.shape
    assert (shape.width, shape.height, shape.dynamic, shape.multiple_of) == (16, 32, False, 4)
    assert ops(tmp_path / "out", "vae_decoder")["MultiHeadAttention"] == 1
    assert ops(tmp_path / "out", "unet")["Cast"] > 10
    spec = json.loads((tmp_path / "out" / "tokenizer" / "tokenizer_spec.json").read_text())
    assert spec["pad_id"] != spec["eos_id"]


def test_lcm_like_has_guidance_as_an_input(tmp_path: Path) -> None:
    model = variant(
        tmp_path / "model",
        {
            "time_cond_proj_dim": 32,
            "down_block_types": ("DownBlock2D",) * 2,
            "up_block_types": ("UpBlock2D",) * 2,
        },
        diffusers.AutoencoderTiny(
            encoder_block_out_channels=(16, 16),
            decoder_block_out_channels=(16, 16),
            num_encoder_blocks=(1, 1),
            num_decoder_blocks=(1, 1),
        ),
        diffusers.LCMScheduler(),
    )
    source = resolve_source(model)
    unet = next(c for c in source.family.export_spec(source, None).components if c.name == "unet")
    assert unet.spec.inputs[-1].shape == ("batch", 32)
    assert export_one(unet, tmp_path, "ort-mha")["MultiHeadAttention"] == 2


@pytest.mark.parametrize("size", [None, (26, 18)], ids=["any size", "one size"])
def test_sizes_that_no_level_divides_are_generated_as_diffusers_does(
    size: tuple[int, int] | None, tmp_path: Path
) -> None:
    """The parity of each export is checked at such sizes: 9 x 13 latents, of two levels."""
    vae = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(16, 16),
        decoder_block_out_channels=(16, 16),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )
    model = variant(
        tmp_path / "model",
        {"sample_size": [9, 13], "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D")}
        | {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")},
        vae,
        diffusers.DDIMScheduler(),
    )
    export = export_spec(resolve_source(model), size)
    shape = export.pipeline.shape
    assert (shape.width, shape.height, shape.multiple_of) == (26, 18, 2)
    unet = next(c for c in export.components if c.name == "unet")
    assert export_one(unet, tmp_path, "ort-mha")["Resize"] == 1


def test_standard_operators_only(tmp_path: Path) -> None:
    source = resolve_source(EMOJI)
    text_encoder = source.family.export_spec(source, None).components[0]
    found = export_one(text_encoder, tmp_path, "sdpa")
    assert found["MultiHeadAttention"] == 0
    assert found["Softmax"] == 2


class TestFailures:
    """Whatever goes wrong, the error is one line, and nothing is left behind."""

    def test_parity(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(parity.TOLERANCE, "fp32", 1e-12)
        source = resolve_source(EMOJI)
        with pytest.raises(ParityError, match=r"text_encoder \(fp32\) differs .*1e-12"):
            export_pipeline(source, export_spec(source), tmp_path / "out")
        assert not list(tmp_path.iterdir())

    def test_exporter(self, monkeypatch: pytest.MonkeyPatch) -> None:
        source = resolve_source(EMOJI)
        part: Component = source.family.export_spec(source, None).components[0]

        def fail(*args: Any, **kwargs: Any) -> None:
            raise RuntimeError("step 3 of 3\nmany lines") from ValueError("no such op\nmore")

        monkeypatch.setattr(torch.onnx, "export", fail)
        with pytest.raises(EdgesdError, match=r"text_encoder could not be.*no such op") as caught:
            graph_from_module(part.load(), part, "ort-mha")
        assert "\n" not in str(caught.value)
        assert caught.value.__cause__ is not None

    def test_configs_of_a_wrong_type(self, tmp_path: Path) -> None:
        model = Path(shutil.copytree(EMOJI, tmp_path / "model"))
        path = model / "unet" / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "sample_size": "big"}))
        with pytest.raises(InputError, match="sample_size is 'big'"):
            export_spec(resolve_source(model))

    def test_tokenizer_is_broken(self, tmp_path: Path) -> None:
        model = Path(shutil.copytree(EMOJI, tmp_path / "model"))
        (model / "tokenizer" / "tokenizer.json").write_text("{")
        source = resolve_source(model)
        with pytest.raises(InputError, match=r"cannot read .*/tokenizer"):
            export_spec(source)


def test_importing_the_package_is_light() -> None:
    code = (
        "import sys, edgesd.export.pipeline, edgesd.export.source, edgesd.export.families.sd; "
        "sys.exit(str({'torch', 'onnx', 'diffusers', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == "set()"


_TRUE_SIZE = """
import pathlib, resource, sys
import diffusers, torch
from edgesd.export.pipeline import _export
from edgesd.export.source import resolve_source
root, out = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
source = resolve_source(root)
unet = next(c for c in source.family.export_spec(source, None).components if c.name == "unet")
graph = _export(unet, out, "fp32", "ort-mha", lambda stage, component: None)
print(graph.parity.rel_rms, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


@pytest.mark.slow
def test_true_size_unet_stays_below_12_gb(tmp_path: Path) -> None:
    """The UNet of Stable Diffusion 1.5, random weights, 64x64 latents: 3.4 GB in fp32."""
    text = json.loads((EMOJI / "text_encoder" / "config.json").read_text())
    sd15 = {
        "sample_size": 64,
        "block_out_channels": (320, 640, 1280, 1280),
        "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
        "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
        "layers_per_block": 2,
        "norm_num_groups": 32,
        "attention_head_dim": 8,
        "cross_attention_dim": 768,
    }
    vae = diffusers.AutoencoderTiny()
    model = variant(tmp_path / "model", sd15, vae, diffusers.DDIMScheduler())
    config = model / "text_encoder" / "config.json"
    config.write_text(json.dumps({**text, "hidden_size": 768}))
    done = subprocess.run(
        [sys.executable, "-c", _TRUE_SIZE, str(model), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rel_rms, peak_bytes = map(float, done.stdout.split())
    assert rel_rms < 1e-5
    assert peak_bytes < 12e9
    weights = tmp_path / "out" / "unet" / "weights.bin"
    assert weights.stat().st_size > 3.4e9
    shutil.rmtree(tmp_path / "out")
    shutil.rmtree(model)
