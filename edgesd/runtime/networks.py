"""What the networks of a bundle must take and give for the loop to run them.

A manifest may come from anywhere: what the loop relies on is checked before anything is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from edgesd.errors import BundleError
from edgesd.spec.bundle import BundleManifest
from edgesd.spec.pipeline import ComponentSpec, TensorSpec


class _Network(NamedTuple):
    """Ranks of inputs and outputs by name; optional: of inputs that some networks have."""

    inputs: Mapping[str, int]
    outputs: Mapping[str, int]
    optional: Mapping[str, int] = {}


_NETWORKS = {
    "text_encoder": _Network({"input_ids": 2}, {"encoder_hidden_states": 3}),
    "unet": _Network(
        {"sample": 4, "timestep": 1, "encoder_hidden_states": 3},
        {"noise_pred": 4},
        {"timestep_cond": 2},
    ),
    "vae_decoder": _Network({"latents": 4}, {"image": 4}),
}
_HEAD = _Network({"latents": 4}, {"features": 4})
_TAIL = _Network({"features": 4, "statistics": 3, "own": 1, "core": 1}, {"image": 4, "moments": 3})
_LATENTS = ("sample", "noise_pred", "latents")
"""Tensors that have as many channels as the pipeline's latents."""

_FLOAT = ("float32", "float16")
_TYPES = {"input_ids": ("int64", "int32"), "core": ("int64",)}


def check_networks(manifest: BundleManifest) -> None:
    """Raise BundleError unless text encoder, UNet, decoder and the decoder's two parts are there,
    have the inputs and outputs that images are generated with, and fit the pipeline's latents."""
    pipeline = manifest.pipeline
    for name in _NETWORKS:
        if name not in pipeline.components:
            raise BundleError(f"{manifest.name} has no {name}: build the bundle again")
    found = {name: (pipeline.components[name], network) for name, network in _NETWORKS.items()}
    split = manifest.engines["vae_decoder"].split
    if split is not None:
        found |= {"head": (split.head.spec, _HEAD), "tail": (split.tail.spec, _TAIL)}
    for name, (spec, network) in found.items():
        for problem in _problems(spec, network):
            raise BundleError(f"{name} in the manifest has {problem}: build the bundle again")
    channels = pipeline.latent.channels
    for name in _NETWORKS:
        spec = pipeline.components[name]
        for tensor in (*spec.inputs, *spec.outputs):
            if tensor.name in _LATENTS and tensor.shape[1] != channels:
                raise BundleError(
                    f"{name} in the manifest has {tensor.name} of {tensor.shape[1]} channels, and "
                    f"the pipeline's latents have {channels}: build the bundle again"
                )


def _problems(spec: ComponentSpec, network: _Network) -> Iterator[str]:
    inputs = {**network.inputs, **network.optional}
    for what, tensors, needed, known in (
        ("inputs", spec.inputs, network.inputs, inputs),
        ("outputs", spec.outputs, network.outputs, network.outputs),
    ):
        names = [tensor.name for tensor in tensors]
        if len(set(names)) != len(names) or not needed.keys() <= set(names) <= known.keys():
            yield f"the {what} {', '.join(names) or 'none'}, not {', '.join(needed)}"
        for tensor in tensors:
            if tensor.name in known and not _fits(tensor, known[tensor.name]):
                yield f"{tensor.name} as {tensor.dtype} {list(tensor.shape)}"


def _fits(tensor: TensorSpec, rank: int) -> bool:
    types = _TYPES.get(tensor.name, _FLOAT)
    fixed = tensor.name in ("timestep_cond", "statistics")  # sizes that the loop reads from it
    sizes = tensor.shape[1:] if tensor.name == "timestep_cond" else tensor.shape
    return (
        len(tensor.shape) == rank
        and tensor.dtype in types
        and not (fixed and any(isinstance(size, str) for size in sizes))
        and (tensor.name != "image" or tensor.shape[1] == 3)
    )
