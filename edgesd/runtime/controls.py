"""What ControlNets and adapters add to the denoiser's inputs, step by step.

As in diffusers' pipelines: ControlNets (Zhang et al. 2023, arXiv 2302.05543) run at each step on
what the denoiser is given and a control image, adapters (Mou et al. 2023, arXiv 2302.08453) once.
Their outputs, each times a scale, are added up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from edgesd.errors import InputError, UsageError
from edgesd.runtime.arrays import Array, Float
from edgesd.runtime.conditioning import Run
from edgesd.runtime.pictures import Painting
from edgesd.runtime.requests import CompleteRequest, of_pictures
from edgesd.spec.pipeline import ComponentSpec, Part, Wiring, size_of


@dataclass(frozen=True)
class Shown:
    """What one side component is shown, and how much of its outputs is added.

    image: [1, 3, H, W] from 0 to 1. start, end: parts of the steps, between which it acts. once:
    whether the component runs once for an image.
    """

    component: str
    image: Float
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0
    once: bool = False

    def acts(self, index: int, count: int, taken: int) -> bool:
        """Whether it acts at a step (0-based) of `count`, the first `taken` of which are taken:
        diffusers' `controlnet_keep`, and for what runs once, its `adapter_conditioning_factor`."""
        late = index >= int(taken * self.end) if self.once else (index + 1) / count > self.end
        return not (index / count < self.start or late) and self.scale != 0


@dataclass(frozen=True)
class Controls:
    """All that side components are shown. guess: whether those that run at each step see the
    positive half of guidance alone, and their first outputs count less (guess mode). features:
    outputs [1, C, h, w] of those that ran once."""

    shown: tuple[Shown, ...] = ()
    guess: bool = False
    features: Mapping[Part, Float] = field(default_factory=dict)

    @property
    def components(self) -> frozenset[str]:
        """Those that run at all."""
        return frozenset(one.component for one in self.shown if one.scale != 0)


NO_CONTROLS = Controls()


def controls_of(wiring: Wiring, requests: Sequence[CompleteRequest]) -> Controls:
    """What the requests of a batch show to side components, all the same. Raises InputError for a
    picture that is broken, UsageError where each would be shown another part of it."""
    first = requests[0]
    painted = _painted_alone(requests) if first.controls else None
    sides = {side.name: side for side in wiring.sides}
    shown = []
    for one in first.controls:
        if one.name not in sides:
            continue  # its latents are a part of the denoiser's sample
        side = sides[one.name]
        image = one.hint(first.width, first.height, painted)
        once = side.when == "once"
        shown.append(Shown(side.component, image, one.scale, one.start, one.end, once))
    return Controls(tuple(shown), first.guess_mode)


def _painted_alone(requests: Sequence[CompleteRequest]) -> Painting | None:
    """Where each request paints a part of its image alone, the same in all; None where they paint
    in the whole image."""
    if requests[0].mask_padding is None:
        return None
    found = of_pictures(requests, CompleteRequest.painting)
    if len({one and one.box for one in found}) > 1:
        raise UsageError(
            "the images of one batch that are shown a control image must paint the same part: "
            "generate them one by one, or leave mask_padding out"
        )
    return found[0]


def with_features(
    wiring: Wiring, controls: Controls, run: Run, done: Callable[[str], None]
) -> Controls:
    """`controls` with the outputs of the sides that run once. run, done: see
    conditioning.Prompts."""
    images = {one.component: one.image for one in controls.shown}
    features: dict[Part, Float] = {}
    for side in wiring.sides:
        if side.when == "once" and side.component in controls.components:
            inputs = {one.name: images[side.component] for one in side.inputs}
            for name, values in run(side.component, inputs).items():
                features[Part(side.component, name)] = np.array(values, np.float32)
            done(side.component)
    return Controls(controls.shown, controls.guess, features)


def guess_weights(count: int) -> Float:
    """What outputs of a ControlNet count in guess mode, the first of `count` least."""
    return np.logspace(-1, 0, count).astype(np.float32)


def sum_shapes(
    wiring: Wiring, spec: ComponentSpec, rows: int, height: int, width: int
) -> dict[str, tuple[int, ...]]:
    """Shapes [rows, C, h, w] of the denoiser's inputs that are sums of outputs of sides, by name.
    spec: of the denoiser. rows, height, width: of the latents in one run of it."""
    sizes = {"batch": rows, "height": height, "width": width}
    sums = {one.name for one in wiring.denoiser.inputs if one.fill == "side"}
    return {
        tensor.name: tuple(size_of(dim, sizes) for dim in tensor.shape)
        for tensor in spec.inputs
        if tensor.name in sums
    }


class Sums:
    """The denoiser's inputs that are sums of outputs of sides. inputs: arrays of these that the
    denoiser is run on, by name: they are added up in place, as they are large, but for those of
    another type than fp32."""

    def __init__(self, wiring: Wiring, inputs: Mapping[str, Array]) -> None:
        self.arrays: dict[str, Float] = {
            name: array if array.dtype == np.float32 else np.zeros(array.shape, np.float32)
            for name, array in inputs.items()
        }
        """By the input's name [rows, C, h, w]."""
        self._into: dict[Part, list[Float]] = {}
        for one in wiring.denoiser.inputs:
            if one.name in inputs:
                for part in one.parts:
                    self._into.setdefault(part, []).append(self.arrays[one.name])

    def clear(self) -> None:
        """Begin a new sum."""
        for array in self.arrays.values():
            array.fill(0)

    def add(
        self, component: str, outputs: Mapping[str, Array], gains: Sequence[float], rows: int
    ) -> None:
        """Add outputs [n, C, h, w] of a component, each times its gain, to the last `rows` rows. n:
        1, or `rows`. Raises InputError for other shapes than the denoiser takes."""
        for (name, values), gain in zip(outputs.items(), gains, strict=True):
            for array in self._into.get(Part(component, name), ()):
                if values.shape[1:] != array.shape[1:] or len(values) not in (1, rows):
                    raise InputError(
                        f"{component} makes {name} of the shape {list(values.shape)}, and "
                        f"{[rows, *array.shape[1:]]} is added to: build the bundle again"
                    )
                scaled = values * np.float32(gain)
                into = array[-rows:].reshape(-1, *scaled.shape)
                into += scaled
