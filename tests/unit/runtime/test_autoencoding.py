"""Decoding in parts, of graphs that make other shapes than an image has."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from edgesd.errors import BundleError
from edgesd.runtime.arrays import Array
from edgesd.runtime.autoencoding import decoded
from edgesd.runtime.backends.base import Runner
from edgesd.runtime.backends.fake import FakeRunner
from edgesd.runtime.loaded import Loaded
from edgesd.spec.bundle import ComponentPart, SplitComponent
from edgesd.spec.pipeline import ComponentSpec, TensorSpec
from tests.support import pipeline_spec

SPEC = pipeline_spec()
LATENTS = np.zeros((SPEC.latent.channels, 8, 6), np.float32)
SCALE = SPEC.latent.scale_factor


def f32(name: str, *shape: int | str) -> TensorSpec:
    return TensorSpec(name, "float32", shape)


FEATURES = f32("features", 1, 5, "h", "w")
HEAD = ComponentPart(
    "d/head.onnx",
    ComponentSpec(
        "head", (f32(SPEC.wiring.decoder.input, 1, len(LATENTS), "h", "w"),), (FEATURES,)
    ),
    1,
)
TAIL = ComponentPart(
    "d/tail.onnx",
    ComponentSpec(
        "tail",
        (
            FEATURES,
            f32("statistics", 2, 2, 2),
            f32("own", 1),
            TensorSpec("core", "int64", (4,)),
        ),
        (f32(SPEC.wiring.decoder.output, 1, 3, "H", "W"), f32("moments", 2, 2, 2)),
    ),
    1,
)


def decode(features: tuple[int, int], image: tuple[int, int]) -> Array:
    """What becomes of LATENTS where head and tail make these heights and widths."""

    def head(inputs: Mapping[str, Array]) -> dict[str, Array]:
        return {"features": np.zeros((1, 5, *features), np.float32)}

    def tail(inputs: Mapping[str, Array]) -> dict[str, Array]:
        values = np.zeros((1, 3, *image), np.float32)
        return {SPEC.wiring.decoder.output: values, "moments": np.zeros((2, 2, 2), np.float32)}

    @contextmanager
    def part(component: str, part: ComponentPart) -> Iterator[Runner]:
        yield FakeRunner(part.spec, head if part is HEAD else tail)

    engine = SimpleNamespace(split=SplitComponent(HEAD, TAIL))
    manifest = SimpleNamespace(pipeline=SPEC, engines={SPEC.wiring.decoder.component: engine})
    fake: Any = SimpleNamespace(
        bundle=SimpleNamespace(manifest=manifest),
        memory="stream",
        replaced=set(),
        window=64,
        part=part,
    )
    return decoded(cast(Loaded, fake), LATENTS)


def test_parts_that_fit_make_an_image() -> None:
    assert decode((8, 6), (8 * SCALE, 6 * SCALE)).shape == (3, 8 * SCALE, 6 * SCALE)


@pytest.mark.parametrize(
    ("features", "image", "words"),
    [
        ((16, 6), (8 * SCALE, 6 * SCALE), "the head of vae_decoder makes features of the shape"),
        ((8, 6), (8 * SCALE, 6), "the tail of vae_decoder makes an image of the shape"),
    ],
)
def test_parts_that_make_another_size_are_refused(
    features: tuple[int, int], image: tuple[int, int], words: str
) -> None:
    with pytest.raises(BundleError, match=words):
        decode(features, image)
