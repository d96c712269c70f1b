"""Lets one thread at a time use a pipeline, and none once it is closed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from edgesd.errors import UsageError


class Turns:
    """Turns at one pipeline. name: of it, for messages."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.RLock()
        self._generating = self._closed = False

    @contextmanager
    def turn(self, *, while_generating: bool = False) -> Iterator[None]:
        """Have the pipeline alone. Raises UsageError once it is closed, and, unless
        `while_generating`, to a call from within `on_step`."""
        with self._lock:
            self.check_open()
            if self._generating and not while_generating:
                raise UsageError(
                    "this pipeline is generating: within on_step it only decodes previews; call it "
                    "after generate has returned"
                )
            yield

    @contextmanager
    def generating(self) -> Iterator[None]:
        """A turn within which only turns `while_generating` are given."""
        with self.turn():
            self._generating = True
            try:
                yield
            finally:
                self._generating = False

    def check_open(self) -> None:
        """Raise UsageError once the pipeline is closed. Needs no turn."""
        if self._closed:
            raise UsageError(f"the pipeline of {self._name} was closed: open another one")

    def close(self, free: Callable[[], None]) -> None:
        """Take the last turn, in which `free` is called; nothing where it was taken already."""
        with self._lock:
            if not self._closed:
                with self.turn():
                    self._closed = True
                    free()
