"""The search of layers' schemes, on layers whose figures are made up: nothing is generated."""

from __future__ import annotations

from collections.abc import Iterable
from math import log10

import pytest

from edgesd.errors import UsageError
from edgesd.export.quantize.assign import LayerScheme, Option
from edgesd.export.quantize.layers import Layer
from edgesd.export.quantize.store import Summary
from edgesd.progress import Progress
from edgesd.recipes.gates import Shortfall
from edgesd.recipes.search import Assignment, Budget, Probes, SchemeSearch
from edgesd.spec.quality import Gate
from edgesd.spec.scheme import Scheme, parse_scheme

ROWS = 100
PROBES = (0, 1)


def missed(worst: float, floor: float) -> Shortfall:
    return Shortfall(Gate("psnr", floor, "option"), floor, worst)


def layer(name: str, component: str = "unet") -> Layer:
    return Layer(component, name, f"{name}/Node", "linear", (64, 128))


LAYERS = [layer(f"line{index}") for index in range(8)]
OTHER = layer("line", "vae_encoder")


class FakeLayers:
    """Layers whose error falls with their bytes."""

    def quantize(
        self, wanted: Iterable[tuple[Layer, LayerScheme]], progress: Progress, task: str
    ) -> None:
        """Nothing to do: summaries are made up."""

    def summary(self, layer: Layer, scheme: Scheme) -> Summary:
        rank = min(scheme.rank, 64)
        size = layer.rows * layer.columns * scheme.weight_bits // 8 + 2 * rank * (64 + 128)
        error = 1e3 / size * (1 if scheme.activation_bits == 16 else 2)
        return Summary(scheme, "rtn", rank, size, error)

    def rows_per_run(self, layer: Layer) -> int:
        return ROWS


def sensitivities(probes: Probes) -> dict[Layer, float]:
    """The later a layer, the more it does to the image."""
    return {la: 1.0 + index for index, la in enumerate(LAYERS)} | {OTHER: 0.0}


def search(scheme: str = "w4a8-g64-lr32") -> SchemeSearch:
    planned: dict[Layer, LayerScheme] = {la: parse_scheme(scheme) for la in [*LAYERS, OTHER]}
    return SchemeSearch(
        parse_scheme(scheme), planned, FakeLayers(), sensitivities, ["unet", "vae_decoder"]
    )


def planned(found: SchemeSearch) -> Assignment:
    return Assignment(found.planned)


def taken(found: SchemeSearch, assignment: Assignment) -> int:
    return found.total_bytes(assignment)


def test_a_budget_of_bytes_is_kept_and_spent_where_images_gain() -> None:
    ours = search()
    all_of_it = taken(ours, planned(ours))
    budget = Budget(0.7 * all_of_it, max_size=0.2, limit=0.9 * all_of_it)
    chosen = ours.spend(budget, PROBES)
    assert 0.6 * all_of_it < taken(ours, chosen) <= 0.7 * all_of_it
    sizes = [ours.layer_bytes(la, chosen.schemes[la]) for la in LAYERS]
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1]
    assert all(s is not None and s.activation_bits == 8 for s in chosen.schemes.values())
    changed = {la for la in chosen.schemes if chosen.schemes[la] != ours.planned[la]}
    assert changed == chosen.reasons.keys() and set(chosen.reasons.values()) == {
        "the best use of the budget"
    }


def test_what_no_image_depends_on_gets_no_branch() -> None:
    ours = search()
    chosen = ours.spend(Budget(1e9, max_size=0.9, limit=1e9), PROBES)
    other = chosen.schemes[OTHER]
    assert other is not None and other.rank == 0


def test_budgets_out_of_reach_say_what_the_least_is() -> None:
    ours = search()
    with pytest.raises(UsageError, match=r"--max-size 0\.1 allows 3\.0 MB; .* at least 3\.\d MB"):
        ours.spend(Budget(1e3, max_size=0.1, limit=3e6), PROBES)
    with pytest.raises(UsageError, match=r"--max-time 0\.1: .* at least 0\.\d\d of the source's"):
        time = 0.1 * ours.source_time()
        ours.spend(Budget(time=time, max_time=0.1), PROBES)


def test_two_budgets_that_only_together_are_too_much() -> None:
    """Any layer can be small (a group of 64) or quick (8 bits in 8), and none can be both."""
    ours = search("w4a8-g64")
    options = ours.options(PROBES)
    small = sum(min(o.bytes for o in found) for found in options.values())
    quick = sum(min(o.time for o in found) for found in options.values())
    budget = Budget(small, quick, max_size=0.1, max_time=0.5, limit=1e6)
    with pytest.raises(UsageError, match=r"keeps both --max-size 0\.1 and --max-time 0\.5"):
        ours.spend(budget, PROBES)


def test_layers_that_do_most_are_promoted_first() -> None:
    ours = search("w8a8")
    after = ours.promote(planned(ours), missed(30.0, 31.0), Budget(), PROBES)
    changed = [la for la in LAYERS if after.schemes[la] != ours.planned[la]]
    assert changed and changed == LAYERS[-len(changed) :] and len(changed) < len(LAYERS)
    assert all("30.0 dB where 31 was asked" in after.reasons[la] for la in changed)
    again = ours.promote(after, missed(30.9, 31.0), Budget(), PROBES)
    same = [la for la in changed if again.schemes[la] == after.schemes[la]]
    assert same and all(again.reasons[la] == after.reasons[la] for la in same)


def test_a_distance_asks_for_as_much_as_the_decibels_that_it_means() -> None:
    ours, gate = search("w8a8"), Gate("lpips", 0.2, "option")
    after = ours.promote(planned(ours), Shortfall(gate, 0.2, 0.4), Budget(), PROBES)
    doubled = ours.promote(planned(ours), missed(30.0, 30.0 + 10 * log10(2)), Budget(), PROBES)
    assert after.schemes == doubled.schemes != ours.planned
    assert {*after.reasons} == {*doubled.reasons}
    for reason in after.reasons.values():
        assert reason.startswith("worst image at LPIPS 0.4000 where 0.2 was asked for; alone")


def test_where_the_budget_leaves_nothing_nothing_changes() -> None:
    ours = search("w8a8")
    before = planned(ours)
    budget = Budget(bytes=ours.total_bytes(before), time=0.0)
    after = ours.promote(before, missed(30.0, 99.0), budget, PROBES)
    assert after.schemes == before.schemes and not after.reasons


def test_a_layer_that_gets_its_planned_scheme_again_has_no_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ours, worse = search("w8a8"), parse_scheme("w4a8-g64")
    first, plan = LAYERS[0], ours.planned
    options = {first: [Option(worse, 1, 1.0, 2.0), Option(plan[first], 2, 2.0, 0.0)]}
    before = Assignment({first: worse}, {first: "the best use of the budget"})
    monkeypatch.setattr(ours, "options", lambda probes: options)
    after = ours.promote(before, missed(30.0, 40.0), Budget(), PROBES)
    assert after.schemes == {first: plan[first]} and not after.reasons


def test_recipes_say_what_was_planned() -> None:
    ours = search("w8a8")
    assignment = Assignment({**ours.planned, LAYERS[3]: None}, {LAYERS[3]: "why"})
    recipes = {recipe.name: recipe for recipe in ours.recipes(assignment)}
    promoted, plain = recipes["line3"], recipes["line2"]
    assert (promoted.scheme, promoted.planned_scheme, promoted.reason) == ("fp16", "w8a8", "why")
    assert promoted.bytes == 2 * 64 * 128 and promoted.error == 0
    assert (plain.scheme, plain.planned_scheme, plain.reason) == ("w8a8", None, None)
    assert ours.total_bytes(assignment) == sum(recipe.bytes for recipe in ours.recipes(assignment))


def test_the_most_sensitive_come_first() -> None:
    assert search().most_sensitive(PROBES, 3) == [LAYERS[7], LAYERS[6], LAYERS[5]]
