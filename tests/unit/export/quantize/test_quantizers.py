"""Each quantizer against a plain NumPy version of its formula, and on adversarial weights."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

torch = pytest.importorskip("torch")

from edgesd.errors import EdgesdError, UsageError  # noqa: E402
from edgesd.export.calibrate import LayerStats  # noqa: E402
from edgesd.export.quantize import activations, methods, quantize, rounding  # noqa: E402
from edgesd.export.quantize.layers import (  # noqa: E402
    GELU_FLOOR,
    Activations,
    Layer,
    QuantizedLayer,
)
from edgesd.export.quantize.methods import get_method, svdquant  # noqa: E402
from edgesd.export.quantize.methods.gptq import DAMPING, gptq  # noqa: E402
from edgesd.export.quantize.quantize import (  # noqa: E402
    joint_smoothing,
    layer_error,
    quantize_layer,
)
from edgesd.spec.scheme import parse_scheme  # noqa: E402
from tests.quantizing import normal  # noqa: E402

Array = npt.NDArray[np.float32]
Wide = npt.NDArray[np.float64]


pytestmark = pytest.mark.usefixtures("one_thread")


def correlated(count: int, columns: int, seed: int = 0) -> Array:
    """Inputs of a few strong directions and uneven channels, as layers see them."""
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((max(2, columns // 4), columns))
    x = rng.standard_normal((count, len(mixing))) @ mixing
    x += 0.2 * rng.standard_normal((count, columns))
    return (x * rng.lognormal(0, 0.7, columns)).astype(np.float32)


def covariance(x: Array) -> Array:
    return (x.T @ x / len(x)).astype(np.float32)


def _spiked() -> Array:
    weight = normal(12, 48)
    weight[3, 5], weight[7, 40] = 80.0, -95.0
    return weight


def _huge_channel() -> Array:
    weight = normal(12, 48)
    weight[:, 9] *= 1e4
    return weight


def _huge_output() -> Array:
    weight = normal(12, 48)
    weight[4] *= 1e4
    return weight


def _dead() -> Array:
    weight = normal(12, 48)
    weight[2], weight[:, 7] = 0, 0
    return weight


ADVERSARIAL: dict[str, Callable[[], Array]] = {
    "normal": lambda: normal(12, 48),
    "outliers": _spiked,
    "huge channel": _huge_channel,
    "huge output": _huge_output,
    "zeros": lambda: np.zeros((12, 48), np.float32),
    "dead row and column": _dead,
    "constant": lambda: np.full((12, 48), -0.37, np.float32),
    "one sign": lambda: np.abs(normal(12, 48)),
    "tiny": lambda: normal(12, 48) * np.float32(1e-9),
    "small": lambda: normal(12, 48) * np.float32(1e-4),
    "too big for float16": lambda: normal(12, 48) * np.float32(1e6),
    "one output": lambda: normal(1, 48),
    "one column": lambda: normal(12, 1),
    "one weight": lambda: normal(1, 1),
    "odd": lambda: normal(7, 37),
    "more than a group": lambda: normal(5, 33),
    "tall": lambda: normal(60, 18),
}


@pytest.fixture(params=ADVERSARIAL)
def weight(request: pytest.FixtureRequest) -> Array:
    return ADVERSARIAL[request.param]()


# Round to nearest.


def usable(scale: float) -> float:
    half = np.float16(min(scale, 65504.0))
    return float(half) if half > 0 else 1.0


def plain_scale(values: Array, importance: Array, high: int, low: int, search: bool) -> float:
    """The best of 15 candidates for one group, tried one by one."""
    largest = max(float(values.max()) / high, float(values.min()) / low, 0.0)
    best, chosen = np.inf, usable(largest)
    for step in range(15) if search else ():
        scale = np.float32(usable(np.float32(largest) * np.float32(1 - 0.035 * step)))
        codes = np.clip(np.round(values / scale), low, high)
        error = float((importance * (codes * scale - values) ** 2).sum())
        if error < best:
            best, chosen = error, float(scale)
    return chosen


def plain_scales(weight: Array, group: int, bits: int, importance: Array | None) -> Array:
    low, high = (-8, 7) if bits == 4 else (-127, 127)
    weights = np.ones(weight.shape[1], np.float32) if importance is None else importance
    starts = range(0, weight.shape[1], group)
    out = np.empty((len(weight), len(starts)), np.float32)
    for row, values in enumerate(weight):
        for index, start in enumerate(starts):
            part = slice(start, start + group)
            out[row, index] = plain_scale(values[part], weights[part], high, low, bits == 4)
    return out


def plain_codes(weight: Array, scales: Array, group: int, bits: int) -> npt.NDArray[np.int8]:
    low, high = (-8, 7) if bits == 4 else (-127, 127)
    out = np.empty(weight.shape, np.int8)
    for row in range(len(weight)):
        for column in range(weight.shape[1]):
            value = weight[row, column] / scales[row, column // group]
            out[row, column] = min(max(round(float(value)), low), high)
    return out


def rounded(weight: Array, scales: Array, group: int, bits: int) -> Wide:
    """What is left of a weight, in float64."""
    codes = plain_codes(weight, scales, group, bits).astype(np.float64)
    return codes * np.repeat(scales, group, 1)[:, : weight.shape[1]]


@pytest.mark.parametrize("group", [16, 32, 64])
@pytest.mark.parametrize("weighted", [False, True])
def test_four_bit_scales_and_codes(weight: Array, group: int, weighted: bool) -> None:
    importance = np.abs(normal(weight.shape[1], seed=1)) ** 3 if weighted else None
    found = rounding.group_scales(
        torch.from_numpy(weight), group, 4, None if importance is None else torch.tensor(importance)
    )
    scales = found.numpy()
    assert scales.shape == (len(weight), -(-weight.shape[1] // group))
    assert (scales > 0).all() and np.isfinite(scales).all()
    np.testing.assert_array_equal(scales, scales.astype(np.float16))
    codes = rounding.round_to_nearest(torch.from_numpy(weight), found, group, 4).numpy()
    assert codes.dtype == np.int8 and codes.min() >= -8 and codes.max() <= 7
    np.testing.assert_array_equal(codes, plain_codes(weight, scales, group, 4))

    def loss(scales: Array) -> Wide:
        weights = np.ones(weight.shape[1]) if importance is None else importance
        error = (rounded(weight, scales, group, 4) - weight) ** 2 * weights
        return np.add.reduceat(error, range(0, weight.shape[1], group), 1)

    plain = plain_scales(weight, group, 4, importance)
    # Candidates may tie but for the order of a sum: equal scales or an equal loss.
    np.testing.assert_allclose(loss(scales), loss(plain), rtol=1e-5, atol=1e-30)
    assert (scales == plain).mean() > 0.98
    low, high = rounding.code_range(4)
    groups = rounding.grouped(torch.from_numpy(weight), group).numpy()
    largest = np.maximum(groups.max(-1) / high, groups.min(-1) / low)
    unsearched = np.vectorize(usable)(largest).astype(np.float32)
    assert (loss(scales) <= loss(unsearched) * (1 + 1e-6)).all()


def test_eight_bits_have_a_scale_per_output(weight: Array) -> None:
    columns = weight.shape[1]
    found = rounding.group_scales(torch.from_numpy(weight), columns, 8)
    scales = found.numpy()
    np.testing.assert_array_equal(scales, plain_scales(weight, columns, 8, None))
    codes = rounding.round_to_nearest(torch.from_numpy(weight), found, columns, 8).numpy()
    assert codes.min() >= -127 and codes.max() <= 127
    np.testing.assert_array_equal(codes, plain_codes(weight, scales, columns, 8))


def test_the_error_of_eight_bits_is_at_most_half_a_step() -> None:
    weight = normal(12, 48) * np.float32(0.05)
    scales = rounding.group_scales(torch.from_numpy(weight), 48, 8).numpy()
    error = np.abs(rounded(weight, scales, 48, 8) - weight)
    # Rounding the scale to float16 may cost the largest value 127 / 2048 steps more.
    assert (error <= scales * (0.5 + 127 / 2048)).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_outputs_of_zeros_stay_zero(bits: int) -> None:
    zeros = torch.zeros(3, 20)
    scales = rounding.group_scales(zeros, 16, bits)
    assert (scales == 1).all()
    assert not rounding.round_to_nearest(zeros, scales, 16, bits).any()


def test_a_group_never_sees_what_lies_outside_of_it() -> None:
    weight = normal(4, 64)
    alone = rounding.group_scales(torch.from_numpy(weight[:, :32].copy()), 32, 4).numpy()
    weight[:, 32:] *= 1000
    np.testing.assert_array_equal(
        rounding.group_scales(torch.from_numpy(weight), 32, 4).numpy()[:, :1], alone
    )


def test_importance_protects_what_matters() -> None:
    weight = normal(16, 32)
    importance = np.ones(32, np.float32)
    importance[3] = 1e4
    plain = rounding.group_scales(torch.from_numpy(weight), 32, 4).numpy()
    aware = rounding.group_scales(
        torch.from_numpy(weight), 32, 4, torch.from_numpy(importance)
    ).numpy()
    before = (rounded(weight, plain, 32, 4) - weight)[:, 3] ** 2
    after = (rounded(weight, aware, 32, 4) - weight)[:, 3] ** 2
    assert after.sum() < before.sum()


# GPTQ.


def textbook_gptq(weight: Array, scales: Array, group: int, bits: int, hessian: Array) -> Wide:
    """Optimal brain quantization, one column after the other, removing each from the inverse.

    No Cholesky factor and no panels: the inverse of what is left is kept explicitly.
    """
    low, high = (-8, 7) if bits == 4 else (-127, 127)
    diagonal = np.diag(hessian).astype(np.float64)
    order = np.argsort(-diagonal, kind="stable")
    damped = hessian.astype(np.float64)[np.ix_(order, order)]
    inverse = np.linalg.inv(damped + DAMPING * diagonal.mean() * np.eye(len(damped)))
    wide = np.repeat(scales, group, 1)[:, : weight.shape[1]].astype(np.float64)[:, order]
    rest, codes = weight.astype(np.float64)[:, order], np.empty(weight.shape)
    for k in range(weight.shape[1]):
        codes[:, k] = np.clip(np.round(rest[:, k] / wide[:, k]), low, high)
        error = (rest[:, k] - codes[:, k] * wide[:, k]) / inverse[k, k]
        rest -= np.outer(error, inverse[k])
        inverse -= np.outer(inverse[:, k], inverse[k]) / inverse[k, k]
        inverse[k], inverse[:, k] = 0, 0
    out = np.empty(weight.shape)
    out[:, order] = codes
    return out


def output_error(weight: Array, codes: Wide, scales: Array, group: int, hessian: Array) -> float:
    wide = np.repeat(scales.astype(np.float64), group, 1)[:, : weight.shape[1]]
    change = codes * wide - weight
    return float(np.einsum("nk,kj,nj->", change, hessian.astype(np.float64), change))


@pytest.mark.parametrize(
    ("rows", "columns", "group", "bits"),
    [
        (6, 40, 32, 4),
        (9, 37, 16, 4),
        (8, 200, 64, 4),
        (5, 270, 32, 4),
        (7, 150, 150, 8),
        (3, 1, 16, 4),
    ],
)
def test_gptq_is_the_textbook_algorithm(rows: int, columns: int, group: int, bits: int) -> None:
    weight, hessian = normal(rows, columns), covariance(correlated(4 * columns + 8, columns))
    scales = rounding.group_scales(torch.from_numpy(weight), group, bits)
    found = gptq(torch.from_numpy(weight), scales, group, bits, [torch.from_numpy(hessian)])
    expected = textbook_gptq(weight, scales.numpy(), group, bits, hessian)
    # A tie that falls the other way changes all codes after it in its row.
    assert (found.numpy() == expected).all(1).mean() >= 0.6
    assert (found.numpy() == expected).mean() >= 0.9
    losses = [
        output_error(weight, codes, scales.numpy(), group, hessian)
        for codes in (found.numpy().astype(np.float64), expected)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


@pytest.mark.parametrize("name", [n for n in ADVERSARIAL if n not in ("one column", "one weight")])
def test_gptq_loses_no_more_than_rounding_to_nearest(name: str) -> None:
    weight = ADVERSARIAL[name]()
    columns = weight.shape[1]
    hessian = covariance(correlated(8 * columns, columns, seed=3))
    scales = rounding.group_scales(torch.from_numpy(weight), 16, 4)
    found = gptq(torch.from_numpy(weight), scales, 16, 4, [torch.from_numpy(hessian)]).numpy()
    assert found.min() >= -8 and found.max() <= 7
    nearest = rounding.round_to_nearest(torch.from_numpy(weight), scales, 16, 4).numpy()
    ours, plain = (
        output_error(weight, codes.astype(np.float64), scales.numpy(), 16, hessian)
        for codes in (found, nearest)
    )
    assert ours <= plain * (1 + 1e-6)
    if name in ("normal", "odd", "tall"):
        assert ours < 0.6 * plain


def test_gptq_without_inputs_rounds_to_nearest(weight: Array) -> None:
    scales = rounding.group_scales(torch.from_numpy(weight), 16, 4)
    blocks = [torch.zeros(weight.shape[1], weight.shape[1])]
    found = gptq(torch.from_numpy(weight), scales, 16, 4, blocks).numpy()
    np.testing.assert_array_equal(found, plain_codes(weight, scales.numpy(), 16, 4))


def test_gptq_with_uncorrelated_inputs_rounds_to_nearest() -> None:
    weight = normal(6, 40)
    scales = rounding.group_scales(torch.from_numpy(weight), 16, 4)
    blocks = [torch.diag(torch.linspace(0.1, 3, 40))]
    found = gptq(torch.from_numpy(weight), scales, 16, 4, blocks).numpy()
    np.testing.assert_array_equal(found, plain_codes(weight, scales.numpy(), 16, 4))


def test_gptq_takes_blocks_one_by_one() -> None:
    weight, x = normal(6, 100), correlated(500, 100)
    parts = [slice(0, 48), slice(48, 96), slice(96, 100)]  # inside of groups, too
    blocks = [torch.from_numpy(covariance(x[:, part])) for part in parts]
    scales = rounding.group_scales(torch.from_numpy(weight), 32, 4)
    wide = scales.repeat_interleave(32, 1)[:, :100]
    found = gptq(torch.from_numpy(weight), scales, 32, 4, blocks).numpy()
    for part, block in zip(parts, blocks, strict=True):
        alone = gptq(torch.from_numpy(weight[:, part].copy()), wide[:, part], 1, 4, [block])
        np.testing.assert_array_equal(found[:, part], alone.numpy())


def test_gptq_with_dead_and_repeated_inputs_is_finite() -> None:
    x = correlated(200, 40)
    x[:, 5], x[:, 6], x[:, 20:30] = 0, x[:, 7], 0
    scales = rounding.group_scales(torch.from_numpy(normal(6, 40)), 16, 4)
    hessian = torch.from_numpy(covariance(x))
    found = gptq(torch.from_numpy(normal(6, 40)), scales, 16, 4, [hessian]).numpy()
    dead = [5, *range(20, 30)]
    nearest = plain_codes(normal(6, 40), scales.numpy(), 16, 4)
    np.testing.assert_array_equal(found[:, dead], nearest[:, dead])


def test_gptq_refuses_what_is_no_covariance() -> None:
    weight = torch.from_numpy(normal(4, 16))
    block = torch.full((16, 16), torch.nan)
    with pytest.raises(torch.linalg.LinAlgError):
        gptq(weight, torch.ones(4, 1), 16, 4, [block])


# SVDQuant.


def metric_matrix(blocks: list[Array], noise: Array | None) -> Wide:
    """S [K, K] of the metric, dense."""
    columns = sum(map(len, blocks))
    out, start = np.zeros((columns, columns)), 0
    for block in blocks:
        part = slice(start, start + len(block))
        mean = float(np.diag(block).mean())
        damping = svdquant.DAMPING * mean if mean > 0 else 1.0
        out[part, part] = block.astype(np.float64) + damping * np.eye(len(block))
        start += len(block)
    return out if noise is None else out + np.diag(noise.astype(np.float64) ** 2)


def whitened_svd(matrix: Wide, metric: Wide, rank: int) -> Wide:
    """The best approximation of a rank in a metric, by its exact symmetric square root."""
    values, vectors = np.linalg.eigh(metric)
    root = vectors * np.sqrt(values) @ vectors.T
    left, singular, right = np.linalg.svd(matrix @ root, full_matrices=False)
    return (left[:, :rank] * singular[:rank] @ right[:rank]) @ np.linalg.inv(root)


def size(matrix: Wide, metric: Wide) -> float:
    return float(np.einsum("nk,kj,nj->", matrix, metric, matrix))


def blocks_of(columns: int, *ends: int) -> list[Array]:
    x = correlated(6 * columns, columns, seed=5)
    starts = (0, *ends)
    return [covariance(x[:, a:b]) for a, b in zip(starts, (*ends, columns), strict=True)]


def product(factors: tuple[torch.Tensor, torch.Tensor]) -> Wide:
    return np.asarray(factors[0].double() @ factors[1].double())


@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize(("rows", "columns"), [(12, 48), (48, 12), (7, 37), (1, 20), (20, 20)])
@pytest.mark.parametrize("rank", [1, 4, 16])
def test_low_rank_is_the_svd_in_the_metric(rows: int, columns: int, rank: int, noisy: bool) -> None:
    weight, blocks = normal(rows, columns), blocks_of(columns, columns // 3)
    noise = np.abs(normal(columns, seed=2)) if noisy else None
    metric = svdquant.Metric(
        [torch.from_numpy(b) for b in blocks], None if noise is None else torch.from_numpy(noise)
    )
    up, down = svdquant.low_rank(metric.apply(torch.from_numpy(weight)), rank, metric)
    assert up.shape == (rows, min(rank, rows, columns))
    assert down.shape == (min(rank, rows, columns), columns)
    dense = metric_matrix(blocks, noise)
    expected = whitened_svd(weight.astype(np.float64), dense, rank)
    found = product((up, down))
    whole = size(weight, dense)
    assert size(found - expected, dense) < 1e-6 * whole
    losses = [size(weight - branch, dense) for branch in (found, expected)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4, abs=1e-7 * whole)


def test_a_branch_of_full_rank_is_the_weight() -> None:
    weight = normal(10, 40)
    metric = svdquant.Metric([torch.from_numpy(b) for b in blocks_of(40)])
    factors = svdquant.low_rank(metric.apply(torch.from_numpy(weight)), 512, metric)
    assert factors[0].shape == (10, 10)
    np.testing.assert_allclose(product(factors), weight, atol=1e-4)


def test_the_metric_is_applied_and_undone() -> None:
    blocks = blocks_of(37, 10, 25)
    noise = np.abs(normal(37, seed=4))
    metric = svdquant.Metric([torch.from_numpy(b) for b in blocks], torch.from_numpy(noise))
    matrix = torch.from_numpy(normal(5, 37))
    applied = metric.apply(matrix)
    expected = size(matrix.numpy().astype(np.float64), metric_matrix(blocks, noise))
    assert float(applied.double().square().sum()) == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(metric.undo(applied), matrix, atol=1e-3)
    # M S = (M L) L^T, so that (M S) L^-T = M L.
    dense = torch.from_numpy(metric_matrix(blocks, noise)).float()
    np.testing.assert_allclose(metric.undo_transposed(matrix @ dense), applied, atol=1e-2)


def coarse(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    scales = rounding.group_scales(matrix, 16, 4)
    codes = rounding.round_to_nearest(matrix, scales, 16, 4)
    return codes, scales, codes * scales.repeat_interleave(16, 1)[:, : matrix.shape[1]]


def repaired(
    weight: Array, residual: Array, rank: int, blocks: list[Array], noise: Array | None
) -> Wide:
    """The closed form, with a dense inverse."""
    metric = metric_matrix(blocks, noise)
    if noise is None:
        return whitened_svd(weight.astype(np.float64) - residual, metric, rank)
    seen, start = np.zeros_like(metric), 0
    for block in blocks:
        seen[start : start + len(block), start : start + len(block)] = block
        start += len(block)
    optimum = (weight @ metric - residual.astype(np.float64) @ seen) @ np.linalg.inv(metric)
    return whitened_svd(optimum, metric, rank)


@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize("rank", [1, 5, 40])
@pytest.mark.parametrize("columns", [48, 37])
def test_repair_is_the_closed_form_and_no_branch_is_better(
    columns: int, rank: int, noisy: bool
) -> None:
    weight, blocks = normal(20, columns), blocks_of(columns, 16)
    noise = np.abs(normal(columns, seed=2)) if noisy else None
    residual = coarse(torch.from_numpy(weight * np.float32(0.6)))[2].numpy()
    arguments = (
        [torch.from_numpy(b) for b in blocks], None if noise is None else torch.from_numpy(noise)
    )  # fmt: skip
    fit = svdquant.Fit(torch.from_numpy(weight), *arguments)
    wanted, lost = fit.beside(torch.from_numpy(residual))
    factors = svdquant.low_rank(wanted, rank, fit.metric)
    found = product(factors)
    dense = metric_matrix(blocks, noise)
    expected = repaired(weight, residual, rank, blocks, noise)
    assert size(found - expected, dense) < 1e-6 * size(weight, dense)

    def loss(branch: Wide) -> float:
        if noise is None:
            return size(weight - residual - branch, dense)
        own = metric_matrix(blocks, None)
        damping = own - metric_matrix_undamped(blocks)
        undamped = metric_matrix_undamped(blocks)
        through = np.diag(noise.astype(np.float64) ** 2) + damping
        return size(weight - residual - branch, undamped) + size(weight - branch, through)

    best = loss(found)
    codes = 0.0 if noise is None else float(np.square(residual * noise, dtype=np.float64).sum())
    own = size(weight - residual - found, metric_matrix_undamped(blocks)) + codes
    within = 1e-5 * size(weight, metric_matrix_undamped(blocks))
    got = fit.loss(torch.from_numpy(residual), lost, *factors)
    assert got == pytest.approx(own, rel=1e-3, abs=within)
    up, down = (factor.double().numpy() for factor in factors)
    for seed in range(20):
        rng = np.random.default_rng(seed)
        nearby = [f + 1e-2 * np.abs(f).mean() * rng.standard_normal(f.shape) for f in (up, down)]
        assert loss(nearby[0] @ nearby[1]) >= best * (1 - 1e-6)


def metric_matrix_undamped(blocks: list[Array]) -> Wide:
    columns = sum(map(len, blocks))
    out, start = np.zeros((columns, columns)), 0
    for block in blocks:
        out[start : start + len(block), start : start + len(block)] = block
        start += len(block)
    return out


def fitted_loss(
    weight: Array, found: tuple[torch.Tensor, ...], blocks: list[Array], noise: Array | None
) -> float:
    codes, scales, up, down = (part.double().numpy() for part in found)
    residual = codes * np.repeat(scales, 16, 1)[:, : weight.shape[1]]
    total = size(weight - residual - up @ down, metric_matrix_undamped(blocks))
    return total + (0 if noise is None else float(((residual * noise) ** 2).sum()))


@pytest.mark.parametrize("noisy", [False, True])
def test_more_rounds_never_lose_more_and_beat_the_plain_branch(noisy: bool) -> None:
    weight, blocks = normal(24, 64), blocks_of(64, 32)
    noise = 0.3 * np.abs(normal(64, seed=2)) if noisy else None
    arguments = (
        [torch.from_numpy(b) for b in blocks], None if noise is None else torch.from_numpy(noise)
    )  # fmt: skip
    losses = [
        fitted_loss(
            weight,
            svdquant.svdquant(torch.from_numpy(weight), 4, *arguments, coarse, coarse, rounds),
            blocks,
            noise,
        )
        for rounds in (1, 2, 4, 8)
    ]
    assert all(b <= a * (1 + 1e-4) for a, b in itertools.pairwise(losses))
    left, values, right = np.linalg.svd(weight, full_matrices=False)
    up = torch.from_numpy(left[:, :4] * values[:4])
    down = torch.from_numpy(right[:4].copy())
    codes, scales, _ = coarse(torch.from_numpy(weight) - up @ down)
    plain = fitted_loss(weight, (codes, scales, up, down), blocks, noise)
    assert losses[-1] < 0.85 * plain


def test_noise_moves_the_weight_of_noisy_channels_into_the_branch() -> None:
    weight, blocks = normal(24, 64), blocks_of(64)
    noise = np.zeros(64, np.float32)
    noise[10] = 50.0
    tensors = [torch.from_numpy(b) for b in blocks]
    plain = svdquant.svdquant(torch.from_numpy(weight), 4, tensors, None, coarse, coarse, 2)
    aware = svdquant.svdquant(
        torch.from_numpy(weight), 4, tensors, torch.from_numpy(noise), coarse, coarse, 2
    )
    through = [
        float((found[0] * found[1].repeat_interleave(16, 1))[:, 10].square().sum())
        for found in (plain, aware)
    ]
    assert through[1] < 0.1 * through[0]
    assert fitted_loss(weight, aware, blocks, noise) < fitted_loss(weight, plain, blocks, noise)


@pytest.mark.parametrize("shape", [(30, 80), (80, 30), (40, 40), (1, 9), (9, 1)])
def test_small_matrices_have_exact_singular_vectors(shape: tuple[int, int]) -> None:
    matrix = normal(*shape)
    rank = min(5, *shape)
    basis = svdquant.top_singular(torch.from_numpy(matrix), 5).numpy()
    assert basis.shape == (shape[0], rank)
    np.testing.assert_allclose(basis.T @ basis, np.eye(rank), atol=1e-5)
    left = np.linalg.svd(matrix, full_matrices=False)[0][:, :rank]
    np.testing.assert_allclose(np.abs(left.T @ basis), np.eye(rank), atol=1e-4)


def test_subspace_iteration_is_near_the_svd_and_the_same_each_time() -> None:
    rng = np.random.default_rng(0)
    left = np.linalg.qr(rng.standard_normal((530, 530)))[0]
    right = np.linalg.qr(rng.standard_normal((600, 530)))[0]
    values = 1 / np.arange(1, 531) ** 0.7
    matrix = torch.from_numpy((left * values @ right.T).astype(np.float32))
    torch.manual_seed(1)
    basis = svdquant.top_singular(matrix, 24)
    torch.manual_seed(2)
    assert torch.equal(basis, svdquant.top_singular(matrix, 24))
    found = basis.numpy().astype(np.float64)
    np.testing.assert_allclose(found.T @ found, np.eye(24), atol=1e-5)
    kept = float(((found.T @ matrix.numpy()) ** 2).sum())
    best = float((values[:24] ** 2).sum())
    assert best * 0.999 < kept <= best * (1 + 1e-5)


def test_factors_are_balanced_and_fit_float16() -> None:
    up, down = svdquant._balanced(torch.eye(6)[:, :3], torch.full((3, 8), 1e8))
    np.testing.assert_allclose(up @ down, torch.eye(6)[:, :3] @ torch.full((3, 8), 1e8), rtol=1e-5)
    assert torch.isfinite(up.half()).all() and torch.isfinite(down.half()).all()
    up, down = svdquant._balanced(torch.eye(6)[:, :3], torch.zeros(3, 8))
    assert torch.isfinite(up).all() and not (up @ down).any()


# Whole layers.


def linear(weight: Array) -> Layer:
    return Layer("unet", "block.linear", "block.linear/MatMul", "linear", weight.shape)


def stats(x: Array, layer: Layer, timesteps: int = 1) -> LayerStats:
    """Statistics of rows [n, K], as calibration records them."""
    steps = np.arange(len(x)) % timesteps
    pixels = x.reshape(len(x), -1, layer.channels)
    return LayerStats(
        low=np.stack([pixels[steps == t].min((0, 1)) for t in range(timesteps)]),
        high=np.stack([pixels[steps == t].max((0, 1)) for t in range(timesteps)]),
        blocks=(x.T @ x,),
        count=len(x),
        rows=x.astype(np.float16),
        row_steps=steps.astype(np.int64),
    )


SCHEMES = ("w8a8-lr4", "w4a16-g16", "w4a4-g16-lr4")


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", ["rtn", "gptq", "svdquant"])
def test_every_method_takes_any_weight(weight: Array, scheme: str, name: str) -> None:
    layer = linear(weight)
    x = correlated(96, weight.shape[1], seed=7)
    found = quantize_layer(layer, weight, stats(x, layer), parse_scheme(scheme), get_method(name))
    low, high = (-8, 7) if scheme.startswith("w4") else (-127, 127)
    assert found.codes.dtype == np.int8 and found.codes.shape == weight.shape
    assert found.codes.min() >= low and found.codes.max() <= high
    assert found.scales.dtype == np.float16 and (found.scales > 0).all()
    parts = (found.scales, found.smooth, found.up, found.down, found.effective_weight())
    assert all(np.isfinite(part).all() for part in parts if part is not None)
    assert found.rank == (min(4, *weight.shape) if "lr" in scheme else 0)
    assert np.isfinite(found.error) and found.error == layer_error(found, weight, stats(x, layer))


@pytest.mark.parametrize("name", ["normal", "outliers", "huge output", "odd", "small", "tall"])
def test_methods_are_ordered(name: str) -> None:
    weight = ADVERSARIAL[name]()
    layer = linear(weight)
    recorded = stats(correlated(400, weight.shape[1], seed=7), layer)
    errors = {
        (method, scheme): quantize_layer(
            layer, weight, recorded, parse_scheme(scheme), get_method(method)
        ).error
        for method in ("rtn", "gptq", "svdquant")
        for scheme in ("w8a16", "w4a16-g32", "w4a16-g32-lr4")
    }
    assert errors["rtn", "w8a16"] < (0.05 if name == "outliers" else 0.01)
    assert errors["rtn", "w8a16"] < errors["rtn", "w4a16-g32"] < 0.3
    assert errors["gptq", "w4a16-g32"] < errors["rtn", "w4a16-g32"]
    # One huge output is the branch's alone, which is exact to 16 bits.
    assert errors["svdquant", "w4a16-g32-lr4"] < max(errors["gptq", "w4a16-g32-lr4"], 2e-4)


def test_an_outlier_channel_of_the_input_is_smoothed_away() -> None:
    weight = normal(32, 64)
    layer = linear(weight)
    x = normal(400, 64, seed=7)
    x[:, [3, 40]] *= 60
    recorded = stats(x, layer)
    scheme = parse_scheme("w4a4-g32-lr8")
    plain, smoothed = (
        quantize_layer(layer, weight, recorded, scheme, get_method(m)) for m in ("gptq", "svdquant")
    )
    assert plain.smooth is None and smoothed.smooth is not None
    assert set(np.argsort(smoothed.smooth)[-2:]) == {3, 40}
    assert smoothed.error < 0.6 * plain.error


@pytest.mark.parametrize("method", ["gptq", "svdquant"])
def test_correlations_of_few_rows_are_not_trusted(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    turned = np.linalg.qr(normal(64, 64, seed=3))[0]  # into directions of falling strength
    x = ((normal(1000, 64, seed=7) / np.arange(1, 65) ** 0.5) @ turned).astype(np.float32)
    weight, scheme = normal(48, 64), parse_scheme("w4a8-g32-lr4")
    layer = linear(weight)

    def lost() -> float:
        """On all rows, by a layer that was fitted to the first ones."""
        found = quantize_layer(layer, weight, stats(x[:24], layer), scheme, get_method(method))
        return layer_error(found, weight, stats(x, layer))

    shrunk = lost()
    monkeypatch.setattr(quantize, "_shrunk", lambda block, count: block / count)
    assert shrunk < 0.9 * lost()


def test_shrinking_keeps_variances_and_hardly_touches_many_rows() -> None:
    rows = torch.from_numpy(correlated(200, 8))
    total = rows.T @ rows
    few, many = quantize._shrunk(total, 8), quantize._shrunk(1000 * total, 8000)
    torch.testing.assert_close(few.diagonal(), total.diagonal() / 8)
    torch.testing.assert_close(few.triu(1), total.triu(1) / 8.8)
    torch.testing.assert_close(many, total / 8, rtol=2e-3, atol=0)


@pytest.mark.parametrize(
    ("method", "name", "reads"),
    [("svdquant", "w4a4-g32-lr8", 1), ("svdquant", "w4a16-g32-lr8", 0), ("rtn", "w4a4-g32", 0)],
)
def test_layers_of_one_input_share_a_smoothing(method: str, name: str, reads: int) -> None:
    weight, x = normal(32, 64), normal(400, 64, seed=7)
    x[:, [3, 40]] *= 60
    layer, read = linear(weight), []
    recorded, scheme, how = stats(x, layer), parse_scheme(name), get_method(method)

    def shared() -> Array | None:
        read.append(layer)
        return joint_smoothing(layer, (weight, 8 * normal(16, 64, seed=9)), recorded, scheme, how)

    found = quantize_layer(layer, weight, recorded, scheme, how, shared)
    alone = quantize_layer(layer, weight, recorded, scheme, how)
    assert len(read) == reads
    if reads:
        np.testing.assert_array_equal(found.smooth, shared())
        assert found.smooth is not None and alone.smooth is not None
        assert not np.array_equal(found.smooth, alone.smooth)
    else:
        assert found.smooth is None and np.array_equal(found.codes, alone.codes)


@pytest.mark.parametrize(("name", "pays"), [("w4a4-g32-lr8", True), ("w4a8-g32-lr8", False)])
def test_a_shared_smoothing_pays_earlier_in_four_bits(name: str, pays: bool) -> None:
    uneven = np.random.default_rng(1).lognormal(0, 0.45, 64)
    weight, x = normal(32, 64), (normal(400, 64, seed=7) * uneven).astype(np.float32)
    layer, scheme, method = linear(weight), parse_scheme(name), get_method()
    recorded = stats(x, layer)
    shared = joint_smoothing(layer, (weight,), recorded, scheme, method)
    assert (shared is not None) == pays
    assert quantize_layer(layer, weight, recorded, scheme, method).smooth is None


def test_the_same_inputs_give_the_same_layer() -> None:
    weight = normal(24, 40)
    layer = linear(weight)
    recorded = stats(correlated(200, 40), layer)
    first, second = (
        quantize_layer(layer, weight, recorded, parse_scheme("w4a4-g16-lr4"), get_method())
        for _ in range(2)
    )
    for name in ("codes", "scales", "up", "down"):
        assert getattr(first, name).tobytes() == getattr(second, name).tobytes()
    assert first.error == second.error


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused_in_one_line(bad: float) -> None:
    weight = normal(8, 32)
    layer, scheme = linear(weight), parse_scheme("w4a8-g32-lr4")
    recorded = stats(normal(64, 32), layer)
    broken = weight.copy()
    broken[3, 3] = bad
    with pytest.raises(EdgesdError, match=r"unet: block\.linear holds NaN or infinite weights"):
        quantize_layer(layer, broken, recorded, scheme, get_method())
    with pytest.raises(EdgesdError, match=r"inputs of block\.linear aren't finite"):
        block = recorded.blocks[0].copy()
        block[0, 0] = bad
        spoiled = LayerStats(**{**vars(recorded), "blocks": (block,)})
        quantize_layer(layer, weight, spoiled, scheme, get_method())


def test_a_layer_that_saw_nothing_is_rounded_to_nearest() -> None:
    weight = normal(8, 40)
    found = quantize_layer(linear(weight), weight, None, parse_scheme("w4a8-g16-lr4"), get_method())
    assert str(found.scheme) == "w4a16-g16" and found.method == "rtn" and found.rank == 0
    assert found.activations == Activations()
    scales = plain_scales(weight, 16, 4, None)
    np.testing.assert_array_equal(found.scales, scales)
    np.testing.assert_array_equal(found.codes, plain_codes(weight, scales, 16, 4))


# Activations.

CONV = Layer("unet", "conv", "conv/Conv", "conv", (8, 12, 3, 3), pads=(1, 1, 1, 1))


def plain_affine(rows: Array, scale: float, zero: float) -> Array:
    codes = np.clip(np.round(rows / np.float32(scale)) + zero, 0, 255)
    return ((codes - zero) * np.float32(scale)).astype(np.float32)


def test_floating_point_inputs_stay_as_they_are() -> None:
    rows = torch.from_numpy(normal(5, 108))
    none = torch.zeros(5, dtype=torch.int64)
    assert activations.fake_quantize(rows, Activations(), CONV, torch.zeros(1, 2), none) is rows


@pytest.mark.parametrize("timesteps", [1, 3])
@pytest.mark.parametrize("shift", [0.0, 4.0, -4.0])
def test_dynamic_inputs_have_the_range_of_their_tensor(timesteps: int, shift: float) -> None:
    rows = normal(30, 108) + np.float32(shift)
    steps = np.arange(30) % timesteps
    rows *= (1 + 5 * steps[:, None]).astype(np.float32)
    ranges = np.array([[rows[steps == t].min(), rows[steps == t].max()] for t in range(timesteps)])
    found = activations.fake_quantize(
        torch.from_numpy(rows), Activations("dynamic", 8), CONV, torch.from_numpy(ranges),
        torch.from_numpy(steps),
    ).numpy()  # fmt: skip
    for t in range(timesteps):
        low, high = min(ranges[t, 0], 0), max(ranges[t, 1], 0)
        scale = np.float32(np.float32(high - low) / np.float32(255))
        zero = np.clip(np.round(-low / scale), 0, 255)
        expected = plain_affine(rows[steps == t], scale, zero)
        np.testing.assert_allclose(found[steps == t], expected, rtol=1e-5, atol=1e-6)
        assert np.abs(found[steps == t] - rows[steps == t]).max() <= scale


def test_static_inputs_have_the_range_of_their_timestep() -> None:
    rows, steps = normal(30, 108), np.arange(30) % 3
    act = Activations(
        "static", 8, scale=np.array([0.01, 0.02, 0.005], np.float32),
        zero_point=np.array([128, 0, 255], np.uint8),
    )  # fmt: skip
    found = activations.fake_quantize(
        torch.from_numpy(rows), act, CONV, torch.zeros(3, 2), torch.from_numpy(steps)
    ).numpy()
    assert act.scale is not None and act.zero_point is not None
    for t in range(3):
        expected = plain_affine(rows[steps == t], act.scale[t], float(act.zero_point[t]))
        np.testing.assert_allclose(found[steps == t], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("channels", "group", "bits"), [(12, 4, 4), (40, 32, 8), (36, 12, 4)])
@pytest.mark.parametrize("taps", [1, 9])
def test_groups_have_a_scale_per_row_and_tap(
    channels: int, group: int, bits: int, taps: int
) -> None:
    layer = Layer("unet", "conv", "conv/Conv", "conv", (8, channels, *(2 * [int(taps**0.5)])))
    rows = normal(6, taps * channels)
    rows[2] = 0
    rows[3, :channels] = 0
    found = activations.fake_quantize(
        torch.from_numpy(rows), Activations("group", bits, group), layer, torch.zeros(1, 2),
        torch.zeros(6, dtype=torch.int64),
    ).numpy()  # fmt: skip
    high = 7 if bits == 4 else 127
    expected = np.empty_like(rows)
    for row in range(6):
        for tap in range(taps):
            for start in range(0, channels, group):
                stop = min(start + group, channels)
                part = slice(tap * channels + start, tap * channels + stop)
                scale = np.abs(rows[row, part]).max() / np.float32(high)
                values = rows[row, part]
                expected[row, part] = np.round(values / scale) * scale if scale > 0 else 0
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_an_input_behind_gelu_needs_no_sign() -> None:
    layer = replace(linear(normal(8, 64)), floor=GELU_FLOOR)
    rows = torch.nn.functional.gelu(torch.from_numpy(normal(40, 64)) * 2).numpy()
    smooth = np.linspace(0.5, 2, 64, dtype=np.float32)
    shift = np.float32(GELU_FLOOR) / smooth
    act = Activations("group", 4, 16, shift=shift)
    none = torch.zeros(1, 2), torch.zeros(40, dtype=torch.int64)
    found = activations.fake_quantize(torch.from_numpy(rows / smooth), act, layer, *none).numpy()
    expected = np.empty_like(rows)
    for row in range(40):
        for start in range(0, 64, 16):
            part = slice(start, start + 16)
            values = rows[row, part] / smooth[part] + shift[part]
            assert (values >= 0).all()
            scale = values.max() / np.float32(15)
            codes = np.round(values / scale)
            assert codes.min() >= 0 and codes.max() == 15
            expected[row, part] = codes * scale - shift[part]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    recorded, weight = stats(rows, layer), normal(8, 64)
    scheme = parse_scheme("w4a4-g16")
    signed, unsigned = (
        quantize_layer(layer, weight, recorded, scheme, get_method("rtn", measures=measures))
        for measures in ((), ("unsigned",))
    )
    assert signed.activations.shift is None and unsigned.activations.shift is not None
    assert activation_error(unsigned, rows) < 0.6 * activation_error(signed, rows)
    for eight in ("w4a8-g16", "w8a8"):
        found8 = quantize_layer(layer, weight, recorded, parse_scheme(eight), get_method("rtn"))
        assert found8.activations.shift is None


def activation_error(quantized: QuantizedLayer, rows: Array) -> float:
    none = torch.zeros(1, 2), torch.zeros(len(rows), dtype=torch.int64)
    x = torch.from_numpy(rows)
    low = activations.fake_quantize(x, quantized.activations, quantized.layer, *none)
    return float((low - x).square().mean().sqrt())


def test_which_mode_a_layer_gets() -> None:
    linear_layer = Layer("unet", "a", "a/MatMul", "linear", (8, 40))
    one_row = Layer("unet", "a", "a/Gemm", "linear", (8, 40), one_row=True)
    table = Layer("text_encoder", "a", "a/Gather", "embedding", (8, 40))
    modes = {
        (scheme, static): [
            activations.activation_mode(layer, parse_scheme(scheme), static)
            for layer in (CONV, linear_layer, one_row, table)
        ]
        for scheme in ("w8a16", "w8a8", "w4a8-g32", "w4a4-g32")
        for static in (False, True)
    }
    assert modes == {
        ("w8a16", False): ["none"] * 4,
        ("w8a16", True): ["none"] * 4,
        ("w8a8", False): ["dynamic", "dynamic", "none", "none"],
        ("w8a8", True): ["static", "static", "none", "none"],
        ("w4a8-g32", False): ["dynamic", "group", "none", "none"],
        ("w4a8-g32", True): ["static", "group", "none", "none"],
        ("w4a4-g32", False): ["group", "group", "none", "none"],
        ("w4a4-g32", True): ["group", "group", "none", "none"],
    }
    assert activations.channel_group(linear_layer, parse_scheme("w4a8-g32")) == 32
    assert activations.channel_group(linear_layer, parse_scheme("w4a8-g64")) == 40
    assert activations.channel_group(linear_layer, parse_scheme("w4a4-g32")) == 8
    assert activations.channel_group(CONV, parse_scheme("w4a4-g64")) == 4


def test_static_ranges_hold_what_was_recorded() -> None:
    recorded = np.array([[-4, 2], [0.5, 8], [-3, -1], [0, 0]], np.float32)
    act = activations.static_ranges(torch.from_numpy(recorded))
    assert act.mode == "static" and act.bits == 8
    assert act.scale is not None and act.zero_point is not None and act.symmetric_scale is not None
    assert act.zero_point.dtype == np.uint8 and (act.scale > 0).all()
    for (low, high), scale, zero in zip(recorded, act.scale, act.zero_point, strict=True):
        for value in (low, high, 0.0):
            assert abs(plain_affine(np.float32(value), scale, float(zero)) - value) <= scale
    np.testing.assert_allclose(act.symmetric_scale, [8 / 127], rtol=1e-6)


@pytest.mark.parametrize("alpha", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("taps", [1, 9])
def test_smoothing_is_equation_4(alpha: float, taps: int) -> None:
    weight = normal(10, taps * 12)
    channel_max = np.abs(normal(12, seed=3)) * np.float32(20) + np.float32(0.1)
    found = activations.smoothing(torch.from_numpy(channel_max), torch.from_numpy(weight), alpha)
    expected = np.empty(12)
    for j in range(12):
        column = max(np.abs(weight[:, tap * 12 + j]).max() for tap in range(taps))
        expected[j] = channel_max[j] ** alpha / column ** (1 - alpha)
    expected /= np.exp(np.log(expected).mean())
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5)


def test_smoothing_leaves_dead_channels_alone() -> None:
    weight = normal(10, 12)
    weight[:, 2] = 0
    channel_max = np.abs(normal(12, seed=3)) + np.float32(1)
    channel_max[5] = 0
    channel_max[7] = 1e30
    found = activations.smoothing(torch.from_numpy(channel_max), torch.from_numpy(weight), 0.5)
    assert found[2] == 1 and found[5] == 1
    assert (found >= 1e-3).all() and (found <= 1e3).all()
    nothing = activations.smoothing(torch.zeros(12), torch.zeros(10, 12), 0.5)
    assert (nothing == 1).all()


# Methods.

ZEROS = """
from dataclasses import dataclass

import torch

from edgesd.export.quantize.method import Method, Problem, Represented, plain_branch


@dataclass(frozen=True, repr=False)
class Zeros(Method):
    name = label = "zeros"

    def represent(self, problem: Problem) -> Represented:
        codes = torch.zeros_like(problem.matrix, dtype=torch.int8)
        scales = torch.ones(len(codes), -(-codes.shape[1] // problem.group))
        return Represented(codes, scales, *plain_branch(problem.matrix, problem.rank))


METHOD = Zeros
"""


def test_a_method_is_added_by_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "zeros.py").write_text(ZEROS)
    before = methods.method_names()
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path)])
    assert methods.method_names() == sorted([*before, "zeros"])
    weight = normal(8, 40)
    layer = linear(weight)
    recorded = stats(normal(64, 40), layer)
    scheme = parse_scheme("w4a16-g16-lr4")
    found = quantize_layer(layer, weight, recorded, scheme, get_method("zeros"))
    assert found.method == "zeros" and not found.codes.any() and found.rank == 4


def test_an_unknown_method_is_refused_with_those_there_are() -> None:
    with pytest.raises(UsageError, match=f"magic.*{', '.join(methods.method_names())}"):
        get_method("magic")


def test_layers_that_were_quantized_before_are_found_again() -> None:
    """The cache's keys hash it."""
    assert repr(get_method()) == "Method(name='svdquant', static=False)"
    assert repr(get_method("rtn", static=True)) == "Method(name='rtn', static=True)"
    assert "without=['joint', 'split']" in repr(get_method(measures=("unsigned",)))


def test_inputs_that_never_change_have_a_metric_in_spite_of_rounding() -> None:
    value = torch.linspace(1, 2, 32)
    block = torch.outer(value, value)
    rounded = block - 4e-4 * block.diagonal().mean() * torch.eye(32)  # as sums in fp32 leave it
    assert torch.linalg.eigvalsh(rounded).min() < -svdquant.DAMPING * block.diagonal().mean()
    factor = svdquant.Metric([rounded]).factors[0]
    torch.testing.assert_close(factor @ factor.T, block, rtol=0.02, atol=0.02)


def test_a_covariance_that_no_inputs_have_is_refused() -> None:
    with pytest.raises(EdgesdError, match="which no inputs have"):
        svdquant.Metric([torch.diag(torch.tensor([3.0, -1.0]))])


@pytest.mark.parametrize("columns", [64, 80])
def test_scales_are_searched_in_parts_as_at_once(
    columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, importance = torch.from_numpy(normal(37, columns)), torch.rand(columns)
    whole = rounding.group_scales(weight, 16, 4, importance)
    monkeypatch.setattr(rounding, "_CACHED", 5 * columns)
    assert torch.equal(whole, rounding.group_scales(weight, 16, 4, importance))
