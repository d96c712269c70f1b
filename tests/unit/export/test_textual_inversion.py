"""Textual inversions: files of all kinds are read, their tokens and vectors added as diffusers
does; what fits no model is refused."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from safetensors.torch import save_file  # noqa: E402

from edgesd.errors import InputError, UsageError  # noqa: E402
from edgesd.export.families.checkpoint import Embedding  # noqa: E402
from edgesd.export.families.parts.clip import load_tokenizer  # noqa: E402
from edgesd.export.families.parts.weights import load_network, shell  # noqa: E402
from edgesd.export.own_pipeline import check_own_pipeline  # noqa: E402
from edgesd.export.pipeline import export_spec  # noqa: E402
from edgesd.export.source import ModelSource, resolve_source  # noqa: E402
from edgesd.export.source.embedding import read_embedding, read_embeddings  # noqa: E402
from edgesd.export.tokenizer import write_tokenizer  # noqa: E402
from edgesd.recipes.like import Like  # noqa: E402
from edgesd.recipes.sources import open_model  # noqa: E402
from edgesd.runtime.tokenizer import PromptTokenizer  # noqa: E402
from edgesd.spec.build import (  # noqa: E402
    BuildOptions,
    BuildRecord,
    EmbeddingReference,
    ModelReference,
)
from tests.models import EMOJI  # noqa: E402
from tests.single_files import without_weights, write_single_file  # noqa: E402
from tests.support import assert_refused, run_cli  # noqa: E402
from tests.tiny_pipelines import WIDTH as TINY_WIDTH  # noqa: E402
from tests.tiny_pipelines import write_tiny  # noqa: E402

WIDTH = 128
"""Of the embedded model's text encoder, whose tokenizer has 4096 tokens."""

KNOWN = 4096


def vectors(count: int, width: int = WIDTH) -> Any:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(count))


def save(path: Path, **tensors: Any) -> Path:
    save_file(tensors, path)
    return path


def inverted(*given: object) -> ModelSource:
    return open_model(str(EMOJI), embeddings=[str(one) for one in given])


def test_the_files_of_diffusers_and_of_the_web_ui(tmp_path: Path) -> None:
    web = save(tmp_path / "bad-hands.safetensors", emb_params=vectors(3))
    both = save(tmp_path / "xl.safetensors", clip_l=vectors(2, 4), clip_g=vectors(2, 6))
    learned = save(tmp_path / "learned_embeds.safetensors", **{"<cat>": vectors(1)[0].half()})
    assert read_embedding(str(web)).tokens == ["bad-hands", "bad-hands_1", "bad-hands_2"]
    assert torch.equal(read_embedding(str(web)).vectors[""], vectors(3))
    assert read_embedding(f"{web}:<x>").token == "<x>"
    assert {n: list(v.shape) for n, v in read_embedding(str(both)).vectors.items()} == {
        "clip_l": [2, 4],
        "clip_g": [2, 6],
    }
    found = read_embedding(str(learned))
    assert (found.tokens, found.vectors[""].dtype) == (["<cat>"], torch.float32)
    assert read_embedding(f"{learned}:<dog>").token == "<dog>"
    odd = save(tmp_path / "with:colon.safetensors", emb_params=vectors(1))
    assert read_embedding(str(odd)).token == "with:colon"


def test_files_that_are_none(tmp_path: Path) -> None:
    fine = vectors(2)
    files = {
        "holds 0 tensors": save(tmp_path / "empty.safetensors"),
        "holds 3 tensors": save(tmp_path / "3.safetensors", a=fine, b=fine * 1, c=fine * 2),
        "holds 2 tensors": save(tmp_path / "2.safetensors", a=fine, b=fine * 1),
        "of [76, 128]": save(tmp_path / "many.safetensors", emb_params=vectors(76)),
        "of [1, 2, 128]": save(tmp_path / "rank.safetensors", emb_params=fine[None]),
        "of [0, 128]": save(tmp_path / "zero.safetensors", emb_params=vectors(2)[:0]),
        "'ids' of [2]": save(tmp_path / "ids.safetensors", ids=torch.tensor([1, 2])),
        "NaN": save(tmp_path / "nan.safetensors", emb_params=fine * np.nan),
        "two encoders": save(tmp_path / "xl.safetensors", clip_l=fine, clip_g=vectors(3)),
        "can't stand in a prompt": save(tmp_path / "a b.safetensors", emb_params=fine),
    }
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "nan.safetensors").read_bytes()[:-9])
    (tmp_path / "text.safetensors").write_text("no tensors")
    (tmp_path / "a.pt").write_bytes(pickle.dumps({"string_to_param": {}}))
    for name in ("cut", "text"):
        files[f"{name}.safetensors isn't"] = tmp_path / f"{name}.safetensors"
    files["is a pickle"] = tmp_path / "a.pt"
    files["no such file"] = tmp_path / "missing.safetensors"
    for words, path in files.items():
        with pytest.raises(InputError) as caught:
            read_embedding(str(path))
        assert words in str(caught.value), str(caught.value)
    whole = save(tmp_path / "whole.safetensors", emb_params=fine)
    for token in ("a b", "a\x1b[31m", "x" * 101, "\u202e"):
        with pytest.raises(InputError, match="can't stand in a prompt"):
            read_embedding(f"{whole}:{token}")
    with (tmp_path / "large.safetensors").open("wb") as file:
        file.truncate(65 << 20)
    with pytest.raises(InputError, match="larger than"):
        read_embedding(str(tmp_path / "large.safetensors"))


def test_two_files_of_one_token(tmp_path: Path) -> None:
    toy = save(tmp_path / "toy.safetensors", emb_params=vectors(2))
    one = save(tmp_path / "toy_1.safetensors", emb_params=vectors(1))
    with pytest.raises(InputError, match="two files have the token 'toy_1'"):
        read_embeddings([str(toy), str(one)])
    assert [e.token for e in read_embeddings([str(toy), f"{one}:other"])] == ["toy", "other"]


def test_tables_grow_as_in_diffusers(tmp_path: Path) -> None:
    toy = save(tmp_path / "toy.safetensors", emb_params=vectors(2))
    cat = save(tmp_path / "cat.safetensors", **{"<cat>": vectors(1)[0]})
    source = inverted(toy, cat)
    net = load_network(source, "text_encoder", transformers.CLIPTextModel)
    own = load_network(resolve_source(EMOJI), "text_encoder", transformers.CLIPTextModel)
    assert net.config.vocab_size == KNOWN + 3
    ids = torch.tensor([[KNOWN - 2, 5, KNOWN, KNOWN + 1, KNOWN + 2, KNOWN - 1]])
    with torch.no_grad():
        found = net.get_input_embeddings()(ids)[0]
        assert torch.equal(found[1:2], own.get_input_embeddings()(ids[:, 1:2])[0])
    assert torch.equal(found[2:5], torch.cat([vectors(2), vectors(1)]))
    assert shell(source, "text_encoder", transformers.CLIPTextModel).config.vocab_size == KNOWN + 3
    tokenizer = load_tokenizer(EMOJI / "tokenizer", source.embeddings)
    ids = tokenizer.convert_tokens_to_ids(["toy", "toy_1", "<cat>"])
    assert ids == [KNOWN, KNOWN + 1, KNOWN + 2]


def test_a_single_file_takes_them_too(tmp_path: Path) -> None:
    folder = write_tiny("sd", tmp_path / "sd")
    file = write_single_file(folder, tmp_path / "model.safetensors")
    toy = save(tmp_path / "toy.safetensors", emb_params=vectors(2, TINY_WIDTH))
    plain, source = (
        open_model(str(file), embeddings=given, config=without_weights(folder))
        for given in ((), [f"{toy}:<new>"])
    )
    tables = [
        load_network(one, "text_encoder", transformers.CLIPTextModel).get_input_embeddings()
        for one in (plain, source)
    ]
    count = tables[0].num_embeddings
    found = tables[1](torch.arange(count + 2)[None])[0]
    assert torch.equal(
        found, torch.cat([tables[0](torch.arange(count)[None])[0], vectors(2, TINY_WIDTH)])
    )
    assert plain.sha256() != source.sha256()
    assert export_spec(source).components[0].load().net.config.vocab_size == count + 2


def test_what_was_added_belongs_to_the_model(tmp_path: Path) -> None:
    """Its hash says so, which names what builds keep."""
    toy = save(tmp_path / "toy.safetensors", emb_params=vectors(2))
    plain, with_toy = inverted(), inverted(toy)
    other = inverted(f"{toy}:other")
    assert len({plain.sha256(), with_toy.sha256(), other.sha256()}) == 3


def test_prompts_are_fed_as_in_diffusers(tmp_path: Path) -> None:
    toy = save(tmp_path / "toy.safetensors", emb_params=vectors(3))
    source = inverted(f"{toy}:<toy>")
    export = export_spec(source)
    files = write_tokenizer(source.folder("tokenizer"), tmp_path / "made", 77, source.embeddings)
    tokenizer = PromptTokenizer(*files.values())
    check_own_pipeline(export, {"tokenizer": tokenizer})
    ids = tokenizer.encode("a <toy>!")[0][0].tolist()
    assert [i for i in ids if i >= KNOWN] == [KNOWN, KNOWN + 1, KNOWN + 2]
    assert export.components[0].load().net.config.vocab_size == KNOWN + 3


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ({"emb_params": vectors(2, 64)}, "vectors of 64 values"),
        ({"clip_l": vectors(2), "clip_g": vectors(2, 64)}, "two text encoders"),
        ({"a</w>": vectors(1)}, "knows the token"),
    ],
)
def test_vectors_of_another_model(file: dict[str, Any], words: str, tmp_path: Path) -> None:
    source = inverted(save(tmp_path / "toy.safetensors", **file))
    with pytest.raises(InputError, match=words):
        export_spec(source)


def test_a_pipeline_of_two_encoders_needs_vectors_for_both(tmp_path: Path) -> None:
    index = {**resolve_source(EMOJI).index, "text_encoder_2": ["transformers", "X"]}
    embedding = Embedding("toy", "0" * 64, {"": vectors(2)})
    source = replace(resolve_source(EMOJI), index=index, embeddings=(embedding,))
    with pytest.raises(InputError, match="give a file with clip_l and clip_g"):
        load_network(source, "text_encoder", transformers.CLIPTextModel)


def test_a_build_refuses_a_pickle_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "bad.pt"
    path.write_bytes(b"x")
    assert_refused(
        run_cli("build", "demo", "--target", "x86-64-cpu", "--embedding", path), "is a pickle"
    )


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (torch.zeros(1, 4).to(torch.float8_e4m3fn), "float8_e4m3fn: expected 1 to 75 vectors"),
        (torch.full((1, 4), 1e300, dtype=torch.float64), "infinite values"),
    ],
)
def test_numbers_that_no_text_encoder_has(values: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=words):
        read_embedding(str(save(tmp_path / "toy.safetensors", toy=values)))


def test_a_bundle_says_what_was_added(miniature: Any) -> None:
    record = BuildRecord(
        ModelReference("demo", "demo", "0" * 64),
        BuildOptions("x86-64-cpu"),
        embeddings=(EmbeddingReference("<toy>", "0" * 64),),
    )
    like = Like(Path("other"), miniature.manifest, record)
    like.check_embeddings(["toy.safetensors"])
    with pytest.raises(UsageError, match=r"<toy>.*--embedding FILE"):
        like.check_embeddings([])
