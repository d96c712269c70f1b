"""Where graphs are checked."""

from __future__ import annotations

import pytest

from edgesd.export.families.parts.shapes import checked_size, sizes
from edgesd.spec.pipeline import ShapeSpec


@pytest.mark.parametrize(
    ("height", "width", "step", "checked"),
    [
        (128, 128, 64, (128, 128)),
        (512, 512, 64, (512, 512)),
        (1024, 1024, 32, (512, 512)),
        (768, 1024, 64, (384, 512)),
        (2048, 1024, 8, (512, 256)),
        (1024, 1024, 512, (1024, 1024)),
    ],
)
def test_large_sizes_are_halved(
    height: int, width: int, step: int, checked: tuple[int, int]
) -> None:
    """As often as needed; a side stays two steps long at least."""
    shape = ShapeSpec(height, width, 32, True, step)
    assert checked_size(shape) == checked
    first, second = sizes(shape, 8)
    assert (first["height"] * 8, first["width"] * 8) == checked
    assert second["height"] != second["width"] and second["height"] * 8 % step == 0
