"""T5's text encoder: its graph computes what transformers does, for a fixed number of tokens."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
import onnxruntime  # noqa: E402

from edgesd.errors import InputError, UsageError  # noqa: E402
from edgesd.export.backends import tensorrt  # noqa: E402
from edgesd.export.backends.onnxruntime import LOWERING  # noqa: E402
from edgesd.export.cost.workload import trace  # noqa: E402
from edgesd.export.families import Component, Family  # noqa: E402
from edgesd.export.families.checkpoint import TRANSFORMERS_STEM  # noqa: E402
from edgesd.export.families.parts import t5  # noqa: E402
from edgesd.export.mapped import state_of  # noqa: E402
from edgesd.export.passes.half_compute import HalfCompute  # noqa: E402
from edgesd.export.passes.own_kernels import AttentionIn8Bits  # noqa: E402
from edgesd.export.passes.standard_attention import StandardAttention  # noqa: E402
from edgesd.export.passes.standard_norms import StandardNorms  # noqa: E402
from edgesd.export.pipeline import export_spec  # noqa: E402
from edgesd.export.quantize.layers import QuantizedLayer, find_layers  # noqa: E402
from edgesd.export.quiet import quiet  # noqa: E402
from edgesd.export.source import resolve_source  # noqa: E402
from edgesd.export.source.folder import ModelSource  # noqa: E402
from edgesd.export.to_onnx import graph_from_module  # noqa: E402
from edgesd.export.tokenizer import write_tokenizer  # noqa: E402
from edgesd.runtime.arrays import Array  # noqa: E402
from edgesd.runtime.backends.onnxruntime import session_options  # noqa: E402
from edgesd.runtime.tokenizer import PromptTokenizer  # noqa: E402
from edgesd.spec.pipeline import ShapeSpec  # noqa: E402
from tests.models import EMOJI  # noqa: E402
from tests.quantizing import evaluate, rounded_layers  # noqa: E402
from tests.support import assert_refused, run_cli  # noqa: E402
from tests.tiny_pipelines import write_tiny  # noqa: E402
from tests.unit.runtime.test_t5_tokenizer import pieces  # noqa: E402

ENCODER, TOKENIZER, TOKENS = "text_encoder_2", "tokenizer_2", 128
LOUD = 2e4
"""What the weights that make T5's sums large are multiplied with."""
FAMILY: Any = Family("t5", (), {ENCODER: TRANSFORMERS_STEM}, (TOKENIZER,), lambda *_: None)
SHAPE = ShapeSpec(64, 64, 4, dynamic=True, multiple_of=16)


def config(**more: Any) -> Any:
    """Far distances share a bucket from 12 tokens on."""
    return transformers.T5Config(
        vocab_size=len(pieces()) + 9,
        d_model=32,
        d_ff=48,
        d_kv=8,
        num_layers=2,
        num_heads=4,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=12,
        **{"feed_forward_proj": "gated-gelu", **more},
    )


def write_model(root: Path, dtype: Any, **more: Any) -> ModelSource:
    torch.manual_seed(0)
    with quiet():
        net = transformers.T5EncoderModel(config(**more)).to(dtype)
        for weight in net.parameters():
            weight.data += 0.1 * torch.randn(weight.shape, dtype=dtype)
        net.save_pretrained(root / ENCODER)
    transformers.T5TokenizerFast(vocab=pieces(), extra_ids=0).save_pretrained(root / TOKENIZER)
    index = {ENCODER: ["transformers", "T5EncoderModel"]}
    return ModelSource("tiny", root, index, FAMILY)


def component(source: ModelSource) -> Component:
    found = source.config(f"{ENCODER}/config.json")
    return t5.text_encoder(source, ENCODER, found, TOKENS, SHAPE)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    """In 16 bits, as T5-XXL is. Read-only."""
    return write_model(tmp_path_factory.mktemp("t5"), torch.float16)


def export(source: ModelSource) -> ir.Model:
    part = component(source)
    return graph_from_module(part.load(), part, "ort-mha")


@pytest.fixture(scope="module")
def graph(source: ModelSource) -> bytes:
    return ir.to_proto(export(source)).SerializeToString()


def model_of(graph: bytes) -> ir.Model:
    import onnx

    return ir.from_proto(onnx.load_from_string(graph))


def run(model: ir.Model, ids: Array, library: Path | None = None) -> Array:
    content = ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(content, session_options(1, library))
    found: Array = session.run(None, {"input_ids": ids})[0]
    return found


def reference(source: ModelSource, ids: Array, loud: bool = False) -> Array:
    """transformers' own, in fp32, without a mask, as diffusers' FluxPipeline runs it."""
    net = transformers.T5EncoderModel.from_pretrained(source.folder(ENCODER), dtype=torch.float32)
    with torch.no_grad():
        for name, weight in net.named_parameters():
            if loud and name.endswith("wo.weight"):
                weight *= LOUD
        found = net.eval()(torch.from_numpy(ids), output_hidden_states=False)[0]
    return np.asarray(found)


def ids_of(prompts: list[str]) -> Array:
    tokenizer = transformers.T5TokenizerFast(vocab=pieces(), extra_ids=0)
    found: Array = tokenizer(
        prompts, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="np"
    ).input_ids
    return found


PROMPTS = ["", "a red apple", "x " * 140]


def test_the_graph_computes_what_transformers_does(source: ModelSource, graph: bytes) -> None:
    ids = ids_of(PROMPTS)
    wanted = reference(source, ids)
    assert np.abs(wanted).max() > 0.5
    np.testing.assert_allclose(run(model_of(graph), ids), wanted, atol=3e-5)


def test_the_first_t5_does_too(tmp_path: Path) -> None:
    source = write_model(tmp_path, torch.float32, feed_forward_proj="relu")
    ids = ids_of(PROMPTS[1:2])
    np.testing.assert_allclose(run(export(source), ids), reference(source, ids), atol=3e-5)


def test_nothing_is_left_to_compute_the_buckets_with(graph: bytes) -> None:
    model = model_of(graph)
    count = Counter(node.op_type for node in model.graph)
    assert count["MultiHeadAttention"] == count["Gelu"] == 2
    assert count["SimplifiedLayerNormalization"] == 5
    assert not count.keys() & {"Log", "Where", "Range", "Less", "Abs", "Cast", "Tanh", "Softmax"}
    assert [value.shape for value in model.graph.inputs] == [ir.Shape(["batch", TOKENS])]


def test_the_bias_is_part_of_attention_in_standard_operators(
    source: ModelSource, graph: bytes
) -> None:
    model, ids = model_of(graph), ids_of(PROMPTS)
    assert StandardAttention()(model)
    assert StandardNorms()(model)
    assert not any(node.domain for node in model.graph)
    np.testing.assert_allclose(run(model, ids), reference(source, ids), atol=3e-5)


def test_kernels_without_a_bias_leave_the_attention(source: ModelSource, graph: bytes) -> None:
    assert not AttentionIn8Bits()(model_of(graph))
    kinds = [op for op in trace(component(source), {"batch": 1}).operations if op.heads[0]]
    assert [(op.kind, op.biased) for op in kinds] == [("attention", True)] * 2


def test_biases_are_no_weights(graph: bytes) -> None:
    model = model_of(graph)
    (gather,) = (n for n in model.graph if n.op_type == "Gather" and n.attributes["axis"].value)
    assert gather.inputs[0] is not None and gather.inputs[0].shape == (4, 8)
    layers = find_layers("t5", model, least=1)
    assert [la.kind for la in layers] == ["embedding"] + ["linear"] * 14


def quantized(model: ir.Model, scheme: str, static: bool = False) -> dict[str, QuantizedLayer]:
    """Layers of the graph, by their nodes, calibrated on one prompt."""
    return rounded_layers(model, {"input_ids": ids_of(PROMPTS[1:2])}, scheme, static)


@pytest.mark.integration
@pytest.mark.parametrize(("scheme", "error"), [("w8a8", 0.05), ("w4a8-g32", 0.35)])
def test_quantized(
    source: ModelSource, graph: bytes, own_kernels: Path | None, scheme: str, error: float
) -> None:
    ids, model = ids_of(PROMPTS[1:2]), model_of(graph)
    layers = quantized(model, scheme)
    kinds = Counter(layer.layer.kind for layer in layers.values())
    assert kinds == {"embedding": 1, "linear": 14}
    wanted = reference(source, ids)

    def error_of(found: Array) -> float:
        return float(np.sqrt(np.mean((found - wanted) ** 2) / np.mean(wanted**2)))

    LOWERING.lower_quantized(model, layers, (), None)
    assert "Gelu" in (node.op_type for node in model.graph)
    assert 1e-4 < error_of(run(model, ids)) < error
    if own_kernels is not None:
        model = model_of(graph)
        assert LOWERING.lower_to_kernels(model, layers, (), None)
        count = Counter(node.op_type for node in model.graph)
        assert (count["QuantLinear"], count["MultiHeadAttention"], count["MatMul"]) == (14, 2, 0)
        assert 1e-4 < error_of(run(model, ids, own_kernels)) < error
    model = model_of(graph)
    tensorrt.LOWERING.lower_quantized(model, quantized(model, scheme, True), (), None)
    assert not any(node.domain for node in model.graph)


def test_sums_beyond_fp16_stay_in_fp32(source: ModelSource, graph: bytes) -> None:
    """As at the true size: only the norms bound what the layers add to."""
    loud, ids = model_of(graph), ids_of(PROMPTS[1:2])
    for name, value in loud.graph.initializers.items():
        if "wo.weight" in name and value.const_value is not None:
            value.const_value = ir.tensor(value.const_value.numpy() * np.float32(LOUD))
    graph, wanted = ir.to_proto(loud).SerializeToString(), reference(source, ids, loud=True)

    def error_of(model: ir.Model) -> float:
        (found,) = evaluate(model, {"input_ids": ids})
        return float(np.sqrt(np.mean((found - wanted) ** 2) / np.mean(wanted**2)))

    naive = model_of(graph)
    for rewrite in (StandardNorms(), StandardAttention(), HalfCompute()):
        rewrite(naive)
    narrow = model_of(graph)
    for rewrite in (StandardAttention(), HalfCompute(), StandardNorms()):
        rewrite(narrow)
    assert not error_of(naive) < 0.5 and not error_of(narrow) < 0.5
    model = model_of(graph)
    tensorrt.LOWERING.lower(model, "fp16")
    assert error_of(model) < 0.01
    kinds = {node.name: node.outputs[0].dtype for node in model.graph if node.op_type == "MatMul"}
    wide = {name for name, dtype in kinds.items() if dtype == ir.DataType.FLOAT}
    assert {name.split(".")[-1] for name in wide if name} == {"wo/MatMul"} and len(wide) == 2
    for scheme in ("w8a8", "w4a16-g32"):
        model = model_of(graph)
        layers = quantized(model, scheme, static=True)
        tensorrt.LOWERING.lower_quantized(model, layers, (), None)
        assert error_of(model) < 0.45, scheme


def test_a_position_counts(source: ModelSource, graph: bytes) -> None:
    ids = ids_of(PROMPTS[1:2])
    model = model_of(graph)
    (table,) = (v for name, v in model.graph.initializers.items() if name.endswith("biases"))
    assert table.const_value is not None
    table.const_value = ir.tensor(np.flip(table.const_value.numpy(), -1))
    assert np.abs(run(model, ids) - reference(source, ids)).max() > 1e-3


def test_weights_stay_in_the_type_of_their_files(source: ModelSource) -> None:
    state = state_of(component(source).load())
    wide = [name for name, weight in state.items() if weight.dtype == torch.float32]
    assert [name.rpartition(".")[2] for name in wide] == ["biases"]
    count = sum(weight.dtype == torch.float16 for weight in state.values())
    assert count == len(transformers.T5EncoderModel(config()).state_dict())


@pytest.mark.parametrize(("pad", "end"), [(None, [2]), (-1, None), (10**6, 10**6)])
def test_examples_are_tokens_whatever_the_config_says_of_their_ends(
    source: ModelSource, pad: Any, end: Any
) -> None:
    found = source.config(f"{ENCODER}/config.json")
    found |= {"pad_token_id": pad, "eos_token_id": end}
    part = t5.text_encoder(source, ENCODER, found, TOKENS, SHAPE)
    ids = part.examples["input_ids"](np.random.default_rng(0), (2, TOKENS))
    assert ids.shape == (2, TOKENS) and 0 <= ids.min() <= ids.max() < found["vocab_size"]


def test_the_tokenizer_becomes_one_that_boards_read(source: ModelSource, tmp_path: Path) -> None:
    folder = source.folder(TOKENIZER)
    files = write_tokenizer(folder, tmp_path / "made", TOKENS, (), "T5Tokenizer")
    spec = json.loads(files["tokenizer_spec.json"])
    assert spec == {"max_length": TOKENS, "pad_id": 0, "bos_id": None, "eos_id": 1}
    rows = [PromptTokenizer(*files.values()).encode(prompt)[0] for prompt in PROMPTS]
    assert np.array_equal(np.concatenate(rows), ids_of(PROMPTS))


def test_a_tokenizer_without_its_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "spiece.model").write_bytes(b"\n")
    with pytest.raises(InputError, match=r"lacks tokenizer\.json") as caught:
        write_tokenizer(tmp_path, tmp_path / "made", TOKENS, (), "T5TokenizerFast")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "made").exists()


def test_the_number_of_tokens(source: ModelSource, tmp_path: Path) -> None:
    tokenizer = t5.load_tokenizer(source.folder(TOKENIZER))
    found = source.config(f"{ENCODER}/config.json")

    def count(given: ModelSource, usual: int = 256) -> int:
        return t5.token_count(given, TOKENIZER, tokenizer, found, usual)

    assert count(source) == 256
    assert count(replace(source, max_tokens=128)) == 128
    tokenizer.model_max_length = 24
    assert count(source) == 24
    assert count(replace(source, max_tokens=512)) == 512
    own = replace(source, root=tmp_path)
    (tmp_path / "edgesd.json").write_text('{"max_tokens": 64}')
    assert (count(own), count(replace(own, max_tokens=32))) == (64, 32)
    (tmp_path / "edgesd.json").write_text('{"max_tokens": 513}')
    with pytest.raises(
        InputError, match=r"takes 2 to 512 tokens of a prompt, not 513.*edgesd\.json"
    ):
        count(own)
    found["vocab_size"] = 9
    with pytest.raises(InputError, match="embeddings for 9 only"):
        count(source)


@pytest.mark.integration
def test_a_bundle_has_as_many_tokens_as_are_asked_for(tmp_path: Path) -> None:
    source = resolve_source(write_tiny("flux-schnell", tmp_path / "model"))
    hashes = set()
    for asked, wanted in ((None, 256), (128, 128)):
        given = replace(source, max_tokens=asked)
        export = export_spec(given)
        ref = export.pipeline.wiring.tokenizers[TOKENIZER]
        assert (ref.max_tokens, ref.chunked) == (wanted, False)
        encoder = export.pipeline.components[ENCODER]
        assert [each.shape[1] for each in (*encoder.inputs, *encoder.outputs)] == [wanted] * 2
        hashes.add(given.sha256())
    assert len(hashes) == 2


def test_models_without_t5_refuse_a_number_of_tokens() -> None:
    with pytest.raises(UsageError, match=r"^--max-tokens is for .* has none: leave it out$"):
        export_spec(replace(resolve_source(EMOJI), max_tokens=128))
    found = run_cli("plan", str(EMOJI), "--target", "x86-64-cpu", "--max-tokens", "128")
    assert_refused(found, "--max-tokens is for")
