"""The syntaxes of prompts: plain text, and that of AUTOMATIC1111's web UI.

In the second, `(x)` weighs 1.1, `[x]` 1 / 1.1 and `(x:1.3)` 1.3; nested ones are multiplied. A
backslash before a bracket or a backslash makes it text. BREAK begins a new chunk. The grammar is
that of its version 1.10 (`prompt_parser.py`), with what it does to text that isn't well formed:
brackets that are never closed hold until the end, and others without a partner are text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import groupby
from typing import Literal, NamedTuple, get_args

from edgesd.errors import InputError

Syntax = Literal["plain", "a1111"]
SYNTAXES: tuple[Syntax, ...] = get_args(Syntax)

_ROUND, _SQUARE = 1.1, 1 / 1.1
"""Weights of (x) and [x]."""

_MOST_NESTED = 64
"""Brackets of one kind that are open at once. A segment's weight is a product of so many."""

_LARGEST_WEIGHT = 1e4

_PIECE = re.compile(
    r"\\(?P<literal>[()\[\]\\]?)"  # a backslash before anything else vanishes
    r"|(?P<open>[(\[])"
    r"|:\s*(?P<weight>[+-]?[.\d]+)\s*\)"
    r"|(?P<close>[)\]])"
    r"|[^\\()\[\]:]+|:"
)
_BREAK = re.compile(r"\bBREAK\b")
_NETWORK = re.compile(r"<(\w{1,40}):([^<>]{1,200})>")
_WEIGHTED = re.compile(
    r"\([^()]{1,200}:\s*[+-]?[.\d]+\s*\)|\(\([^()]{1,200}\)\)|\[[^\[\]]{1,200}\]"
)
_SCHEDULED = re.compile(r"\[[^\[\]]{0,200}(?::\s*[.\d]+\s*|\|[^\[\]]{0,200})\]")
_AND = re.compile(r"\bAND\b")


class Segment(NamedTuple):
    """A part of a prompt, and what its tokens' embeddings are multiplied with."""

    text: str
    weight: float = 1.0

    @property
    def ends_chunk(self) -> bool:
        """Whether this is no text, but the end of a chunk."""
        return self == _END_OF_CHUNK


_END_OF_CHUNK = Segment("BREAK", -1.0)
"""As in the web UI, where brackets multiply this weight, too: within them BREAK is a word."""


def segments(prompt: str, syntax: Syntax) -> list[Segment]:
    """A prompt in its segments, at least one.

    Raises InputError for a weight that isn't a number or too large, and for brackets that are
    nested too deep.
    """
    if syntax == "plain":
        return [Segment(prompt)]
    found = [
        Segment("".join(segment.text for segment in group), weight)
        for weight, group in groupby(_weighted(without_networks(prompt)), lambda one: one.weight)
    ]
    for segment in found:
        if not abs(segment.weight) <= _LARGEST_WEIGHT:
            raise InputError(
                f"the prompt weighs {segment.text[:40]!r} {segment.weight:g}, and "
                f"{_LARGEST_WEIGHT:g} is the most: weights of 0.5 to 1.5 are usual"
            )
    return found or [Segment("")]


def _weighted(prompt: str) -> list[Segment]:
    """Segments in order, in pieces. Each is multiplied by the brackets around it, inner first."""
    texts: list[str] = []
    weights: list[float] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}

    def close(bracket: str, weight: float) -> None:
        for index in range(opened[bracket].pop(), len(weights)):
            weights[index] *= weight

    for piece in _PIECE.finditer(prompt):
        if (literal := piece["literal"]) is not None:
            texts.append(literal)
            weights.append(1.0)
        elif bracket := piece["open"]:
            opened[bracket].append(len(weights))
            if len(opened[bracket]) > _MOST_NESTED:
                raise InputError(
                    f"the prompt has more than {_MOST_NESTED} {bracket!r} open at once: close "
                    f"them, or write \\{bracket} where the bracket itself is meant"
                )
        elif piece["weight"] and opened["("]:
            close("(", _number(piece["weight"]))
        elif piece["close"] == ")" and opened["("]:
            close("(", _ROUND)
        elif piece["close"] == "]" and opened["["]:
            close("[", _SQUARE)
        else:
            for text, weight in _between_breaks(piece[0]):
                texts.append(text)
                weights.append(weight)
    for bracket, weight in (("(", _ROUND), ("[", _SQUARE)):
        while opened[bracket]:
            close(bracket, weight)
    return [Segment(*each) for each in zip(texts, weights, strict=True)]


def _between_breaks(text: str) -> Iterator[Segment]:
    """The parts of a text at BREAK, without the blanks around it."""
    parts = _BREAK.split(text)
    for index, part in enumerate(parts):
        if index > 0:
            yield _END_OF_CHUNK
            part = part.lstrip()
        yield Segment(part if index == len(parts) - 1 else part.rstrip())


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError as exc:
        raise InputError(
            f"the prompt has the weight {text[:40]!r}, which isn't a number: write it as in "
            "(word:1.3)"
        ) from exc


def escaped(text: str) -> str:
    """A plain text so that it means itself in the web UI's syntax. What no escape is known for is
    broken up by a backslash, which vanishes before other characters."""
    text = re.sub(r"[()\[\]\\]", r"\\\g<0>", text)
    text = re.sub(r"\b(?:BREA(?=K\b)|AN(?=D\b))", r"\g<0>\\", text)
    return re.sub(r"<(?=\w+:)", r"<\\", text)


def without_networks(prompt: str) -> str:
    """A prompt without `<lora:NAME:SCALE>` and its kind, which is no text in the web UI."""
    return _NETWORK.sub("", prompt)


def remarks(prompt: str, syntax: Syntax) -> Iterator[str]:
    """What a user should know of how a prompt is read: it holds what another syntax reads, or what
    edgesd doesn't have."""
    network = _NETWORK.search(prompt)
    if syntax == "plain":
        marks = (_NETWORK.search(prompt), _WEIGHTED.search(prompt), _BREAK.search(prompt))
        if mark := next(filter(None, marks), None):
            yield (
                f"{mark[0][:60]} is read as plain text: --prompt-syntax a1111 reads it as "
                "AUTOMATIC1111's web UI does, as weights and breaks"
            )
        return
    if network:
        kind = network[1].lower()
        yield f"{network[0][:60]} is left out: edgesd has no {kind} for a prompt to name"
    if mark := _SCHEDULED.search(prompt) or _AND.search(prompt):
        yield (
            f"{mark[0][:60]} is read as text: prompts that change between steps, or that are "
            "joined with AND, aren't supported"
        )
