"""Small random LoRAs for a diffusers pipeline, with the names that different programs give them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
TEXT = ("q_proj", "k_proj", "v_proj", "out_proj")
CONVOLUTIONS = ("conv1", "conv2")
Tensors = dict[str, torch.Tensor]


def save(path: Path, tensors: Mapping[str, torch.Tensor], **metadata: str) -> Path:
    save_file(
        {
            name: tensor.clone(memory_format=torch.contiguous_format)
            for name, tensor in tensors.items()
        },
        path,
        metadata,
    )
    return path


def layers(net: Any, ends: tuple[str, ...], kind: type[nn.Module]) -> Iterator[tuple[str, Any]]:
    for name, module in net.named_modules():
        if isinstance(module, kind) and name.endswith(ends):
            yield name, module


def encoders(pipeline: Any) -> dict[str, Any]:
    """The text encoders of a pipeline."""
    names = ("text_encoder", "text_encoder_2")
    return {name: net for name in names if (net := pipeline.components.get(name)) is not None}


def peft_lora(pipeline: Any, rank: int = 4, seed: int = 0, text: bool = False) -> Tensors:
    """Of attention, in diffusers' and peft's names, without alpha. text: of text encoders, too."""
    generator = torch.Generator().manual_seed(seed)
    found: Tensors = {}
    nets = [("unet", pipeline.unet, ATTENTION)]
    nets += [(name, net, TEXT) for name, net in encoders(pipeline).items() if text]
    for prefix, net, ends in nets:
        for name, layer in layers(net, ends, nn.Linear):
            down = torch.randn(rank, layer.in_features, generator=generator) * 0.2
            up = torch.randn(layer.out_features, rank, generator=generator) * 0.2
            found[f"{prefix}.{name}.lora_A.weight"] = down
            found[f"{prefix}.{name}.lora_B.weight"] = up
    return found


def kohya_lora(
    pipeline: Any, rank: int = 4, alpha: float = 2.0, seed: int = 0, text: bool = False
) -> Tensors:
    """Of attention and convolutions (LoCon), in Kohya's names, with alpha."""
    generator = torch.Generator().manual_seed(seed)
    found: Tensors = {}

    def add(key: str, down: tuple[int, ...], up: tuple[int, ...]) -> None:
        found[f"{key}.lora_down.weight"] = torch.randn(down, generator=generator) * 0.2
        found[f"{key}.lora_up.weight"] = torch.randn(up, generator=generator) * 0.2
        found[f"{key}.alpha"] = torch.tensor(alpha)

    for name, layer in layers(pipeline.unet, ATTENTION, nn.Linear):
        key = "lora_unet_" + name.replace(".", "_")
        add(key, (rank, layer.in_features), (layer.out_features, rank))
    for name, layer in layers(pipeline.unet, CONVOLUTIONS, nn.Conv2d):
        key = "lora_unet_" + name.replace(".", "_")
        down = (rank, layer.in_channels, *layer.kernel_size)
        add(key, down, (layer.out_channels, rank, 1, 1))
    nets = encoders(pipeline) if text else {}
    prefixes = ("lora_te1_", "lora_te2_") if len(nets) > 1 else ("lora_te_",)
    for prefix, net in zip(prefixes, nets.values(), strict=False):
        for name, layer in layers(net, (*TEXT, "fc1", "fc2"), nn.Linear):
            wrapped = name if name.startswith("text_model.") else f"text_model.{name}"
            key = prefix + wrapped.replace(".", "_")
            add(key, (rank, layer.in_features), (layer.out_features, rank))
    return found
