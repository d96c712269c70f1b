"""What all specs share: strict decoding, and types whose ranges and patterns are checked."""

from __future__ import annotations

import re
from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta

from edgesd.errors import InputError

# What a decoded spec may say. Files that specs are read from may come from anywhere.
_SHA256 = r"\A[0-9a-f]{64}\Z"
_PATH = r"\A(?!/)(?!.*(?:\A|/)\.{0,2}(?:/|\Z))[^\x00-\x1f\x7f-\x9f\u2028\u2029\\]{1,200}\Z"
_WORD = r"\A[A-Za-z0-9][A-Za-z0-9._+-]{0,63}\Z"
_LABEL = r"\A[^\x00-\x1f\x7f-\x9f\u2028\u2029]{1,200}\Z"
DTYPE = r"\A(?:float16|float32|float64|u?int(?:8|16|32|64)|bool)\Z"
_PATTERNS = {
    _SHA256: "a SHA-256 in 64 hexadecimal digits",
    _PATH: "a safe path: relative, without .. or control characters",
    _WORD: "one word",
    _LABEL: "a name without control characters",
    DTYPE: "a number type",
}
Sha256 = Annotated[str, Meta(pattern=_SHA256)]
"""64 hexadecimal digits in lower case: also safe as a file name."""
RelativePath = Annotated[str, Meta(pattern=_PATH)]
"""A file below some folder, with forward slashes: it can't lead out of there by its name."""
Word = Annotated[str, Meta(pattern=_WORD)]
"""A name of a target, an architecture, a backend, a component."""
Label = Annotated[str, Meta(pattern=_LABEL)]
Text = Annotated[str, Meta(max_length=10_000)]
"""For people. It is cleaned where it is printed."""
Bytes = Annotated[int, Meta(ge=0, le=1 << 50)]
Count = Annotated[int, Meta(ge=0, le=(1 << 31) - 1)]
Size = Annotated[int, Meta(ge=1, le=(1 << 31) - 1)]
MAX_PIXELS = 1 << 14
Pixels = Annotated[int, Meta(ge=1, le=MAX_PIXELS)]
"""A side of an image."""
Number = Annotated[float, Meta(ge=-1e15, le=1e15)]
MAX_STEPS = 1000
"""Of a request from outside."""
MAX_GUIDANCE = 1000
MAX_CONTROL_SCALE = 10
"""Of a ControlNet's outputs; 1 is what it was trained with."""
MAX_SCORE = 1000
"""Aesthetic scores are to 10, and a model may be told others."""
Guidance = Annotated[float, Meta(ge=-MAX_GUIDANCE, le=MAX_GUIDANCE)]
"""The scale of classifier-free guidance."""

_MOST_WORDS = 600
"""Characters of a message."""
MOST_DIMS, MOST_TENSORS = 8, 64
MOST_CONFIG = 100_000
"""Values in a scheduler's configuration; trained_betas has one for each training timestep."""
Dim = Size | Label
"""A fixed size, or the name of a symbolic one: batch, height, width (in the tensor's own unit)."""


class Spec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=False):
    """Base of all specs: immutable, strict when decoded: types, ranges, and names that are used as
    paths."""


_T = TypeVar("_T")


def decode_json(raw: bytes | str | msgspec.Raw, kind: type[_T]) -> _T:
    """`raw` as a value of `kind`. Whatever it is, what is raised is an InputError with one line
    that says what is wrong, and where."""
    try:
        return msgspec.json.decode(raw, type=kind)
    except (msgspec.MsgspecError, UnicodeError) as exc:
        words = " ".join(str(exc).split())
        for pattern, meaning in _PATTERNS.items():
            words = words.replace(f"`str` matching regex {pattern!r}", meaning)
        if len(words) > _MOST_WORDS:  # it may show a value that isn't among those allowed
            words = f"{words[: _MOST_WORDS // 2]}...{words[-_MOST_WORDS // 2 :]}"
        raise InputError(words) from exc
    except RecursionError as exc:
        raise InputError("it is nested too deeply") from exc


def check_ranges(spec: Spec) -> None:
    """Raise InputError when a spec that was made here says what no decoded one may say."""
    try:
        raw = msgspec.json.encode(spec)
    except UnicodeEncodeError as exc:  # bytes of a command line that are no text
        raise InputError("a name or text that was given holds bytes that aren't UTF-8") from exc
    decode_json(raw, type(spec))


def is_sha256(text: str) -> bool:
    """Whether `text` is a Sha256."""
    return re.match(_SHA256, text) is not None


def is_relative_path(text: str) -> bool:
    """Whether `text` is a RelativePath."""
    return re.match(_PATH, text) is not None


def is_file_name(text: str) -> bool:
    """Whether `text` names a file in a folder, and nothing below or outside it."""
    return is_relative_path(text) and "/" not in text
