"""The networks of `edgesd.evaluate.perceptual`, in plain torch, and where their weights are."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import http.client
import math
import re
import socket
import threading
import urllib.request
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from edgesd.errors import InputError
from edgesd.files import sha256_file

Pixels = npt.NDArray[np.uint8]

_TIMEOUT_S = 3.0


class PerceptualNet(ABC):
    """Compares images by the feature maps of a network for image classification.

    distance = sum over stages k of mean over space of sum over channels c of
    w_kc (unit(f_k(first)) - unit(f_k(second)))^2, where unit() divides by the norm over channels
    (Zhang et al. 2018, arXiv 1801.03924, eq. 1). float32 on the CPU, one image at a time, at the
    image's own size; one whose shorter side is below `minimum_side` pixels is enlarged to that
    (bilinear, same proportions), as it would vanish before the last stage.
    """

    minimum_side: int
    channel_weights: list[Tensor]  # [C_k] for each stage

    def distance(self, first: Pixels, second: Pixels) -> float:
        """Of two images [H, W, 3] of one size: 0 for equal ones, without a unit."""
        with torch.inference_mode():
            total = torch.zeros(())
            stages = zip(
                self.channel_weights, self._maps(first)[0], self._maps(second)[0], strict=True
            )
            for weights, a, b in stages:
                total += ((_unit(a) - _unit(b)) ** 2).mean(dim=(0, 2, 3)) @ weights
        return float(total)

    def embedding(self, image: Pixels) -> npt.NDArray[np.float32]:
        """Image [H, W, 3] -> [D]: the last feature map, averaged over space."""
        with torch.inference_mode():
            pooled = self._maps(image)[1].mean(dim=(0, 2, 3))
        return np.asarray(pooled.numpy())

    def _maps(self, image: Pixels) -> tuple[list[Tensor], Tensor]:
        sample = torch.tensor(image, dtype=torch.float32).permute(2, 0, 1)[None]
        shorter = min(sample.shape[2:])
        if shorter < self.minimum_side:
            size = [round(side * self.minimum_side / shorter) for side in sample.shape[2:]]
            sample = F.interpolate(sample, size, mode="bilinear", align_corners=False)
        return self._forward(sample)

    @abstractmethod
    def _forward(self, sample: Tensor) -> tuple[list[Tensor], Tensor]:
        """RGB [1, 3, H, W] in 0 to 255 -> a map [1, C_k, H_k, W_k] per stage, and the last map."""


@dataclass(frozen=True)
class Backbone:
    """A network for image classification whose feature maps LPIPS v0.1 compares.

    file: as torchvision publishes it; the name carries the start of the file's SHA-256. linear:
    LPIPS' own file of linear layers for it. convs: of torchvision's `features`: index, input and
    output channels, kernel, stride, padding. pool_before: indices in front of which there is a max
    pooling, of `pool` pixels and stride 2. stages: indices whose ReLU is compared. sha256: of all
    convolutions' weights and biases, sha256_linear: of the linear layers, each as float32, little
    endian, in their order: any file of these weights has the same.
    """

    name: str
    file: str
    linear: str
    convs: tuple[tuple[int, int, int, int, int, int], ...]
    pool_before: tuple[int, ...]
    pool: int
    stages: tuple[int, ...]
    sha256: str
    sha256_linear: str


ALEXNET = Backbone(
    "AlexNet",
    "alexnet-owt-7be5be79.pth",
    "alex.pth",
    (
        (0, 3, 64, 11, 4, 2),
        (3, 64, 192, 5, 1, 2),
        (6, 192, 384, 3, 1, 1),
        (8, 384, 256, 3, 1, 1),
        (10, 256, 256, 3, 1, 1),
    ),
    (3, 6),
    3,
    (0, 3, 6, 8, 10),
    "2b566cc3a4d6f0a7343701af22f461f1ac3dcd03a3ac28cce10968a1d3c85fdc",
    "718a8b40b0d22f96192d34ab93c0db5c7943558ff6c2407f44812dce2f29b5f4",
)
VGG16 = Backbone(
    "VGG16",
    "vgg16-397923af.pth",
    "vgg.pth",
    tuple(
        (index, inputs, outputs, 3, 1, 1)
        for index, inputs, outputs in (
            *((0, 3, 64), (2, 64, 64), (5, 64, 128), (7, 128, 128)),
            *((10, 128, 256), (12, 256, 256), (14, 256, 256)),
            *((17, 256, 512), (19, 512, 512), (21, 512, 512)),
            *((24, 512, 512), (26, 512, 512), (28, 512, 512)),
        )
    ),
    (5, 10, 17, 24),
    2,
    (2, 7, 14, 21, 28),
    "40acdda7c6b05249f81637b2571671ce938507c5f986db17af374cf62a2f42a6",
    "9153a2043dccf3b525d4f13db916e93ef040548ea923b6f2100de5ebac141a78",
)
BACKBONES = (ALEXNET, VGG16)
"""The first is what LPIPS means where nothing else is said."""

ALEXNET_URL = f"https://download.pytorch.org/models/{ALEXNET.file}"


class Lpips(PerceptualNet):
    """LPIPS v0.1 (Zhang et al. 2018): five stages, each the output of a ReLU.

    Input scaling, stages and the linear layers are those of the authors' code. embedding: the last
    stage, D = 256 for AlexNet, 512 for VGG16.
    """

    minimum_side = 32  # the reference fails below 31

    # of the image in -1 to 1, per channel
    _SHIFT = (-0.030, -0.088, -0.188)
    _SCALE = (0.458, 0.448, 0.450)

    def __init__(self, backbone: Backbone, weights: Path, linear: Path) -> None:
        """Load the two files. Raises InputError where one is missing or isn't what it should be:
        weights that aren't the published ones are another distance."""
        self._backbone = backbone
        state, layers = _State(weights), _State(linear)
        self._convs: list[tuple[Tensor, Tensor]] = []
        for index, inputs, outputs, kernel, _, _ in backbone.convs:
            name = f"features.{index}"
            weight = state.take(f"{name}.weight", outputs, inputs, kernel, kernel)
            self._convs.append((weight, state.take(f"{name}.bias", outputs)))
        self.channel_weights = []
        channels = {conv[0]: conv[2] for conv in backbone.convs}
        for stage, index in enumerate(backbone.stages):
            outputs = channels[index]
            mixed = layers.take(f"lin{stage}.model.1.weight", 1, outputs, 1, 1)
            self.channel_weights.append(mixed.reshape(outputs))
        state.check(backbone.sha256, backbone.name)
        layers.check(backbone.sha256_linear, f"LPIPS v0.1 for {backbone.name}")

    def _forward(self, sample: Tensor) -> tuple[list[Tensor], Tensor]:
        shift, scale = (torch.tensor(v).view(1, 3, 1, 1) for v in (self._SHIFT, self._SCALE))
        x = (sample / 127.5 - 1 - shift) / scale
        stages = []
        for (weight, bias), (index, _, _, _, stride, padding) in zip(
            self._convs, self._backbone.convs, strict=True
        ):
            if index in self._backbone.pool_before:
                x = F.max_pool2d(x, kernel_size=self._backbone.pool, stride=2)
            x = F.relu(F.conv2d(x, weight, bias, stride=stride, padding=padding))
            if index in self._backbone.stages:
                stages.append(x)
        return stages, x


class LiteFeatures(PerceptualNet):
    """The unlearned distance on EfficientNet-Lite0: every channel and each of five stages counts
    the same, so it lies from 0 to 4. Not LPIPS, and not on its scale.

    Stages: the last block at each of the strides 2, 4, 8, 16 and 32. embedding: the pooled head,
    D = 1280. The network is EfficientNet-B0 (Tan and Le 2019, arXiv 1905.11946, table 1) without
    squeeze-and-excitation and with ReLU6; padding as TensorFlow's SAME, input (rgb - 127) / 128.
    """

    minimum_side = 64

    # blocks, kernel, stride of the first block, expansion, output channels
    _GROUPS = (
        (1, 3, 1, 1, 16),
        (2, 3, 2, 6, 24),
        (2, 5, 2, 6, 40),
        (3, 3, 2, 6, 80),
        (3, 5, 1, 6, 112),
        (4, 5, 2, 6, 192),
        (1, 3, 1, 6, 320),
    )
    _STAGES = (0, 2, 4, 10, 15)  # blocks

    def __init__(self, weights: Path) -> None:
        """Load the file. Raises InputError where it is missing or isn't what it should be."""
        state = _State(weights)
        self._stem = _folded(state, "_conv_stem", "_bn0", 3, 32, kernel=3, stride=2)
        self._blocks: list[list[_Conv]] = []
        channels = 32
        for count, kernel, first_stride, expansion, outputs in self._GROUPS:
            for i in range(count):
                stride = first_stride if i == 0 else 1
                self._blocks.append(
                    self._block(state, channels, outputs, kernel, stride, expansion)
                )
                channels = outputs
        self._head = _folded(state, "_conv_head", "_bn1", channels, 1280)
        self.channel_weights = [
            torch.full((self._blocks[i][-1].weight.shape[0],), 1 / len(self._STAGES))
            for i in self._STAGES
        ]

    def _block(
        self, state: _State, inputs: int, outputs: int, kernel: int, stride: int, expansion: int
    ) -> list[_Conv]:
        """Expand, filter each channel by itself, project."""
        name, wide = f"_blocks.{len(self._blocks)}", inputs * expansion
        convs = []
        if expansion != 1:
            convs.append(_folded(state, f"{name}._expand_conv", f"{name}._bn0", inputs, wide))
        depthwise = f"{name}._depthwise_conv", f"{name}._bn1"
        convs.append(_folded(state, *depthwise, 1, wide, kernel=kernel, stride=stride, groups=wide))
        convs.append(_folded(state, f"{name}._project_conv", f"{name}._bn2", wide, outputs))
        return convs

    def _forward(self, sample: Tensor) -> tuple[list[Tensor], Tensor]:
        x = self._stem((sample - 127) / 128).clamp_(0, 6)
        stages = []
        for i, block in enumerate(self._blocks):
            y = x
            for conv in block[:-1]:
                y = conv(y).clamp_(0, 6)
            y = block[-1](y)
            x = y + x if y.shape == x.shape else y  # the first block of a group has no shortcut
            if i in self._STAGES:
                stages.append(x)
        return stages, self._head(x).clamp_(0, 6)


def hub_alexnet(*, offline: bool) -> Path | None:
    """AlexNet's file in torch.hub's cache, fetched (233 MB) unless `offline`; None without one.

    The fetch is tried once per process and given up after 3 s without an answer.
    """
    path = Path(torch.hub.get_dir(), "checkpoints", ALEXNET.file)
    if path.parts[0].startswith("~"):  # there is no home folder for it
        return None
    if path.is_file() or (not offline and _fetch(path)):
        return path
    return None


@functools.cache
def _fetch(path: Path) -> bool:
    """Whether ALEXNET_URL was written to `path`, checked against the hash in its name."""
    if not _answers(ALEXNET_URL):
        return False
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_TIMEOUT_S)  # torch.hub sets none, and a stalled line never ends
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sha256 = ALEXNET.file.removesuffix(".pth").rpartition("-")[2]
        torch.hub.download_url_to_file(ALEXNET_URL, str(path), sha256, progress=False)
    except (OSError, http.client.HTTPException, RuntimeError):  # RuntimeError: another hash
        return False
    finally:
        socket.setdefaulttimeout(before)
    return True


def _answers(url: str) -> bool:
    answered = threading.Event()

    def ask() -> None:
        request = urllib.request.Request(url, method="HEAD")
        with (
            contextlib.suppress(OSError, http.client.HTTPException),
            urllib.request.urlopen(request, timeout=_TIMEOUT_S),
        ):
            answered.set()

    # A thread, because looking up a name knows no timeout.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_TIMEOUT_S)
    return answered.is_set()


class _State:
    """A file of named tensors, of which each is checked when it is taken."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            # LPIPS' own files were saved from a GPU
            state: Any = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as exc:  # torch.load raises whatever its zip and pickle readers do
            raise InputError(
                f"{path} isn't a file of PyTorch weights ({type(exc).__name__}): get it again"
            ) from exc
        if not isinstance(state, dict):
            raise InputError(
                f"{path} holds a {type(state).__name__}: expected PyTorch weights by name"
            )
        self._tensors: dict[object, object] = state
        self._hash = hashlib.sha256()

    def take(self, name: str, *shape: int) -> Tensor:
        """`name` in float32. Raises InputError unless it is there, of this shape and finite."""
        tensor = self._tensors.get(name)
        if not isinstance(tensor, Tensor):
            raise InputError(f"{self._path} holds no weights {name}: it is of another network")
        if tensor.shape != shape or not tensor.is_floating_point():
            raise InputError(
                f"{self._path}: {name} is {str(tensor.dtype).removeprefix('torch.')} "
                f"{list(tensor.shape)}, expected float32 {list(shape)}: it is of another network"
            )
        if not tensor.isfinite().all():
            raise InputError(f"{self._path}: {name} isn't finite: get the file again")
        values = tensor.detach().float()
        self._hash.update(values.contiguous().numpy().astype("<f4", copy=False).data)
        return values

    def check(self, sha256: str, what: str) -> None:
        """Raise InputError unless all that was taken has this hash, in the order of taking, or the
        file has the hash that its name ends in, as torchvision's have: then it is `what`."""
        if self._hash.hexdigest() == sha256:
            return
        named = re.fullmatch(r".*-([0-9a-f]{8})\.pth", self._path.name)
        if named and sha256_file(self._path).startswith(named[1]):
            return
        raise InputError(
            f"{self._path} holds other weights than the published ones of {what}: get the file "
            "again"
        )


@dataclass(frozen=True)
class _Conv:
    """A convolution padded as TensorFlow's SAME: [1, C, H, W] -> [1, D, ceil(H/s), ceil(W/s)]."""

    weight: Tensor
    bias: Tensor
    stride: int
    groups: int

    def __call__(self, x: Tensor) -> Tensor:
        kernel = self.weight.shape[-1]
        if self.stride == 1:
            return F.conv2d(x, self.weight, self.bias, padding=kernel // 2, groups=self.groups)
        pad = []  # width first, and the odd pixel on the right and below
        for side in (x.shape[3], x.shape[2]):
            total = max((math.ceil(side / self.stride) - 1) * self.stride + kernel - side, 0)
            pad += [total // 2, total - total // 2]
        return F.conv2d(F.pad(x, pad), self.weight, self.bias, self.stride, groups=self.groups)


def _folded(
    state: _State,
    conv: str,
    norm: str,
    inputs: int,
    outputs: int,
    *,
    kernel: int = 1,
    stride: int = 1,
    groups: int = 1,
) -> _Conv:
    """`conv` and the batch norm after it in one convolution."""
    weight = state.take(f"{conv}.weight", outputs, inputs, kernel, kernel).double()
    gain, offset, mean, variance = (
        state.take(f"{norm}.{part}", outputs).double()
        for part in ("weight", "bias", "running_mean", "running_var")
    )
    gain = gain / torch.sqrt(variance + 1e-3)
    weight = (weight * gain.view(-1, 1, 1, 1)).float()
    weight = weight.contiguous(memory_format=torch.channels_last)  # twice as fast on a CPU
    return _Conv(weight, (offset - mean * gain).float(), stride, groups)


def _unit(features: Tensor) -> Tensor:
    """[1, C, H, W], of length 1 over C; where all are zero, zero."""
    return features / (features.square().sum(dim=1, keepdim=True).sqrt() + 1e-10)
