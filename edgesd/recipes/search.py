"""Which scheme each layer gets: what budgets of bytes and time allow, what a quality floor needs.

Nothing is generated or written here; a function gives each layer's effect on the image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from edgesd.errors import UsageError
from edgesd.export.cost.times import relative_time
from edgesd.export.quantize.assign import (
    LayerScheme,
    Option,
    assign,
    options_of,
    total_loss,
    within,
)
from edgesd.export.quantize.layers import Layer
from edgesd.export.quantize.store import Summary
from edgesd.progress import SILENT, Progress
from edgesd.recipes.gates import Shortfall
from edgesd.spec.bundle import LayerRecipe
from edgesd.spec.scheme import Scheme

Probes = tuple[int, ...]
"""Places of the requests whose images a layer's effect is measured with."""

MARGIN = 1.15
"""Promoted layers must take this much more error away than is missing."""


class Layers(Protocol):
    """What a search asks of layers (LayerStore)."""

    def quantize(
        self, wanted: Iterable[tuple[Layer, LayerScheme]], progress: Progress, task: str
    ) -> None:
        """Quantize layers that aren't there yet, several at a time."""

    def summary(self, layer: Layer, scheme: Scheme) -> Summary:
        """`layer` quantized by `scheme`."""

    def rows_per_run(self, layer: Layer) -> int:
        """Rows of the layer's matrix product in one run of its network."""


@dataclass(frozen=True)
class Assignment:
    """The scheme of every layer. reasons: why a layer has another scheme than was planned."""

    schemes: Mapping[Layer, LayerScheme]
    reasons: Mapping[Layer, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Budget:
    """What all layers may take together: bytes on disk, and time in the unit of `relative_time`.

    max_size, max_time: the ratios that were asked for. limit: bytes of the whole bundle.
    """

    bytes: float = math.inf
    time: float = math.inf
    max_size: float | None = None
    max_time: float | None = None
    limit: float = math.inf


class SchemeSearch:
    """Chooses schemes for layers of which `scheme` was asked.

    planned: the scheme of each layer before anything is measured. sensitivities: mean squared error
    of the images at some places when one layer alone is quantized as planned. generating:
    components that an image depends on.
    """

    def __init__(
        self,
        scheme: Scheme,
        planned: Mapping[Layer, LayerScheme],
        layers: Layers,
        sensitivities: Callable[[Probes], Mapping[Layer, float]],
        generating: Collection[str],
        progress: Progress = SILENT,
    ) -> None:
        self.scheme, self.planned, self.layers = scheme, planned, layers
        self._sensitivities, self._generating = sensitivities, generating
        self._progress = progress

    def spend(self, budget: Budget, probes: Probes) -> Assignment:
        """The schemes that make the best images within `budget`. Raises UsageError, with what the
        least is, when none keep it.

        A budget decides on ranks and weights; activations keep the format that was asked for.
        """
        options = {
            layer: [o for o in every if _same_activations(o.scheme, self.planned[layer])]
            for layer, every in self.options(probes).items()
        }
        least = sum(min(option.bytes for option in few) for few in options.values())
        if least > budget.bytes:
            needed = budget.limit - budget.bytes + least
            raise UsageError(
                f"--max-size {budget.max_size:g} allows {budget.limit / 1e6:.1f} MB; {self.scheme} "
                f"takes at least {needed / 1e6:.1f} MB: allow more, or choose a scheme of fewer "
                "bits"
            )
        fastest = sum(min(option.time for option in few) for few in options.values())
        if budget.max_time is not None and fastest > budget.time:
            raise UsageError(
                f"--max-time {budget.max_time:g}: {self.scheme} takes at least "
                f"{budget.max_time * fastest / budget.time:.2f} of the source's time as "
                "estimated: allow more, or choose another scheme"
            )
        chosen = assign(options, budget.bytes, budget.time)
        if not within(chosen, budget.bytes, budget.time):
            raise UsageError(
                f"no choice of layers' schemes keeps both --max-size {budget.max_size:g} and "
                f"--max-time {budget.max_time:g}: allow more of one"
            )
        return self._changed(
            Assignment(self.planned), chosen, lambda layer: "the best use of the budget"
        )

    def promote(
        self, before: Assignment, missed: Shortfall, budget: Budget, probes: Probes
    ) -> Assignment:
        """Give layers better schemes until the error that is too much should be gone, the best gain
        for its cost first. The same schemes as `before` where the budget leaves nothing to promote.

        missed: the limit that doesn't hold. What counts is the error in the images at `probes`.
        Where the budget leaves too little, layers that matter less to them may pay.
        """
        options = self.options(probes)
        losses = {
            layer: next((o.loss for o in options[layer] if o.scheme == scheme), 0.0)
            for layer, scheme in before.schemes.items()
        }
        target = sum(losses.values()) / (missed.factor * MARGIN)
        chosen = assign(options, budget.bytes, budget.time, target, before.schemes)
        if total_loss(chosen) > target:
            afresh = assign(options, budget.bytes, budget.time, target)
            chosen = min(chosen, afresh, key=total_loss)

        def reason(layer: Layer) -> str:
            return f"{missed} was asked for; alone, it makes a squared error of {losses[layer]:.2g}"

        return self._changed(before, chosen, reason)

    def most_sensitive(self, probes: Probes, count: int = 5) -> list[Layer]:
        """The layers that do most to the image when they are quantized as planned."""
        ordered = sorted(self._sensitivities(probes).items(), key=lambda item: -item[1])
        return [layer for layer, _ in ordered[:count]]

    def source_time(self) -> float:
        """Time of all layers in the source, in the unit of `relative_time`."""
        runs = self.layers.rows_per_run
        return sum(relative_time(layer, None, runs(layer)) for layer in self.planned)

    def options(self, probes: Probes) -> dict[Layer, list[Option]]:
        """Every layer's options, with the squared error each would make in the image: measured
        for the planned one, and in proportion to the squared error of the layer's output else."""
        measured = self._sensitivities(probes)
        schemes = {layer: self._schemes_of(layer) for layer in self.planned}
        pairs = [(layer, scheme) for layer, several in schemes.items() for scheme in several]
        self.layers.quantize(pairs, self._progress, "options")
        out: dict[Layer, list[Option]] = {}
        for layer, base in self.planned.items():
            rows = self.layers.rows_per_run(layer)
            unit = 0.0
            if base is not None and layer.component in self._generating:
                unit = measured[layer] / max(self.layers.summary(layer, base).error, 1e-9) ** 2
            out[layer] = []
            for scheme in schemes[layer]:
                error = 0.0 if scheme is None else self.layers.summary(layer, scheme).error
                time = relative_time(layer, scheme, rows)
                size = self.layer_bytes(layer, scheme)
                out[layer].append(Option(scheme, size, time, unit * error**2))
        return out

    def _schemes_of(self, layer: Layer) -> list[LayerScheme]:
        """What a layer may be given."""
        base = self.planned[layer]
        if layer.component in self._generating:
            return options_of(layer, base)
        # What no image depends on has nothing to gain from a branch, which others need.
        return [base and Scheme(base.weight_bits, base.activation_bits, base.group), base]

    def layer_bytes(self, layer: Layer, scheme: LayerScheme) -> int:
        """Bytes on disk of a layer under a scheme."""
        if scheme is None:
            return 2 * layer.rows * layer.columns
        return self.layers.summary(layer, scheme).bytes

    def total_bytes(self, assignment: Assignment) -> int:
        """Bytes on disk of all layers."""
        return sum(self.layer_bytes(*item) for item in assignment.schemes.items())

    def recipes(self, assignment: Assignment) -> tuple[LayerRecipe, ...]:
        """The recipe of every layer."""
        return tuple(
            self._recipe(layer, scheme, assignment.reasons.get(layer))
            for layer, scheme in assignment.schemes.items()
        )

    def _recipe(self, layer: Layer, scheme: LayerScheme, reason: str | None) -> LayerRecipe:
        summary = None if scheme is None else self.layers.summary(layer, scheme)
        return LayerRecipe(
            name=layer.name,
            component=layer.component,
            kind=layer.kind,
            shape=layer.shape,
            scheme="fp16" if summary is None else str(summary.scheme),
            method="fp16" if summary is None else summary.method,
            rank=0 if summary is None else summary.rank,
            bytes=self.layer_bytes(layer, scheme),
            error=0.0 if summary is None else summary.error,
            planned_scheme=None if reason is None else str(self.planned[layer] or "fp16"),
            reason=reason,
        )

    def _changed(
        self, before: Assignment, chosen: Mapping[Layer, Option], reason: Callable[[Layer], str]
    ) -> Assignment:
        """`before` with the chosen options; a layer whose scheme stays keeps its reason."""
        schemes, reasons = dict(before.schemes), dict(before.reasons)
        for layer, option in chosen.items():
            if option.scheme == schemes[layer]:
                continue
            schemes[layer] = option.scheme
            reasons.pop(layer, None)
            if option.scheme != self.planned[layer]:
                reasons[layer] = reason(layer)
        return Assignment(schemes, reasons)


def _same_activations(scheme: LayerScheme, planned: LayerScheme) -> bool:
    if scheme is None or planned is None:
        return scheme == planned
    return scheme.activation_bits == planned.activation_bits
