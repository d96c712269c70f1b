"""Marks of tests that need something of the machine, and skip by name without it."""

from __future__ import annotations

import os
import sys

import pytest

LPIPS_WEIGHTS = os.environ.get("EDGESD_LPIPS", "")
"""The user's folder of LPIPS' weights, which tests don't see otherwise."""

utf8_names = pytest.mark.skipif(
    sys.getfilesystemencoding() != "utf-8", reason="file names of this locale aren't UTF-8"
)
needs_lpips_weights = pytest.mark.skipif(
    not LPIPS_WEIGHTS, reason="needs LPIPS' weights (EDGESD_LPIPS, scripts/lpips_weights.py)"
)
