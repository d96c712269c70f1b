"""Metrics against values worked out by hand."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from edgesd.errors import InputError
from edgesd.evaluate.psnr import max_abs_difference, psnr


def flat(value: int, height: int = 2, width: int = 5) -> np.ndarray:
    return np.full((height, width, 3), value, np.uint8)


def test_equal_images_are_infinitely_alike() -> None:
    assert psnr(flat(7), flat(7)) == math.inf
    assert max_abs_difference(flat(7), flat(7)) == 0


@pytest.mark.parametrize(
    ("difference", "decibels"),
    # MSE 1: 20 log10(255) = 48.1308; MSE 100: 20 dB less; MSE 255^2: 0
    [(1, 48.130804), (10, 28.130804), (255, 0.0)],
)
def test_psnr_of_flat_images(difference: int, decibels: float) -> None:
    assert psnr(flat(0), flat(difference)) == pytest.approx(decibels, abs=1e-6)
    assert psnr(flat(difference), flat(0)) == pytest.approx(decibels, abs=1e-6)
    assert max_abs_difference(flat(difference), flat(0)) == difference


def test_psnr_of_one_channel_of_one_pixel() -> None:
    # 30 values, one of which differs by 3: MSE 9 / 30 = 0.3, 10 log10(65025 / 0.3) = 53.359592
    changed = flat(100)
    changed[1, 3, 2] += 3
    assert psnr(flat(100), changed) == pytest.approx(53.359592, abs=1e-6)
    assert max_abs_difference(flat(100), changed) == 3


def test_images_and_arrays_are_the_same() -> None:
    image = Image.fromarray(flat(10))
    assert image.mode == "RGB"
    assert psnr(image, flat(11)) == pytest.approx(48.130804, abs=1e-6)


def test_other_images_are_refused() -> None:
    with pytest.raises(InputError, match="5x2 and 5x3"):
        psnr(flat(0), flat(0, height=3))
    with pytest.raises(InputError, match="float64"):
        psnr(flat(0), flat(0) / 255)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="uint8"):
        psnr(flat(0)[..., 0], flat(0)[..., 0])
    with pytest.raises(InputError, match="uint8"):
        psnr(flat(0, height=0), flat(0, height=0))
    with pytest.raises(InputError, match="RGBA"):
        psnr(Image.new("RGBA", (5, 2)), flat(0))
    with pytest.raises(InputError, match="HSV"):
        max_abs_difference(Image.new("HSV", (5, 2)), flat(0))


def test_evaluate_runs_without_torch() -> None:
    code = "import sys, edgesd.evaluate.psnr; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
