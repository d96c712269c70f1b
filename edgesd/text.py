"""Text from outside (bundles, boards, model cards, libraries, file names, prompts) on a terminal.

A terminal obeys escape codes, and characters that can't be seen reorder or hide what can: text that
edgesd didn't write itself is printed through `shown`, or `shown_lines` where it has several lines.
"""

from __future__ import annotations

import re
import unicodedata

# Controls (escape codes begin with one), formats (bidi marks, zero-width characters, tags), lone
# surrogates, and separators of lines and paragraphs.
_UNSAFE = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
# Characters of other categories that take no room or look like a blank, first and last. The
# variation selectors 15 and 16 aren't among them: common emoji contain them.
_INVISIBLE = (
    (0x034F, 0x034F),
    (0x115F, 0x1160),
    (0x17B4, 0x17B5),
    (0x180B, 0x180F),
    (0x2065, 0x2065),
    (0x2800, 0x2800),
    (0x3164, 0x3164),
    (0xFE00, 0xFE0D),
    (0xFFA0, 0xFFA0),
    (0xFFF0, 0xFFF8),
    (0xE0000, 0xE0FFF),
)

_TERMINAL_CODE = re.compile(r"\x1b(\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(\x07|\x1b\\)?|[@-_])?")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[^\sa-z])")
_SENTENCE = 400
"""Characters of another library's sentence, at most."""


def first_sentence(exc: BaseException) -> str:
    """The first sentence of what another library says, whole, or the type of `exc`.

    Terminal codes are left out, line breaks are blanks, and the full stop is dropped. More than
    400 characters are cut at a word, which "..." shows.
    """
    words = " ".join(_TERMINAL_CODE.sub("", str(exc)).split())
    sentence = _SENTENCE_END.split(words, maxsplit=1)[0].rstrip(" .:;,")
    if len(sentence) > _SENTENCE:
        sentence = sentence[:_SENTENCE].rpartition(" ")[0] + " ..."
    return sentence or type(exc).__name__


def shown(text: object) -> str:
    """`text` as one line that is safe to print.

    What a terminal would obey, hide or break the line at is written as an escape, as Python writes
    it (`\\x1b`, `\\u202e`); a byte of a file name that is no text, as `\\xff`.
    """
    line = str(text)
    if line.isascii() and line.isprintable():
        return line
    return "".join(char if _safe(char) else _escaped(char) for char in line)


def shown_lines(text: object) -> str:
    """`text` with its line feeds (and tabs) kept, each line as `shown` writes it."""
    lines = str(text).replace("\r\n", "\n").split("\n")
    return "\n".join("\t".join(shown(part) for part in line.split("\t")) for line in lines)


def shown_json(text: str, encoding: str = "utf-8") -> str:
    """JSON `text` with the same meaning, in which `shown` would find nothing to replace, and which
    can be written in `encoding`."""
    if text.isascii():
        return text  # its strings have no control characters
    safe = "".join(char if char == "\n" or _safe(char) else _json_escaped(char) for char in text)
    try:
        safe.encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return "".join(char if char.isascii() else _json_escaped(char) for char in safe)
    return safe


def _safe(char: str) -> bool:
    code = ord(char)
    if code < 0x7F:
        return code >= 0x20
    if unicodedata.category(char) in _UNSAFE:
        return False
    return not any(first <= code <= last for first, last in _INVISIBLE)


def _escaped(char: str) -> str:
    code = ord(char)
    if 0xDC80 <= code <= 0xDCFF:  # how Python keeps a byte that isn't valid UTF-8
        return f"\\x{code - 0xDC00:02x}"
    if code in (0x09, 0x0A, 0x0D):
        return {0x09: "\\t", 0x0A: "\\n", 0x0D: "\\r"}[code]
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _json_escaped(char: str) -> str:
    units = char.encode("utf-16-be", errors="surrogatepass")
    return "".join(f"\\u{units[i : i + 2].hex()}" for i in range(0, len(units), 2))
