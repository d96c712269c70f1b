"""Text from outside on a terminal: nothing that it would obey, hide or break the line at."""

from __future__ import annotations

import ast
import json
import logging
import os
import pty
import shutil
import subprocess
import sys
import unicodedata
import warnings
from pathlib import Path

import msgspec
import pytest

from edgesd.cli.common import Reporter, fail, print_json, show_messages
from edgesd.engines.bundle import update_manifest
from edgesd.errors import InputError
from edgesd.runtime.bundle import Bundle
from edgesd.text import first_sentence, shown, shown_json, shown_lines
from tests.marks import utf8_names

ROOT = Path(__file__).resolve().parents[2]
CLIPBOARD = "\x1b]52;c;cm0gLXJmIH4=\x07"
HOSTILE = (
    *("\x1b[2J", CLIPBOARD, "\x9b31m", "\r", "\b", "\x00", "\x7f", "\x85", "\n", "\x0b", "\x0c"),
    *("\u202e", "\u2066", "\u200f", "\u061c", "\u2028", "\u2029"),
    *("\u200b", "\ufeff", "\u00ad", "\u2060", "\u034f", "\u3164", "\u2800", "\ufe00"),
    *("\U000e0041", "\U000e0100", "\ud800", "\udcff", "\ufff9"),
)


def is_safe(text: str) -> bool:
    unsafe = {"Cc", "Cf", "Cs", "Zl", "Zp"}
    return not any(unicodedata.category(char) in unsafe for char in text)


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_what_a_terminal_would_obey_or_hide_is_shown_as_an_escape(text: str) -> None:
    line = shown(f"model {text} x")
    assert is_safe(line) and "\\" in line
    assert line.startswith("model ") and line.endswith(" x")
    assert is_safe(shown_lines(text).replace("\n", ""))


@pytest.mark.parametrize(
    "text",
    ["a red apple", "ein grüner Käfer", "赤い　りんご", "un œuf à 5 €", "❤️ 🍎", "שלום", "a\u00a0b"],
)
def test_what_people_write_is_shown_as_it_is(text: str) -> None:
    assert shown(text) == text


@utf8_names
def test_a_byte_of_a_file_name_that_is_no_text_is_shown_as_a_byte() -> None:
    assert shown(Path(os.fsdecode(b"caf\xe9.png"))) == "caf\\xe9.png"


def test_lines_and_tabs_are_kept_where_there_may_be_several() -> None:
    assert shown_lines("one\r\ntwo\tthree\x1b") == "one\ntwo\tthree\\x1b"


def test_json_is_exact_and_has_nothing_a_terminal_would_obey(
    capsys: pytest.CaptureFixture[str],
) -> None:
    value = {"name": "".join(text for text in HOSTILE if is_encodable(text)) + "ü赤🍎"}
    print_json(value)
    printed = capsys.readouterr().out
    assert json.loads(printed) == value
    assert is_safe(printed.replace("\n", "")) and "ü赤🍎" in printed
    print_json(value, indent=-1)
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1 and json.loads(printed) == value
    assert shown_json(printed) == printed


def is_encodable(text: str) -> bool:
    return not any(0xD800 <= ord(char) < 0xE000 for char in text)


def test_an_error_is_one_safe_line_of_bounded_length(capsys: pytest.CaptureFixture[str]) -> None:
    fail(InputError("a name\n\u2028" + "".join(HOSTILE) + "y" * 10**6), debug=False)
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and is_safe(printed[:-1])
    assert printed.startswith("edgesd: a name") and "left out" in printed and len(printed) < 9000


def test_the_traceback_that_debug_shows_is_safe(capsys: pytest.CaptureFixture[str]) -> None:
    fail(ValueError(CLIPBOARD), debug=True)
    printed = capsys.readouterr().err
    assert "ValueError" in printed and is_safe(printed.replace("\n", ""))


def test_progress_is_safe_beside_a_bar_and_without_one(capsys: pytest.CaptureFixture[str]) -> None:
    text = "".join(HOSTILE) + "[red]:apple:"
    for fancy in (False, True):
        reporter = Reporter()
        reporter.fancy = fancy
        with reporter.bar():
            reporter.line(text)
            reporter.warn(text)
            reporter._shown_at -= 2
            reporter.update(text, 1, 2, text)
        printed = capsys.readouterr().err
        assert CLIPBOARD not in printed and "\u202e" not in printed and "\x9b" not in printed
        assert "[red]:apple:" in "".join(printed.split())


def test_nothing_prints_but_by_the_functions_that_make_text_safe() -> None:
    printing = {
        *("print", "click.echo", "click.secho", "traceback.print_exception", "warnings.warn"),
        *("sys.stdout.write", "sys.stderr.write", "self._bar.console.print"),
    }
    found = []
    for path in sorted((ROOT / "edgesd").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and (name := ast.unparse(node.func)) in printing:
                found.append((path.relative_to(ROOT).as_posix(), name, ast.unparse(node.args[0])))
    assert sorted(found) == [
        ("edgesd/cli/common.py", "click.echo", "text"),
        ("edgesd/cli/common.py", "self._bar.console.print", "shown(text)"),
    ]


def on_a_terminal(*arguments: str) -> tuple[int, bytes]:
    """Status and output of `edgesd ARGUMENTS` on a pseudo-terminal."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "edgesd", *arguments], stdin=theirs, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    output = b""
    try:
        while part := os.read(ours, 65536):
            output += part
    except OSError:  # the other end is closed
        pass
    finally:
        os.close(ours)
    return process.wait(timeout=60), output


@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        ("It failed. Try again.", "It failed"),
        (
            "Two options, \x1b[1mdo those steps\x1b[0m\nonly if you trust it. (1) ...",
            "Two options, do those steps only if you trust it",
        ),
        (
            "no module x.y.z, see e.g. the docs\nfor 3.5 or more",
            "no module x.y.z, see e.g. the docs for 3.5 or more",
        ),
        ("", "ValueError"),
        (" \n\x1b[2J ", "ValueError"),
    ],
)
def test_of_a_library_s_words_the_first_sentence_is_told_whole(said: str, sentence: str) -> None:
    assert first_sentence(ValueError(said)) == sentence


def test_a_sentence_without_end_is_cut_at_a_word() -> None:
    told = first_sentence(ValueError("word " * 10**5))
    assert told.endswith("word ...") and len(told) < 420


def test_what_is_logged_or_warned_of_is_one_safe_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging, "lastResort", logging.lastResort)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    show_messages()
    record = logging.LogRecord(
        "edgesd", logging.WARNING, "", 0, "of %s", (CLIPBOARD + "\nx",), None
    )
    assert logging.lastResort
    logging.lastResort.handle(record)
    other = logging.LogRecord("other.library", logging.WARNING, "", 0, "for developers", (), None)
    logging.lastResort.handle(other)
    warnings.showwarning(UserWarning("of " + CLIPBOARD), UserWarning, "", 0)
    slip = logging.LogRecord("other.library", logging.ERROR, "", 0, "of %d", ("x",), None)
    logging.lastResort.handle(slip)
    first, second, third = capsys.readouterr().err.splitlines()
    assert first.startswith("edgesd: warning: of \\x1b") and is_safe(first)
    assert second.startswith("edgesd: warning: of \\x1b") and is_safe(second)
    assert third == "edgesd: error: of %d"


def test_a_hostile_bundle_is_inspected_safely_on_a_terminal(
    miniature: Bundle, tmp_path: Path
) -> None:
    forged = f"x{CLIPBOARD}\x1b[2J\nverified: 9 files, every byte\u202e\x1b[8m"
    folder = tmp_path / "bundle"
    shutil.copytree(miniature.path, folder)
    licence = msgspec.structs.replace(miniature.manifest.licence, name=forged)
    update_manifest(
        folder,
        msgspec.structs.replace(
            miniature.manifest, name=forged, tools={forged: forged}, licence=licence
        ),
    )
    status, output = on_a_terminal("inspect", str(folder))
    bar, _, rows = output.decode().rpartition("\x1b")  # the bar's own codes come before the rows
    lines = rows.rstrip().split("\r\n")
    assert status == 0 and "licence" in rows and all(map(is_safe, lines[1:]))
    assert CLIPBOARD not in bar and sum(line.startswith("verified:") for line in lines) == 1
    status, output = on_a_terminal("inspect", str(folder), "--json")
    assert status == 0 and json.loads(output)["manifest"]["name"] == forged
    assert is_safe(output.decode().replace("\r\n", ""))


@utf8_names
def test_an_error_about_a_hostile_name_is_safe_on_a_terminal(tmp_path: Path) -> None:
    status, output = on_a_terminal("inspect", str(tmp_path / f"x{CLIPBOARD}\u202e"))
    assert status != 0 and b"\\x1b]52" in output and b"\\u202e" in output
    assert b"\x1b]52" not in output and "\u202e".encode() not in output
