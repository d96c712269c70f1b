"""What adapters begin as, and training all weights, on a very small language model."""

from __future__ import annotations

import random
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")
if find_spec("peft") is None:  # imported where it is used: it takes seconds
    pytest.skip("peft isn't installed", allow_module_level=True)

from edgesd.errors import InputError, MissingDependencyError, UsageError  # noqa: E402
from edgesd.export.prompter import export as exporting  # noqa: E402
from edgesd.export.prompter import starts as starting  # noqa: E402
from edgesd.export.prompter import train as training_module  # noqa: E402
from edgesd.export.prompter.base import Base, load_base  # noqa: E402
from edgesd.export.prompter.export import export  # noqa: E402
from edgesd.export.prompter.gguf_files import (  # noqa: E402
    Layout,
    dequantize,
    read_updates,
    rounded,
    tensor_types,
    write_base,
    write_merged,
)
from edgesd.export.prompter.loftq import loftq, random_like  # noqa: E402
from edgesd.export.prompter.pairs import PairSet, write_pairs  # noqa: E402
from edgesd.export.prompter.starts import OWN_BASE, AdapterSettings, begin  # noqa: E402
from edgesd.export.prompter.train import Training, train  # noqa: E402
from edgesd.progress import SILENT  # noqa: E402
from tests.support import Interrupting, assert_refused, run_cli  # noqa: E402
from tests.unit.export.prompter.test_training import (  # noqa: E402, F401
    IDS,
    LORA,
    base,
    pairs,
    read,
    small,
)

pytestmark = pytest.mark.integration


@pytest.fixture
def tokenizer(base: Path) -> Any:  # noqa: F811
    return transformers.AutoTokenizer.from_pretrained(base)


@pytest.fixture
def from_files(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The small GGUF files have no tokenizer that can be read: they get a word tokenizer."""

    def load(path: Path) -> Base:
        return Base(read(path), tokenizer, 1)

    monkeypatch.setattr(starting, "load_base", load)
    monkeypatch.setattr(training_module, "load_base", load)


# LoftQ itself


def test_loftq_comes_nearer_to_the_weight_than_rounding() -> None:
    weight = np.random.default_rng(0).standard_normal((96, 64)).astype(np.float32)

    def rounding(values: np.ndarray) -> np.ndarray:
        return rounded(values, "Q4_0")

    plain = np.linalg.norm(weight - rounding(weight))
    left = []
    for rank, iterations in ((4, 1), (4, 5), (16, 5)):
        grid, update = loftq(weight, rounding, rank, iterations)
        np.testing.assert_array_equal(grid, rounding(grid))
        assert update.a.shape == (rank, 64) and update.b.shape == (96, rank)
        left.append(np.linalg.norm(weight - grid - update.b @ update.a))
    assert left[2] < left[1] < left[0] < plain


@pytest.mark.parametrize("shape", [(40, 24), (24, 40)])
def test_one_iteration_is_the_singular_value_decomposition(shape: tuple[int, int]) -> None:
    weight = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    _, update = loftq(weight, np.zeros_like, 5, 1)
    left, values, right = np.linalg.svd(weight, full_matrices=False)
    wanted = (left[:, :5] * values[:5]) @ right[:5]
    np.testing.assert_allclose(update.b @ update.a, wanted, atol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(update.a, axis=1) ** 2, values[:5], rtol=1e-4)


def test_the_control_has_the_norms_and_other_directions() -> None:
    weight = np.random.default_rng(2).standard_normal((40, 24)).astype(np.float32)
    _, update = loftq(weight, np.zeros_like, 5, 1)
    control = random_like(update, np.random.default_rng(3))
    ours, theirs = (np.linalg.svd(u.b @ u.a, compute_uv=False)[:5] for u in (update, control))
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)
    overlap = np.sum((update.b @ update.a) * (control.b @ control.a)) / np.sum(ours**2)
    assert abs(overlap) < 0.3


def test_a_type_that_a_weight_cannot_have() -> None:
    with pytest.raises(InputError, match=r"a weight of \[4, 20\] can't have the type Q4_0"):
        rounded(np.zeros((4, 20), np.float32), "Q4_0")


# Starts


def test_the_order_of_rows_goes_both_ways(small: tuple[Path, Any]) -> None:  # noqa: F811
    layout = Layout(small[0])
    there = {t.name: dequantize(t) for t in layout.reader.tensors}
    for name, value in small[1].state_dict().items():
        target = layout.name(name)
        array = value.numpy()
        if array.ndim == 2:
            np.testing.assert_array_equal(layout.to_torch(target, there[target]), array)
            np.testing.assert_array_equal(layout.to_gguf(target, array), there[target])
    with pytest.raises(InputError, match="has no name in GGUF files"):
        layout.name("model.layers.0.gate_of_nothing.weight")


@pytest.mark.usefixtures("from_files")
@pytest.mark.parametrize("start", ["loftq-gguf", "loftq-gguf-control"])
def test_loftq_brings_its_own_base(
    start: str,
    small: tuple[Path, Any],  # noqa: F811
    pairs: PairSet,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = tmp_path / "run"
    settings = AdapterSettings(8, 16, start, "Q4_0", 3)
    training = Training(settings, steps=2, batch=4, learning_rate=1e-3)
    report = train(small[0], pairs, "x", run, training)
    assert report.start == start and report.base == OWN_BASE
    assert set(report.starts) == {"default", "loftq-gguf", "loftq-gguf-control"}
    assert report.loss_before == pytest.approx(report.starts[start], abs=1e-6)
    types = tensor_types(run / OWN_BASE)
    assert types["Q4_0"] > types["Q8_0"] > 0
    monkeypatch.setattr(exporting, "llama_loss", lambda *files: report.loss_after)
    with pytest.raises(InputError, match="isn't the file that"):
        export(run, small[0], pairs, tmp_path / "out", "a licence")
    made = export(run, run / OWN_BASE, pairs, tmp_path / "out", "a licence")
    assert made.types == types


@pytest.mark.usefixtures("from_files")
def test_loftq_starts_nearer_to_the_model_than_its_rounded_base(
    small: tuple[Path, Any],  # noqa: F811
    tmp_path: Path,
) -> None:
    settings = AdapterSettings(16, 32, "loftq-gguf", "Q4_0", 5)
    started = begin(small[0], tmp_path, settings, SILENT)
    layout = Layout(started.file)
    away = {}
    with torch.no_grad():
        wanted = small[1](IDS).logits
        for name, updates in started.starts.items():
            starting.set_adapter(started.model, layout, updates, 2.0)
            away[name] = float((started.model(IDS).logits - wanted).square().mean())
    assert away["loftq-gguf"] < 0.8 * away["default"] < away["loftq-gguf-control"]


def test_loftq_of_what_lies_on_the_grid(small: tuple[Path, Any], tmp_path: Path) -> None:  # noqa: F811
    settings = AdapterSettings(4, 8, "loftq-gguf", "Q8_0")
    with pytest.raises(InputError, match="is Q8_0 already"):
        begin(small[0], tmp_path, settings, SILENT)
    with pytest.raises(InputError, match="LoftQ writes a GGUF file"):
        begin(tmp_path, tmp_path, settings, SILENT)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_what_needs_a_gpu_says_so(
    small: tuple[Path, Any],  # noqa: F811
    pairs: PairSet,  # noqa: F811
    base: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    with pytest.raises(MissingDependencyError, match="use loftq-gguf"):
        begin(small[0], tmp_path, AdapterSettings(4, 8, "loftq"), SILENT)
    pytest.importorskip("apollo_torch")
    with pytest.raises(MissingDependencyError, match="use galore or apollo"):
        train(base, pairs, "x", tmp_path, Training(None, "galore8bit", steps=1))


@pytest.mark.gpu
@pytest.mark.usefixtures("from_files")
def test_pefts_loftq(small: tuple[Path, Any], pairs: PairSet, tmp_path: Path) -> None:  # noqa: F811
    settings = AdapterSettings(4, 8, "loftq", iterations=2)
    report = train(small[0], pairs, "x", tmp_path, Training(settings, steps=2, batch=4))
    assert report.base == OWN_BASE
    assert set(tensor_types(tmp_path / OWN_BASE)) == {"F16", "F32", "Q8_0"}


def test_a_pissa_adapter_fits_the_base_as_it_was(
    base: Path,  # noqa: F811
    pairs: PairSet,  # noqa: F811
    tmp_path: Path,
) -> None:
    """Nothing is changed by its start, and what is written adds what was learned."""
    import peft

    settings = AdapterSettings(4, 8, "pissa")
    (tmp_path / "a").mkdir()
    started = begin(base, tmp_path / "a", settings, SILENT)
    plain = load_base(base)
    ids = IDS % 10
    with torch.no_grad():
        torch.testing.assert_close(
            started.model(ids).logits, plain.model(ids).logits, atol=1e-4, rtol=1e-3
        )
    run = tmp_path / "run"
    training = Training(settings, steps=4, batch=4, learning_rate=1e-2, warm_up=1)
    report = train(base, pairs, "x", run, training)
    assert report.loss_after < report.loss_before
    assert (report.rank, report.alpha) == (8, 16) and report.start == "pissa"
    assert not (run / starting.INITIAL).exists()
    again = peft.PeftModel.from_pretrained(plain.model, run)
    held = [training_module.row(plain, pair) for pair in pairs.some_held(256)]
    assert training_module.held_loss(again, held) == pytest.approx(report.loss_after, abs=1e-3)


# All weights


@pytest.mark.parametrize("kind", ["adamw", "galore", "apollo"])
def test_all_weights_learn_and_an_interrupted_run_ends_the_same(
    kind: str,
    base: Path,  # noqa: F811
    pairs: PairSet,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if kind != "adamw":
        pytest.importorskip("apollo_torch")
    training = Training(None, kind, steps=6, batch=4, learning_rate=3e-3, warm_up=1)
    whole = train(base, pairs, "x", tmp_path / "whole", training)
    assert whole.loss_after < whole.loss_before
    assert (whole.rank, whole.start, whole.optimizer) == (0, "full", kind)
    if kind == "adamw":  # two moments of each weight, and a step's number for each tensor
        assert 8 * whole.trained_parameters <= whole.state_bytes < 8.1 * whole.trained_parameters
    else:
        assert whole.state_bytes < 8 * whole.trained_parameters
    monkeypatch.setattr(training_module, "_SAVE_SECONDS", 0.0)

    with pytest.raises(KeyboardInterrupt):
        train(base, pairs, "x", tmp_path / "cut", training, Interrupting(4))
    again = train(base, pairs, "x", tmp_path / "cut", training)
    assert again.loss_after == pytest.approx(whole.loss_after, abs=1e-6)
    assert (again.loss_before, again.state_bytes) == (whole.loss_before, whole.state_bytes)


@pytest.mark.usefixtures("from_files")
def test_all_weights_become_a_model_of_their_own(
    small: tuple[Path, Any],  # noqa: F811
    pairs: PairSet,  # noqa: F811
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"
    training = Training(None, steps=3, batch=4, learning_rate=1e-2, warm_up=1)
    report = train(small[0], pairs, "x", run, training)
    assert (run / "weights.safetensors").is_file()
    with pytest.raises(UsageError, match="add --merge TYPE"):
        export(run, small[0], pairs, tmp_path / "out", "a licence")
    with pytest.raises(UsageError, match="erases what was learned"):
        export(run, small[0], pairs, tmp_path / "out", "a licence", "Q8_0")
    write_merged(run, small[0], 1.0, tmp_path / "merged.gguf")
    loaded = Base(read(tmp_path / "merged.gguf"), starting.load_base(small[0]).tokenizer, 1)
    held = [training_module.row(loaded, pair) for pair in pairs.some_held(256)]
    loss = training_module.held_loss(loaded.model, held)
    assert loss == pytest.approx(report.loss_after, rel=2e-3)
    assert abs(report.loss_before - loss) > 10 * abs(report.loss_after - loss)
    train(small[0], pairs, "x", run, Training(LORA, steps=1, batch=2))
    assert read_updates(run, small[0]) and not (run / "weights.safetensors").exists()


def test_options_that_exclude_each_other(base: Path, pairs: PairSet, tmp_path: Path) -> None:  # noqa: F811
    file = tmp_path / "pairs.jsonl"
    write_pairs(file, pairs)
    common = ("prompter", "train", file, "--base", base, "-o", tmp_path / "run")
    assert_refused(run_cli(*common, "--optim", "apollo"), "add --full")
    outcome = run_cli(*common, "--full", "--init", "pissa")
    assert outcome.code == 2 and "--full trains none" in outcome.err
    assert not (tmp_path / "run").exists()


# Files


def test_a_file_of_the_same_name_in_the_working_directory(
    small: tuple[Path, Any],  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """transformers reads that one, when it is told a bare name."""
    layout = Layout(small[0])
    name = "blk.0.attn_q.weight"
    other = {name: np.ones(layout.shapes[name], np.float32)}
    write_base(small[0], other, "Q8_0", tmp_path / small[0].name)
    monkeypatch.chdir(tmp_path)
    ends = SimpleNamespace(eos_token_id=1)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *_, **__: ends)
    found = load_base(small[0]).model
    key = "model.layers.0.self_attn.q_proj.weight"
    torch.testing.assert_close(found.state_dict()[key], small[1].state_dict()[key])


def test_an_adapter_on_a_base_with_other_values(
    small: tuple[Path, Any],  # noqa: F811
    tmp_path: Path,
) -> None:
    chance = random.Random(0)
    layout = Layout(small[0])
    weights = {
        name: np.full(shape, chance.random(), np.float32)
        for name, shape in layout.shapes.items()
        if "attn_v" in name
    }
    write_base(small[0], weights, "Q5_1", tmp_path / "new.gguf")
    there = {t.name: dequantize(t) for t in Layout(tmp_path / "new.gguf").reader.tensors}
    before = {t.name: dequantize(t) for t in layout.reader.tensors}
    for name, values in there.items():
        wanted = weights.get(name, before[name])
        np.testing.assert_allclose(values, wanted, atol=1e-3)
    with pytest.raises(InputError, match="train first"):
        read_updates(tmp_path, small[0])
