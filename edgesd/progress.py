"""The protocol by which long work reports progress, from exports down to hashed bytes.

The command line shows it (cli.common.Reporter); a program may give any object with these methods.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol


class Progress(Protocol):
    """Follows long work."""

    def line(self, text: str) -> None:
        """A stage begins, or another program printed something: a line that stays."""

    def update(
        self, task: str, done: int, total: int, note: str = "", *, in_bytes: bool = False
    ) -> None:
        """`done` of `total` parts of `task` are finished; `note` says more, such as a loss.

        in_bytes: the parts are bytes. Work whose total is 0 isn't shown.
        """


class Lines:
    """Progress of which only the lines are handed on, to `to`."""

    def __init__(self, to: Callable[[str], None]) -> None:
        self._to = to

    def line(self, text: str) -> None:
        self._to(text)

    def update(
        self, task: str, done: int, total: int, note: str = "", *, in_bytes: bool = False
    ) -> None:
        """See Progress."""


SILENT: Progress = Lines(lambda text: None)
"""Shows nothing."""


class Prefixed:
    """Progress of one of several, such as a board: `prefix` stands before its lines and tasks."""

    def __init__(self, progress: Progress, prefix: str) -> None:
        self._progress, self._prefix = progress, prefix

    def line(self, text: str) -> None:
        self._progress.line(self._prefix + text)

    def update(
        self, task: str, done: int, total: int, note: str = "", *, in_bytes: bool = False
    ) -> None:
        self._progress.update(self._prefix + task, done, total, note, in_bytes=in_bytes)


def count_bytes(progress: Progress, task: str, total: int) -> Callable[[int], None]:
    """What to call with each number of bytes of `task` that are done.

    More than `total`, where some are done twice, isn't shown.
    """
    done = 0

    def count(size: int) -> None:
        nonlocal done
        done += size
        progress.update(task, min(done, total), total, in_bytes=True)

    return count
