"""Decoding and encoding in tiles: a full autoencoder's halves in parts, against the whole."""

from __future__ import annotations

from dataclasses import replace
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
from edgesd.spec.bundle import ComponentPart, SplitComponent
from edgesd.spec.pipeline import ComponentSpec, LatentSpec, TensorSpec

Array = npt.NDArray[np.float32]
CHANNELS = (16, 16, 32, 32)
"""Of the levels of a small AutoencoderKL, finest first."""


def test_tiles_cover_all_and_margins_stay_inside() -> None:
    assert tiles_of(20, 24, (3, 3)) == [Tile(0, 20, 0, 20)]
    assert tiles_of(9, 5, (1, 2)) == [Tile(0, 4, 0, 6), Tile(4, 9, 3, 9)]
    assert tiles_of(64, 18, (3, 3)) == [
        Tile(0, 16, 0, 19),
        Tile(16, 32, 13, 35),
        Tile(32, 48, 29, 51),
        Tile(48, 64, 45, 64),
    ]
    for size in range(1, 130):
        margins = tiles.DECODER_MARGINS
        found = tiles_of(size, tiles.WINDOWS[1] - sum(margins), margins)
        assert found[0].begin == 0 and found[-1].end == size
        assert all(a.end == b.begin for a, b in pairwise(found))
        assert all(tile.last - tile.first <= tiles.WINDOWS[1] for tile in found)


def test_tiles_of_what_sees_no_further_are_the_whole() -> None:
    latents = np.arange(2 * 7 * 5, dtype=np.float32).reshape(2, 7, 5)

    def decode(seen: Array, rows: Tile, columns: Tile) -> Array:
        assert seen.shape[2:] == (rows.last - rows.first, columns.last - columns.first)
        return np.repeat(np.repeat(seen[0, [0, 1, 0]], 2, 1), 2, 2)

    image = np.zeros((3, 14, 10), np.float32)
    tiles.in_tiles(decode, latents, image, (7, 5), 3, (1, 1))
    assert (image == latents[[0, 1, 0]].repeat(2, 1).repeat(2, 2)).all()

    def encode(seen: Array, rows: Tile, columns: Tile) -> Array:
        assert seen.shape[2:] == (2 * (rows.last - rows.first), 2 * (columns.last - columns.first))
        return seen[0, :2, ::2, ::2]

    back = np.zeros((2, 7, 5), np.float32)
    tiles.in_tiles(encode, image, back, (7, 5), 2, (0, 1))
    assert (back == latents).all()


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
    mosaic, size = tiles._mosaic(features, (100, 20), 28)
    assert mosaic.shape == (1, 1, 27, 20) and size == (27, 20)
    rows = (mosaic[0, 0, :, 0] / 20).astype(int).tolist()
    assert rows == [*range(9), *range(46, 55), *range(91, 100)]


OPTIONS: dict[str, Any] = {
    "block_out_channels": CHANNELS,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "norm_num_groups": 8,
    "layers_per_block": 2,
}


def component(fixed: bool = False, **fields: Any) -> Any:
    """An AutoencoderKL's decoder with random weights, to be exported. fixed: of one size."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    from edgesd.export.families import Component
    from edgesd.export.families.parts.vae import VaeDecoder

    torch.manual_seed(0)
    options = {**OPTIONS, **fields}
    net = diffusers.AutoencoderKL(**options).eval().requires_grad_(False)
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


class Half:
    """A decoder or encoder as a bundle has it, below `root`."""

    def __init__(self, root: Path, component: Any) -> None:
        from edgesd.export.external_data import split_files, write_model
        from edgesd.export.passes.split_autoencoder import describe_split, split_component
        from edgesd.export.to_onnx import graph_from_module

        self.root, self.component = root, component
        self.model = graph_from_module(self.component.load(), self.component, "ort-mha")
        parts = split_component(self.model)
        name, files = self.component.name, split_files(len(parts))
        self.split: SplitComponent = describe_split(name, parts, files)
        self.folder = root / name
        write_model(self.model, self.folder, dict(zip(files, parts, strict=True)))

    def open(self, part: ComponentPart | None) -> OnnxRuntimeRunner:
        spec = self.component.spec if part is None else part.spec
        path = self.root / part.path if part else self.folder / "model.onnx"
        graph = GraphFile(path.read_bytes(), self.folder)
        return OnnxRuntimeRunner(spec, graph, 1, small=part is not None)

    def run(self, part: ComponentPart | None, **inputs: Array) -> dict[str, Array]:
        with self.open(part) as runner:
            return {name: np.array(value) for name, value in run_once(runner, inputs).items()}


class Decoder(Half):
    def __init__(self, root: Path) -> None:
        super().__init__(root, component())

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


def rms(found: Array, wanted: Array) -> float:
    """RMS of the difference, in deviations."""
    return float(np.sqrt(np.mean((found - wanted) ** 2)) / wanted.std())


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
    with decoder.open(decoder.split.tail) as tail:
        image = tiles.in_tiled_part(tail, features, (1, 8), window)
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
    from edgesd.export.passes.split_autoencoder import split_component
    from edgesd.export.to_onnx import graph_from_module

    made = component(**fields)
    model = graph_from_module(made.load(), made, "ort-mha")
    before = [node.name for node in model.graph]
    assert split_component(model) == ()
    assert [node.name for node in model.graph] == before


@pytest.mark.integration
def test_graphs_of_one_size_are_left_alone() -> None:
    from edgesd.export.passes.split_autoencoder import split_component
    from edgesd.export.to_onnx import graph_from_module

    made = component(fixed=True)
    assert split_component(graph_from_module(made.load(), made, "ort-mha")) == ()


def encoder_component(**fields: Any) -> Any:
    """An AutoencoderKL's encoder with random weights, to be exported."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    from edgesd.export.families import Component
    from edgesd.export.families.parts.vae import VaeEncoder

    torch.manual_seed(0)
    options = {**OPTIONS, **fields}

    def load(weights: bool = True) -> Any:
        with torch.device("cpu" if weights else "meta"):
            net = diffusers.AutoencoderKL(**options).eval()
        net.decoder = net.post_quant_conv = None
        return VaeEncoder(net, LatentSpec(4, scale, 0.18215))

    scale = 2 ** (len(options["block_out_channels"]) - 1)
    image = TensorSpec("image", "float32", ("batch", 3, "height", "width"))
    outputs = (TensorSpec(n, "float32", ("batch", 4, f"{n}_height", f"{n}_width")) for n in MOMENTS)
    spec = ComponentSpec("vae_encoder", (image,), tuple(outputs))
    size = {"batch": 2, "height": 64, "width": 96}
    multiples = {"height": scale, "width": scale}
    return Component(spec, load, (size,), multiples=multiples)


MOMENTS = ("mean", "std")


class Encoder(Half):
    def __init__(self, root: Path) -> None:
        super().__init__(root, encoder_component())

    def tiled(self, image: Array, window: int, less: int = 0) -> dict[str, Array]:
        """What tail makes of `image` [3, H, W], the parts before it in tiles. less: what their
        margins lack."""
        for index, part in enumerate(self.split.parts[:-1]):
            assert part.margins is not None
            margins = part.margins[0] - less, part.margins[1] - less
            with self.open(part) as runner:
                most = window >> index
                image = tiles.in_tiled_part(runner, image, (2, 1), most, margins)
        return self.run(self.split.tail, features=image[None])


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    return Encoder(tmp_path_factory.mktemp("encoder"))


def picture(height: int, width: int) -> Array:
    """Values [3, H, W] of -1 to 1 that aren't alike everywhere, as statistics of tiles would be."""
    down, across = np.linspace(-1, 1, height)[:, None], np.linspace(-1, 1, width)
    smooth = np.stack([down * across, np.sin(3 * down + across), np.cos(2 * across) + 0 * down])
    noise = np.random.default_rng(0).standard_normal((3, height, width)) * 0.2 * (down > 0)
    values: Array = np.clip(smooth + noise, -1, 1).astype(np.float32)
    values[:, : height // 3, width // 2 :] = 0.9
    return values


@pytest.mark.integration
def test_an_encoder_has_a_part_for_each_resolution(encoder: Encoder) -> None:
    *tiled, tail = encoder.split.parts
    assert [part.margins for part in tiled] == [(3, 3), (2, 3), (2, 3)] and tail.margins is None
    assert [t.name for t in tiled[0].spec.inputs] == ["image", "statistics", "own", "core"]
    assert [t.shape for part in tiled for t in part.spec.outputs if t.name == "moments"] == [
        (4, 2, 8)
    ] * 3
    size = (encoder.folder / "weights.bin").stat().st_size
    assert 0.8 * size < sum(part.weight_bytes for part in encoder.split.parts) < 1.2 * size


@pytest.mark.integration
@pytest.mark.parametrize(
    ("height", "width", "window"),
    [(104, 152, 512), (200, 232, 88), (328, 104, 88), (104, 264, 52), (136, 136, 68)],
)
def test_an_encoder_in_tiles_makes_what_the_whole_makes(
    encoder: Encoder, height: int, width: int, window: int
) -> None:
    """But for rounding: not by way of tiles of which each is like another."""
    image = picture(height, width)
    whole = encoder.run(None, image=image[None])
    found = encoder.tiled(image, window)
    for name in MOMENTS:
        assert found[name].shape == whole[name].shape == (1, 4, height // 8, width // 8)
        assert off(found[name], whole[name]) < 2e-3  # as the parts of the whole image are
        assert rms(found[name], whole[name]) < 2e-4


@pytest.mark.integration
def test_what_is_planned_of_an_encoder_is_what_its_parts_are(encoder: Encoder) -> None:
    from edgesd.export.cost.workload import split_workload, trace
    from edgesd.export.quantize.layers import find_layers

    traced = trace(encoder.component, {"batch": 1, "height": 64, "width": 96})
    found = {replace(layer, node="") for layer in find_layers("vae_encoder", encoder.model)}
    assert {*traced.layers} == found  # with strides and paddings
    parts = split_workload(traced)
    assert len(parts) == len(encoder.split.parts)
    norms = [sum(op.kind == "group_norm" for op in part.operations) for part in parts]
    assert norms[:-1] == [4, 4, 4]
    sizes = [traced.sizes[value] for part in parts[:-1] for value in part.outputs]
    assert sizes == [4 * 16 * 32 * 48, 4 * 16 * 16 * 24, 4 * 32 * 8 * 12]


@pytest.mark.integration
def test_an_encoder_sees_as_far_as_its_margins_and_no_less(encoder: Encoder) -> None:
    image = picture(200, 232)
    whole = encoder.run(None, image=image[None])["mean"]
    assert rms(encoder.tiled(image, 88, less=1)["mean"], whole) > 1e-2


@pytest.mark.integration
def test_statistics_of_an_encoder_become_exact_one_after_another(
    encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, difference = [], tiles.difference

    def noted(taken: tiles.Figures, made: tiles.Figures) -> float:
        found.append(np.abs(taken - made).max((1, 2)))
        return difference(taken, made)

    monkeypatch.setattr(tiles, "difference", noted)
    with encoder.open(encoder.split.head) as head:
        tiles.in_tiled_part(head, picture(200, 232), (2, 1), 88, (3, 3))
    assert len(found) == 4  # a pass for each, after the first one
    for number, distances in enumerate(found):
        assert (distances[: number + 1] < 1e-6).all()
        assert number == 3 or distances[number + 1] > 1e-6


@pytest.mark.integration
@pytest.mark.parametrize(
    ("fields", "margins"),
    [
        (
            {
                "block_out_channels": (16, 16),
                "down_block_types": ("DownEncoderBlock2D",) * 2,
                "up_block_types": ("UpDecoderBlock2D",) * 2,
                "layers_per_block": 1,
            },
            [(2, 2)],
        ),
        (
            {
                "block_out_channels": (16, 16),
                "down_block_types": ("AttnDownEncoderBlock2D", "DownEncoderBlock2D"),
                "up_block_types": ("UpDecoderBlock2D",) * 2,
                "layers_per_block": 1,
            },
            [],
        ),
    ],
    ids=["two levels", "attention before a downsampling"],
)
def test_encoders_of_other_forms(fields: dict[str, Any], margins: list[tuple[int, int]]) -> None:
    from edgesd.export.passes.split_autoencoder import describe_split, split_component
    from edgesd.export.to_onnx import graph_from_module

    made = encoder_component(**fields)
    parts = split_component(graph_from_module(made.load(), made, "ort-mha"))
    found = describe_split("e", parts, ["a"] * len(parts)).parts[:-1] if parts else ()
    assert [part.margins for part in found] == margins
