"""Prompts are cut into chunks as diffusers and the web UI cut them, and encoded chunk by chunk."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgesd.errors import BundleError, InputError, UsageError
from edgesd.runtime.bundle import Bundle
from edgesd.runtime.chunks import Prompt, chunks_of, fixed_chunks
from edgesd.runtime.conditioning import Conditioned, Prompts, joined
from edgesd.runtime.networks import check_networks
from edgesd.runtime.pipeline import Pipeline
from edgesd.runtime.requests import Completion, Request
from edgesd.runtime.settings import Settings
from edgesd.runtime.tokenizer import PromptTokenizer
from edgesd.spec.pipeline import Part, TextSpec
from tests.support import pipeline_spec, run_cli, write_bundle

FOLDER = Path(__file__).parents[3] / "models" / "emoji" / "tokenizer"
SPEC = {"max_length": 77, "pad_id": 0, "bos_id": 4094, "eos_id": 4095}
BOS, EOS, PAD = SPEC["bos_id"], SPEC["eos_id"], SPEC["pad_id"]


@pytest.fixture(scope="module")
def tokenizer() -> PromptTokenizer:
    content = (FOLDER / "tokenizer.json").read_bytes()
    return PromptTokenizer(content, json.dumps(SPEC).encode())


def with_vectors(count: int) -> PromptTokenizer:
    """A tokenizer with a textual inversion `<toy>` of several vectors."""
    content = json.loads((FOLDER / "tokenizer.json").read_text())
    first = max(token["id"] for token in content["added_tokens"]) + 1
    for number in range(count):
        content["added_tokens"].append(
            {
                "id": first + number,
                "content": f"<toy>_{number}" if number else "<toy>",
                **dict.fromkeys(
                    ("single_word", "lstrip", "rstrip", "normalized", "special"), False
                ),
            }
        )
    return PromptTokenizer(json.dumps(content).encode(), json.dumps(SPEC).encode())


def tokens(tokenizer: PromptTokenizer, text: str, **options: Any) -> list[list[int]]:
    """The ids of each chunk, without beginning, end and padding, which are checked."""
    found = []
    for chunk in chunks_of(tokenizer, text, **options)[0]:
        row = chunk.ids[0].tolist()
        end = len(row) - 1 - row[::-1].index(EOS)
        assert len(row) == 77 and row[0] == BOS and set(row[end + 1 :]) <= {PAD}
        found.append(row[1:end])
    return found


@given(text=st.text(st.characters(exclude_characters="\0", codec="utf-8"), max_size=300))
def test_the_first_chunk_is_the_prompt_that_diffusers_cuts(
    text: str, tokenizer: PromptTokenizer
) -> None:
    (first, *_), _ = chunks_of(tokenizer, text)
    assert (first.ids == tokenizer.encode(text)[0]).all()
    found = tokens(tokenizer, text, most=10**6)
    assert [id_ for chunk in found for id_ in chunk] == tokenizer.ids(text)
    assert all(len(chunk) == 75 for chunk in found[:-1])


def test_what_exceeds_the_most_chunks_is_told(tokenizer: PromptTokenizer) -> None:
    chunks, cut = chunks_of(tokenizer, "cat " * 160 + "red hat", most=2)
    assert len(chunks) == 2
    assert cut is not None and (cut.kept_tokens, cut.text[-7:]) == (150, "red hat")
    assert chunks_of(tokenizer, "cat " * 150, most=2)[1] is None


def test_the_web_ui_ends_a_chunk_at_a_comma_that_is_near(tokenizer: PromptTokenizer) -> None:
    (comma,) = tokenizer.ids(",")
    for behind in (1, 19, 20, 40):
        text = "cat " * (74 - behind) + ", " + "dog " * (behind + 3)
        first, second = tokens(tokenizer, text, syntax="a1111")
        if behind < 20:
            assert first[-1] == comma and len(second) == behind + 3
        else:
            assert len(first) == 75 and len(second) == 3
        assert [len(chunk) for chunk in tokens(tokenizer, text)] == [75, 3]


def test_a_break_ends_a_chunk(tokenizer: PromptTokenizer) -> None:
    cat, dog = tokenizer.ids("cat"), tokenizer.ids("dog")
    assert tokens(tokenizer, "cat BREAK dog", syntax="a1111") == [cat, dog]
    assert tokens(tokenizer, "BREAK", syntax="a1111") == [[]]
    assert tokens(tokenizer, "cat BREAK BREAK dog", syntax="a1111") == [cat, [], dog]


def test_weights_are_those_of_the_tokens(tokenizer: PromptTokenizer) -> None:
    (chunk,), _ = chunks_of(tokenizer, "a (red:1.3) [cat]", "a1111")
    assert chunk.weights is not None
    counts = [len(tokenizer.ids(word)) for word in ("a", "red", "cat")]
    wanted = np.repeat(np.float32([1, 1, 1.3, 1 / 1.1, 1]), [1, *counts, 76 - sum(counts)])
    np.testing.assert_allclose(chunk.weights, wanted, rtol=1e-7)
    assert chunks_of(tokenizer, "a red cat", "a1111")[0][0].weights is None


def test_the_vectors_of_a_token_stay_together_in_the_web_ui() -> None:
    tokenizer = with_vectors(4)
    toy = tokenizer.ids("<toy>")
    assert len(toy) == 4
    text = "cat " * 73 + "<toy> dog"
    first, second = tokens(tokenizer, text, syntax="a1111")
    assert len(first) == 73 and second[:4] == toy
    assert [len(chunk) for chunk in tokens(tokenizer, text)] == [75, 3]  # as diffusers
    assert sum(len(c) for c in tokens(with_vectors(70), "<toy> " * 3, syntax="a1111")) == 210


def test_vectors_beyond_all_bounds_are_refused() -> None:
    """Before the text with all of them is made, which grows with both numbers."""
    with pytest.raises(InputError, match="8000 times '<toy>', which stands for 70 tokens"):
        chunks_of(with_vectors(70), "<toy> " * 8000)


def test_weights_leave_the_mean(tokenizer: PromptTokenizer) -> None:
    """A plain version of the web UI's "Original" emphasis, in double precision."""
    rng = np.random.default_rng(1)
    hidden = rng.standard_normal((1, 77, 16)).astype(np.float32)
    (chunk,), _ = chunks_of(tokenizer, "a (red:1.3) cat", "a1111")
    wide = hidden.astype(np.float64) * np.float64(chunk.weights)[None, :, None]
    wanted = wide * (hidden.astype(np.float64).mean() / wide.mean())
    np.testing.assert_allclose(chunk.weighted(hidden), wanted, rtol=2e-5)
    assert chunk.weighted(np.zeros_like(hidden)).max() == 0


TEXTS = [TextSpec("first", "one", "ids"), TextSpec("second", "two", "ids")]


class Encoders:
    """Stand-ins for two text encoders: hidden states [1, 77, 2], and of the second what is pooled
    [1, 3]; `runs` counts."""

    def __init__(self) -> None:
        self.runs: list[tuple[str, bytes]] = []

    def __call__(self, name: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
        ids = inputs["ids"]
        self.runs.append((name, ids.tobytes()))
        hidden = np.sin(ids[..., None] * np.float32([0.1, 0.7])).astype(np.float32)
        if name == "first":
            return {"hidden": hidden}
        return {"hidden": hidden, "pooled": ids[:, 1:4].astype(np.float32)}


def conditioned(
    tokenizer: PromptTokenizer,
    positive: list[Prompt],
    negative: list[Prompt | None] | None,
    chunks: int | None = None,
) -> tuple[Conditioned, Encoders]:
    prompts = Prompts(TEXTS, {"one": tokenizer, "two": tokenizer}, chunks)
    encoders = Encoders()
    return prompts.conditioned(positive, negative, encoders, lambda name: None), encoders


HIDDEN = [Part("first", "hidden"), Part("second", "hidden")]
POOLED = Part("second", "pooled")


def test_embeddings_of_chunks_follow_one_another(tokenizer: PromptTokenizer) -> None:
    long, short = Prompt(("cat " * 80,)), Prompt(("dog",))
    found, encoders = conditioned(tokenizer, [long], [short])
    assert found.negative is not None
    assert joined(found.positive, HIDDEN).shape == (1, 154, 4)
    assert joined(found.negative, HIDDEN).shape == (1, 154, 4)
    for part in HIDDEN:
        first, second = (
            np.sin(chunk.ids[..., None] * np.float32([0.1, 0.7]))
            for chunk in chunks_of(tokenizer, "cat " * 80)[0]
        )
        np.testing.assert_allclose(found.positive[part][:, :77], first, atol=1e-6)
        np.testing.assert_allclose(found.positive[part][:, 77:], second, atol=1e-6)
        empty = np.sin(tokenizer.framed(())[..., None] * np.float32([0.1, 0.7]))
        np.testing.assert_allclose(found.negative[part][:, 77:], empty, atol=1e-6)
    first_ids = chunks_of(tokenizer, "cat " * 80)[0][0].ids
    assert (found.positive[POOLED] == first_ids[:, 1:4]).all()
    assert len(encoders.runs) == len(set(encoders.runs)) == 8


def test_zeros_are_as_long_as_the_prompt(tokenizer: PromptTokenizer) -> None:
    found, _ = conditioned(tokenizer, [Prompt(("cat " * 80,))], [None])
    assert found.negative is not None
    assert found.negative[HIDDEN[0]].shape == (1, 154, 2) and not found.negative[HIDDEN[0]].any()
    assert found.negative[POOLED].shape == (1, 3)


def test_fixed_networks_get_their_number_of_chunks(tokenizer: PromptTokenizer) -> None:
    for chunks in (1, 3):
        for words in (1, 80, 400):
            found, _ = conditioned(tokenizer, [Prompt(("cat " * words,))], None, chunks)
            assert found.positive[HIDDEN[0]].shape == (1, 77 * chunks, 2)


def test_each_tokenizer_reads_its_prompt(tokenizer: PromptTokenizer) -> None:
    found, _ = conditioned(tokenizer, [Prompt(("cat", "dog"))], None)
    alone, _ = conditioned(tokenizer, [Prompt(("cat",))], None)
    other, _ = conditioned(tokenizer, [Prompt(("dog",))], None)
    assert (found.positive[HIDDEN[0]] == alone.positive[HIDDEN[0]]).all()
    assert (found.positive[HIDDEN[1]] == other.positive[HIDDEN[1]]).all()
    assert (found.positive[HIDDEN[1]] != alone.positive[HIDDEN[1]]).any()


def test_what_is_known_is_not_run_again(tokenizer: PromptTokenizer) -> None:
    prompts = Prompts(TEXTS, {"one": tokenizer, "two": tokenizer}, None)
    encoders = Encoders()

    def encode(text: str) -> None:
        prompts.conditioned([Prompt((text,))], [Prompt(("",))], encoders, lambda name: None)

    encode("cat")
    encode("dog")
    assert len(encoders.runs) == 6
    prompts.forget()
    encode("dog")
    assert len(encoders.runs) == 10


def test_a_prompt_is_cut_once(tokenizer: PromptTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    ids = tokenizer.ids

    def counted(text: str) -> list[int]:
        read.append(text)
        return ids(text)

    monkeypatch.setattr(tokenizer, "ids", counted)
    prompts = Prompts(TEXTS, {"one": tokenizer, "two": tokenizer}, None)
    long, short = Prompt(("cat " * 80,)), Prompt(("dog",))
    for _ in range(2):
        assert prompts.count((long, short)) == 2
        prompts.conditioned([long], [short], Encoders(), lambda name: None)
    assert sorted(read) == [*(["cat " * 80] * 2), *(["dog"] * 2)]  # by each tokenizer


@pytest.fixture(scope="module")
def any_length(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle whose denoiser takes any number of chunks. Read-only."""
    return write_bundle(tmp_path_factory.mktemp("any") / "bundle", tokens="tokens")


LONG = "a red apple " * 30


def test_a_bundle_says_how_many_chunks_it_takes(any_length: Bundle, miniature: Bundle) -> None:
    assert fixed_chunks(any_length.manifest.pipeline) is None
    assert fixed_chunks(miniature.manifest.pipeline) == 1
    assert fixed_chunks(pipeline_spec(154)) == 2


@pytest.mark.parametrize("tokens", [1, 76, 78, 100, 33 * 77, 2**31 - 1])
def test_other_numbers_of_tokens_are_refused(tokens: int, tmp_path: Path) -> None:
    other = write_bundle(tmp_path / "bundle", tokens=tokens)
    with pytest.raises(BundleError, match="encoder_hidden_states of unet takes"):
        check_networks(other.manifest)


def test_tokens_of_an_encoder_of_any_length_are_bounded_too(tmp_path: Path) -> None:
    manifest = write_bundle(tmp_path / "bundle", tokens=1 << 30).manifest
    encoder = manifest.pipeline.components["text_encoder"]
    outputs = [
        msgspec.structs.replace(out, shape=(out.shape[0], "tokens", *out.shape[2:]))
        for out in encoder.outputs
    ]
    components = {
        **manifest.pipeline.components,
        "text_encoder": msgspec.structs.replace(encoder, outputs=tuple(outputs)),
    }
    spec = msgspec.structs.replace(manifest.pipeline, components=components)
    with pytest.raises(BundleError, match="chunks, and 32 are the most"):
        check_networks(msgspec.structs.replace(manifest, pipeline=spec))


def test_a_long_prompt_counts_to_its_end(any_length: Bundle, tmp_path: Path) -> None:
    out = run_cli("generate", any_length.path, "-p", LONG, "--seed", 1, "-o", tmp_path / "a.png")
    assert out.code == 0 and "were cut" not in out.err
    assert (
        run_cli(
            "generate", any_length.path, "-p", LONG + "cat", "--seed", 1, "-o", tmp_path / "b.png"
        ).code
        == 0
    )
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "b.png").read_bytes()


def test_a_short_prompt_is_as_in_a_bundle_of_one_chunk(
    any_length: Bundle, miniature: Bundle
) -> None:
    images = []
    for bundle in (any_length, miniature):
        with Pipeline(bundle, Settings(threads=1)) as pipeline:
            images += pipeline.generate([Request("a red apple", 1)])
    assert images[0].tobytes() == images[1].tobytes()


def test_no_image_depends_on_a_longer_prompt_in_its_batch(
    any_length: Bundle, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(f"a cat\n{LONG}\na red cat\na blue cat\n")
    for batch, name in ((1, "alone"), (3, "together")):
        made = run_cli(
            "generate", any_length.path, "--prompts", prompts, "--seed", 1, "--batch", batch,
            "-o", tmp_path / name,
        )  # fmt: skip
        assert made.code == 0, made.err
    for path in (tmp_path / "alone").iterdir():
        assert path.read_bytes() == (tmp_path / "together" / path.name).read_bytes()
    with Pipeline(any_length) as pipeline, pytest.raises(UsageError, match="chunks"):
        pipeline.generate([Request("a cat", 1), Request(LONG, 1)])


def test_weights_change_the_image(any_length: Bundle) -> None:
    with Pipeline(any_length, Settings(threads=1)) as pipeline:

        def image(prompt: str, syntax: Any) -> bytes:
            return pipeline.generate([Request(prompt, 1, syntax=syntax)])[0].tobytes()

        plain = image("a red cat", "plain")
        assert image("a red cat", "a1111") == image("a (red:1.0) cat", "a1111") == plain
        assert image("a (red:3) cat", "a1111") != plain
        assert image("a red BREAK cat", "a1111") != plain


def test_a_second_prompt_needs_a_second_tokenizer() -> None:
    completion = Completion(pipeline_spec())
    for request in (Request("a", 1, prompt_2="b"), Request("a", 1, negative_prompt_2="b")):
        with pytest.raises(UsageError, match="two text encoders"):
            completion.complete(request)


def test_a_prompt_that_is_not_of_its_syntax_is_refused_at_once() -> None:
    with pytest.raises(InputError, match="isn't a number"):
        Completion(pipeline_spec()).complete(Request("(a:1.2.3)", 1, syntax="a1111"))


def test_marks_in_a_plain_prompt_are_told_once(miniature: Bundle, tmp_path: Path) -> None:
    prompts = "-p", "a (red:1.3) cat", "-p", "[a] ((cat))"
    made = run_cli("generate", miniature.path, *prompts, "-o", tmp_path / "out")
    assert made.code == 0 and made.err.count("--prompt-syntax a1111") == 1
