"""What is shown of long work where there is no terminal: plain lines, in fitting units."""

from __future__ import annotations

import pytest

from edgesd.cli import common
from edgesd.cli.common import Reporter
from edgesd.progress import Lines, Prefixed, Progress, count_bytes


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "LINE_SECONDS", 0.0)


@pytest.mark.parametrize(
    ("done", "total", "shown"),
    [
        (3, 9, "send: 3/9 bytes"),
        (500, 9_999, "send: 500/9999 bytes"),
        (2_000, 10_000, "send: 2/10 kB"),
        (1_500_000, 9_900_000, "send: 1500/9900 kB"),
        (25_400_000, 25_400_000, "send: 25/25 MB"),
        (0, 4_300_000_000, "send: 0/4300 MB"),
    ],
)
def test_bytes_are_shown_in_a_unit_that_fits(
    done: int, total: int, shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Reporter().update("send", done, total, in_bytes=True)
    assert capsys.readouterr().err == f"{shown}\n"
    count_bytes(Reporter(), "send", total)(done)
    assert capsys.readouterr().err == f"{shown}\n"


def test_a_total_of_nothing_is_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    reporter = Reporter()
    reporter.update("send", 0, 0, in_bytes=True)
    reporter.update("generate", 0, 0, "s/step")
    assert capsys.readouterr().err == ""


def test_plain_lines_keep_their_distance(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = 0.0
    monkeypatch.setattr(common, "LINE_SECONDS", 1.0)
    monkeypatch.setattr("time.monotonic", lambda: clock)
    reporter = Reporter()
    for n in range(25):
        clock = n / 10
        reporter.update("generate", n, 25)
    assert capsys.readouterr().err == "generate: 10/25\ngenerate: 20/25\n"


def test_a_quiet_reporter_shows_none(capsys: pytest.CaptureFixture[str]) -> None:
    Reporter(quiet=True).update("generate", 1, 2)
    assert capsys.readouterr().err == ""


def test_bytes_add_up_to_the_total_and_no_further(capsys: pytest.CaptureFixture[str]) -> None:
    count = count_bytes(Prefixed(Reporter(), "pi@board: "), "send", 9)
    for size in (4, 4, 4):
        count(size)
    assert capsys.readouterr().err.splitlines() == [
        f"pi@board: send: {done}/9 bytes" for done in (4, 8, 9)
    ]


def test_lines_of_one_board_are_told_from_another_s() -> None:
    lines: list[str] = []
    progress: Progress = Prefixed(Lines(lines.append), "pi@board: ")
    progress.line("verifying")
    progress.update("verify", 1, 2)
    assert lines == ["pi@board: verifying"]
