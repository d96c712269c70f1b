"""Prompts become the ids that transformers gives, and what is cut is told as diffusers tells it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgesd.errors import BundleError, InputError
from edgesd.runtime.tokenizer import PromptTokenizer, TokenizerSpec

FOLDER = Path(__file__).parents[3] / "models" / "emoji" / "tokenizer"
SPEC = {"max_length": 77, "pad_id": 4095, "bos_id": 4094, "eos_id": 4095}
TOKENIZER_JSON = (FOLDER / "tokenizer.json").read_bytes()

PROMPTS = [
    "",
    " ",
    "a red apple",
    "A Cat's hat, isn't it? 12345 !!! ...",
    "naïve café, ÅNGSTRÖM, e\u0301, ﬁ, ǅ",
    "寿司とラーメン мир שלום नमस्ते",
    "😀 👩‍👩‍👧‍👦 🏳️‍🌈 ❤️ 👍🏽",
    "line one\nline two\r\n\ttab\u00a0nbsp\u2028separator",
    "zero\u200bwidth \u202eright-to-left \ufeffmark",
    "before <|endoftext|> after <|startoftext|> end",
    "<|endoftext|>" * 90,
    "<|EndOfText|> <|endoftext",
    "\x01\x02 control \x7f \u0085",
    "cat " * 75,
    "cat " * 76,
    "the quick brown fox " * 500,
    "x" * 10_000,
    "😀" * 2_500,
    "café <|endoftext|>😀 dog's!! \n" * 300,
    "\U0010ffff \ufffd \ue000",
]


@pytest.fixture(scope="module")
def tokenizer() -> PromptTokenizer:
    return PromptTokenizer(TOKENIZER_JSON, json.dumps(SPEC).encode())


@pytest.fixture(scope="module")
def clip() -> Any:
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    return transformers.CLIPTokenizer.from_pretrained(FOLDER)


def reference(clip: Any, prompt: str) -> tuple[np.ndarray, str | None]:
    """Ids, and the text that diffusers' encode_prompt warns about."""
    ids = clip(
        prompt, padding="max_length", max_length=77, truncation=True, return_tensors="np"
    ).input_ids
    untruncated = clip(prompt, padding="longest", return_tensors="np").input_ids
    removed = None
    if untruncated.shape[-1] >= ids.shape[-1] and not np.array_equal(ids, untruncated):
        (removed,) = clip.batch_decode(untruncated[:, 76:-1])
    return ids, removed


@pytest.mark.parametrize("prompt", PROMPTS, ids=range(len(PROMPTS)))
def test_equals_transformers(tokenizer: PromptTokenizer, clip: Any, prompt: str) -> None:
    want, removed = reference(clip, prompt)
    ids, truncation = tokenizer.encode(prompt)
    assert ids.dtype == np.int64 and ids.shape == (1, 77)
    assert np.array_equal(ids, want)
    assert (truncation.text if truncation else None) == removed


@settings(max_examples=200)
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=200))
def test_any_text_equals_transformers(tokenizer: PromptTokenizer, clip: Any, prompt: str) -> None:
    want, removed = reference(clip, prompt)
    ids, truncation = tokenizer.encode(prompt)
    assert np.array_equal(ids, want)
    assert (truncation.text if truncation else None) == removed


def test_truncation_counts_tokens(tokenizer: PromptTokenizer) -> None:
    assert tokenizer.encode("cat " * 75)[1] is None
    ids, truncation = tokenizer.encode("cat " * 75 + "red hat")
    assert truncation is not None
    assert truncation.text == "red hat"
    assert truncation.kept_tokens == 75
    assert truncation.cut_tokens >= 2
    assert ids[0, 0] == SPEC["bos_id"] and ids[0, -1] == SPEC["eos_id"]


def test_pads_with_zero_as_stable_diffusion_2_does(clip: Any) -> None:
    tokenizer = PromptTokenizer(TOKENIZER_JSON, json.dumps(SPEC | {"pad_id": 0}).encode())
    try:
        clip.pad_token = "!"
        want, _ = reference(clip, "a red apple")
    finally:
        clip.pad_token = "<|endoftext|>"
    ids, _ = tokenizer.encode("a red apple")
    assert ids[0, -1] == 0
    assert np.array_equal(ids, want)


def test_other_lengths(clip: Any) -> None:
    tokenizer = PromptTokenizer(TOKENIZER_JSON, json.dumps(SPEC | {"max_length": 5}).encode())
    ids, truncation = tokenizer.encode("one two three four five")
    want = clip("one two three four five", max_length=5, truncation=True).input_ids
    assert ids.tolist() == [want]
    assert truncation is not None and truncation.kept_tokens == 3


@pytest.mark.parametrize("prompt", ["a\0b", "\0", "a\ud800b", "\udcff", "ok " * 99 + "\udfff"])
def test_text_that_is_no_text_is_refused(tokenizer: PromptTokenizer, prompt: str) -> None:
    with pytest.raises(InputError) as caught:
        tokenizer.encode(prompt)
    message = str(caught.value)
    assert "\n" not in message
    message.encode()


@pytest.mark.parametrize(
    ("tokenizer_json", "spec_json", "blamed"),
    [
        (b"", b"{}", "tokenizer_spec.json"),
        (TOKENIZER_JSON, b"", "tokenizer_spec.json"),
        (TOKENIZER_JSON, b"\xff", "tokenizer_spec.json"),
        (TOKENIZER_JSON, json.dumps(SPEC | {"more": 1}).encode(), "tokenizer_spec.json"),
        (TOKENIZER_JSON, json.dumps(SPEC | {"bos_id": 1}).encode(), "doesn't fit"),
        (TOKENIZER_JSON, json.dumps(SPEC | {"pad_id": 5000}).encode(), "doesn't fit"),
        (TOKENIZER_JSON, json.dumps(SPEC | {"max_length": 1}).encode(), "doesn't fit"),
        (TOKENIZER_JSON[:999], json.dumps(SPEC).encode(), "tokenizer.json"),
        (b"{}", json.dumps(SPEC).encode(), "tokenizer.json"),
        (b"\xff", json.dumps(SPEC).encode(), "tokenizer.json"),
    ],
)
def test_damaged_files_are_named(tokenizer_json: bytes, spec_json: bytes, blamed: str) -> None:
    with pytest.raises(BundleError) as caught:
        PromptTokenizer(tokenizer_json, spec_json)
    assert blamed in str(caught.value) and "\n" not in str(caught.value)


def test_the_spec_round_trips() -> None:
    import msgspec

    spec = TokenizerSpec(max_length=77, pad_id=0, bos_id=1, eos_id=2)
    assert msgspec.json.decode(msgspec.json.encode(spec), type=TokenizerSpec) == spec
