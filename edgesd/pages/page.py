"""Parts of HTML pages that stand alone: nothing loaded from elsewhere, readable on a phone."""

from __future__ import annotations

import base64
import hashlib
import html
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from edgesd.errors import InputError, UsageError

_CONTROL = dict.fromkeys((*range(9), 11, 12, *range(14, 32), *range(127, 160)), "\ufffd")


GENERATOR = '<meta name="generator" content="edgesd">'
"""By this a page of edgesd's is known."""


def html_page(title: str, sections: Iterable[str], script: str = "") -> str:
    """A whole page of those `sections` that aren't empty; `script` runs in it, and nothing else."""
    scripts = f" script-src '{_sha256(script)}';" if script else ""
    policy = (
        f"default-src 'none'; img-src data:; style-src '{_sha256(_STYLE)}';{scripts} "
        "base-uri 'none'; form-action 'none'"
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f"{GENERATOR}\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escaped(title)}</title>\n"
        f"<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(section for section in sections if section)
        + "\n</main>\n"
        + (f"<script>{script}</script>\n" if script else "")
        + "</body>\n</html>\n"
    )


def is_page(path: Path) -> bool:
    """Whether edgesd wrote the page at `path`."""
    with path.open("rb") as file:
        return GENERATOR.encode() in file.read(4096)


def check_page_path(path: Path) -> None:
    """Raise UsageError when a page's name isn't one of HTML, InputError when it is a folder."""
    if path.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"-o {path}: the report is an HTML page; give a name ending in .html")
    if path.is_dir():
        raise InputError(f"-o {path} is a folder: give a name such as {path / 'report.html'}")


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


def escaped(value: str) -> str:
    """`value` as HTML text or attribute value; control characters become visible."""
    return html.escape(value.translate(_CONTROL))


def section_of(title: str, content: str) -> str:
    return f"<section>\n<h2>{escaped(title)}</h2>\n{content}</section>"


def fact_list(facts: Iterable[tuple[str, str | None]]) -> str:
    """A description list of those `facts` that are there."""
    rows = "".join(
        f'<div><dt>{escaped(name)}</dt><dd dir="auto">{escaped(value)}</dd></div>\n'
        for name, value in facts
        if value is not None
    )
    return f'<dl class="facts">\n{rows}</dl>\n'


def table_of(
    caption: str, columns: Sequence[Column], rows: Iterable[Sequence[Cell]], row_header: int = 0
) -> str:
    """A table that scrolls sideways; the cells of the column `row_header` head their rows."""

    def head(column: Column) -> str:
        numeric = ' class="number"' if column.numeric else ""
        order = f' aria-sort="{column.sorted}"' if column.sorted else ""
        return f'<th scope="col"{numeric}{order}>{escaped(column.title)}</th>'

    def cell(index: int, content: Cell) -> str:
        column = columns[index]
        kind = ' class="number"' if column.numeric else ' class="prose"' if column.prose else ""
        order = f' data-order="{content.order!r}"' if content.order is not None else ""
        tag, scope = ("th", ' scope="row"') if index == row_header else ("td", "")
        return f'<{tag}{scope}{kind}{order} dir="auto">{escaped(content.text)}</{tag}>'

    body = "\n".join(
        f"<tr>{''.join(cell(index, content) for index, content in enumerate(row))}</tr>"
        for row in rows
    )
    return (
        f'<div class="scroll" role="region" aria-label="{escaped(caption)}" tabindex="0">\n'
        "<table>\n"
        f"<caption>{escaped(caption)}</caption>\n"
        f"<thead><tr>{''.join(map(head, columns))}</tr></thead>\n"
        f"<tbody>\n{body}\n</tbody>\n</table>\n</div>\n"
    )


def mb(size_bytes: int) -> str:
    """`size_bytes` in megabytes (10^6), without the unit."""
    megabytes = size_bytes / 1e6
    return f"{megabytes:.1f}" if megabytes >= 10 else f"{megabytes:.3g}"


def megabytes(size_bytes: int) -> str:
    return f"{mb(size_bytes)} MB"


def counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"


def _sha256(text: str) -> str:
    """The source expression that allows exactly `text` in a Content-Security-Policy."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


_STYLE = """
:root {
  color-scheme: light dark;
  --page: #fbfbfa; --card: #ffffff; --ink: #1d1f21; --soft: #5c6166; --line: #dfe1e3;
  --accent: #22669c; --notice: #fff4d6; --notice-line: #d9a514;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #151719; --card: #1d2023; --ink: #e6e7e8; --soft: #a2a8ae; --line: #34393e;
    --accent: #7ab3e0; --notice: #3a3012; --notice-line: #c99a1a;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif;
  overflow-wrap: anywhere; }
main { max-width: 72rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 2rem; line-height: 1.2; margin: 0; }
h2 { font-size: 1.35rem; margin: 2.5rem 0 .75rem; padding-top: 1rem;
  border-top: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 1.5rem 0 .5rem; }
p { margin: .5rem 0; max-width: 48rem; }
code { font: .9em/1.4 ui-monospace, monospace; }
.kicker, .lead, .note, figcaption, caption { color: var(--soft); }
.kicker { margin: 0; font-size: .875rem; }
.lead { font-size: 1.15rem; margin-top: .15rem; }
.note { font-size: .875rem; }
.notice { background: var(--notice); border-left: 4px solid var(--notice-line);
  padding: .6rem .9rem; border-radius: 4px; }
dl, dd { margin: 0; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(13rem, 1fr));
  gap: .75rem; margin-top: 1rem; }
.figures div { background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: .7rem .9rem; }
.figures dt, .figures span { color: var(--soft); font-size: .875rem; }
.figures strong { display: block; font-size: 1.5rem; line-height: 1.3; font-weight: 600; }
.facts div { display: grid; grid-template-columns: 9rem 1fr; gap: 0 1rem; padding: .2rem 0; }
.facts dt { color: var(--soft); }
.scroll { overflow: auto; max-height: 36rem; margin: 1rem 0; background: var(--card);
  border: 1px solid var(--line); border-radius: 8px; }
table { border-collapse: collapse; width: 100%; font-size: .875rem; overflow-wrap: normal;
  font-variant-numeric: tabular-nums; }
caption { text-align: left; padding: .6rem .75rem; }
th, td { text-align: left; padding: .35rem .75rem; border-top: 1px solid var(--line);
  white-space: nowrap; vertical-align: top; }
th[scope=row] { font-weight: 500; }
thead th { position: sticky; top: 0; background: var(--card); border-top: 0;
  box-shadow: 0 1px var(--line); white-space: normal; vertical-align: bottom; }
.number { text-align: right; }
.prose { white-space: normal; min-width: 14rem; overflow-wrap: anywhere; }
th button { font: inherit; color: inherit; background: none; border: 0; padding: 0;
  cursor: pointer; }
th[aria-sort=ascending] button::after { content: " \\2191"; }
th[aria-sort=descending] button::after { content: " \\2193"; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 30rem), 1fr));
  gap: 1rem; }
.gallery { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(45%, 14rem), 1fr)); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: .9rem; }
.card h3 { margin: 0 0 .6rem; }
.pair { display: grid; grid-template-columns: repeat(3, minmax(0, 1fr)); gap: .5rem; }
figure { margin: 0; }
figcaption, .absent { font-size: .875rem; color: var(--soft); margin: 0; }
img { display: block; width: 100%; height: auto; border-radius: 4px;
  outline: 1px solid var(--line); }
.sharp img { image-rendering: pixelated; }
.flip { font: inherit; font-size: .875rem; color: var(--accent); background: none; cursor: pointer;
  border: 1px solid var(--line); border-radius: 4px; padding: .2rem .6rem; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
.chart { max-width: 48rem; }
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--soft); font-size: 13px; }
svg rect { fill: var(--accent); }
.grid { stroke: var(--line); }
.axis { stroke: var(--soft); }
.raised ul { columns: 20rem auto; }
summary { cursor: pointer; color: var(--soft); font-size: .875rem; }
@media (max-width: 36rem) {
  .facts div { grid-template-columns: 1fr; padding: .35rem 0; }
  .pair { gap: .3rem; }
}
@media print { .scroll { max-height: none; overflow: visible; } .flip { display: none; } }
"""
