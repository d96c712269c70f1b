"""diffusers' T2IAdapter (Mou et al. 2023, arXiv 2302.08453).

Graph, with h and w in latents and H and W in pixels: control [batch, 3, H, W] from 0 to 1 ->
feature_0, feature_1 ... (parts/inlets.py), unscaled.
"""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from edgesd.errors import InputError
from edgesd.export.families import Component
from edgesd.export.families.checkpoint import Checkpoint
from edgesd.export.families.parts.inlets import (
    FEATURE,
    Inlets,
    check_places,
    on_meta,
    place_of,
    tensors,
)
from edgesd.export.families.parts.shapes import (
    COLOURS,
    CONTROL,
    control_image,
    dims,
    sizes,
    uniform,
)
from edgesd.export.families.parts.weights import load_network
from edgesd.spec.pipeline import ComponentSpec, LatentSpec, ShapeSpec
from edgesd.text import first_sentence

CLASS = "T2IAdapter"
_LUMA = (19595, 38470, 7471)
"""What the colours of a pixel count for its grey, in 65536ths, as pillow has it."""


class Adapter(nn.Module):
    """control [batch, 3, H, W] -> features. grey: the network takes one channel, which is made of
    the colours as pillow makes an image of mode L."""

    def __init__(self, net: nn.Module, grey: bool) -> None:
        super().__init__()
        self.net = net
        self.grey = grey

    def forward(self, control: Tensor) -> tuple[Tensor, ...]:
        if self.grey:
            red, green, blue = (torch.round(control[:, at : at + 1] * 255) for at in range(COLOURS))
            of_red, of_green, of_blue = _LUMA
            summed = red * of_red + green * of_green + blue * of_blue
            control = torch.floor((summed + (1 << 15)) / (1 << 16)) / 255
        return (*self.net(control),)


def adapter(
    source: Checkpoint, name: str, inlets: Inlets, shape: ShapeSpec, latent: LatentSpec
) -> Component:
    """The component `name`. inlets: of the UNet that it is for. Raises InputError for one that is
    for another."""
    batch, _, _ = dims(shape, latent.scale_factor)
    control = control_image(batch, shape, latent)

    def load(weights: bool = True) -> nn.Module:
        net = load_network(source, name, diffusers.T2IAdapter, weights)
        return Adapter(net, net.config["in_channels"] == 1)

    module: Any = load(weights=False)
    where = f"adapter {source.folder(name)}"
    if (channels := module.net.config["in_channels"]) not in (1, COLOURS):
        raise InputError(f"{where} takes images of {channels} channels: expected 1 or {COLOURS}")
    try:
        with torch.no_grad():
            made = module(on_meta(control, {**inlets.sizes, "batch": 1}))
    except RuntimeError as exc:  # torch's, for sizes that it can't halve
        raise InputError(
            f"{where} doesn't take images of {source.name}: {first_sentence(exc)}"
        ) from exc
    places = tuple(map(place_of, made))
    check_places(where, source.name, FEATURE, places, inlets.features)
    return Component(
        ComponentSpec(
            name, (control,), tuple(tensors(FEATURE, places, batch, shape, inlets.sizes))
        ),
        load,
        sizes(shape, latent.scale_factor),
        inlets.multiples,
        {CONTROL: uniform(0, 1)},
    )
