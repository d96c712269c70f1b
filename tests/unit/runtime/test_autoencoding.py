"""Decoding and encoding in parts, of graphs that make other shapes than they should."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import numpy as np
import pytest

from edgesd.errors import BundleError
from edgesd.runtime.arrays import Array
from edgesd.runtime.autoencoding import decoded, encoded
from edgesd.runtime.backends.base import Runner
from edgesd.runtime.backends.fake import FakeRunner
from edgesd.runtime.bundle import Bundle
from edgesd.runtime.loaded import Loaded
from edgesd.runtime.networks import check_networks
from edgesd.spec.bundle import BundleManifest, ComponentPart, SplitComponent, split_of
from edgesd.spec.pipeline import ComponentSpec, EncoderSpec, TensorSpec
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
        tiled={"vae_decoder"},
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


ENCODER = EncoderSpec("vae_encoder", "image", ("mean", "std"))
STATISTICS = (f32("statistics", 2, 2, 2), f32("own", 1), TensorSpec("core", "int64", (4,)))


def encoder_part(name: str, inputs: Sequence[TensorSpec], *outputs: TensorSpec) -> ComponentPart:
    margins = (1, 1) if len(inputs) > 1 else None
    spec = ComponentSpec(name, tuple(inputs), outputs)
    return ComponentPart(f"e/{name}.onnx", spec, 1, margins=margins)


PARTS = (
    encoder_part(
        "head",
        (f32("image", 1, 3, "H", "W"), *STATISTICS),
        f32("features", 1, 5, "h", "w"),
        f32("moments", 2, 2, 2),
    ),
    encoder_part(
        "tail", (FEATURES,), *(f32(n, 1, len(LATENTS), "h", "w") for n in ENCODER.outputs)
    ),
)


def encode(memory: str, halved: int, halo: int | None = None, whole: int = 1) -> list[Array]:
    """What becomes of an image, each channel of which is 1, 2, 3, where the head makes a `halved`th
    of its sides; whole: what the sides of a whole one are divided by, besides."""
    latent = msgspec.structs.replace(SPEC.latent, scale_factor=2, encoder_halo=halo)
    wiring = msgspec.structs.replace(SPEC.wiring, encoder=ENCODER)
    spec = msgspec.structs.replace(SPEC, latent=latent, wiring=wiring)
    image = np.arange(1, 4, dtype=np.float32)[None, :, None, None] * np.ones((1, 3, 128, 96), "f4")

    def head(inputs: Mapping[str, Array]) -> dict[str, Array]:
        small = inputs["image"][:, :1, ::halved, ::halved]
        return {
            "features": small.repeat(5, 1).astype(np.float32),
            "moments": np.zeros((2, 2, 2), np.float32),
        }

    def tail(inputs: Mapping[str, Array]) -> dict[str, Array]:
        mean = inputs["features"][:, : len(LATENTS)]
        return {"mean": mean, "std": 2 * mean}

    @contextmanager
    def part(component: str, part: ComponentPart) -> Iterator[Runner]:
        yield FakeRunner(part.spec, head if part is PARTS[0] else tail)

    def run(component: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
        small = inputs["image"][:, :1, :: 2 * whole, :: 2 * whole]
        ones = np.repeat(small, len(LATENTS), 1)
        return {"mean": ones, "std": 2 * ones}

    engine = SimpleNamespace(split=SplitComponent(*PARTS) if halo is None else None)
    fake: Any = SimpleNamespace(
        bundle=SimpleNamespace(
            manifest=SimpleNamespace(pipeline=spec, engines={"vae_encoder": engine})
        ),
        tiled={"vae_encoder"} if memory == "stream" else set(),
        replaced=set(),
        window=22,
        part=part,
        run=run,
    )
    return list(encoded(cast(Loaded, fake), image))


@pytest.mark.parametrize("memory", ["balanced", "stream"])
def test_encoder_parts_make_what_the_whole_makes(memory: str) -> None:
    mean, spread = encode(memory, 2)
    assert mean.shape == (1, len(LATENTS), 64, 48)
    assert (mean == 1).all() and (spread == 2).all()


def test_an_encoder_that_sees_only_so_far_is_run_in_tiles() -> None:
    (latents,) = encode("stream", 2, halo=4)
    assert latents.shape == (1, len(LATENTS), 64, 48) and (latents == 1).all()


def test_encoders_that_make_other_shapes_are_refused() -> None:
    with pytest.raises(BundleError, match="part 1 of vae_encoder makes features of the shape"):
        encode("stream", 4)
    with pytest.raises(BundleError, match="vae_encoder makes latents of the shape"):
        encode("balanced", 2, whole=2)
    with pytest.raises(BundleError, match="vae_encoder"):
        encode("stream", 2, halo=4, whole=2)


def manifest_of(miniature: Bundle, *parts: ComponentPart) -> BundleManifest:
    """Of a bundle whose encoder, which makes latents of half an image's sides, has `parts`."""
    manifest, channels = miniature.manifest, miniature.manifest.pipeline.latent.channels
    spec = ComponentSpec(
        ENCODER.component,
        (f32("image", "b", 3, "H", "W"),),
        tuple(f32(name, "b", channels, "h", "w") for name in ENCODER.outputs),
    )
    pipeline = msgspec.structs.replace(
        manifest.pipeline,
        components={**manifest.pipeline.components, spec.name: spec},
        wiring=msgspec.structs.replace(manifest.pipeline.wiring, encoder=ENCODER),
        latent=msgspec.structs.replace(manifest.pipeline.latent, scale_factor=2),
    )
    engine = msgspec.structs.replace(manifest.engines["vae_decoder"], split=split_of(parts))
    engines = {**manifest.engines, spec.name: engine}
    return msgspec.structs.replace(manifest, pipeline=pipeline, engines=engines)


def test_parts_of_an_encoder_are_checked_before_they_run(miniature: Bundle) -> None:
    head, tail = PARTS
    check_networks(manifest_of(miniature, head, tail))
    unknown = encoder_part(
        "head", head.spec.inputs, f32("features", 1, "c", "h", "w"), head.spec.outputs[1]
    )
    wrong = {
        "part 1 of the encoder has no margins": (
            msgspec.structs.replace(head, margins=None),
            tail,
        ),
        "vae_encoder has 3 parts": (head, encoder_part("1", *middle()), tail),
        "part 2 of the encoder in the manifest has the inputs": (head, head, tail),
        "part 1 of the encoder in the manifest has features as": (unknown, tail),
        "the tail of the encoder in the manifest has the inputs": (head, head),
    }
    for words, parts in wrong.items():
        with pytest.raises(BundleError, match=words):
            check_networks(manifest_of(miniature, *parts))
    manifest = manifest_of(miniature, head, tail)
    split = msgspec.structs.replace(SplitComponent(HEAD, TAIL), middle=(HEAD,))
    decoder = msgspec.structs.replace(manifest.engines["vae_decoder"], split=split)
    engines = {**manifest.engines, "vae_decoder": decoder}
    with pytest.raises(BundleError, match="vae_decoder has more than a head and a tail"):
        check_networks(msgspec.structs.replace(manifest, engines=engines))


def middle() -> tuple[tuple[TensorSpec, ...], TensorSpec, TensorSpec]:
    """Inputs and outputs of a part between an encoder's head and tail."""
    return (FEATURES, *STATISTICS), f32("coarse", 1, 5, "h", "w"), f32("moments", 2, 2, 2)
