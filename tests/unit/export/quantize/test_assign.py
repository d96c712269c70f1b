"""Mixed precision: the rule, the ladder, and how a budget is spent."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import replace

import pytest

from edgesd.export.quantize.assign import (
    Option,
    assign,
    options_of,
    planned,
    promoted,
    within,
)
from edgesd.export.quantize.layers import Layer
from edgesd.spec.scheme import Scheme, parse_scheme


def layer(name: str, kind: str = "linear", shape: tuple[int, ...] = (64, 128)) -> Layer:
    return Layer("unet", name, f"{name}/Node", kind, shape)


def test_ends_stay_in_fp16_and_embeddings_get_eight_bits() -> None:
    convs = [layer(f"conv{i}", "conv", (32, 32, 3, 3)) for i in range(3)]
    table, line = layer("table", "embedding", (100, 32)), layer("line")
    scheme = parse_scheme("w4a8-g64-lr32")
    found = planned([table, convs[0], line, convs[1], convs[2]], scheme)
    assert found == {
        table: Scheme(8, 16),
        convs[0]: None,
        line: scheme,
        convs[1]: scheme,
        convs[2]: None,
    }


@pytest.mark.parametrize(
    ("asked", "given"), [("w4a4-g64-lr8", "w4a8-g64-lr8"), ("w8a8", "w8a8"), ("w4a16-g64",) * 2]
)
def test_networks_that_run_once_have_no_inputs_of_four_bits(asked: str, given: str) -> None:
    line, text = layer("line"), replace(layer("line"), component="text_encoder")
    table = replace(layer("table", "embedding", (100, 32)), component="text_encoder")
    found = planned([line, text, table], parse_scheme(asked), once={"text_encoder"})
    assert found == {line: parse_scheme(asked), text: parse_scheme(given), table: Scheme(8, 16)}


def test_the_ladder_ends_in_fp16() -> None:
    steps = [parse_scheme("w4a4-g64-lr8")]
    while (upper := promoted(steps[-1])) is not None:
        steps.append(upper)
    assert [str(step) for step in steps] == ["w4a4-g64-lr8", "w4a8-g64-lr8", "w8a8", "w8a16"]


def test_options_have_smaller_ranks_and_groups_and_better_schemes() -> None:
    line = layer("line", shape=(16, 128))

    def names(scheme: str) -> list[str]:
        return [str(found or "fp16") for found in options_of(line, parse_scheme(scheme))]

    # A branch of rank 16 is the whole layer: larger ones are the planned scheme itself.
    ranks = ("", "-lr4", "-lr8", "-lr32")
    assert names("w4a16-g64-lr32") == [
        *(f"w4a16-g64{rank}" for rank in ranks),
        *(f"w4a16-g32{rank}" for rank in ranks),
        *("w8a16", "fp16"),
    ]
    assert names("w4a8-g16") == ["w4a8-g16", "w4a16-g16", "w8a8", "w8a16", "fp16"]
    ranks = ("", "-lr1", "-lr2", "-lr4", "-lr8")
    assert names("w8a8-lr8") == [*(f"w8a8{rank}" for rank in ranks), "w8a16", "fp16"]
    assert options_of(layer("x"), None) == [None]
    assert options_of(layer("x", "embedding"), Scheme(8, 16)) == [Scheme(8, 16), None]


def random_options(seed: int, layers: int, count: int) -> dict[Layer, list[Option]]:
    rng = random.Random(seed)
    return {
        layer(f"line{i}"): [
            Option(Scheme(8, 8, 0, k), rng.randrange(1, 60), 1.0, rng.random() / (k + 1))
            for k in range(count)
        ]
        for i in range(layers)
    }


@pytest.mark.parametrize("seed", range(12))
def test_near_the_best_of_all_assignments(seed: int) -> None:
    options = random_options(seed, 5, 4)
    least = sum(min(o.bytes for o in found) for found in options.values())
    for budget in (least, least + 20, least + 60, 10_000):
        found = assign(options, budget)
        assert sum(o.bytes for o in found.values()) <= budget
        loss = sum(o.loss for o in found.values())
        best = min(
            sum(o.loss for o in combination)
            for combination in itertools.product(*options.values())
            if sum(o.bytes for o in combination) <= budget
        )
        # Greedy on the hull misses at most what one layer could still gain.
        spare = max(max(o.loss for o in found) for found in options.values())
        assert best <= loss + 1e-12 and loss <= best + spare
        if budget == 10_000:
            assert loss == pytest.approx(best)


def test_it_stops_at_the_loss_that_is_allowed() -> None:
    options = random_options(1, 20, 4)
    cheap = sum(o.loss for o in assign(options, 0).values())
    costs = []
    for allowed in (cheap, cheap * 0.7, cheap * 0.4):
        found = assign(options, max_loss=allowed)
        assert sum(o.loss for o in found.values()) <= allowed
        costs.append(sum(o.bytes for o in found.values()))
    assert costs == sorted(costs)


def test_a_start_is_never_made_worse() -> None:
    options = random_options(2, 20, 4)
    start = {key: found[1].scheme for key, found in options.items()}
    same = assign(options, max_loss=float("inf"), start=start)
    assert {key: o.scheme for key, o in same.items()} == start
    better = assign(options, start=start)
    for key, option in better.items():
        assert option.loss <= options[key][1].loss


def test_time_is_a_budget_too() -> None:
    options = {
        layer("a"): [Option(Scheme(8, 8), 10, 1.0, 5.0), Option(Scheme(8, 16), 9, 3.0, 0.0)],
        layer("b"): [Option(Scheme(8, 8), 10, 1.0, 4.0), Option(Scheme(8, 16), 9, 3.0, 0.0)],
    }
    assert [o.time for o in assign(options, max_time=4.0).values()] == [3.0, 1.0]
    assert [o.time for o in assign(options).values()] == [3.0, 3.0]


def test_where_the_cheapest_of_both_exceeds_one_budget_the_other_pays() -> None:
    small, fast = Option(Scheme(4, 8, 64), 10, 3.0, 1.0), Option(Scheme(8, 8), 14, 1.0, 0.5)
    options = {layer("a"): [small, fast], layer("b"): [small, fast]}
    assert list(assign(options, max_loss=9.0).values()) == [fast, fast]
    for max_bytes in (20, 24, 28):
        assert within(assign(options, max_bytes), max_bytes, math.inf)
    for max_time in (2.0, 4.0):
        assert within(assign(options, max_time=max_time), math.inf, max_time)
    assert not within(assign(options, 20, 2.0), 20, 2.0)
