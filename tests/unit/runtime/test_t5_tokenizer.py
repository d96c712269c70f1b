"""T5's prompts become the ids that transformers gives FLUX: no beginning, an end, and padding."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgesd.errors import BundleError, InputError
from edgesd.runtime.chunks import Prompt, chunks_of, fixed_chunks
from edgesd.runtime.conditioning import Prompts
from edgesd.runtime.networks import check_networks
from edgesd.runtime.tokenizer import PromptTokenizer
from edgesd.spec.pipeline import PipelineSpec, TextSpec, TokenizerRef
from tests.support import pipeline_spec, write_bundle

TOKENS = 24
SPEC = {"max_length": TOKENS, "pad_id": 0, "bos_id": None, "eos_id": 1}
EOS, PAD = 1, 0

PROMPTS = [
    "",
    " ",
    "a red apple",
    "A Cat's hat, isn't it? 12345 !!! ...",
    "naïve café, ÅNGSTRÖM, e\u0301, ﬁ, ǅ",
    "寿司とラーメン мир שלום नमस्ते 😀",
    "line one\nline two\r\n\ttab\u00a0nbsp\u2028separator",
    "zero\u200bwidth \u202eright-to-left \ufeffmark",
    "before </s> after <pad> and <unk> end",
    "</s>" * 40,
    "a</s>b <PAD> </s",
    "\x01\x02 control \x7f \u0085 ▁ ▁▁",
    "x " * (TOKENS - 1),
    "x " * TOKENS,
    "a red apple " * 200,
    "x" * 10_000,
    "\U0010ffff \ufffd \ue000",
]


def pieces() -> list[tuple[str, float]]:
    """A vocabulary of letters and some words."""
    found = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    found += [(chr(code), -8.0) for code in range(33, 127)]
    return found + [(word, -6.0) for word in ("▁a", "▁red", "▁apple", "▁x", "é", "ap", "ple")]


@pytest.fixture(scope="module")
def t5() -> Any:
    """transformers' tokenizer."""
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    return transformers.T5TokenizerFast(vocab=pieces(), extra_ids=0)


@pytest.fixture(scope="module")
def content(t5: Any) -> bytes:
    found: bytes = t5.backend_tokenizer.to_str().encode()
    return found


@pytest.fixture(scope="module")
def tokenizer(content: bytes) -> PromptTokenizer:
    return PromptTokenizer(content, json.dumps(SPEC).encode())


def reference(t5: Any, prompt: str) -> np.ndarray:
    """As diffusers' FluxPipeline calls it."""
    ids: np.ndarray = t5(
        prompt, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="np"
    ).input_ids
    return ids


@pytest.mark.parametrize("prompt", PROMPTS, ids=range(len(PROMPTS)))
def test_equals_transformers(tokenizer: PromptTokenizer, t5: Any, prompt: str) -> None:
    ids, truncation = tokenizer.encode(prompt)
    assert ids.dtype == np.int64 and ids.shape == (1, TOKENS)
    assert np.array_equal(ids, reference(t5, prompt))
    whole = t5(prompt).input_ids
    assert (truncation.cut_tokens if truncation else 0) == max(0, len(whole) - TOKENS)
    (chunk, *more), cut = chunks_of(tokenizer, prompt, most=1)
    assert np.array_equal(chunk.ids, ids) and not more and cut == truncation


@settings(max_examples=200)
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=200))
def test_any_text_equals_transformers(tokenizer: PromptTokenizer, t5: Any, prompt: str) -> None:
    assert np.array_equal(tokenizer.encode(prompt)[0], reference(t5, prompt))


def test_what_is_cut_is_told(tokenizer: PromptTokenizer) -> None:
    _, truncation = tokenizer.encode("x " * (TOKENS - 1) + "red apple")
    assert truncation is not None
    assert (truncation.text, truncation.cut_tokens) == ("red apple", 2)
    assert truncation.kept_tokens == TOKENS - 1


def test_the_end_stays(tokenizer: PromptTokenizer) -> None:
    row = tokenizer.encode("x " * 100)[0][0]
    assert row[-1] == EOS and PAD not in row
    assert tokenizer.encode("")[0][0].tolist() == [EOS] + [PAD] * (TOKENS - 1)


@pytest.mark.parametrize("changed", [{"bos_id": 1}, {"eos_id": 0}, {"max_length": 0}])
def test_a_spec_of_another_tokenizer_is_refused(content: bytes, changed: dict[str, int]) -> None:
    with pytest.raises(BundleError, match="doesn't fit"):
        PromptTokenizer(content, json.dumps(SPEC | changed).encode())


def test_text_that_is_no_text_is_refused(tokenizer: PromptTokenizer) -> None:
    with pytest.raises(InputError, match="NUL"):
        tokenizer.encode("a\0b")


def test_weights_are_those_of_the_tokens(tokenizer: PromptTokenizer) -> None:
    (chunk,), _ = chunks_of(tokenizer, "a (red:1.5) x", "a1111", 1, whole=True)
    assert chunk.ids[0, :4].tolist() == [*tokenizer.ids("a red x"), EOS]
    assert chunk.weights is not None
    assert chunk.weights.tolist() == [1, 1.5, 1] + [1] * (TOKENS - 3)


def test_nothing_cuts_a_whole_prompt_before_it_is_full(tokenizer: PromptTokenizer) -> None:
    text = "a red apple BREAK " + "x, " * 6
    (chunk,), cut = chunks_of(tokenizer, text, "a1111", 1, whole=True)
    wanted = [*tokenizer.ids("a red apple"), *tokenizer.ids("x, " * 6)]
    assert chunk.ids[0].tolist()[: len(wanted) + 1] == [*wanted, EOS] and cut is None
    (chunk,), cut = chunks_of(tokenizer, text, "a1111", 1)
    assert chunk.ids[0].tolist()[:4] == [*tokenizer.ids("a red apple"), EOS] and cut is not None


TEXTS = (TextSpec("clip", "short", "input_ids"), TextSpec("t5", "long", "input_ids"))


def test_only_what_no_encoder_reads_is_told(content: bytes, tokenizer: PromptTokenizer) -> None:
    short = PromptTokenizer(content, json.dumps(SPEC | {"max_length": 8}).encode())
    prompts = Prompts(TEXTS, {"short": short, "long": tokenizer}, 1, whole=("long",))

    def told(*texts: str) -> dict[str, int]:
        prompts.conditioned(
            [Prompt(texts)], None, lambda *_: {"hidden": np.zeros((1, 1, 1))}, lambda name: None
        )
        return {text[:3]: cut.kept_tokens for text, cut in prompts.truncations.items()}

    assert told("x " * 10) == {}
    assert told("a " * 30) == {"a a": TOKENS - 1}
    assert told("red " * 10, "x " * 12) == {"a a": TOKENS - 1, "red": 7}


def whole(pipeline: PipelineSpec) -> PipelineSpec:
    """The same pipeline, whose encoder takes prompts whole."""
    refs = {name: TokenizerRef(77, chunked=False) for name in pipeline.wiring.tokenizers}
    wiring = msgspec.structs.replace(pipeline.wiring, tokenizers=refs)
    return msgspec.structs.replace(pipeline, wiring=wiring)


def test_a_pipeline_takes_whole_prompts_alone(tmp_path: Path) -> None:
    assert fixed_chunks(pipeline_spec("tokens")) is None
    assert fixed_chunks(whole(pipeline_spec("tokens"))) == 1
    assert fixed_chunks(whole(pipeline_spec(154))) == 1
    for tokens in (77, 154):
        manifest = write_bundle(tmp_path / str(tokens), tokens=tokens).manifest
        check_networks(manifest)
        manifest = msgspec.structs.replace(manifest, pipeline=whole(manifest.pipeline))
        if tokens == 77:
            check_networks(manifest)
        else:
            with pytest.raises(BundleError, match="takes 154 tokens of 77"):
                check_networks(manifest)
