"""By what images are judged, and what decides whether a change of a bundle's graphs is accepted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from edgesd.errors import InputError
from edgesd.evaluate.quality import UNSEEN
from edgesd.recipes import gates
from edgesd.recipes.gates import (
    WORST,
    Shortfall,
    WorstImages,
    accept_kernels,
    accept_pooling,
    gates_of,
    judging,
    shortfall,
)
from edgesd.recipes.notes import PoolingMeasured
from edgesd.spec.build import QuantOptions
from edgesd.spec.quality import Gate, ImageQuality, Metric

Accept = Callable[[Sequence[ImageQuality], Sequence[ImageQuality], Sequence[Gate]], bool]
both = pytest.mark.parametrize("accept", [accept_kernels, accept_pooling])
NAN = float("nan")


def images(
    *psnr: float | None, distance: float = 0.1, features: float | None = None
) -> list[ImageQuality]:
    return [ImageQuality("a cat", 0, db, 0.9, distance, features=features) for db in psnr]


def of_mean(mean: float, least: float) -> list[ImageQuality]:
    """Six images of this mean PSNR and this least one, and two better ones."""
    rest = (6 * mean - least) / 5
    return images(99.0, least, *[rest] * 5, 98.0)


def far(*distances: float) -> list[ImageQuality]:
    return [image for distance in distances for image in images(20.0, distance=distance)]


def psnr(limit: float | None = None) -> list[Gate]:
    return [Gate("psnr", limit, "family" if limit is None else "option")]


def test_only_the_worst_images_count() -> None:
    several = images(*[None] * 20, 31, 30, 32, 34, 33, 35)
    assert WorstImages.of(several, "psnr") == WorstImages("psnr", 32.5, 30)
    assert WorstImages.of(images(40.0), "psnr") == WorstImages("psnr", 40, 40)
    assert WorstImages.of(images(None), "psnr") == WorstImages("psnr", 100, 100)
    distances = far(*[0.0] * 20, *[0.3] * (WORST - 1), 0.6)
    assert WorstImages.of(distances, "lpips") == WorstImages("lpips", pytest.approx(0.35), 0.6)


@both
@pytest.mark.parametrize(
    ("after", "floor", "accepted"),
    [
        ((34, 30), None, True),
        ((33.001, 20), None, True),  # one decibel of the mean may be lost
        ((32.9, 30), None, False),
        ((33.5, 30), 30, True),
        ((33.5, 29.9), 30, False),
        ((36, 29.9), 30, False),
    ],
)
def test_a_decibel_may_be_lost_and_a_floor_holds(
    accept: Accept, after: tuple[float, float], floor: float | None, accepted: bool
) -> None:
    assert accept(of_mean(34, 31), of_mean(*after), psnr(floor)) == accepted


@both
@pytest.mark.parametrize("metric", ["lpips", "features"])
@pytest.mark.parametrize(
    ("before", "after", "limit", "accepted"),
    [
        (0.2, 0.2, None, True),
        (0.2, 0.25, None, True),  # 0.97 dB
        (0.2, 0.26, None, False),  # 1.1 dB
        (0.3, 0.1, None, True),
        (0.2, 0.25, 0.25, True),
        (0.2, 0.25, 0.24, False),
        (0.0, UNSEEN, None, True),  # nobody sees it
        (UNSEEN / 10, 1.2 * UNSEEN, None, True),
        (0.0, 2 * UNSEEN, None, False),
        (0.2, NAN, None, False),
        (0.2, NAN, 0.5, False),
    ],
)
def test_the_same_in_distances(
    accept: Accept,
    metric: Metric,
    before: float,
    after: float,
    limit: float | None,
    accepted: bool,
) -> None:
    assert accept(far(before), far(after), [Gate(metric, limit)]) == accepted


@both
def test_the_first_gate_decides_on_losses_and_all_limits_hold(accept: Accept) -> None:
    before = images(30.0, distance=0.1)
    worse, better = images(20.0, distance=0.1), images(30.0, distance=0.3)
    lpips, floor = Gate("lpips"), Gate("psnr", 18.0, "option")
    assert accept(before, worse, [lpips, floor]) and not accept(before, better, [lpips, floor])
    assert not accept(before, images(17.9, distance=0.1), [lpips, floor])
    beside = Gate("features", 0.5, "option")
    assert accept(before, images(20.0, distance=0.1, features=0.5), [lpips, floor, beside])
    assert not accept(before, images(20.0, distance=0.1, features=0.51), [lpips, floor, beside])


@both
def test_images_that_are_no_number_are_not_accepted(accept: Accept) -> None:
    assert not accept(of_mean(34, 31), images(NAN), psnr())
    assert not accept(of_mean(34, 31), images(34.0, NAN, 34.0), psnr(30.0))


def test_each_gate_has_its_own_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gates, "POOLING_LOSS", 0.0)
    before, after = of_mean(34, 31), of_mean(33.5, 31)
    assert accept_kernels(before, after, psnr()) and not accept_pooling(before, after, psnr())


def test_no_limit_always_holds() -> None:
    assert shortfall(psnr(), images(3.0)) is None
    assert shortfall(psnr(30.0), images(30.0)) is None
    assert shortfall([Gate("lpips")], far(0.9)) is None
    assert shortfall([Gate("lpips", 0.2)], far(0.1, 0.2)) is None


def test_the_limit_that_is_furthest_comes_first() -> None:
    found = shortfall([*psnr(30.0), Gate("lpips", 0.2, "option")], images(40.0, 27.0))
    assert found == Shortfall(Gate("psnr", 30.0, "option"), 30.0, 27.0)
    assert found.factor == pytest.approx(2, rel=0.01)
    assert f"{found}" == "worst image at 27.0 dB where 30" and found.option == "--min-psnr"
    far_off = images(40.0, 27.0, distance=0.5)
    found = shortfall([*psnr(30.0), Gate("lpips", 0.2, "option")], far_off)
    assert found is not None and found.factor == 2.5 and found.option == "--max-lpips"
    assert f"{found}" == "worst image at LPIPS 0.5000 where 0.2"


@pytest.mark.parametrize(
    ("options", "judge", "expected"),
    [
        ({}, "psnr", [Gate("psnr")]),
        ({"min_psnr": 38.0}, "psnr", [Gate("psnr", 38.0, "option")]),
        ({}, "lpips", [Gate("lpips")]),
        (
            {"min_psnr": 18.0, "max_lpips": 0.3},
            "lpips",
            [Gate("lpips", 0.3, "option"), Gate("psnr", 18.0, "option")],
        ),
        ({"max_lpips": 0.3}, "psnr", [Gate("psnr"), Gate("lpips", 0.3, "option")]),
        ({"max_feature_distance": 1.0}, "features", [Gate("features", 1.0, "option")]),
        (
            {"max_feature_distance": 1.0},
            "lpips",
            [Gate("lpips"), Gate("features", 1.0, "option")],
        ),
    ],
)
def test_the_family_s_metric_is_the_first_gate(
    options: dict[str, Any], judge: Metric, expected: list[Gate]
) -> None:
    assert list(gates_of(QuantOptions(**options), judge)) == expected


@dataclass(frozen=True)
class Ruler:
    """Stands in for a perceptual distance."""

    metric: Metric


@pytest.fixture(params=[True, False], ids=["weights", "none"])
def lpips_is_here(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    def missing(folder: Path | None) -> Any:
        raise InputError("no weights")

    here: bool = request.param
    ruler = Ruler("lpips")
    monkeypatch.setattr(gates, "find_lpips", lambda folder: ruler if here else None)
    monkeypatch.setattr(gates, "open_lpips", (lambda folder: ruler) if here else missing)
    monkeypatch.setattr(gates, "open_stand_in", lambda: Ruler("features"))
    return here


def test_a_feature_distance_stands_in_under_its_own_name(lpips_is_here: bool) -> None:
    for family in ("psnr", "lpips"):
        found = judging(QuantOptions(), family, None)  # type: ignore[arg-type]
        expected = "lpips" if lpips_is_here else "features"
        assert found.perceptual.metric == expected and found.features is None
        assert found.gates == (Gate("psnr" if family == "psnr" else expected),)
        assert found.metric == found.gates[0].metric


def test_nothing_stands_in_for_a_limit_of_lpips(lpips_is_here: bool) -> None:
    asked = QuantOptions(max_lpips=0.3)
    if not lpips_is_here:
        with pytest.raises(InputError, match="no weights"):
            judging(asked, "psnr", None)
        return
    assert judging(asked, "lpips", None).gates == (Gate("lpips", 0.3, "option"),)


def test_a_feature_distance_is_measured_beside_lpips_where_it_is_limited(
    lpips_is_here: bool,
) -> None:
    found = judging(QuantOptions(max_feature_distance=0.4), "lpips", None)
    limited = Gate("features", 0.4, "option")
    if lpips_is_here:
        assert found.features is not None and found.features.metric == "features"
        assert found.gates == (Gate("lpips"), limited)
    else:
        assert found.features is None and found.gates == (limited,)


def test_pooling_says_by_what_it_was_judged() -> None:
    limits = [*psnr(30.0), Gate("lpips", 0.2, "option")]
    before, after = WorstImages("psnr", 34.0, 31.0), WorstImages("psnr", 32.5, 30.5)
    note = str(PoolingMeasured(False, before, after, limits))
    assert note == (
        "attention isn't pooled: the worst images have a mean PSNR of 32.5 dB (worst 30.5) with "
        "it, 34.0 dB (worst 31.0) without; 1 dB may be lost, and --min-psnr 30 and --max-lpips "
        "0.2 must hold"
    )
    distances = WorstImages("lpips", 0.2, 0.3), WorstImages("lpips", 0.21, 0.31)
    note = str(PoolingMeasured(True, *distances, [Gate("lpips")]))
    assert note == (
        "attention is pooled: the worst images have a mean LPIPS of 0.2100 (worst 0.3100) with "
        "it, 0.2000 (worst 0.3000) without"
    )
