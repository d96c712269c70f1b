"""Exporters talk a lot: hide what isn't an error, and keep errors to one line."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hide warnings, progress bars, log lines below ERROR and what is printed to stdout."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))  # importing the libraries logs, too
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), _no_bars():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    libraries = [lib for lib in (diffusers_logging, transformers_logging) if _bars_are_on(lib)]
    for library in libraries:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in libraries:
            library.enable_progress_bar()


def _bars_are_on(library: object) -> bool:
    return bool(getattr(library, "is_progress_bar_enabled", lambda: True)())
