"""The errors that a user can cause or cure. Each class knows its exit status.

A message says what happened, what was received, what was expected and what to do.
Exit statuses: 1 internal fault, 2 usage (as Click), 3 bad input, 4 broken bundle, 5 wrong
target or environment, 6 not enough memory or disk, 7 quality gate not met, 8 a board can't be
reached or failed, 130 interrupted.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import ClassVar


class EdgesdError(Exception):
    """Base of every error that is reported as one line, without a traceback."""

    exit_code: ClassVar[int] = 1


class UsageError(EdgesdError):
    """An argument has no valid meaning (unknown name, value out of range)."""

    exit_code = 2


class InputError(EdgesdError):
    """A file, folder or value given as input is missing, malformed or unsupported."""

    exit_code = 3


class BundleError(EdgesdError):
    """A bundle is incomplete, altered, or of a schema this version can't read."""

    exit_code = 4


class TargetError(EdgesdError):
    """The bundle, engine or request doesn't fit the target or this machine."""

    exit_code = 5


class ResourceError(EdgesdError):
    """Memory or disk space doesn't suffice."""

    exit_code = 6


class MissingDependencyError(EdgesdError):
    """An optional package is not installed; the message names the extra that brings it."""

    exit_code = 5


class ParityError(EdgesdError):
    """A converted component differs from its source by more than its tolerance."""

    exit_code = 7


class QualityError(EdgesdError):
    """The pictures of a quantized pipeline are further from their source's than was allowed."""

    exit_code = 7


class BoardError(EdgesdError):
    """A board can't be reached, or what was asked of it failed there."""

    exit_code = 8


class LinkError(BoardError):
    """The link to a board was lost, or it doesn't answer: trying again may help."""


def unknown_name(kind: str, name: str, valid: Iterable[str]) -> str:
    """One line for a name that isn't in `valid`: what was received, the nearest, all of them."""
    valid = sorted(valid)
    near = difflib.get_close_matches(name, valid, n=1, cutoff=0.3)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"unknown {kind} {name!r}: {hint}valid: {', '.join(valid)}"
