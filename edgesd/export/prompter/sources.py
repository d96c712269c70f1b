"""Where pairs come from: captions, templates, known data sets of prompts, and the emoji domain."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from edgesd.errors import InputError
from edgesd.export.prompter.pairs import Pair
from edgesd.textfiles import read_json, read_lines

_STOP = frozenset(
    [
        "a",
        "an",
        "and",
        "are",
        "as",
        "at",
        "be",
        "been",
        "being",
        "by",
        "for",
        "from",
        "had",
        "has",
        "have",
        "he",
        "her",
        "his",
        "i",
        "in",
        "into",
        "is",
        "it",
        "its",
        "near",
        "next",
        "of",
        "off",
        "on",
        "one",
        "onto",
        "or",
        "other",
        "out",
        "over",
        "she",
        "some",
        "that",
        "the",
        "their",
        "them",
        "there",
        "they",
        "this",
        "three",
        "to",
        "two",
        "up",
        "very",
        "was",
        "were",
        "which",
        "while",
        "who",
        "with",
        "you",
        "your",
    ]
)
_WORD = re.compile(r"[A-Za-z][A-Za-z'-]+")
_MOST = 100_000
"""Pairs of one source, at most."""

_MOST_BYTES = 1 << 30
"""Of a file: COCO's captions are 92 MB."""


def _words(text: str) -> list[str]:
    """The words of a caption that carry its meaning, in order, once each."""
    found = (word.lower() for word in _WORD.findall(text))
    return list(dict.fromkeys(word for word in found if word not in _STOP))


def _short(text: str, rng: random.Random) -> str:
    """A short prompt that may have led to a caption: two to four of its words, in order."""
    words = _words(text)
    count = min(len(words), rng.randint(2, 4))
    places = sorted(rng.sample(range(len(words)), count))
    return " ".join(words[place] for place in places)


def from_captions(path: Path, seed: int) -> Iterator[Pair]:
    """A caption per line; each is a subject."""
    rng = random.Random(seed)
    for line in read_lines(path, _MOST_BYTES):
        if caption := line.strip():
            yield Pair(_short(caption, rng), caption, caption)


def from_templates(path: Path, seed: int) -> Iterator[Pair]:
    """JSON: {"slots": {NAME: [text ...]}, "subject": NAME, "pairs": [{"wish", "prompt"} ...]}.

    Each pair's {NAME}s are filled in, all combinations up to a limit. subject: the slot that the
    split goes by.
    """
    document = _json(path)
    try:
        slots = {str(name): [str(v) for v in values] for name, values in document["slots"].items()}
        subject = str(document["subject"])
        pairs = [(str(pair["wish"]), str(pair["prompt"])) for pair in document["pairs"]]
    except (KeyError, TypeError, AttributeError) as exc:
        raise InputError(
            f"{path} isn't a file of templates: it needs slots, subject and pairs ({exc!r})"
        ) from exc
    rng = random.Random(seed)
    for user_prompt, prompt in pairs:
        used = sorted(set(re.findall(r"{(\w+)}", user_prompt + prompt)))
        if subject not in used or not set(used) <= slots.keys():
            raise InputError(
                f"{path}: {user_prompt!r} needs the slot {{{subject}}}, and only known ones"
            )
        rows = list(itertools.islice(itertools.product(*(slots[name] for name in used)), _MOST))
        rng.shuffle(rows)
        for row in rows:
            values = dict(zip(used, row, strict=True))
            yield Pair(user_prompt.format(**values), prompt.format(**values), values[subject])


def from_coco(path: Path, seed: int) -> Iterator[Pair]:
    """COCO Captions (captions_train2017.json): of an image's captions the longest is the prompt,
    the others give short prompts."""
    by_image: dict[str, list[str]] = {}
    try:
        for entry in _json(path)["annotations"]:
            by_image.setdefault(str(entry["image_id"]), []).append(str(entry["caption"]).strip())
    except (KeyError, TypeError) as exc:
        raise InputError(f"{path} isn't COCO Captions: {exc!r} is missing") from exc
    rng = random.Random(seed)
    for image, captions in by_image.items():
        prompt = max(captions, key=len)
        for caption in captions:
            if caption != prompt or len(captions) == 1:
                yield Pair(_short(caption, rng), prompt, image)


def from_mjhq(path: Path, seed: int) -> Iterator[Pair]:
    """MJHQ-30K (meta_data.json): {ID: {"category", "prompt"}}."""
    rng = random.Random(seed)
    for key, entry in _mapping(path).items():
        if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str):
            raise InputError(f"{path} isn't MJHQ-30K's meta_data.json: {key} has no prompt")
        yield Pair(_short(entry["prompt"], rng), entry["prompt"], key)


def from_sdci(path: Path, seed: int) -> Iterator[Pair]:
    """sDCI: {IMAGE: caption}, or a list of Densely Captioned Images with short_caption and
    summaries."""
    document = _json(path)
    rng = random.Random(seed)
    if isinstance(document, dict) and all(isinstance(v, str) for v in document.values()):
        for key, caption in document.items():
            yield Pair(_short(caption, rng), caption, key)
        return
    for number, entry in enumerate(document if isinstance(document, list) else [document]):
        try:
            short = str(entry["short_caption"])
            summaries = entry["summaries"]
            texts = summaries["base"] if isinstance(summaries, dict) else summaries
            subject = str(entry.get("image", number))
            for text in [texts] if isinstance(texts, str) else texts:
                yield Pair(_short(short, rng), str(text), subject)
        except (KeyError, TypeError, AttributeError) as exc:
            raise InputError(f"{path} isn't sDCI: entry {number} has no {exc}") from exc


_COLOURS = {
    "red": ("crimson", "scarlet", "ruby", "cherry red", "blood red"),
    "orange": ("amber", "tangerine coloured", "apricot", "pumpkin coloured"),
    "yellow": ("golden", "lemon yellow", "sunny yellow", "mustard"),
    "green": ("emerald", "lime", "olive", "mossy green", "jade"),
    "blue": ("azure", "navy", "sky blue", "sapphire", "cobalt"),
    "purple": ("violet", "lilac", "lavender", "plum coloured"),
    "pink": ("rosy", "salmon coloured", "bubblegum pink", "magenta"),
}
_MOODS = (
    *("sleepy", "happy", "tiny", "cute", "big", "old", "fluffy", "friendly", "little", "funny"),
    *("lonely", "shiny", "brave", "lazy", "adorable", "giant", "sweet", "magic", "simple", "nice"),
)
_FRAMES = (
    *("{}", "{}", "{}", "a picture of {}", "draw {}", "i want {}", "{} please", "show me {}"),
    *("something like {}", "an icon of {}", "make {}", "can you draw {}?"),
)


def from_emoji(path: Path, seed: int) -> Iterator[Pair]:
    """The emoji domain: names and keywords that the embedded image model knows -> its captions.

    path: models/emoji/prompts/domain.json. The prompt is the bare name, or COLOUR OBJECT.
    """
    domain = _mapping(path)
    try:
        names: Mapping[str, Sequence[str]] = domain["names"]
        objects, colours = domain["coloured"], domain["colours"]
    except KeyError as exc:
        raise InputError(f"{path} has no {exc}: give the domain.json of the emoji model") from exc
    rng = random.Random(seed)

    def framed(text: str) -> str:
        return rng.choice(_FRAMES).format(text)

    for name, tags in names.items():
        subject = _subject(name, objects)
        yield Pair(framed(name), name, subject)
        yield Pair(framed(f"{rng.choice(_MOODS)} {name}"), name, subject)
        for count in (1, 2, 2, 3):
            if len(tags) >= count:
                yield Pair(framed(" ".join(rng.sample(list(tags), count))), name, subject)
        if tags:
            yield Pair(f"{name} {rng.choice(tags)}", name, subject)
    for thing in objects:
        for colour in colours:
            prompt, subject = f"{colour} {thing}", _subject(thing, objects)
            yield Pair(framed(prompt), prompt, subject)
            synonym = rng.choice(_COLOURS[colour])
            yield Pair(framed(f"{synonym} {thing}"), prompt, subject)
            yield Pair(framed(f"{rng.choice(_MOODS)} {colour} {thing}"), prompt, subject)
            yield Pair(f"{thing} in {rng.choice([colour, synonym])}", prompt, subject)


def _subject(name: str, objects: Sequence[str]) -> str:
    """The object that a name is of: cat for grinning cat, so that a subject is held back whole."""
    words = set(name.split())
    return next((thing for thing in objects if set(thing.split()) <= words), name)


SOURCES: dict[str, Callable[[Path, int], Iterator[Pair]]] = {
    "captions": from_captions,
    "templates": from_templates,
    "coco": from_coco,
    "mjhq": from_mjhq,
    "sdci": from_sdci,
    "emoji": from_emoji,
}
"""Format -> pairs of a file, for a seed."""


def _json(path: Path) -> Any:
    return read_json(path, _MOST_BYTES)


def _mapping(path: Path) -> dict[str, Any]:
    document = _json(path)
    if not isinstance(document, dict):
        raise InputError(f"{path} holds a {type(document).__name__}: expected an object")
    return document
