"""Training an adapter, and what becomes of it in GGUF files, on a very small language model."""

from __future__ import annotations

import json
import random
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

torch = pytest.importorskip("torch")
gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")
if find_spec("peft") is None:  # imported where it is used: it takes seconds
    pytest.skip("peft isn't installed", allow_module_level=True)

from safetensors.numpy import load_file, save_file  # noqa: E402

from edgesd.errors import InputError, QualityError, UsageError  # noqa: E402
from edgesd.export.prompter import export as exporting  # noqa: E402
from edgesd.export.prompter import train as training_module  # noqa: E402
from edgesd.export.prompter.export import export, llama_loss, read_report  # noqa: E402
from edgesd.export.prompter.gguf_files import (  # noqa: E402
    permute,
    read_updates,
    tensor_types,
    write_adapter,
    write_merged,
)
from edgesd.export.prompter.pairs import Pair, PairSet, make_pairs, write_pairs  # noqa: E402
from edgesd.export.prompter.starts import MODULES, AdapterSettings  # noqa: E402
from edgesd.export.prompter.train import (  # noqa: E402
    REPORT,
    STATE,
    Training,
    TrainingReport,
    train,
)
from tests.support import Interrupting, Recorded, assert_refused, run_cli  # noqa: E402
from tests.unit.runtime.test_prompter import smollm2  # noqa: E402

pytestmark = pytest.mark.integration

WORDS = ["red", "blue", "whale", "cat", "apple", "star", "tree", "fish"]
LORA = AdapterSettings(rank=4, alpha=8)
TRAINING = Training(LORA, steps=6, batch=4, learning_rate=1e-2, warm_up=1)


@pytest.fixture(scope="module")
def pairs() -> PairSet:
    chance = random.Random(0)
    raw = [
        Pair(f"{a} {chance.choice(WORDS)}", f"{a} {b}", f"{a} {b}") for a in WORDS for b in WORDS
    ]
    return make_pairs("words", raw, 0.25)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A transformers folder: two layers, grouped attention, a word tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("base")
    words = ["<unk>", "<end>", *WORDS, "Wish", ":", "Prompt"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<end>"
    )
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    model(len(words)).save_pretrained(folder)
    return folder


def model(vocabulary: int) -> Any:
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    return transformers.LlamaForCausalLM(config)


# Training


def test_the_loss_falls_and_progress_is_shown(base: Path, pairs: PairSet, tmp_path: Path) -> None:
    progress = Recorded()
    report = train(base, pairs, "x", tmp_path / "run", TRAINING, progress)
    assert report.loss_after < report.loss_before
    steps = [(done, total) for _, done, total in progress.updates]
    assert steps == [(done, 6) for done in range(1, 7)]
    assert read_report(tmp_path / "run") == report
    assert not (tmp_path / "run" / STATE).exists()
    assert report.held_pairs == len(pairs.held) and report.training_pairs == len(pairs.training)


def test_a_run_that_was_interrupted_goes_on_to_the_same_end(
    base: Path, pairs: PairSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(base, pairs, "x", tmp_path / "whole", TRAINING)
    monkeypatch.setattr(training_module, "_SAVE_SECONDS", 0.0)

    with pytest.raises(KeyboardInterrupt):
        train(base, pairs, "x", tmp_path / "cut", TRAINING, Interrupting(4))
    with pytest.raises(InputError, match="a run of another base, data or settings"):
        train(base, pairs, "y", tmp_path / "cut", TRAINING)
    again = train(base, pairs, "x", tmp_path / "cut", TRAINING)
    assert again.loss_after == whole.loss_after and again.loss_before == whole.loss_before
    name = "adapter_model.safetensors"
    assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_damaged_state(base: Path, pairs: PairSet, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / STATE).write_bytes(b"nonsense")
    with pytest.raises(InputError, match="is damaged"):
        train(base, pairs, "x", run, TRAINING)


def test_a_loss_that_is_no_number(
    base: Path, pairs: PairSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([2.0, float("nan")])
    monkeypatch.setattr(training_module, "held_loss", lambda *rows: next(losses))
    with pytest.raises(InputError, match="smaller --learning-rate"):
        train(base, pairs, "x", tmp_path / "run", TRAINING)
    assert not (tmp_path / "run" / REPORT).exists()


def test_the_command(base: Path, pairs: PairSet, tmp_path: Path) -> None:
    file, run = tmp_path / "pairs.jsonl", tmp_path / "run"
    write_pairs(file, pairs)
    common = ("prompter", "train", file, "--steps", "2", "--batch", "2", "-o", run)
    outcome = run_cli(*common, "--base", base, "--json")
    assert outcome.code == 0, outcome.err
    assert json.loads(outcome.out)["steps"] == 2
    missing = run_cli(*common, "--base", tmp_path / "none.gguf")
    assert missing.code == 3
    assert_refused(missing, "there is no model at")
    (tmp_path / "bad.gguf").write_bytes(b"GGUF, not")
    broken = run_cli(*common, "--base", tmp_path / "bad.gguf")
    assert broken.code == 3
    assert_refused(broken, "bad.gguf can't be read as a GGUF file")


# GGUF files


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A GGUF file of a small model in Q8_0, and the model as transformers reads it."""
    torch.manual_seed(1)
    source = model(32)
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(2)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_context_length(64)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(16)
    writer.add_vocab_size(32)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{n}" for n in range(32)])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for name, value in source.state_dict().items():
        array = value.numpy()
        target = names.get_name(name, (".weight",))
        if target.endswith("attn_q.weight"):
            array = permute(array, 4)
        if target.endswith("attn_k.weight"):
            array = permute(array, 2)
        if array.ndim == 1:
            writer.add_tensor(target, array)
        else:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(target, gguf.quants.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, read(path)


def read(path: Path) -> Any:
    found = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    return found.eval()


@pytest.fixture
def run(small: tuple[Path, Any], tmp_path: Path) -> tuple[Path, Any]:
    """A peft adapter with random weights on the small model, and the model with it."""
    import peft

    path, _ = small
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=list(MODULES))
    adapted = peft.get_peft_model(read(path), config)
    torch.manual_seed(2)
    with torch.no_grad():
        for weight in adapted.parameters():
            if weight.requires_grad:
                weight.normal_(std=0.1)
    adapted.save_pretrained(str(tmp_path / "run"))
    return tmp_path / "run", adapted.eval()


IDS = torch.arange(1, 21)[None]


def test_a_merged_model_computes_what_base_and_adapter_compute(
    small: tuple[Path, Any], run: tuple[Path, Any], tmp_path: Path
) -> None:
    folder, adapted = run
    merged = tmp_path / "merged.gguf"
    write_merged(folder, small[0], 2.0, merged)
    with torch.no_grad():
        wanted, plain = adapted(IDS).logits, small[1](IDS).logits
        found = read(merged)(IDS).logits
    change = (wanted - plain).square().mean().sqrt()
    assert (found - wanted).square().mean().sqrt() < 0.01 * change
    assert set(tensor_types(merged)) == {"F16", "F32"}


def test_an_adapters_tensors(
    small: tuple[Path, Any], run: tuple[Path, Any], tmp_path: Path
) -> None:
    """Each product of an adapter's two is, in the base's layout, what peft would add."""
    folder, _ = run
    out = tmp_path / "adapter.gguf"
    write_adapter(folder, small[0], 8.0, out)
    reader = gguf.GGUFReader(out)
    assert reader.fields["adapter.lora.alpha"].contents() == 8.0
    assert reader.fields["general.type"].contents() == "adapter"
    assert reader.fields["general.architecture"].contents() == "llama"
    there = {t.name: t.data.astype(np.float32) for t in reader.tensors}
    source = load_file(folder / "adapter_model.safetensors")
    assert len(there) == len(source) == 2 * 2 * len(MODULES)
    prefix = "base_model.model.model.layers.1"
    a, b = (source[f"{prefix}.self_attn.k_proj.lora_{x}.weight"] for x in "AB")
    found = there["blk.1.attn_k.weight.lora_b"] @ there["blk.1.attn_k.weight.lora_a"]
    np.testing.assert_allclose(found, permute(b @ a, 2), atol=2e-3)
    a, b = (source[f"{prefix}.mlp.down_proj.lora_{x}.weight"] for x in "AB")
    found = there["blk.1.ffn_down.weight.lora_b"] @ there["blk.1.ffn_down.weight.lora_a"]
    np.testing.assert_allclose(found, b @ a, atol=2e-3)


def test_an_adapter_of_another_model(
    small: tuple[Path, Any], run: tuple[Path, Any], tmp_path: Path
) -> None:
    folder = tmp_path / "other"
    shutil.copytree(run[0], folder)
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(n for n in tensors if n.endswith("q_proj.lora_A.weight"))
    save_file({**tensors, name: np.zeros((4, 32), np.float32)}, path)
    with pytest.raises(InputError, match="isn't an adapter for"):
        read_updates(folder, small[0])
    path.write_bytes(b"no")
    with pytest.raises(InputError, match="can't be read"):
        read_updates(folder, small[0])


def test_what_is_no_gguf_file(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + bytes(40))
    with pytest.raises(InputError, match="can't be read as a GGUF file"):
        tensor_types(tmp_path / "x.gguf")


# Export


@pytest.fixture
def trained(small: tuple[Path, Any], run: tuple[Path, Any]) -> Path:
    from edgesd.files import sha256_file

    report = TrainingReport(
        "small.gguf", sha256_file(small[0]), "x", "words", "a {}", "default", "adamw", 6, 4, 4, 8,
        0.01, 0, 9, 9, 5.0, 2.0, {}, 1.0, 1, 1, 1,
    )  # fmt: skip
    (run[0] / REPORT).write_bytes(msgspec.json.encode(report))
    return run[0]


@pytest.mark.parametrize("loss", [2.0, 2.06, 2.07, float("nan")])
def test_the_gate_is_the_loss_in_llama_cpp(
    loss: float,
    trained: Path,
    small: tuple[Path, Any],
    pairs: PairSet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(exporting, "llama_loss", lambda *files: loss)
    out = tmp_path / "out"
    if loss <= 2.06:
        made = export(trained, small[0], pairs, out, "a licence")
        assert made.loss_llama == loss and "Q8_0" in made.types
        assert sorted(p.name for p in out.iterdir()) == [
            *("adapter.gguf", "base.gguf", "export.json", "prompter.json")
        ]
        assert (out / "base.gguf").read_bytes() == small[0].read_bytes()
    else:
        with pytest.raises(QualityError, match=r"in llama\.cpp the held-out loss is"):
            export(trained, small[0], pairs, out, "a licence")
        assert not out.exists()


def test_a_merge_onto_the_bases_own_grid_is_refused(
    trained: Path, small: tuple[Path, Any], pairs: PairSet, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="erases what was learned"):
        export(trained, small[0], pairs, tmp_path / "out", "a licence", "Q8_0")
    assert not (tmp_path / "out").exists()


def test_another_base_than_it_was_trained_on(
    trained: Path, small: tuple[Path, Any], pairs: PairSet, tmp_path: Path
) -> None:
    other = tmp_path / "other.gguf"
    other.write_bytes(small[0].read_bytes() + b"\0")
    with pytest.raises(InputError, match=r"isn't the file that .* was trained on"):
        export(trained, other, pairs, tmp_path / "out", "a licence")


@pytest.mark.slow
def test_llama_cpp_agrees_with_torch(tmp_path: Path) -> None:
    """On the real base: a few steps, and the same held-out loss in both."""
    if find_spec("llama_cpp") is None:
        pytest.skip("llama-cpp-python isn't installed")
    from edgesd.export.prompter.sources import from_emoji

    domain = Path(__file__).parents[4] / "models/emoji/prompts/domain.json"
    made, base = make_pairs("emoji", from_emoji(domain, 0)), smollm2()
    report = train(base, made, "x", tmp_path / "run", Training(LORA, steps=10, batch=8))
    assert report.loss_after < 0.6 * report.loss_before
    report = export(tmp_path / "run", base, made, tmp_path / "out", "Apache-2.0")
    assert abs(report.loss_llama / report.loss_torch - 1) < 0.03
    assert llama_loss(base, None, made) > 1.5 * report.loss_llama
