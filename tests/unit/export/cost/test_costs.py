"""Memory of a build, whatever the network's size."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")

from edgesd.export.cost.costs import build_bytes

SDXL = 2_567_500_000


def test_weights_stay_in_their_files() -> None:
    assert build_bytes(SDXL, 1024 * 1024) == build_bytes(2 * SDXL, 1024 * 1024) < 10e9
    assert build_bytes(10**8, 0) < build_bytes(5 * 10**8, 0) < build_bytes(SDXL, 0)
    assert build_bytes(SDXL, 1) < build_bytes(SDXL, 512 * 512)
