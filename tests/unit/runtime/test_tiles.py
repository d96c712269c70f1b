"""Decoding in tiles: a full autoencoder's decoder in head and tail, against the whole."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from edgesd.runtime import tiles
from edgesd.runtime.backends.base import run_once
from edgesd.runtime.backends.onnxruntime import OnnxRuntimeRunner
from edgesd.runtime.bundle import GraphFile
from edgesd.runtime.tiles import Tile, tiles_of
from edgesd.spec.bundle import DecoderPart, SplitDecoder
from edgesd.spec.pipeline import ComponentSpec, LatentSpec, TensorSpec

Array = npt.NDArray[np.float32]
CHANNELS = (16, 16, 32, 32)
"""Of the levels of a small AutoencoderKL, finest first."""


def test_tiles_cover_all_and_margins_stay_inside() -> None:
    assert tiles_of(20, 24, 3) == [Tile(0, 20, 0, 20)]
    assert tiles_of(64, 18, 3) == [
        Tile(0, 16, 0, 19),
        Tile(16, 32, 13, 35),
        Tile(32, 48, 29, 51),
        Tile(48, 64, 45, 64),
    ]
    for size in range(1, 130):
        found = tiles_of(size, tiles.WINDOWS[1] - 2 * tiles.MARGIN, tiles.MARGIN)
        assert found[0].begin == 0 and found[-1].end == size
        assert all(a.end == b.begin for a, b in pairwise(found))
        assert all(tile.last - tile.first <= tiles.WINDOWS[1] for tile in found)


def test_tiles_of_what_sees_no_further_are_the_whole() -> None:
    latents = np.arange(2 * 7 * 5, dtype=np.float32).reshape(2, 7, 5)

    def decode(seen: Array, rows: Tile, columns: Tile) -> Array:
        assert seen.shape[2:] == (rows.last - rows.first, columns.last - columns.first)
        return np.repeat(np.repeat(seen[0, [0, 1, 0]], 2, 1), 2, 2)

    image = tiles.decode_tiles(decode, latents, 2, 3, 1)
    assert (image == latents[[0, 1, 0]].repeat(2, 1).repeat(2, 2)).all()


def test_figures_differ_by_means_and_deviations() -> None:
    figures = np.zeros((1, 2, 2))
    figures[0, 1] = 4  # deviation 2
    assert tiles.difference(figures, figures) == 0
    moved = figures + 0.0
    moved[0, 0, 0], moved[0, 1, 0] = 0.2, 4.04
    assert tiles.difference(moved, figures) == pytest.approx(0.1 / 2**0.5, rel=1e-3)
    wider = figures * 1.21
    assert tiles.difference(wider, figures) == pytest.approx(0.1, rel=1e-3)


def test_a_mosaic_is_of_patches_from_all_over() -> None:
    features = np.arange(100 * 20, dtype=np.float32).reshape(1, 100, 20)
    mosaic = tiles._mosaic(features, 28)
    assert mosaic.shape == (1, 1, 27, 20)
    rows = (mosaic[0, 0, :, 0] / 20).astype(int).tolist()
    assert rows == [*range(9), *range(46, 55), *range(91, 100)]


def component(fixed: bool = False, **fields: Any) -> Any:
    """An AutoencoderKL's decoder with random weights, to be exported. fixed: of one size."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    from edgesd.export.families import Component
    from edgesd.export.families.parts.vae import VaeDecoder

    torch.manual_seed(0)
    options: dict[str, Any] = {
        "block_out_channels": CHANNELS,
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "norm_num_groups": 8,
        "layers_per_block": 2,
    }
    net = diffusers.AutoencoderKL(**{**options, **fields}).eval().requires_grad_(False)
    net.encoder = net.quant_conv = None
    module = VaeDecoder(net, LatentSpec(4, 8, 0.18215))
    dims: Any = ("batch", "height", "width", "height", "width")
    if fixed:
        dims = (1, 8, 12, 64, 96)
    latents = TensorSpec("latents", "float32", (dims[0], 4, *dims[1:3]))
    image = TensorSpec("image", "float32", (dims[0], 3, *dims[3:]))
    spec = ComponentSpec("vae_decoder", (latents,), (image,))
    size = {"batch": 1, "height": 8, "width": 12}
    return Component(spec, lambda: module, (size, {**size, "batch": 2}))


class Decoder:
    """A decoder as a bundle has it, below `root`."""

    def __init__(self, root: Path) -> None:
        from edgesd.export.external_data import SPLIT_FILES, write_model
        from edgesd.export.passes.tiled_decoder import describe_split, split_decoder
        from edgesd.export.to_onnx import graph_from_module

        self.root, self.component = root, component()
        self.model = graph_from_module(self.component.load(), self.component, "ort-mha")
        parts = split_decoder(self.model)
        assert parts is not None
        self.split: SplitDecoder = describe_split("vae_decoder", parts, SPLIT_FILES)
        self.folder = root / "vae_decoder"
        write_model(self.model, self.folder, dict(zip(SPLIT_FILES, parts, strict=True)))

    def run(self, part: DecoderPart | None, **inputs: Array) -> dict[str, Array]:
        spec = self.component.spec if part is None else part.spec
        path = self.root / (part.path if part else "vae_decoder/model.onnx")
        graph = GraphFile(path.read_bytes(), self.folder)
        with OnnxRuntimeRunner(spec, graph, 1) as runner:
            return {name: np.array(value) for name, value in run_once(runner, inputs).items()}

    def features(self, latents: Array) -> Array:
        return self.run(self.split.head, latents=latents)["features"]

    def tail(self, features: Array, statistics: Array, own: float) -> dict[str, Array]:
        core = np.array([0, 0, *features.shape[2:]])
        fed = {"features": features, "statistics": statistics, "core": core}
        return self.run(self.split.tail, own=np.array([own], np.float32), **fed)

    @property
    def nothing(self) -> Array:
        return np.zeros((19, 2, 8), np.float32)


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    return Decoder(tmp_path_factory.mktemp("decoder"))


def latents(height: int, width: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal((1, 4, height, width), dtype=np.float32)


def off(found: Array, wanted: Array) -> float:
    """Largest difference, as a part of the largest value."""
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


@pytest.mark.integration
def test_halves_one_after_the_other_are_the_whole(decoder: Decoder) -> None:
    given = latents(10, 14)
    whole = decoder.run(None, latents=given)["image"]
    features = decoder.features(given)
    assert features.shape == (1, 32, 10, 14)
    own = decoder.tail(features, decoder.nothing, 1)
    assert off(own["image"], whole) < 1e-4
    given_back = decoder.tail(features, own["moments"], 0)
    assert off(given_back["image"], whole) < 1e-4
    part = decoder.tail(features, own["moments"] / 2, 0.5)
    assert off(part["image"], whole) < 1e-4


@pytest.mark.integration
def test_statistics_of_a_large_image_are_exact(decoder: Decoder) -> None:
    """The fp32 sum of a million values, one after the other, would be off by 1e-4."""
    given = latents(64, 56)
    whole = decoder.run(None, latents=given)["image"]
    own = decoder.tail(decoder.features(given), decoder.nothing, 1)
    assert off(own["image"], whole) < 1e-4


@pytest.mark.integration
def test_moments_are_those_of_the_core(decoder: Decoder) -> None:
    features = decoder.features(latents(8, 8))
    core = np.array([1, 2, 5, 8])
    inputs = {"features": features, "statistics": decoder.nothing, "own": np.ones(1, np.float32)}
    moments = decoder.run(decoder.split.tail, core=core, **inputs)["moments"]
    assert decoder.split.tail.spec.outputs[1].shape == moments.shape == (19, 2, 8)
    conv = next(node for node in decoder.model.graph if node.op_type == "Resize")
    first = next(node for node in decoder.model.graph if node.inputs[0] is conv.outputs[0])
    weight, bias = (value.const_value.numpy() for value in first.inputs[1:])
    torch = pytest.importorskip("torch")
    large = torch.from_numpy(features.repeat(2, 2).repeat(2, 3))
    seen = torch.conv2d(large, torch.tensor(weight), torch.tensor(bias), padding=1)
    rows = seen.numpy()[0, :, 2:10, 4:16].reshape(8, -1).astype(np.float64)
    np.testing.assert_allclose(moments[0, 0], rows.mean(1), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(moments[0, 1], (rows**2).mean(1), rtol=1e-4)


@pytest.mark.integration
def test_halves_share_the_weights(decoder: Decoder) -> None:
    size = (decoder.folder / "weights.bin").stat().st_size
    split = decoder.split.head.weight_bytes + decoder.split.tail.weight_bytes
    assert 0.8 * size < split < 1.2 * size


@pytest.mark.integration
@pytest.mark.parametrize(
    ("height", "width", "window"), [(20, 28, 28), (40, 25, 28), (52, 70, 28), (52, 30, 22)]
)
def test_tiles_are_the_whole(decoder: Decoder, height: int, width: int, window: int) -> None:
    given = latents(height, width, seed=1)
    whole = decoder.run(None, latents=given)["image"][0]
    features = decoder.features(given)[0]
    path = decoder.root / decoder.split.tail.path
    graph = GraphFile(path.read_bytes(), decoder.folder)
    with OnnxRuntimeRunner(decoder.split.tail.spec, graph, 1, small=True) as tail:
        image = tiles.decode_tail(tail, features, 8, window)
    assert image.shape == whole.shape == (3, 8 * height, 8 * width)
    decibels = -10 * np.log10(np.mean((image - whole) ** 2) / 4)
    assert decibels > 45


@pytest.mark.integration
@pytest.mark.parametrize(
    "fields",
    [
        {
            "block_out_channels": (16, 16),
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D", "AttnUpDecoderBlock2D"),
            "layers_per_block": 1,
        },
        {
            "block_out_channels": (16,),
            "down_block_types": ("DownEncoderBlock2D",),
            "up_block_types": ("UpDecoderBlock2D",),
        },
    ],
    ids=["attention behind an upsampling", "no upsampling"],
)
def test_what_can_not_be_split_is_left_alone(fields: dict[str, Any]) -> None:
    from edgesd.errors import EdgesdError
    from edgesd.export.passes.tiled_decoder import DecoderTail, split_decoder
    from edgesd.export.to_onnx import graph_from_module

    made = component(**fields)
    model = graph_from_module(made.load(), made, "ort-mha")
    before = [node.name for node in model.graph]
    assert split_decoder(model) is None
    assert [node.name for node in model.graph] == before
    with pytest.raises(EdgesdError, match=r"sees the whole image|no upsampling"):
        DecoderTail()(model)


@pytest.mark.integration
def test_graphs_of_one_size_are_left_alone() -> None:
    from edgesd.export.passes.tiled_decoder import split_decoder
    from edgesd.export.to_onnx import graph_from_module

    made = component(fixed=True)
    assert split_decoder(graph_from_module(made.load(), made, "ort-mha")) is None
