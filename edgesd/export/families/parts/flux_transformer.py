"""diffusers' FluxTransformer2DModel, in two graphs. With h and w in latents:

    modulation    timestep [batch], pooled_projections [batch, P] (guidance [batch] where it was
                  distilled with guidance) -> modulation [batch, M]
    transformer   sample [batch, C, h, w], encoder_hidden_states [batch, tokens, D], modulation
                  [batch, M] -> noise_pred [batch, C, h, w]; Fill's takes mask [batch, 1, H, W], too

The first has 27 % of FLUX.1's weights, and sees neither latents nor what T5 made: it runs once, for
all steps together, before the second is loaded.

Latents are cut into tokens, and put together again, within the graph: that is a permutation.
Rotary tables are constants, of which the rows and columns of an image are taken.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import diffusers
import msgspec
import torch
from diffusers.models.embeddings import get_1d_rotary_pos_embed
from torch import Tensor, nn
from torch.nn import functional

from edgesd.export.attention import replace_attention
from edgesd.export.families import MAX_BATCH, Component
from edgesd.export.families.checkpoint import Checkpoint
from edgesd.export.families.parts.shapes import (
    dims,
    fixed_shape,
    float_tensor,
    sizes,
    uniform,
)
from edgesd.export.families.parts.weights import load_network
from edgesd.runtime.modulation import ROWS
from edgesd.spec.base import MAX_PIXELS, Dim
from edgesd.spec.pipeline import ComponentSpec, LatentSpec, ShapeSpec

PATCH = 2
"""Sides, in latents, of what is one token."""

POOLED, GUIDANCE, MODULATION = "pooled_projections", "guidance", "modulation"
MASK = "mask"
Rotations = tuple[Tensor, Tensor]
_TIMESTEPS, _GUIDANCE = (0.0, 1000.0), (1.0, 10.0)
_THOUSAND = 1000.0
"""What the network multiplies times and guidance with, of which the former come multiplied."""


class FluxTransformer(nn.Module):
    """sample [batch, C, h, w], states [batch, tokens, D], modulation [batch, M] (FluxModulation) ->
    noise_pred like sample, of as many channels as the network makes. mask [batch, 1, H, W]: for
    those that take one, of which the pixels of each latent become channels.

    positions: rows and columns of tokens of the largest image. unit: pixels of a latent. device: of
    the rotary tables.
    """

    rows_cos: Tensor
    rows_sin: Tensor
    columns_cos: Tensor
    columns_sin: Tensor

    def __init__(self, net: Any, positions: int, unit: int, device: str = "cpu") -> None:
        super().__init__()
        self.net = net
        self.unit = unit
        replace_attention(net, "sdpa")
        _drop(net, "time_text_embed")
        _drop(net.norm_out, _LINEAR)
        for block in net.transformer_blocks:
            _drop(block.norm1, _LINEAR)
            _drop(block.norm1_context, _LINEAR)
        for block in net.single_transformer_blocks:
            _drop(block.norm, _LINEAR)
        first, rows, columns = net.pos_embed.axes_dim
        self.first = first // 2
        for name, width in (("rows", rows), ("columns", columns)):
            cos, sin = _tables(positions, width, net.pos_embed.theta, device)
            self.register_buffer(f"{name}_cos", cos, persistent=False)
            self.register_buffer(f"{name}_sin", sin, persistent=False)

    def forward(
        self,
        sample: Tensor,
        encoder_hidden_states: Tensor,
        modulation: Tensor,
        mask: Tensor | None = None,
    ) -> Tensor:
        net = self.net
        if mask is not None:
            sample = torch.cat([sample, blocks_of(mask, self.unit)], 1)
        height, width = sample.shape[2] // PATCH, sample.shape[3] // PATCH
        tokens = encoder_hidden_states.shape[1]
        rotations = self._rotations(height, width, tokens)
        told = iter(modulation[:, None].chunk(modulation.shape[1] // net.inner_dim, -1))
        image = net.x_embedder(packed(sample))
        text = net.context_embedder(encoder_hidden_states)
        for block in net.transformer_blocks:
            text, image = _double(block, text, image, told, rotations)
        joint = torch.cat([text, image], 1)
        for block in net.single_transformer_blocks:
            joint = _single(block, joint, told, rotations)
        scale, shift = islice(told, 2)
        out = net.proj_out(_moved(net.norm_out.norm(joint[:, tokens:]), shift, scale))
        return unpacked(out, height, width)

    def _rotations(self, height: int, width: int, tokens: int) -> tuple[Tensor, Tensor]:
        """cos and sin [tokens + height * width, d / 2]: of the text, which isn't rotated, then of
        the image row by row, rotated by row and column."""
        found = []
        for rows, columns, still in (
            (self.rows_cos, self.columns_cos, 1.0),
            (self.rows_sin, self.columns_sin, 0.0),
        ):
            count = self.first + rows.shape[1] + columns.shape[1]
            parts = [
                rows.new_full((1, 1, self.first), still).expand(height, width, -1),
                rows[:height, None].expand(-1, width, -1),
                columns[None, :width].expand(height, -1, -1),
            ]
            text = rows.new_full((tokens, count), still)
            found.append(torch.cat([text, torch.cat(parts, 2).flatten(0, 1)]))
        return found[0], found[1]


def blocks_of(mask: Tensor, unit: int) -> Tensor:
    """A mask [batch, 1, H, W] -> [batch, unit * unit, h, w], its pixels under each latent row by
    row, as diffusers' FluxFillPipeline.prepare_mask_latents."""
    batch, _, height, width = mask.shape
    blocks = mask.reshape(batch, height // unit, unit, width // unit, unit)
    return blocks.permute(0, 2, 4, 1, 3).flatten(1, 2)


def mask_of(blocks: Tensor) -> Tensor:
    """The mask that `blocks_of` made these of."""
    batch, pixels, height, width = blocks.shape
    unit = math.isqrt(pixels)
    rows = blocks.reshape(batch, unit, unit, height, width).permute(0, 3, 1, 4, 2)
    return rows.reshape(batch, 1, height * unit, width * unit)


def packed(latents: Tensor) -> Tensor:
    """Latents [batch, C, h, w] -> tokens [batch, h / 2 * w / 2, 4 C], as diffusers'
    FluxPipeline._pack_latents."""
    batch, channels, height, width = latents.shape
    blocks = latents.reshape(batch, channels, height // PATCH, PATCH, width // PATCH, PATCH)
    return blocks.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpacked(tokens: Tensor, height: int, width: int) -> Tensor:
    """Tokens [batch, height * width, 4 C] -> latents [batch, C, 2 height, 2 width]."""
    blocks = tokens.reshape(tokens.shape[0], height, width, -1, PATCH, PATCH)
    return blocks.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


def _tables(positions: int, width: int, theta: float, device: str) -> tuple[Tensor, Tensor]:
    """cos and sin [positions, width / 2] of the angles of an axis, computed in float64."""
    places = torch.arange(positions, device=device)
    angles = get_1d_rotary_pos_embed(
        width, places, theta, use_real=True, freqs_dtype=torch.float64
    )  # each value twice
    cos, sin = (table[:, ::2].contiguous() for table in angles)
    return cos, sin


class FluxModulation(nn.Module):
    """timestep [rows] of 0 to 1000, pooled [rows, P] -> what a FluxTransformer is told of them
    [rows, D]: shifts, scales and gates of all its blocks. guidance [rows]: the scale, for models
    distilled with it."""

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.net = net
        _drop(net, *_STREAMS, "proj_out")
        for block in net.transformer_blocks:
            _drop(block, "attn", "norm2", "ff", "norm2_context", "ff_context")
        for block in net.single_transformer_blocks:
            _drop(block, "proj_mlp", "attn", "proj_out")

    def forward(
        self, timestep: Tensor, pooled_projections: Tensor, guidance: Tensor | None = None
    ) -> Tensor:
        net = self.net
        times = [timestep] if guidance is None else [timestep, guidance * _THOUSAND]
        hidden = functional.silu(net.time_text_embed(*times, pooled_projections))
        norms = [
            *(
                norm
                for block in net.transformer_blocks
                for norm in (block.norm1, block.norm1_context)
            ),
            *(block.norm for block in net.single_transformer_blocks),
            net.norm_out,
        ]
        return torch.cat([norm.linear(hidden) for norm in norms], 1)


_STREAMS = ("x_embedder", "context_embedder", "pos_embed")
_LINEAR = "linear"
"""Of norms, which makes their shifts, scales and gates."""


def _drop(module: Any, *names: str) -> None:
    """Leave out parts of a network that another component has."""
    for name in names:
        setattr(module, name, None)


def _double(
    block: Any, text: Tensor, image: Tensor, told: Iterator[Tensor], rotations: Rotations
) -> tuple[Tensor, Tensor]:
    """diffusers' FluxTransformerBlock, told shifts, scales and gates [batch, 1, D]."""
    shift, scale, gate, *for_image = islice(told, 6)
    text_shift, text_scale, text_gate, *for_text = islice(told, 6)
    attended, text_attended = block.attn(
        _moved(block.norm1.norm(image), shift, scale),
        _moved(block.norm1_context.norm(text), text_shift, text_scale),
        image_rotary_emb=rotations,
    )
    image = _fed_forward(block.norm2, block.ff, image + gate * attended, *for_image)
    text = text + text_gate * text_attended
    return _fed_forward(block.norm2_context, block.ff_context, text, *for_text), image


def _fed_forward(
    norm: Any, net: Any, hidden: Tensor, shift: Tensor, scale: Tensor, gate: Tensor
) -> Tensor:
    out: Tensor = hidden + gate * net(_moved(norm(hidden), shift, scale))
    return out


def _single(block: Any, joint: Tensor, told: Iterator[Tensor], rotations: Rotations) -> Tensor:
    """diffusers' FluxSingleTransformerBlock on text and image [batch, n, D] that stay joined."""
    shift, scale, gate = islice(told, 3)
    normed = _moved(block.norm.norm(joint), shift, scale)
    attended = block.attn(normed, image_rotary_emb=rotations)
    wide = block.act_mlp(block.proj_mlp(normed))
    out: Tensor = joint + gate * block.proj_out(torch.cat([attended, wide], 2))
    return out


def _moved(normed: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return normed * (1 + scale) + shift


def modulation_width(config: Mapping[str, Any]) -> int:
    """What a FluxModulation makes of a row. config: diffusers' of the network."""
    width = config["num_attention_heads"] * config["attention_head_dim"]
    return int(width * (12 * config["num_layers"] + 3 * config["num_single_layers"] + 2))


def flux_modulation(
    source: Checkpoint, name: str, folder: str, config: Mapping[str, Any], shape: ShapeSpec
) -> Component:
    """The component `name`, of the network in `folder`. config: diffusers' of that."""

    def load(weights: bool = True) -> nn.Module:
        return FluxModulation(
            load_network(source, folder, diffusers.FluxTransformer2DModel, weights)
        )

    rows: Dim = "batch" if shape.dynamic else ROWS
    inputs = [
        float_tensor("timestep", rows),
        float_tensor(POOLED, rows, config["pooled_projection_dim"]),
    ]
    if config["guidance_embeds"]:
        inputs.append(float_tensor(GUIDANCE, rows))
    made = float_tensor(MODULATION, rows, modulation_width(config))
    return Component(
        ComponentSpec(name, tuple(inputs), (made,)),
        load,
        sizes=({"batch": 1}, {"batch": 3}) if shape.dynamic else ({}, {}),
        examples={"timestep": uniform(*_TIMESTEPS), GUIDANCE: uniform(*_GUIDANCE)},
    )


def flux_transformer(
    source: Checkpoint,
    name: str,
    config: Mapping[str, Any],
    tokens: int,
    shape: ShapeSpec,
    latent: LatentSpec,
    beside: int = 0,
    masked: bool = False,
) -> Component:
    """The component `name`, in a folder of that name. config: diffusers' of the network. tokens: of
    the text's embeddings. beside: channels of its sample that follow the latents. masked: whether
    it takes a mask."""
    unit = latent.scale_factor
    positions = MAX_PIXELS // (unit * PATCH)

    def load(weights: bool = True) -> nn.Module:
        net = load_network(source, name, diffusers.FluxTransformer2DModel, weights)
        return FluxTransformer(net, positions, unit, "cpu" if weights else "meta")

    batch, height, width = dims(shape, latent.scale_factor)
    if not shape.dynamic:
        batch = shape.batch
    inputs = [
        float_tensor("sample", batch, latent.channels + beside, height, width),
        float_tensor("encoder_hidden_states", batch, tokens, config["joint_attention_dim"]),
        float_tensor(MODULATION, batch, modulation_width(config)),
    ]
    if masked:
        rows: Dim = f"height*{unit}" if shape.dynamic else shape.height
        columns: Dim = f"width*{unit}" if shape.dynamic else shape.width
        inputs.append(float_tensor(MASK, batch, 1, rows, columns))
    noise_pred = float_tensor("noise_pred", batch, latent.channels, height, width)
    return Component(
        ComponentSpec(name, tuple(inputs), (noise_pred,)),
        load,
        sizes=sizes(shape, unit),
        multiples={"height": PATCH, "width": PATCH},
    )


def shape_spec(
    size: tuple[int, int] | None, batch: int, default: tuple[int, int], step: int
) -> ShapeSpec:
    """Sizes that diffusers generates: multiples of `step`.

    size: (width, height) of static graphs. default: of others. Raises UsageError.
    """
    if size is not None:
        return fixed_shape(size, batch, step, step)
    return msgspec.structs.replace(fixed_shape(default, MAX_BATCH, step, step), dynamic=True)
