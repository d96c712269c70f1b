"""Pairs of a short prompt and a prompt: cleaned, without repetition, split by subject; and their
file.

A file of pairs is JSON lines: a header, then a pair each. What (nearly) all prompts begin or end
with isn't learned: it is the header's `form`, which code puts around what the model writes.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from edgesd.errors import InputError
from edgesd.files import atomic_write
from edgesd.runtime.prompter import PROMPT_CHARACTERS, check_form, clean_user_prompt
from edgesd.spec.base import Spec, decode_json
from edgesd.textfiles import lines_of, read_text

FORMAT = 1

_MOST_BYTES = 1 << 30

_SHARED = 0.9
"""A beginning or end that this part of the prompts has is taken for a template's."""


class Pair(Spec, frozen=True):
    """A short prompt and the prompt for it. subject: what both are of; no subject is on both sides
    of the split. held: kept out of training."""

    user_prompt: str = msgspec.field(name="wish")
    prompt: str
    subject: str
    held: bool = False


class Header(Spec, frozen=True):
    """First line of a file of pairs. form: what code makes of the model's line, "{}" in it. closed:
    the file's prompts are all that the image model knows, and the only answers."""

    edgesd_pairs: int
    domain: str
    form: str
    closed: bool = False


@dataclass(frozen=True)
class PairSet:
    """Pairs of one domain; see Header."""

    domain: str
    form: str
    pairs: tuple[Pair, ...]
    closed: bool = False

    @property
    def training(self) -> tuple[Pair, ...]:
        """The pairs to train on."""
        return tuple(pair for pair in self.pairs if not pair.held)

    @property
    def held(self) -> tuple[Pair, ...]:
        """The pairs held out of training."""
        return tuple(pair for pair in self.pairs if pair.held)

    def some_held(self, count: int) -> tuple[Pair, ...]:
        """At most `count` of the held-out pairs, spread over all of them."""
        return self.held[:: max(1, len(self.held) // count)][:count]


def make_pairs(
    domain: str, raw: Iterable[Pair], held_part: float = 0.1, seed: int = 0, closed: bool = False
) -> PairSet:
    """Clean `raw`, drop what repeats, move boilerplate into the form, and split by subject.

    held_part: of the subjects, about, one at least; which ones depends on their names and the seed
    alone. Raises InputError when no pair is left on one side.
    """
    found: dict[tuple[str, str], Pair] = {}
    for pair in raw:
        user_prompt, prompt = clean_user_prompt(pair.user_prompt), clean_prompt(pair.prompt)
        if user_prompt and prompt:
            key = (user_prompt.casefold(), prompt.casefold())
            found.setdefault(key, Pair(user_prompt, prompt, pair.subject))
    start, end = boilerplate([pair.prompt for pair in found.values()])
    subjects = {pair.subject for pair in found.values()}
    order = sorted(subjects, key=lambda subject: _fraction(f"{seed}:{subject}"))
    count = sum(_fraction(f"{seed}:{subject}") < held_part for subject in order)
    held_subjects = set(order[: min(max(1, count), len(order) - 1)])
    pairs = []
    for pair in found.values():
        prompt = pair.prompt
        if start and prompt.startswith(start):
            prompt = prompt[len(start) :]
        if end and prompt.endswith(end):
            prompt = prompt[: -len(end)]
        held = pair.subject in held_subjects
        pairs.append(msgspec.structs.replace(pair, prompt=prompt, held=held))
    made = PairSet(domain, f"{start}{{}}{end}", tuple(pairs), closed)
    if not made.training or not made.held:
        raise InputError(
            f"{len(found)} different pairs of {len({p.subject for p in pairs})} subjects: too few "
            "to train on some and hold others back"
        )
    return made


def clean_prompt(prompt: str) -> str:
    """A prompt as the model may write it: what its grammar has, one line, within its length."""
    plain = clean_user_prompt(prompt).replace("\u2019", "'")
    kept = "".join(c if c.isascii() and (c.isalnum() or c in " ,.'&-") else " " for c in plain)
    words = " ".join(kept.split()).strip(" ,.'&-")
    return words[:PROMPT_CHARACTERS].strip(" ,.'&-")


def boilerplate(prompts: Sequence[str]) -> tuple[str, str]:
    """What nearly all prompts begin and end with, whole words; "" for nothing.

    A word is boilerplate only before (after) words that differ: prompts that are all the same
    have none.
    """
    words = [prompt.split(" ") for prompt in prompts]
    start, end = _shared(words), _shared([row[::-1] for row in words])
    if not words or len({tuple(row) for row in words}) < 2:
        return "", ""
    return "".join(f"{word} " for word in start), "".join(f" {word}" for word in end[::-1])


def _shared(rows: list[list[str]]) -> list[str]:
    found: list[str] = []
    while True:
        at = len(found)
        able = [row for row in rows if row[:at] == found and len(row) > at + 1]
        if not able:
            return found
        word, count = Counter(row[at] for row in able).most_common(1)[0]
        if count < _SHARED * len(rows):
            return found
        found.append(word)


def _fraction(text: str) -> float:
    """A number from 0 to 1 that depends on `text` alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def write_pairs(path: Path, pairs: PairSet) -> None:
    """Write a file of pairs, whole or not at all."""
    encode = msgspec.json.encode
    with atomic_write(path) as file:
        file.write(encode(Header(FORMAT, pairs.domain, pairs.form, pairs.closed)) + b"\n")
        for pair in pairs.pairs:
            file.write(encode(pair) + b"\n")


def read_pairs(path: Path) -> PairSet:
    """Read a file of pairs. Raises InputError, with the line, when it is none."""
    lines = lines_of(read_text(path, _MOST_BYTES))
    number = 1
    try:
        header = decode_json(lines[0] if lines else "", Header)
        pairs = []
        for number, line in enumerate(lines[1:], start=2):  # noqa: B007 - the message has it
            pairs.append(decode_json(line, Pair))
    except InputError as exc:
        raise InputError(
            f"{path} isn't a file of pairs (line {number}: {exc}): make one by edgesd prompter data"
        ) from exc
    if header.edgesd_pairs != FORMAT:
        raise InputError(f"{path} is of another format: make it anew by edgesd prompter data")
    check_form(header.form)
    found = PairSet(header.domain, header.form, tuple(pairs), header.closed)
    if not found.training or not found.held:
        raise InputError(f"{path} has no pairs to train on, or none held back: make it anew")
    return found
