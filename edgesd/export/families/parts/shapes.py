"""Shapes of tensors, the sizes that graphs are checked at, and the values they are checked with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from edgesd.errors import UsageError
from edgesd.export.families import MAX_BATCH, Example, Sizes
from edgesd.spec.base import Dim
from edgesd.spec.pipeline import LatentSpec, ShapeSpec, TensorSpec, check_multiple

CHECKED_PIXELS = 512
"""A network that computes the same at one size and at another does so at a larger one."""

COLOURS = 3
"""Channels of an image."""

CONTROL = "control"
"""The input that a control image goes into."""

TOKENS = "tokens"
"""The symbolic dimension of embeddings of any number of chunks of tokens."""


def float_tensor(name: str, *shape: Dim) -> TensorSpec:
    """An input or output in fp32."""
    return TensorSpec(name, "float32", shape)


def control_image(batch: Dim, shape: ShapeSpec, latent: LatentSpec) -> TensorSpec:
    """A control image in pixels, beside a sample in latents whose batch is `batch`."""
    unit = latent.scale_factor
    height: Dim = f"height*{unit}" if shape.dynamic else shape.height
    width: Dim = f"width*{unit}" if shape.dynamic else shape.width
    return float_tensor(CONTROL, batch, COLOURS, height, width)


def dims(shape: ShapeSpec, unit: int) -> tuple[Dim, Dim, Dim]:
    """Batch, height, width of a tensor whose elements are `unit` pixels wide; the batch is 1 where
    shapes are static."""
    if shape.dynamic:
        return "batch", "height", "width"
    return 1, shape.height // unit, shape.width // unit


def token_dim(shape: ShapeSpec, tokens: int, chunks: int) -> Dim:
    """Tokens of the embeddings that a denoiser takes: of any number of chunks, or of `chunks` with
    `tokens` each where shapes are static (runtime/chunks.py)."""
    return TOKENS if shape.dynamic else tokens * chunks


def with_tokens(found: Sequence[Sizes], tokens: int) -> tuple[Sizes, ...]:
    """The same sizes, the first for one chunk of `tokens`, the second for two, and so on."""
    return tuple(
        {**each, TOKENS: number * tokens} if each else each for number, each in enumerate(found, 1)
    )


def sizes(shape: ShapeSpec, unit: int) -> tuple[Sizes, ...]:
    """Where to check: the pipeline's own size, or a half of it that is small enough for any
    machine, and a smaller oblong one in a batch of 2."""
    if not shape.dynamic:
        return {}, {}
    step = shape.multiple_of
    height, width = checked_size(shape)
    rows = max(2 * step, height // 2 // step * step)
    return (
        {"batch": 1, "height": height // unit, "width": width // unit},
        {"batch": 2, "height": rows // unit, "width": (rows + step) // unit},
    )


def fixed_shape(size: tuple[int, int], batch: int, unit: int, multiple_of: int) -> ShapeSpec:
    """Of static graphs. size: (width, height), multiples of `unit`. multiple_of: of the spec.
    Raises UsageError."""
    width, height = size
    for what, value in (("height", height), ("width", width)):
        check_multiple(what, value, unit)
    if not 1 <= batch <= MAX_BATCH:
        raise UsageError(f"batch {batch} is out of range: expected 1 to {MAX_BATCH}")
    return ShapeSpec(height, width, batch, False, multiple_of)


def checked_size(shape: ShapeSpec) -> tuple[int, int]:
    """Height and width in pixels, up to CHECKED_PIXELS each, that graphs for any size are checked
    at."""
    step = shape.multiple_of
    sides = [shape.height, shape.width]
    while max(sides) > max(CHECKED_PIXELS, 2 * step):
        sides = [max(2 * step, side // 2 // step * step) for side in sides]
    return sides[0], sides[1]


def uniform(low: float, high: float) -> Example:
    """Values from `low` to `high`."""

    def values(rng: np.random.Generator, shape: Sequence[int]) -> npt.NDArray[Any]:
        return rng.uniform(low, high, shape).astype(np.float32)

    return values


def whole_numbers(low: int, high: int) -> Example:
    """Whole numbers from `low` to below `high`: timesteps, sizes in pixels."""

    def values(rng: np.random.Generator, shape: Sequence[int]) -> npt.NDArray[Any]:
        return rng.integers(low, high, shape).astype(np.float32)

    return values


def token_ids(vocab_size: int, end: int) -> Example:
    """Ids [batch, tokens] of a prompt, of which the second half is the token of its end; its first
    is the one before that in CLIP's vocabularies."""

    def values(rng: np.random.Generator, shape: Sequence[int]) -> npt.NDArray[Any]:
        ids = rng.integers(0, vocab_size, shape)
        ids[:, 0], ids[:, shape[1] // 2 :] = end - 1, end
        return ids.astype(np.int64)

    return values
