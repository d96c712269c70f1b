"""Prompts in the web UI's syntax have its segments and weights; hostile ones cost no more time."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgesd.errors import InputError
from edgesd.runtime.syntax import Segment, remarks, segments

END = ("BREAK", -1.0)

GRAMMAR = {
    "": [("", 1.0)],
    "normal text": [("normal text", 1.0)],
    "an (important) word": [("an ", 1.0), ("important", 1.1), (" word", 1.0)],
    "(unbalanced": [("unbalanced", 1.1)],
    "un)balanced]": [("un)balanced]", 1.0)],
    r"\(literal\]": [("(literal]", 1.0)],
    r"a \\ b \x": [("a \\ b x", 1.0)],
    "(unnecessary)(parens)": [("unnecessaryparens", 1.1)],
    "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).": [
        ("a ", 1.0),
        ("house", 1.3 * 1.1 * 1.1),
        (" ", 1.1),
        ("on", 1 / 1.1 * 1.1),
        (" a ", 1.1),
        ("hill", 0.5 * 1.1),
        (", sun, ", 1.1),
        ("sky", 1.1 * 1.1 * 1.1 * 1.1),
        (".", 1.1),
    ],
    "(a : 1.2 )": [("a ", 1.2)],
    "(a:-0.5)": [("a", -0.5)],
    "a:1.3) b": [("a:1.3) b", 1.0)],
    "[a:1.3]": [("a:1.3", 1 / 1.1)],
    "(a [b) c]": [("a ", 1.1), ("b", 1.1 * (1 / 1.1)), (" c", 1 / 1.1)],
    "a BREAK  b": [("a", 1.0), END, ("b", 1.0)],
    "BREAKFAST": [("BREAKFAST", 1.0)],
    "BREAK BREAK": [("", 1.0), END, ("", 1.0), END, ("", 1.0)],
    "(a BREAK b:2)": [("a", 2.0), ("BREAK", -2.0), ("b", 2.0)],  # in brackets it is a word, there
    "a <lora:style:0.8> b": [("a  b", 1.0)],
    "(": [("", 1.0)],
    ":": [(":", 1.0)],
}


@pytest.mark.parametrize("prompt", GRAMMAR)
def test_the_grammar_of_the_web_ui(prompt: str) -> None:
    found = segments(prompt, "a1111")
    assert [segment.text for segment in found] == [text for text, _ in GRAMMAR[prompt]]
    weights = [weight for _, weight in GRAMMAR[prompt]]
    assert [segment.weight for segment in found] == pytest.approx(weights, rel=1e-15)
    assert [segment.ends_chunk for segment in found] == [each == END for each in GRAMMAR[prompt]]


@given(st.text())
def test_plain_text_is_one_segment(prompt: str) -> None:
    assert segments(prompt, "plain") == [Segment(prompt)]


@given(st.text(st.characters(exclude_characters="\\()[]:<>")))
def test_text_without_marks_means_itself(prompt: str) -> None:
    if "BREAK" not in prompt:
        assert segments(prompt, "a1111") == [Segment(prompt)]


def escaped(text: str) -> str:
    return "".join(f"\\{char}" if char in "\\()[]" else char for char in text)


@given(st.text("ab,()[]\\: 1."))
def test_what_is_escaped_means_itself(prompt: str) -> None:
    assert segments(escaped(prompt), "a1111") == [Segment(prompt)]


@given(st.text("ab("))
def test_an_open_bracket_holds_until_the_end(prompt: str) -> None:
    found = segments(prompt[:60], "a1111")
    last = found[-1].weight if prompt[:60] else 1.0
    weights = [segment.weight for segment in found]
    assert weights == sorted(weights) and last == max(weights)


MARKS = {"({})": 1.1, "[{}]": 1 / 1.1, "({}:1.5)": 1.5, "({}: -0.25 )": -0.25}

Written = tuple[str, list[Segment]]
"""A prompt, and its words with their weights."""


def _bracketed(inner: Written, mark: str) -> Written:
    text, words = inner
    return mark.format(text), [Segment(word, weight * MARKS[mark]) for word, weight in words]


def _together(parts: list[Written]) -> Written:
    return "".join(text for text, _ in parts), [word for _, words in parts for word in words]


WRITTEN = st.recursive(
    st.sampled_from("xyz").map(lambda word: (word, [Segment(word)])),
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=4).map(_together),
        st.tuples(inner, st.sampled_from([*MARKS])).map(lambda both: _bracketed(*both)),
    ),
    max_leaves=20,
)


@given(WRITTEN)
def test_weights_are_products_of_the_brackets_around(written: Written) -> None:
    prompt, words = written
    found = segments(prompt, "a1111")
    assert "".join(segment.text for segment in found) == "".join(word for word, _ in words)
    each = [segment.weight for segment in found for _ in segment.text]
    assert each == pytest.approx([weight for _, weight in words])


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("(a:1.2.3)", "1.2.3"),
        ("(a:.)", "isn't a number"),
        ("(a:99999)", "the most"),
        (f"(a:{'9' * 400})", "the most"),
        ("(" * 65 + "a", "open at once"),
        ("[" * 65 + "a", "open at once"),
    ],
)
def test_weights_that_are_none_are_refused(prompt: str, words: str) -> None:
    with pytest.raises(InputError, match=words.replace(".", r"\.")):
        segments(prompt, "a1111")


@pytest.mark.parametrize(
    "prompt",
    [
        "()" * 500_000,
        ")" * 100_000,
        "(a)" * 30_000,
        ("(" * 60 + ")" * 60) * 800,
        ":" * 100_000,
        ": " * 50_000,
        ":1" * 50_000,
        ":" + "1" * 100_000,
        ":" + " " * 100_000,
        " " * 100_000 + "BREA",
        "BREAK " * 16_000,
        "<a:" * 33_000,
        "\\" * 100_000,
    ],
    ids=lambda prompt: f"{prompt[:6]!r}",
)
def test_long_prompts_take_linear_time(prompt: str) -> None:
    """In quadratic time, the first would take hours."""
    assert all(math.isfinite(segment.weight) for segment in segments(prompt, "a1111"))
    list(remarks(prompt, "plain"))
    list(remarks(prompt, "a1111"))


@pytest.mark.parametrize(
    "prompt", ["a (red:1.3) cat", "((red)) cat", "a [red] cat", "a BREAK b", "<lora:a:1> cat"]
)
def test_a_plain_prompt_with_such_marks_is_told(prompt: str) -> None:
    (line,) = remarks(prompt, "plain")
    assert "--prompt-syntax a1111" in line
    assert not list(remarks("a cat (red), 3:2, a smile :)", "plain"))


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("a <lora:style:0.8> cat", "<lora:style:0.8> is left out"),
        ("a [red:blue:0.5] cat", "aren't supported"),
        ("a [red|blue] cat", "aren't supported"),
        ("a cat AND a dog", "aren't supported"),
    ],
)
def test_what_only_the_web_ui_has_is_told(prompt: str, words: str) -> None:
    (line,) = remarks(prompt, "a1111")
    assert words in line
    assert not list(remarks("a (red:1.3) [cat] BREAK b", "a1111"))
