"""Marks of tests that need something of the machine, and skip by name without it."""

from __future__ import annotations

import sys

import pytest

utf8_names = pytest.mark.skipif(
    sys.getfilesystemencoding() != "utf-8", reason="file names of this locale aren't UTF-8"
)
