"""diffusers' UNet2DConditionModel.

Graph, with h and w in latents: sample [batch, C, h, w], timestep [1], encoder_hidden_states
[batch, tokens, D] (text_embeds [batch, P] and time_ids [batch, 6 or 5] where it is told the text as
a whole and sizes; timestep_cond [batch, G] where guidance is distilled) -> noise_pred.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import diffusers
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from torch.nn import functional

from edgesd.errors import InputError
from edgesd.export.families import MAX_BATCH, Component, Sizes
from edgesd.export.families.checkpoint import Checkpoint
from edgesd.export.families.parts.shapes import (
    checked_size,
    dims,
    fixed_shape,
    float_tensor,
    sizes,
    token_dim,
    whole_numbers,
    with_tokens,
)
from edgesd.export.families.parts.weights import load_network
from edgesd.spec.pipeline import ComponentSpec, LatentSpec, ShapeSpec

_TIMESTEPS, _PIXELS = (1, 1000), (0, 1025)
TEXT_EMBEDS, TIME_IDS = "text_embeds", "time_ids"
_NO_SIZE_IS_A_MULTIPLE = 40
"""Upsamplings of a UNet that asks whether a size is a multiple of two to that power."""


class Unet(nn.Module):
    """sample [batch, 4, h, w], timestep [1], states [batch, tokens, C] -> noise_pred like sample.

    timestep_cond [batch, D]: embedding of the guidance scale, for models distilled with it. added:
    what the UNet is told besides, by diffusers' names. follow: upsampling makes the size of what it
    is joined with, which it else doubles to. diffusers' UNet decides that by the sample, which a
    graph for any size can't: both give the same where the sample's size is a multiple of all
    levels'.
    """

    def __init__(self, net: nn.Module, follow: bool = False) -> None:
        super().__init__()
        self.net = net
        if follow:
            _follow_skips(net)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        timestep_cond: Tensor | None = None,
        added: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        out: Tensor = self.net(
            sample,
            timestep,
            encoder_hidden_states=encoder_hidden_states,
            timestep_cond=timestep_cond,
            added_cond_kwargs=added,
            return_dict=False,
        )[0]
        return out


class TextTimeUnet(Unet):
    """The same for Stable Diffusion XL's: text_embeds [batch, P], the text as a whole, and time_ids
    [batch, 6 or 5], what it is told of sizes (spec.pipeline.SIZE_FILLS)."""

    def forward(  # type: ignore[override]  # called with the inputs of its own component alone
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        text_embeds: Tensor,
        time_ids: Tensor,
        timestep_cond: Tensor | None = None,
    ) -> Tensor:
        added = {TEXT_EMBEDS: text_embeds, TIME_IDS: time_ids}
        return super().forward(sample, timestep, encoder_hidden_states, timestep_cond, added)


def told(given: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """What a network is told of texts as a whole and of sizes, among its inputs by diffusers'
    names; None where that is nothing."""
    return {name: given[name] for name in (TEXT_EMBEDS, TIME_IDS) if name in given} or None


def unet(
    source: Checkpoint,
    name: str,
    config: Mapping[str, Any],
    states: tuple[int, int],
    shape: ShapeSpec,
    latent: LatentSpec,
    chunks: int = 1,
    added: tuple[int, int] | None = None,
) -> Component:
    """The component `name`, in a folder of that name. config: diffusers' of the UNet. states:
    tokens and width of the text embeddings. chunks: of so many tokens, where shapes are static.
    added: widths of text_embeds and time_ids, where it takes them."""
    multiple = size_multiple(config)
    follow = shape.dynamic and shape.multiple_of % (multiple * latent.scale_factor) != 0

    def load(weights: bool = True) -> nn.Module:
        net = load_network(source, name, diffusers.UNet2DConditionModel, weights)
        return TextTimeUnet(net, follow) if added else Unet(net, follow)

    batch, height, width = dims(shape, latent.scale_factor)
    if not shape.dynamic:
        batch = shape.batch
    tokens, channels = states
    inputs = [
        float_tensor("sample", batch, config["in_channels"], height, width),
        float_tensor("timestep", 1),
        float_tensor("encoder_hidden_states", batch, token_dim(shape, tokens, chunks), channels),
    ]
    if added:
        inputs += [
            float_tensor(name, batch, width)
            for name, width in zip((TEXT_EMBEDS, TIME_IDS), added, strict=True)
        ]
    if dim := config["time_cond_proj_dim"]:
        inputs.append(float_tensor("timestep_cond", batch, dim))
    noise_pred = float_tensor("noise_pred", batch, latent.channels, height, width)
    return Component(
        ComponentSpec(name, tuple(inputs), (noise_pred,)),
        load,
        multiples={} if follow else {"height": multiple, "width": multiple},
        sizes=with_tokens(
            _odd_sizes(shape, latent.scale_factor, multiple)
            if follow
            else sizes(shape, latent.scale_factor),
            tokens,
        ),
        examples={
            "timestep": whole_numbers(*_TIMESTEPS),
            **({TIME_IDS: whole_numbers(*_PIXELS)} if added else {}),
        },
    )


def size_multiple(config: Mapping[str, Any]) -> int:
    """A latent height and width that are a multiple of this are halved at each level but the last,
    and doubled again."""
    return int(2 ** (len(config["block_out_channels"]) - 1))


def shape_spec(
    size: tuple[int, int] | None, batch: int, config: Mapping[str, Any], scale_factor: int
) -> ShapeSpec:
    """Sizes that diffusers generates, multiples of `scale_factor`, and none in their place.

    size: (width, height) of static graphs. Graphs for any size take multiples of all the UNet's
    levels, which is faster, or of `scale_factor` if the model's own size is none. Raises
    InputError, UsageError.
    """
    step = size_multiple(config) * scale_factor
    if size is None:
        own = config["sample_size"]
        sides = tuple(own) if isinstance(own, list | tuple) else (own, own)
        if len(sides) != 2 or not all(type(side) is int and side > 0 for side in sides):
            raise InputError(
                f"the UNet's sample_size is {own!r}, which says no default size: give --size"
            )
        height, width = (side * scale_factor for side in sides)
        even = height % step == 0 and width % step == 0
        return ShapeSpec(height, width, MAX_BATCH, True, step if even else scale_factor)
    even = all(side % step == 0 for side in size)
    return fixed_shape(size, batch, scale_factor, step if even else scale_factor)


def _odd_sizes(shape: ShapeSpec, unit: int, multiple: int) -> tuple[Sizes, ...]:
    """Where to check a UNet that takes any size: the smaller one is no multiple of any level's."""
    height, width = (side // unit for side in checked_size(shape))
    rows = max(2 * multiple, height // 2) | 1
    return (
        {"batch": 1, "height": height, "width": width},
        {"batch": 2, "height": rows, "width": rows + multiple + 1},
    )


class _Following(nn.Module):
    """diffusers' Upsample2D, of which it takes the convolution, without its branches on sizes."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, hidden: Tensor, output_size: tuple[int, int] | None = None) -> Tensor:
        """[batch, C, h, w] -> [batch, C', 2 h, 2 w], or as output_size says."""
        scale = 2.0 if output_size is None else None
        wide = functional.interpolate(hidden, output_size, scale, mode="nearest")
        out: Tensor = self.conv(wide)
        return out


def _follow_skips(net: Any) -> None:
    """Let a UNet forward the sizes of its skip connections whatever the sample's are."""
    for block in net.up_blocks:
        for index, layer in enumerate(block.upsamplers or ()):
            plain = isinstance(layer, Upsample2D) and layer.use_conv and layer.name == "conv"
            if not plain or layer.norm is not None or not layer.interpolate:
                raise InputError(
                    f"the UNet's {type(layer).__name__} makes images of multiples of "
                    f"{2**net.num_upsamplers} latents only: give --size"
                )
            block.upsamplers[index] = _Following(layer.conv)
    net.num_upsamplers = _NO_SIZE_IS_A_MULTIPLE
