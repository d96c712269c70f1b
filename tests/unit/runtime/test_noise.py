"""Noise equals torch's, and its bits are the same everywhere."""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgesd.errors import UsageError
from edgesd.runtime.noise import BatchNoise, TorchNoise, image_seeds, log, sincos

TOLERANCE = 2e-6
SEEDS = (0, 1, 42, 2**32 - 1, 2**32, 2**63, 2**64 - 1)
SHAPES = (
    (1, 4, 64, 64),
    (1, 4, 16, 16),
    (2, 4, 17, 13),
    (3,),
    (15,),
    (16,),
    (17,),
    (31,),
    (1,),
    (),
    (0, 4),
)
# Odd sizes, and such as are drawn ahead.
COUNTS = st.lists(
    st.integers(0, 40) | st.sampled_from([256, 1024, 2048, 4100]), min_size=1, max_size=12
)

# draws: sha256 of the little-endian float32 bytes of one draw; streams: the same for all SHAPES
# drawn one after the other from one generator, twice. Any board must reproduce them.
_TABLES = json.loads((Path(__file__).parents[2] / "golden" / "noise.json").read_text())
GOLDEN = {(row["seed"], tuple(row["shape"])): row["sha256"] for row in _TABLES["draws"]}
GOLDEN_STREAM = {row["seed"]: row["sha256"] for row in _TABLES["streams"]}


@pytest.fixture(scope="module")
def torch() -> ModuleType:
    return pytest.importorskip("torch")


def digest(values: np.ndarray) -> str:
    return hashlib.sha256(values.astype("<f4").tobytes()).hexdigest()


def stream(seed: int) -> np.ndarray:
    noise = TorchNoise(seed)
    return np.concatenate([noise.normal(shape).reshape(-1) for shape in SHAPES * 2])


def all_digests() -> list[str]:
    """Of every golden draw, for another interpreter to compare."""
    single = [digest(TorchNoise(seed).normal(shape)) for seed, shape in GOLDEN]
    return single + [digest(stream(seed)) for seed in GOLDEN_STREAM]


@pytest.mark.parametrize(("seed", "shape"), GOLDEN)
def test_golden_bytes(seed: int, shape: tuple[int, ...]) -> None:
    assert digest(TorchNoise(seed).normal(shape)) == GOLDEN[seed, shape]


@pytest.mark.parametrize("seed", GOLDEN_STREAM)
def test_golden_streams(seed: int) -> None:
    assert digest(stream(seed)) == GOLDEN_STREAM[seed]


def test_bits_do_not_depend_on_vector_instructions() -> None:
    code = (
        "import warnings; warnings.simplefilter('ignore')\n"
        "from tests.unit.runtime.test_noise import all_digests; print(*all_digests())"
    )
    try:
        from numpy._core._multiarray_umath import __cpu_dispatch__ as features
    except ImportError:
        from numpy.core._multiarray_umath import __cpu_dispatch__ as features
    env = os.environ | {"NPY_DISABLE_CPU_FEATURES": " ".join(features)}
    result = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
    )
    assert result.stdout.split() == [*GOLDEN.values(), *GOLDEN_STREAM.values()]


@pytest.mark.parametrize("seed", SEEDS)
def test_equals_torch(torch: ModuleType, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    noise = TorchNoise(seed)
    for shape in SHAPES * 2:
        want = torch.randn(shape, generator=generator).numpy()
        got = noise.normal(shape)
        assert got.dtype == np.float32 and got.shape == want.shape
        np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE)


@settings(max_examples=60)
@given(seed=st.integers(0, 2**64 - 1), counts=COUNTS)
def test_any_sequence_of_draws_equals_torch(
    torch: ModuleType, seed: int, counts: list[int]
) -> None:
    # Below 16 values torch keeps an odd value for later, across draws of 16 and more.
    generator = torch.Generator().manual_seed(seed)
    noise = TorchNoise(seed)
    for count in counts:
        want = torch.randn(count, generator=generator).numpy()
        np.testing.assert_allclose(noise((count,)), want, rtol=0, atol=TOLERANCE)


def largest_error(torch: ModuleType, seed: int, draws: int) -> float:
    """Over `draws` draws of 2**20 + 5 values."""
    generator = torch.Generator().manual_seed(seed)
    noise = TorchNoise(seed)
    shape = (2**20 + 5,)
    return max(
        float(np.abs(noise.normal(shape) - torch.randn(shape, generator=generator).numpy()).max())
        for _ in range(draws)
    )


def test_a_million_values_equal_torch(torch: ModuleType) -> None:
    assert largest_error(torch, 3, 1) <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 2**32 - 1])
def test_thirty_million_values_equal_torch(torch: ModuleType, seed: int) -> None:
    assert largest_error(torch, seed, 15) <= TOLERANCE


def test_logarithm_and_sines_are_accurate() -> None:
    rng = np.random.default_rng(0)
    x = np.concatenate(
        [rng.random(20_000), 1.0 - rng.random(2_000) * 1e-6, 2.0 ** -np.arange(60.0)]
    )
    x = x[x > 0]
    exact = np.array([math.log(v) for v in x])
    assert np.all(np.abs(log(x) - exact) <= 2**-51 * np.abs(exact))
    angles = np.concatenate([rng.random(20_000) * 2 * math.pi, np.arange(9) * math.pi / 4])
    sine, cosine = sincos(angles)
    assert np.abs(sine - [math.sin(v) for v in angles]).max() <= 2**-52
    assert np.abs(cosine - [math.cos(v) for v in angles]).max() <= 2**-52


def test_each_image_has_a_generator_of_its_own(torch: ModuleType) -> None:
    from diffusers.utils.torch_utils import randn_tensor

    shape = (3, 4, 9, 7)
    seeds = image_seeds(7, 3)
    assert seeds == (7, 8, 9)
    noise = BatchNoise(seeds)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    for _ in range(3):
        want = randn_tensor(shape, generator=generators, dtype=torch.float32).numpy()
        np.testing.assert_allclose(noise(shape), want, rtol=0, atol=TOLERANCE)
    alone = BatchNoise([8])
    assert np.array_equal(alone((1, 4, 9, 7))[0], BatchNoise(seeds)(shape)[1])


def test_seeds_wrap_after_the_largest() -> None:
    assert image_seeds(2**64 - 1, 2) == (2**64 - 1, 0)


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_seeds_out_of_range_are_refused(seed: int) -> None:
    with pytest.raises(UsageError, match="out of range"):
        TorchNoise(seed)


def test_batches_need_one_seed_each() -> None:
    with pytest.raises(UsageError, match="no seed"):
        BatchNoise([])
    with pytest.raises(UsageError, match="one seed for each"):
        BatchNoise([1, 2])((3, 4))
