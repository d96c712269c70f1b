"""What decides whether a change of a bundle's graphs is accepted."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from edgesd.recipes import gates
from edgesd.recipes.gates import WorstImages, accept_kernels, accept_pooling, holds_floor

Accept = Callable[[WorstImages, WorstImages, float | None], bool]
both = pytest.mark.parametrize("accept", [accept_kernels, accept_pooling])


def test_only_the_worst_images_count() -> None:
    decibels = [*[100.0] * 20, 31, 30, 32, 34, 33, 35]
    assert WorstImages.of(decibels) == WorstImages(mean=32.5, least=30)
    assert WorstImages.of([40.0]) == WorstImages(40, 40)


@both
@pytest.mark.parametrize(
    ("after", "floor", "accepted"),
    [
        (WorstImages(34, 30), None, True),
        (WorstImages(33, 20), None, True),  # one decibel of the mean may be lost
        (WorstImages(32.9, 30), None, False),
        (WorstImages(33.5, 30), 30, True),
        (WorstImages(33.5, 29.9), 30, False),
        (WorstImages(36, 29.9), 30, False),
    ],
)
def test_a_decibel_may_be_lost_and_a_floor_holds(
    accept: Accept, after: WorstImages, floor: float | None, accepted: bool
) -> None:
    assert accept(WorstImages(34, 31), after, floor) == accepted


@both
def test_images_that_are_no_number_are_not_accepted(accept: Accept) -> None:
    nan = float("nan")
    assert not accept(WorstImages(34, 31), WorstImages(nan, nan), None)


def test_each_gate_has_its_own_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gates, "POOLING_LOSS", 0.0)
    before, after = WorstImages(34, 31), WorstImages(33.5, 31)
    assert accept_kernels(before, after) and not accept_pooling(before, after)


def test_no_floor_always_holds() -> None:
    assert holds_floor(3.0, None) and holds_floor(30.0, 30.0) and not holds_floor(29.9, 30.0)
