"""HTML pages that stand alone: nothing loaded from elsewhere, readable on a phone.

A page is a template beside this file (*.html.j2) and the data that it shows. All text is escaped by
jinja2 where it is inserted; a name that a template has and the data lack is an error.
"""

from __future__ import annotations

import base64
import functools
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from edgesd.errors import InputError, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jinja2 import Environment
    from markupsafe import Markup

_FOLDER = Path(__file__).parent
_GENERATOR = b'<meta name="generator" content="edgesd">'
"""What base.html.j2 marks every page with."""

# Controls, and characters that reorder the text around them.
_HIDDEN = dict.fromkeys(
    (*range(9), 11, 12, *range(14, 32), *range(127, 160), *range(0x202A, 0x202F),
     *range(0x2066, 0x206A)), "\ufffd",
)  # fmt: skip


class Figure(NamedTuple):
    """One of the large figures at the head of a page."""

    name: str
    value: str
    note: str


Fact = tuple[str, str | None]
"""Name and value; without a value it isn't shown."""


class Cell(NamedTuple):
    """Plain text of a table cell, and the number by which the column sorts, if not the text."""

    text: str
    order: float | None = None


class Column(NamedTuple):
    """A column's title; how it is aligned; `sorted`: in which order the rows come."""

    title: str
    numeric: bool = False
    prose: bool = False
    sorted: str = ""


class Table(NamedTuple):
    """A table; the cells of the column `row_header` head their rows."""

    caption: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    row_header: int = 0


class Mark(NamedTuple):
    """A text beside an axis of a plot, and where."""

    at: float
    text: str


def render(template: str, **data: object) -> str:
    """The page that `template`, a file of this folder, makes of `data`.

    Raises ModuleNotFoundError without jinja2.
    """
    return _environment().get_template(template).render(data)


def check_page_path(path: Path) -> None:
    """Raise UsageError when a page's name isn't one of HTML, InputError when it is a folder, and
    ModuleNotFoundError where none can be made, without jinja2."""
    if path.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"-o {path}: the report is an HTML page; give a name ending in .html")
    if path.is_dir():
        raise InputError(f"-o {path} is a folder: give a name such as {path / 'report.html'}")
    _environment()


def is_page(path: Path) -> bool:
    """Whether edgesd wrote the page at `path`."""
    with path.open("rb") as file:
        return _GENERATOR in file.read(4096)


def page_bytes(page: str) -> bytes:
    """`page` as a file; what is no text (a byte of an argument that isn't UTF-8) is replaced."""
    return page.encode("utf-8", "replace")


def data_uri(media_type: str, data: bytes) -> str:
    """An image as the address that shows it."""
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


def mb(size_bytes: int) -> str:
    """`size_bytes` in megabytes (10^6), without the unit."""
    megabytes = size_bytes / 1e6
    return f"{megabytes:.1f}" if megabytes >= 10 else f"{megabytes:.3g}"


def megabytes(size_bytes: int) -> str:
    """`size_bytes` in megabytes (10^6), with the unit."""
    return f"{mb(size_bytes)} MB"


def counted(count: int, noun: str) -> str:
    """`1 layer`, `2 layers`."""
    return f"{count} {noun}{'s' * (count != 1)}"


@functools.cache
def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    def asset(name: str) -> Markup:
        return Markup((_FOLDER / name).read_text("utf-8"))

    environment = Environment(
        loader=FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_visible,
    )
    environment.globals.update(asset=asset, counted=counted)
    environment.filters["csp_hash"] = _csp_hash
    return environment


def _visible(value: object) -> object:
    """What is inserted into a page, before it is escaped, without hidden characters."""
    return value.translate(_HIDDEN) if isinstance(value, str) else value


def _csp_hash(text: str) -> str:
    """The source expression that allows exactly `text` in a Content-Security-Policy."""
    digest = hashlib.sha256(str(text).encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"
