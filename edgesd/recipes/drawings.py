"""Pictures that a build shows to ControlNets and adapters.

What they are shown later, nobody knows.
"""

from __future__ import annotations

import io

import numpy as np

from edgesd.runtime.pictures import Picture, read_picture
from edgesd.runtime.requests import Control, control_names
from edgesd.spec.pipeline import PipelineSpec

DRAWINGS = 4
_FILLED, _DRAWN = 4, 12


def drawing(pipeline: PipelineSpec, seed: int) -> Picture:
    """Shapes of some greys on black, and lines in white and in colours: of what sketches, edges,
    depths and poses are made. Of a pipeline's own size."""
    from PIL import Image, ImageDraw

    width, height = pipeline.shape.width, pipeline.shape.height
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", (width, height))
    draw = ImageDraw.Draw(image)

    def points(count: int) -> list[tuple[float, float]]:
        return [(float(x) * width, float(y) * height) for x, y in rng.random((count, 2))]

    for _ in range(_FILLED):
        grey = int(rng.integers(0, 256))
        (left, top), (right, bottom) = points(2)
        box = (min(left, right), min(top, bottom), max(left, right), max(top, bottom))
        draw.ellipse(box, fill=(grey, grey, grey))
    for number in range(_DRAWN):
        colour = tuple(map(int, rng.integers(0, 256, 3))) if number % 2 else (255, 255, 255)
        draw.line(points(4), fill=colour, width=max(1, width // 128))
    file = io.BytesIO()
    image.save(file, "PNG")
    return read_picture(file.getvalue(), f"drawing {seed}")


def drawn_controls(pipeline: PipelineSpec) -> tuple[Control, ...]:
    """A drawing shown to all that a pipeline can show one to; nothing where that is nothing."""
    names = control_names(pipeline)
    if not names:
        return ()
    picture = drawing(pipeline, 0)
    return tuple(Control(picture, name) for name in names)
