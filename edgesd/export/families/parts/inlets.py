"""Where a UNet takes what ControlNets and adapters add.

Shapes are found by running it on shapes alone.

Inputs of its graph, with C, h and w of each place:

    residual_0, residual_1 ...  [batch, C, h, w] added to its skip connections and, the last one, to
                                what the block in its middle makes
    feature_0, feature_1 ...    [batch, C, h, w] added within its blocks on the way down, and the
                                last one to what the block in its middle makes, where there is one
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from edgesd.errors import InputError
from edgesd.export.families import Component, Sizes
from edgesd.export.families.parts.shapes import float_tensor
from edgesd.spec.base import Dim
from edgesd.spec.pipeline import LatentSpec, ShapeSpec, TensorSpec, size_of

RESIDUAL, FEATURE = "residual", "feature"

Place = tuple[int, int, int]
"""Channels, height and width."""


@dataclass(frozen=True)
class Inlets:
    """The places of a UNet. sizes: that it was run at. multiples: of its component."""

    residuals: tuple[Place, ...]
    features: tuple[Place, ...]
    sizes: Sizes
    multiples: Mapping[str, int]


def inlets_of(network: Component, shape: ShapeSpec, latent: LatentSpec) -> Inlets:
    """The places of a UNet. shape, latent: of its pipeline."""
    module: Any = network.load(weights=False)
    net, unit = module.net, latent.scale_factor
    sizes = network.sizes[0] or {"height": shape.height // unit, "width": shape.width // unit}
    residuals: list[Place] = []
    features: list[Place] = []

    def from_first(_: object, __: object, made: Tensor) -> None:
        residuals.append(place_of(made))

    def from_block(block: Any, _: object, made: tuple[Tensor, tuple[Tensor, ...]]) -> None:
        last, skips = made
        residuals.extend(map(place_of, skips))
        within = getattr(block, "has_cross_attention", False)
        features.append(place_of(skips[len(block.resnets) - 1] if within else last))

    def from_middle(_: object, __: object, made: Tensor) -> None:
        features.append(place_of(made))

    hooks = [net.conv_in.register_forward_hook(from_first)]
    hooks += [block.register_forward_hook(from_block) for block in net.down_blocks]
    if net.mid_block is not None:
        hooks.append(net.mid_block.register_forward_hook(from_middle))
    with torch.no_grad():
        module(*(on_meta(tensor, sizes) for tensor in network.spec.inputs))
    for hook in hooks:
        hook.remove()
    middle = residuals[-1]  # the block in the middle changes neither
    return Inlets((*residuals, middle), tuple(features), sizes, network.multiples)


def on_meta(tensor: TensorSpec, sizes: Sizes) -> Tensor:
    """A tensor on torch's meta device, as large as `sizes` say."""
    shape = [size_of(dim, sizes) for dim in tensor.shape]
    return torch.empty(shape, dtype=getattr(torch, tensor.dtype), device="meta")


def tensors(
    kind: str, places: Sequence[Place], batch: Dim, shape: ShapeSpec, sizes: Sizes
) -> list[TensorSpec]:
    """Inputs of the UNet, or outputs of what fills them, of the `kind` RESIDUAL or FEATURE."""
    return [
        float_tensor(f"{kind}_{number}", batch, channels, *_dims(shape, sizes, height, width))
        for number, (channels, height, width) in enumerate(places)
    ]


def _dims(shape: ShapeSpec, sizes: Sizes, height: int, width: int) -> tuple[Dim, Dim]:
    if not shape.dynamic:
        return height, width
    rows, columns = sizes["height"] // height, sizes["width"] // width
    return (
        "height" if rows == 1 else f"height/{rows}",
        "width" if columns == 1 else f"width/{columns}",
    )


def check_places(
    where: str, base: str, kind: str, found: Sequence[Place], wanted: Sequence[Place]
) -> None:
    """Raise InputError unless each of `found`, of the `kind` RESIDUAL or FEATURE, is added where it
    fits: diffusers fails there, or drops what it can't add. where: the network that makes them.
    base: the model whose UNet has the places `wanted`, which features may be fewer than."""
    if len(found) > len(wanted) or (kind == RESIDUAL and len(found) < len(wanted)):
        raise InputError(
            f"{where} makes {len(found)} {kind}s, and the UNet of {base} adds {len(wanted)}: give "
            "one for this base model"
        )
    for number, (ours, theirs) in enumerate(zip(found, wanted, strict=False)):
        if ours != theirs:
            raise InputError(
                f"{where} makes {kind} {number} as {list(ours)}, and the UNet of {base} adds "
                f"{list(theirs)}: give one for this base model"
            )


def place_of(made: Tensor) -> Place:
    """Where a tensor [batch, C, h, w] belongs."""
    _, channels, height, width = made.shape
    return channels, height, width
