"""diffusers' ControlNetModel (Zhang et al. 2023, arXiv 2302.05543).

Graph, with h and w in latents and H and W in pixels: the inputs of the UNet that it is for, and
control [batch, 3, H, W] from 0 to 1 -> residual_0, residual_1 ... (parts/inlets.py), unscaled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from edgesd.errors import InputError
from edgesd.export.families import Component
from edgesd.export.families.checkpoint import Checkpoint
from edgesd.export.families.parts.inlets import (
    RESIDUAL,
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
    float_tensor,
    uniform,
)
from edgesd.export.families.parts.unet import told
from edgesd.export.families.parts.weights import load_network
from edgesd.spec.pipeline import ComponentSpec, LatentSpec, ShapeSpec

_UNSUPPORTED = (
    "class_embed_type",
    "num_class_embeds",
    "encoder_hid_dim_type",
    "encoder_hid_dim",
    "global_pool_conditions",
)
_SAME = (
    "cross_attention_dim",
    "block_out_channels",
    "layers_per_block",
    "addition_embed_type",
    "addition_time_embed_dim",
    "projection_class_embeddings_input_dim",
)
"""What its config and the UNet's have in common."""

_NOT_TAKEN = ("timestep_cond",)
"""Inputs of a UNet that diffusers' pipelines don't give a ControlNet."""


class ControlNet(nn.Module):
    """Inputs of the UNet and control [batch, 3, H, W] -> residuals. names: of the inputs, by
    diffusers' own but for the last one's."""

    def __init__(self, net: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.net = net
        self.names = (*names,)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(self.names, inputs, strict=True))
        down, middle = self.net(
            given["sample"],
            given["timestep"],
            encoder_hidden_states=given["encoder_hidden_states"],
            controlnet_cond=given[CONTROL],
            added_cond_kwargs=told(given),
            return_dict=False,
        )
        return (*down, middle)


def controlnet(
    source: Checkpoint,
    name: str,
    network: Component,
    config: Mapping[str, Any],
    inlets: Inlets,
    shape: ShapeSpec,
    latent: LatentSpec,
) -> Component:
    """The component `name`. network, config, inlets: of the UNet that it is for. Raises InputError
    for one that is for another."""
    batch, _, height, width = network.spec.inputs[0].shape
    sample = float_tensor("sample", batch, latent.channels, height, width)
    others = [one for one in network.spec.inputs[1:] if one.name not in _NOT_TAKEN]
    inputs = (sample, *others, control_image(batch, shape, latent))
    names = [tensor.name for tensor in inputs]

    def load(weights: bool = True) -> nn.Module:
        net = load_network(source, name, diffusers.ControlNetModel, weights)
        return ControlNet(net, names)

    module: Any = load(weights=False)
    where = f"ControlNet {source.folder(name)}"
    _check_config(source, where, module.net.config, config, latent)
    with torch.no_grad():
        made = module(*(on_meta(tensor, inlets.sizes) for tensor in inputs))
    places = tuple(map(place_of, made))
    check_places(where, source.name, RESIDUAL, places, inlets.residuals)
    return Component(
        ComponentSpec(name, inputs, tuple(tensors(RESIDUAL, places, batch, shape, inlets.sizes))),
        load,
        network.sizes,
        network.multiples,
        {**network.examples, CONTROL: uniform(0, 1)},
    )


def _check_config(
    source: Checkpoint, where: str, own: Any, unet: Mapping[str, Any], latent: LatentSpec
) -> None:
    """Raise InputError for a ControlNet of another base model, or one that isn't supported."""
    for field in _UNSUPPORTED:
        if own[field]:
            raise InputError(f"{where} has {field}={own[field]!r}, which isn't supported")
    for field in _SAME:
        if _plain(own[field]) != _plain(unet[field]):
            raise InputError(
                f"{where} is for another base model: its {field} is {own[field]}, and that of "
                f"{source.name} {unet[field]}"
            )
    pixels = 1 << (len(own["conditioning_embedding_out_channels"]) - 1)
    for what, found, wanted in (
        ("channels of a control image", own["conditioning_channels"], COLOURS),
        ("channels of latents", own["in_channels"], latent.channels),
        ("pixels to a side of a latent", pixels, latent.scale_factor),
    ):
        if found != wanted:
            raise InputError(f"{where} has {found} {what}, and {source.name} {wanted}")


def _plain(value: object) -> object:
    """A list in a config and the tuple that is a default are the same."""
    return list(value) if isinstance(value, tuple) else value
