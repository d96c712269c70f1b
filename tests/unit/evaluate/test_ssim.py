"""SSIM against the formula, written out place by place."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from edgesd.errors import InputError
from edgesd.evaluate.ssim import ssim


def image(height: int = 14, width: int = 17, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def noisy(pixels: np.ndarray, sigma: float) -> np.ndarray:
    noise = np.random.default_rng(1).normal(0, sigma, pixels.shape)
    return np.clip(pixels + noise, 0, 255).astype(np.uint8)


def plain_ssim(first: np.ndarray, second: np.ndarray) -> float:
    """Wang et al. 2004, eq. 13 to 16, one window after the other."""
    y, x = np.mgrid[-5:6, -5:6]
    weights = np.exp(-(x**2 + y**2) / (2 * 1.5**2))
    weights /= weights.sum()
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    values = []
    for channel in range(3):
        for top in range(first.shape[0] - 10):
            for left in range(first.shape[1] - 10):
                place = np.s_[top : top + 11, left : left + 11, channel]
                a, b = first[place].astype(float), second[place].astype(float)
                mean_a, mean_b = (weights * a).sum(), (weights * b).sum()
                var_a = (weights * (a - mean_a) ** 2).sum()
                var_b = (weights * (b - mean_b) ** 2).sum()
                covariance = (weights * (a - mean_a) * (b - mean_b)).sum()
                numerator = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
                values.append(numerator / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2)))
    return float(np.mean(values))


@pytest.mark.parametrize("size", [(14, 17), (11, 11), (11, 20)])
def test_it_is_the_formula(size: tuple[int, int]) -> None:
    first = image(*size)
    for second in (image(*size, seed=2), noisy(first, 20), 255 - first):
        assert ssim(first, second) == pytest.approx(plain_ssim(first, second), abs=1e-9)


def test_flat_images_by_hand() -> None:
    # no variance: (2 * 100 * 110 + 6.5025) / (100^2 + 110^2 + 6.5025)
    first, second = (np.full((12, 12, 3), value, np.uint8) for value in (100, 110))
    assert ssim(first, second) == pytest.approx(22006.5025 / 22106.5025, abs=1e-9)


def test_equal_images_are_one_and_order_does_not_matter() -> None:
    first, second = image(), image(seed=2)
    assert ssim(first, first) == pytest.approx(1, abs=1e-12)
    assert ssim(first, second) == ssim(second, first)
    assert ssim(Image.fromarray(first), second) == ssim(first, second)


def test_it_falls_with_noise() -> None:
    y, x = np.mgrid[:40, :40]
    smooth = np.stack([3 * x + 2 * y, 4 * x, 5 * y], axis=-1).astype(np.uint8)
    values = [ssim(smooth, noisy(smooth, sigma)) for sigma in (0, 2, 8, 32, 128)]
    assert values == sorted(values, reverse=True)
    assert values[0] > 0.99 and values[-1] < 0.3


def test_other_images_are_refused() -> None:
    with pytest.raises(InputError, match=r"40x10 pixels.*expected 11x11"):
        ssim(image(10, 40), image(10, 40))
    with pytest.raises(InputError, match="17x14 and 17x15"):
        ssim(image(), image(15))
    with pytest.raises(InputError, match="float64"):
        ssim(image(), image() / 255)  # type: ignore[arg-type]
