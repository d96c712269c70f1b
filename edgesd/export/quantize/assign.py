"""Mixed precision: which scheme each layer gets.

`planned` is the rule before anything is measured. `assign` spends a budget of bytes where images
gain most, given the error of each option of each layer in the image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from edgesd.export.quantize.layers import Layer
from edgesd.spec.scheme import GROUPS, Scheme

LayerScheme = Scheme | None
"""A layer's scheme; None: fp16 weights, fp32 arithmetic."""


@dataclass(frozen=True)
class Option:
    """One way to represent a layer: its bytes on disk, its computing time in an image (any unit),
    and the squared error it makes in the image (any unit), each the same for all layers."""

    scheme: LayerScheme
    bytes: int
    time: float
    loss: float


_PRICES = (1.0, 8.0, 1 / 8, 64.0, 1 / 64, 1e6, 1e-6)
"""Of a byte against time, in turn, until both budgets hold."""


def planned(
    layers: Sequence[Layer], scheme: Scheme, ends: bool = True, once: Collection[str] = ()
) -> dict[Layer, LayerScheme]:
    """The scheme of every layer before anything is measured.

    A component's ways in and out stay in fp16, as they see or make few channels and hold few
    weights: its first and last convolution, and, with `ends`, those of a transformer. An embedding,
    which is read and not multiplied, gets 8 bits. once: components that don't run at each step:
    4-bit inputs would spare next to no time there, and have 8 bits instead.
    """
    convs: dict[str, list[Layer]] = {}
    for layer in layers:
        if layer.kind == "conv":
            convs.setdefault(layer.component, []).append(layer)
    kept = {layer for group in convs.values() for layer in (group[0], group[-1])}
    kept |= {layer for layer in layers if ends and layer.end}
    found: dict[Layer, LayerScheme] = {}
    for layer in layers:
        if layer in kept:
            found[layer] = None
        elif layer.kind == "embedding":
            found[layer] = Scheme(8, 16)
        elif layer.component in once and scheme.activation_bits == 4:
            found[layer] = promoted(scheme)
        else:
            found[layer] = scheme
    return found


def options_of(layer: Layer, scheme: LayerScheme) -> list[LayerScheme]:
    """`scheme` and what a layer may get in its place: smaller ranks, groups of half the size,
    16-bit activations, then more bits, up to fp16."""
    if scheme is None or layer.kind == "embedding":
        return [scheme, None] if scheme else [None]
    limit = min(scheme.rank, layer.rows, layer.columns)
    ranks = {rank for part in (8, 4, 2) if (rank := scheme.rank // part) < limit}
    groups, activations = [scheme.group], [scheme.activation_bits]
    if scheme.weight_bits == 4 and scheme.group // 2 in GROUPS:
        groups.append(scheme.group // 2)
    if scheme.weight_bits == 4 and scheme.activation_bits == 8:
        activations.append(16)
    out: list[LayerScheme] = [
        Scheme(scheme.weight_bits, bits, group, rank)
        for bits in activations
        for group in groups
        for rank in sorted({0, scheme.rank, *ranks})
    ]
    step = scheme
    while (upper := promoted(step)) is not None:
        out.append(upper)
        step = upper
    return [*out, None]


def promoted(scheme: Scheme) -> LayerScheme:
    """The next better scheme; None for fp16, above 8-bit weights and 16-bit activations."""
    if scheme.activation_bits == 4:
        return Scheme(scheme.weight_bits, 8, scheme.group, scheme.rank)
    if scheme.weight_bits == 4:
        return Scheme(8, scheme.activation_bits)
    return Scheme(8, 16) if scheme.activation_bits == 8 else None


def assign(
    options: Mapping[Layer, Sequence[Option]],
    max_bytes: float = math.inf,
    max_time: float = math.inf,
    max_loss: float = 0.0,
    start: Mapping[Layer, LayerScheme] | None = None,
) -> dict[Layer, Option]:
    """The cheapest options whose total loss is at most `max_loss`, within both budgets.

    With the default `max_loss` of 0 the budgets are spent as well as can be. Every layer begins
    with its cheapest option (or with that of `start`), and the step that takes away most loss for
    what it costs comes first: on each layer's lower convex hull that is optimal up to the last step
    (Everett 1963, generalized Lagrange multipliers). Cost is bytes and time, each relative to the
    total of the cheapest options; where that exceeds a budget, one of both gets dearer. When no
    price keeps both budgets (`within`), the last try is returned.
    """
    chosen: dict[Layer, Option] = {}
    for price in _PRICES:
        chosen = _assign_at(price, options, max_bytes, max_time, max_loss, start)
        if within(chosen, max_bytes, max_time):
            break
    return chosen


def within(chosen: Mapping[Layer, Option], max_bytes: float, max_time: float) -> bool:
    """Whether the chosen options keep both budgets."""
    return (
        sum(option.bytes for option in chosen.values()) <= max_bytes
        and sum(option.time for option in chosen.values()) <= max_time
    )


def total_loss(chosen: Mapping[Layer, Option]) -> float:
    """The squared error that all layers' options make in the image together."""
    return sum(option.loss for option in chosen.values())


def _assign_at(
    price: float,
    options: Mapping[Layer, Sequence[Option]],
    max_bytes: float,
    max_time: float,
    max_loss: float,
    start: Mapping[Layer, LayerScheme] | None,
) -> dict[Layer, Option]:
    bytes_unit = max(sum(min(o.bytes for o in found) for found in options.values()), 1)
    time_unit = max(sum(min(o.time for o in found) for found in options.values()), 1e-30)

    def cost(option: Option) -> float:
        return price * option.bytes / bytes_unit + option.time / time_unit

    hulls = {layer: _hull(found, cost) for layer, found in options.items()}
    if start is not None:
        for layer in hulls:
            first = next((o for o in options[layer] if o.scheme == start[layer]), None)
            if first is not None:
                better = [o for o in options[layer] if o.loss < first.loss]
                hulls[layer] = [first, *_hull_above(first, better, cost)]
    now = {layer: hull[0] for layer, hull in hulls.items()}
    used_bytes = sum(option.bytes for option in now.values())
    used_time = sum(option.time for option in now.values())
    loss = sum(option.loss for option in now.values())
    steps = [
        (_slope(hull[at], hull[at + 1], cost), layer, at)
        for layer, hull in hulls.items()
        for at in range(len(hull) - 1)
    ]
    for _, layer, at in sorted(steps, key=lambda step: -step[0]):
        if loss <= max_loss:
            break
        before, after = hulls[layer][at], hulls[layer][at + 1]
        more_bytes, more_time = after.bytes - before.bytes, after.time - before.time
        if now[layer] is not before:
            continue
        if (more_bytes > 0 and used_bytes + more_bytes > max_bytes) or (
            more_time > 0 and used_time + more_time > max_time
        ):
            continue
        now[layer] = after
        used_bytes += more_bytes
        used_time += more_time
        loss += after.loss - before.loss
    return now


Cost = Callable[[Option], float]


def _hull(options: Sequence[Option], cost: Cost) -> list[Option]:
    """Options by rising cost and falling loss, each step gaining less for it than the last."""
    first = min(options, key=lambda option: (cost(option), option.loss))
    better = [option for option in options if option.loss < first.loss]
    return [first, *_hull_above(first, better, cost)]


def _hull_above(first: Option, better: Sequence[Option], cost: Cost) -> list[Option]:
    hull = [first]
    for option in sorted(better, key=lambda option: (cost(option), option.loss)):
        if option.loss >= hull[-1].loss:
            continue
        while len(hull) >= 2 and _slope(hull[-2], option, cost) >= _slope(hull[-2], hull[-1], cost):
            hull.pop()
        hull.append(option)
    return hull[1:]


def _slope(first: Option, second: Option, cost: Cost) -> float:
    """Loss taken away for each unit of cost; infinite for a step that costs nothing."""
    more = cost(second) - cost(first)
    return (first.loss - second.loss) / more if more > 0 else math.inf
