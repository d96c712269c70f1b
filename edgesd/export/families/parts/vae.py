"""Autoencoders: diffusers' AutoencoderKL and AutoencoderTiny.

Graphs, with h and w in latents and H and W in pixels:

    decoder  latents [batch, C, h, w] -> image [batch, 3, H, W] in about -1 to 1
    encoder  image [batch, 3, H, W] in -1 to 1 -> mean, std (AutoencoderKL) or latents

All latents are in the space that the denoiser works in: scaling is part of the graphs.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from edgesd.errors import InputError
from edgesd.export.families import AUTOENCODER, Component
from edgesd.export.families.checkpoint import Checkpoint
from edgesd.export.families.parts.shapes import COLOURS, dims, float_tensor, sizes, uniform
from edgesd.export.families.parts.weights import load_network
from edgesd.spec.pipeline import ENCODING_TASKS, ComponentSpec, LatentSpec, ShapeSpec, Task

_TINY = "AutoencoderTiny"


class VaeDecoder(nn.Module):
    """latents [batch, C, h, w], as the UNet makes them -> image [batch, 3, H, W] in about -1 to 1.

    AutoencoderTiny, too, gives -1 to 1: diffusers' DecoderTiny ends with 2 x - 1.
    """

    def __init__(self, net: nn.Module, latent: LatentSpec) -> None:
        super().__init__()
        self.net = net
        self.latent = latent

    def forward(self, latents: Tensor) -> Tensor:
        latent = self.latent
        if latent.std is not None:
            latents = latents * _per_channel(latent.std, latents)
        if latent.scaling_factor != 1:
            latents = latents / latent.scaling_factor
        if latent.mean is not None:
            latents = latents + _per_channel(latent.mean, latents)
        elif latent.shift_factor:
            latents = latents + latent.shift_factor
        out: Tensor = self.net.decode(latents, return_dict=False)[0]  # type: ignore[operator]
        return out


class VaeEncoder(nn.Module):
    """image [batch, 3, H, W] in -1 to 1 -> mean and std of the latents, each [batch, C, h, w].

    AutoencoderTiny gives the latents themselves. All are scaled as the UNet expects them.
    """

    def __init__(self, net: nn.Module, latent: LatentSpec) -> None:
        super().__init__()
        self.net = net
        self.latent = latent

    def forward(self, image: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        encoded = self.net.encode(image)  # type: ignore[operator]
        if hasattr(encoded, "latents"):
            return self._scaled(encoded.latents)
        spread = encoded.latent_dist.std * self.latent.scaling_factor
        if self.latent.std is not None:
            spread = spread / _per_channel(self.latent.std, spread)
        return self._scaled(encoded.latent_dist.mean), spread

    def _scaled(self, latents: Tensor) -> Tensor:
        latent = self.latent
        if latent.mean is not None:
            latents = latents - _per_channel(latent.mean, latents)
        elif latent.shift_factor:
            latents = latents - latent.shift_factor
        if latent.scaling_factor != 1:
            latents = latents * latent.scaling_factor
        return latents if latent.std is None else latents / _per_channel(latent.std, latents)


def _per_channel(values: Sequence[float], latents: Tensor) -> Tensor:
    """Values [C, 1, 1]: a constant of the graph."""
    return torch.tensor(values, dtype=latents.dtype, device=latents.device)[:, None, None]


def vae_decoder(
    source: Checkpoint, name: str, latent: LatentSpec, shape: ShapeSpec, fp32: bool = False
) -> Component:
    """The component `name`: the decoder of the autoencoder in the folder vae. fp32: whether fp16
    can't hold its values, as `force_upcast` of its config says where the pipeline reads it."""

    def load(weights: bool = True) -> nn.Module:
        net = _autoencoder(source, weights)
        net.encoder = net.quant_conv = None
        return VaeDecoder(net, latent)

    batch, height, width = dims(shape, latent.scale_factor)
    _, rows, columns = dims(shape, 1)
    return Component(
        ComponentSpec(
            name,
            (float_tensor("latents", batch, latent.channels, height, width),),
            (float_tensor("image", batch, COLOURS, rows, columns),),
        ),
        load,
        sizes=sizes(shape, latent.scale_factor),
        fp32=fp32,
    )


def encoder_for(
    tasks: Collection[Task],
    source: Checkpoint,
    name: str,
    latent: LatentSpec,
    shape: ShapeSpec,
    fp32: bool = False,
) -> tuple[Component, ...]:
    """See `vae_encoder`; none where no task needs it."""
    if not {*tasks} & {*ENCODING_TASKS}:
        return ()
    return (vae_encoder(source, name, latent, shape, fp32),)


def vae_encoder(
    source: Checkpoint, name: str, latent: LatentSpec, shape: ShapeSpec, fp32: bool = False
) -> Component:
    """The component `name`: the encoder of the autoencoder in the folder vae. fp32: see
    `vae_decoder`."""

    def load(weights: bool = True) -> nn.Module:
        net = _autoencoder(source, weights)
        net.decoder = net.post_quant_conv = None
        return VaeEncoder(net, latent)

    batch, height, width = dims(shape, latent.scale_factor)
    _, rows, columns = dims(shape, 1)
    outputs = ("latents",) if _is_tiny(source) else ("mean", "std")
    return Component(
        ComponentSpec(
            name,
            (float_tensor("image", batch, COLOURS, rows, columns),),
            tuple(float_tensor(each, batch, latent.channels, height, width) for each in outputs),
        ),
        load,
        multiples={"height": latent.scale_factor, "width": latent.scale_factor},
        sizes=sizes(shape, 1),
        examples={"image": uniform(-1, 1)},
        fp32=fp32,
    )


def latent_spec(
    source: Checkpoint,
    config: Mapping[str, Any],
    channels: int,
    scale_factor: int,
    per_channel: bool = False,
    shifted: bool = False,
    patch: int = 1,
) -> LatentSpec:
    """What the denoiser works on. config: diffusers' of the autoencoder. channels: of the denoiser.
    per_channel: whether the pipeline reads latents_mean and latents_std, as those of Stable
    Diffusion XL do. shifted: whether it reads shift_factor, as FLUX's do. patch: see LatentSpec.
    Raises InputError.
    """
    if config["latent_channels"] != channels:
        raise InputError(
            f"{source.name}: the VAE has {config['latent_channels']} latent channels and the "
            f"denoiser {channels}: do both belong to one model?"
        )
    for side in ("in_channels", "out_channels"):
        if config[side] != COLOURS:
            raise InputError(
                f"{source.name}: its VAE has {side}={config[side]}: only images of three "
                "colours are supported"
            )
    scaling = config["scaling_factor"]
    if scaling is None or not math.isfinite(scaling) or scaling == 0:
        raise InputError(
            f"{source.folder(AUTOENCODER)}/config.json: scaling_factor is {scaling}: expected a "
            "number that latents are divided by, such as 0.18215"
        )
    tiny = _is_tiny(source)
    mean, std = _channel_statistics(source, config) if per_channel else (None, None)
    return LatentSpec(
        channels=config["latent_channels"],
        scale_factor=scale_factor,
        scaling_factor=float(scaling),
        halo=_tiny_halo(config["num_decoder_blocks"]) if tiny else None,
        encoder_halo=_tiny_encoder_halo(config["num_encoder_blocks"]) if tiny else None,
        levels=None if tiny else tuple(reversed(config["block_out_channels"])),
        mean=mean,
        std=std,
        shift_factor=_shift(source, config) if shifted else 0.0,
        patch=patch,
    )


def _shift(source: Checkpoint, config: Mapping[str, Any]) -> float:
    shift = config["shift_factor"]
    if shift is None or not math.isfinite(shift):
        raise InputError(
            f"{source.folder(AUTOENCODER)}/config.json: shift_factor is {shift}: expected a number "
            "that is added to latents, such as 0.1159"
        )
    return float(shift)


def _channel_statistics(
    source: Checkpoint, config: Mapping[str, Any]
) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    """Mean and std of each channel of the latents; None, None where not both are given."""
    given = [config[name] for name in ("latents_mean", "latents_std") if config.get(name)]
    if len(given) < 2:
        return None, None
    channels = config["latent_channels"]
    mean, std = (tuple(map(float, values)) for values in given)
    finite = all(math.isfinite(value) for value in (*mean, *std))
    if not finite or {len(mean), len(std)} != {channels} or min(std) <= 0:
        raise InputError(
            f"{source.folder(AUTOENCODER)}/config.json: latents_mean and latents_std are "
            f"{str(given)[:120]}: expected {channels} numbers each, those of latents_std above 0"
        )
    return mean, std


def _is_tiny(source: Checkpoint) -> bool:
    return source.class_of(AUTOENCODER) == _TINY


def _autoencoder(source: Checkpoint, weights: bool) -> Any:
    cls = getattr(diffusers, source.class_of(AUTOENCODER))
    return load_network(source, AUTOENCODER, cls, weights)


def _tiny_encoder_halo(blocks: Sequence[int]) -> int:
    """Latents that a latent of AutoencoderTiny's encoder sees to each side, at most: the same
    convolutions the other way, where a downsampling's begins a pixel before its output."""
    reach = 1  # the last convolution
    for level in reversed(range(len(blocks))):
        reach += 3 * blocks[level]
        reach = 2 * reach + 1 if level else reach + 1
    return -(-reach >> (len(blocks) - 1))


def _tiny_halo(blocks: Sequence[int]) -> int:
    """Latent pixels that a pixel of AutoencoderTiny's decoder sees to each side: each level has a
    convolution, and blocks of three; a pixel before upsampling is two behind it."""
    reach = 1  # the last convolution
    for level in reversed(range(len(blocks))):
        reach += 3 * blocks[level] + 1
        if level:
            reach = -(-reach // 2)
    return reach
