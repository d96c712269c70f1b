"""diffusers' pipelines as ONNX folders, in the form that optimum gives them."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

LATENTS = 16


class _Outputs(nn.Module):
    """A network that gives a graph's outputs. Its parts have the names that they have in the
    network itself, which are those of the graph's nodes."""

    def __init__(self, net: Any, run: Callable[..., Any]) -> None:
        super().__init__()
        for name, child in net.named_children():
            self.add_module(name, child)
        object.__setattr__(self, "_net", net)
        self._run = run

    def forward(self, *inputs: Tensor) -> Any:
        return self._run(self._net, *inputs)


def _unet(net: Any, sample: Tensor, timestep: Tensor, states: Tensor, *added: Tensor) -> Tensor:
    sizes = dict(zip(("text_embeds", "time_ids"), added, strict=True)) if added else None
    out: Tensor = net(sample, timestep, states, added_cond_kwargs=sizes).sample
    return out


def _text(net: Any, input_ids: Tensor) -> tuple[Tensor, ...]:
    out = net(input_ids, output_hidden_states=True)
    return (*(out[name] for name in _text_outputs(net)), *out.hidden_states)


def _text_outputs(net: Any) -> list[str]:
    projected = type(net).__name__.endswith("WithProjection")
    return (
        ["text_embeds", "last_hidden_state"]
        if projected
        else ["last_hidden_state", "pooler_output"]
    )


def write_onnx_folder(pipeline: Any, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Write diffusers' pipeline to the new `folder` as optimum's exporter does, which is torch's
    older one."""
    pipeline.save_pretrained(folder)
    for path in [*folder.glob("*/*.safetensors")]:
        path.unlink()
    for name, net in pipeline.components.items():
        if not isinstance(net, nn.Module):
            continue
        net = net.to(dtype)
        if name == "vae":
            _write_vae(net, folder)
        elif name == "unet":
            _write_unet(net, folder / name)
        else:
            ids = torch.randint(0, net.config.vocab_size, (1, net.config.max_position_embeddings))
            hidden = [f"hidden_states.{k}" for k in range(net.config.num_hidden_layers + 1)]
            outputs = [*_text_outputs(net), *hidden]
            _export(_Outputs(net, _text), (ids,), folder / name, ["input_ids"], outputs)
    index = folder / "model_index.json"
    fields = json.loads(index.read_text())
    index.write_text(json.dumps({**fields, "_class_name": f"ORT{fields['_class_name']}"}))
    return folder


def _write_vae(net: Any, folder: Path) -> None:
    config, dtype = net.config, net.dtype
    latents = torch.randn(1, config.latent_channels, LATENTS, LATENTS, dtype=dtype)
    pixels = torch.randn(1, config.in_channels, 4 * LATENTS, 4 * LATENTS, dtype=dtype)
    decode = _Outputs(net, lambda n, z: n.decode(z).sample)
    encode = _Outputs(net, lambda n, x: n.encode(x).latent_dist.parameters)
    _export(decode, (latents,), folder / "vae_decoder", ["latent_sample"], ["sample"])
    _export(encode, (pixels,), folder / "vae_encoder", ["sample"], ["latent_parameters"])
    shutil.copyfile(folder / "vae" / "config.json", folder / "vae_encoder" / "config.json")
    shutil.move(folder / "vae" / "config.json", folder / "vae_decoder" / "config.json")
    (folder / "vae").rmdir()


def _write_unet(net: Any, folder: Path) -> None:
    config, dtype = net.config, net.dtype
    inputs = {
        "sample": torch.randn(1, config.in_channels, LATENTS, LATENTS, dtype=dtype),
        "timestep": torch.tensor(1, dtype=torch.int64),
        "encoder_hidden_states": torch.randn(1, 77, config.cross_attention_dim, dtype=dtype),
    }
    if config.addition_embed_type:
        width = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        inputs["text_embeds"] = torch.randn(1, width, dtype=dtype)
        inputs["time_ids"] = torch.ones(1, 6, dtype=dtype)
    _export(_Outputs(net, _unet), (*inputs.values(),), folder, [*inputs], ["out_sample"])


def _export(
    module: nn.Module,
    inputs: tuple[Tensor, ...],
    folder: Path,
    input_names: Sequence[str],
    output_names: Sequence[str],
) -> None:
    folder.mkdir(exist_ok=True)
    axes = {
        name: {
            axis: f"{name}_{axis}" for axis in range(tensor.ndim) if axis != 1 or tensor.ndim != 4
        }
        for name, tensor in zip(input_names, inputs, strict=True)
    }
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module,
            inputs,
            folder / "model.onnx",
            input_names=[*input_names],
            output_names=[*output_names],
            dynamic_axes=axes,
            opset_version=17,
            dynamo=False,
        )
