"""Networks that were read from graphs in the form of optimum, held to what the graphs compute."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from edgesd.errors import InputError
from edgesd.export.families.parts.unet import told
from edgesd.export.parity import TOLERANCE, relative_rms
from edgesd.export.pieces import run_model_in_pieces
from edgesd.export.quiet import quiet
from edgesd.runtime.arrays import Array
from edgesd.spec.pipeline import SIZE_FILLS
from edgesd.text import first_sentence

Inputs = Mapping[str, Tensor]

_TOKENS, _LATENTS, _PIXELS = 7, 16, 64
"""Sizes of examples: of texts that a UNet reads, of latents, of pixels; a side is twice the other.
"""
_MOST_NUMBERS = 1 << 24
"""In one input."""


def _unet(net: Any, inputs: Inputs) -> dict[str, Tensor]:
    more = {"timestep_cond": inputs["timestep_cond"]} if "timestep_cond" in inputs else {}
    out = net(
        inputs["sample"],
        inputs["timestep"],
        inputs["encoder_hidden_states"],
        added_cond_kwargs=told(inputs),
        **more,
    )
    return {"out_sample": out.sample}


def _autoencoder(net: Any, inputs: Inputs) -> dict[str, Tensor]:
    if "latent_sample" in inputs:
        return {"sample": net.decode(inputs["latent_sample"]).sample}
    posterior = net.encode(inputs["sample"]).latent_dist
    return {"latent_parameters": posterior.parameters}


def _text_encoder(net: Any, inputs: Inputs) -> dict[str, Tensor]:
    out = net(inputs["input_ids"], output_hidden_states=True)
    hidden = {f"hidden_states.{k}": value for k, value in enumerate(out.hidden_states)}
    named = ("last_hidden_state", "pooler_output", "text_embeds")
    return hidden | {name: out[name] for name in named if out.get(name) is not None}


_RUN: Mapping[str, Callable[[Any, Inputs], dict[str, Tensor]]] = {
    "UNet2DConditionModel": _unet,
    "AutoencoderKL": _autoencoder,
    "CLIPTextModel": _text_encoder,
    "CLIPTextModelWithProjection": _text_encoder,
}
"""Class of a network -> what computes the outputs of its graph, by optimum's names, of its inputs.
"""


def hold_to_graph(graph: Path, net: nn.Module) -> None:
    """Run a graph and the network that was made of it, in fp32, on the same inputs.

    Raises InputError where they differ by more than exports may (`TOLERANCE`), or the graph has
    inputs that the network hasn't.
    """
    run = _RUN.get(type(net).__name__)
    if run is None:
        raise InputError(
            f"{graph}: a {type(net).__name__} can't be read from ONNX: valid: {', '.join(_RUN)}"
        )
    try:
        model = onnx.load(graph, load_external_data=False)
        weights = {tensor.name for tensor in model.graph.initializer}
        given = [each for each in model.graph.input if each.name not in weights]
        inputs = {each.name: _example(each, net) for each in given}
        (found,) = run_model_in_pieces(model, graph.parent, [inputs])
        with quiet(), torch.inference_mode():
            plain = {name: torch.from_numpy(array) for name, array in inputs.items()}
            ours = run(
                net, {n: t.float() if t.is_floating_point() else t for n, t in plain.items()}
            )
    except Exception as exc:  # of ONNX Runtime and of the libraries
        raise InputError(
            f"{graph} can't be compared with {type(net).__name__}: {first_sentence(exc)}: give the "
            "diffusers folder that it was exported from"
        ) from exc
    compared = sorted(ours.keys() & found.keys())
    if not compared:
        raise InputError(
            f"{graph} gives {', '.join(found)[:200]}: expected {', '.join(ours)}, as optimum names "
            "them"
        )
    tolerance = TOLERANCE["fp32" if _in_32_bits(model) else "fp16"]
    for name in compared:
        difference = relative_rms(ours[name].numpy(), found[name].astype(np.float32))
        if not difference <= tolerance:
            raise InputError(
                f"{graph}: {name} differs by {difference:.1e} (relative RMS) from what "
                f"{type(net).__name__} makes of its weights, and {tolerance:.0e} is allowed: give "
                "the diffusers folder that it was exported from"
            )


def _in_32_bits(model: onnx.ModelProto) -> bool:
    halves = (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
    return not any(tensor.data_type in halves for tensor in model.graph.initializer)


def _example(value: onnx.ValueInfoProto, net: Any) -> Array:
    """What an input of a graph may get."""
    rng, config = np.random.default_rng(0), net.config
    tensor = value.type.tensor_type
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
    dims = [int(d.dim_value) for d in tensor.shape.dim]
    if value.name == "input_ids":
        ids = rng.integers(0, config.vocab_size - 1, size=(1, config.max_position_embeddings))
        ids[:, _TOKENS:] = config.vocab_size - 1  # the last token ends a text
        return ids.astype(dtype)
    if value.name == "timestep":
        return np.full([1] * len(dims), 500, dtype)
    if value.name == "time_ids":
        return np.array([[256, 192, 0, 16, 256, 192][: dims[-1] or 6]], dtype)
    shape = _SHAPES.get((type(net).__name__, value.name), lambda _: [dim or 1 for dim in dims])
    if not 0 < math.prod(shape(config)) <= _MOST_NUMBERS:
        raise ValueError(f"{value.name[:60]} is of {shape(config)}"[:200])
    return rng.standard_normal(shape(config)).astype(dtype)


_SHAPES: Mapping[tuple[str, str], Callable[[Any], list[int]]] = {
    ("UNet2DConditionModel", "sample"): lambda c: [1, c.in_channels, _LATENTS, 2 * _LATENTS],
    ("UNet2DConditionModel", "encoder_hidden_states"): lambda c: [
        1,
        _TOKENS,
        c.cross_attention_dim,
    ],
    ("UNet2DConditionModel", "timestep_cond"): lambda c: [1, c.time_cond_proj_dim],
    ("UNet2DConditionModel", "text_embeds"): lambda c: [
        1,
        c.projection_class_embeddings_input_dim
        - SIZE_FILLS["size_ids"] * c.addition_time_embed_dim,
    ],
    ("AutoencoderKL", "latent_sample"): lambda c: [1, c.latent_channels, _LATENTS, 2 * _LATENTS],
    ("AutoencoderKL", "sample"): lambda c: [1, c.in_channels, _PIXELS, 2 * _PIXELS],
}
"""Class of a network and input of its graph -> shape of an example; others have shapes of their
own."""
