"""Captions of the training pictures, and the rule that keeps some colours of an object unseen."""

from __future__ import annotations

import random
from collections.abc import Sequence

from .colour import HUES, hue_distance

KEYWORD_CAPTION_SHARE = 0.1  # "NAME, keyword, keyword"


def with_article(name: str) -> str:
    """``apple`` -> ``an apple``."""
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def captions(name: str, style: str = "flat") -> list[str]:
    """All plain captions of a picture; the more common wordings come twice."""
    article = with_article(name)
    return [
        name,
        name,
        article,
        article,
        f"emoji of {article}",
        f"{name} emoji",
        f"{style} emoji of {article}",
        f"{article}, {style} icon",
        f"{style} icon, {name}",
    ]


def pick_caption(name: str, tags: Sequence[str], style: str, rng: random.Random) -> str:
    """One caption at random; sometimes the name is followed by one or two of its CLDR keywords."""
    if tags and rng.random() < KEYWORD_CAPTION_SHARE:
        return ", ".join([name, *rng.sample(list(tags), min(2, len(tags)))])
    return rng.choice(captions(name, style))


def nearest_colour(hue: float) -> str:
    """The colour word of a hue in degrees; never ``pink``, which is a pale red."""
    words = [word for word in HUES if word != "pink"]
    return min(words, key=lambda word: hue_distance(HUES[word], hue))


def is_held_out(colour: str, short_name: str, own_colour: str) -> bool:
    """Whether ``colour short_name`` is kept out of training: one colour per object, by a checksum.

    The colour that the object has anyway is never held out, so some objects have none.
    """
    checksum = sum(ord(letter) * place for place, letter in enumerate(short_name, start=1))
    return colour == list(HUES)[checksum % len(HUES)] and colour != own_colour
