"""Makes what `unet_peers` compares: one UNet with random weights, in each contender's own format.

Everything is made from nothing, with fixed seeds, and kept: FOLDER/MODEL/torch (safetensors),
edgesd and edgesd-static (ONNX with fused attention), openvino (IR converted from the torch module),
openvino-onnx (IR converted from an ONNX graph of standard operators). Nothing heavy is imported
before it is needed, because contenders that run without torch import this file.
"""

from __future__ import annotations

import multiprocessing
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgesd.errors import EdgesdError
from edgesd.files import atomic_dir
from edgesd.spec import ComponentSpec, Dim, TensorSpec

Inputs = dict[str, npt.NDArray[np.float32]]
TOKENS = 77


@dataclass(frozen=True)
class Model:
    """A UNet. latent: height and width of its latents; config: of diffusers' UNet2DConditionModel,
    whose defaults are those of Stable Diffusion 1.5 where it says nothing."""

    name: str
    latent: int
    cross_attention_dim: int
    config: dict[str, Any] = field(default_factory=dict)

    def spec(self, static: bool = False) -> ComponentSpec:
        """As in a bundle that draws any size, or, if `static`, in one of this size only."""
        sample: tuple[Dim, ...] = ("batch", 4, "height", "width")
        if static:
            sample = (1, 4, self.latent, self.latent)
        return ComponentSpec(
            "unet",
            (
                TensorSpec("sample", "float32", sample),
                TensorSpec("timestep", "float32", (1,)),
                TensorSpec(
                    "encoder_hidden_states",
                    "float32",
                    (sample[0], TOKENS, self.cross_attention_dim),
                ),
            ),
            (TensorSpec("noise_pred", "float32", sample),),
        )

    def inputs(self) -> Inputs:
        """One picture without guidance: sample [1, 4, latent, latent], timestep [1], states."""
        rng = np.random.default_rng(0)
        return {
            "sample": rng.standard_normal((1, 4, self.latent, self.latent), dtype=np.float32),
            "timestep": np.array([500], np.float32),
            "encoder_hidden_states": rng.standard_normal(
                (1, TOKENS, self.cross_attention_dim), dtype=np.float32
            ),
        }


MODELS = {
    model.name: model
    for model in (
        Model(
            "sd15",
            64,
            768,
            {
                "block_out_channels": (320, 640, 1280, 1280),
                "layers_per_block": 2,
                "attention_head_dim": 8,
            },
        ),
        Model(
            "tiny",
            16,
            32,
            {
                "block_out_channels": (32, 64),
                "layers_per_block": 1,
                "attention_head_dim": 4,
                "norm_num_groups": 8,
                "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
                "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            },
        ),
    )
}
"""sd15: the true size, 860 million parameters, 512x512 pixels. tiny: to try the script."""


def prepare(root: Path, model: Model, formats: list[str]) -> Path:
    """Make the formats that `root`/NAME lacks, each in a process of its own, and return it."""
    folder = root / model.name
    for name in ("torch", *(name for name in formats if name != "torch")):
        if not (folder / name).exists():
            print(f"making {name} of {model.name} (once)", flush=True)
            process = multiprocessing.get_context("spawn").Process(
                target=_make, args=(name, folder, model)
            )
            process.start()
            process.join()
            if process.exitcode:
                raise EdgesdError(f"{name} of {model.name} could not be made: see above")
    return folder


def _make(name: str, folder: Path, model: Model) -> None:
    with atomic_dir(folder / name) as out:
        _MAKERS[name](folder, model, out)


def _make_torch(_: Path, model: Model, out: Path) -> None:
    import torch
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    make: Any = UNet2DConditionModel
    make(
        sample_size=model.latent, cross_attention_dim=model.cross_attention_dim, **model.config
    ).save_pretrained(out)


def load_torch(folder: Path) -> Any:
    """The torch module in `folder`/torch, with what it takes and returns as in a bundle."""
    from diffusers import UNet2DConditionModel

    from edgesd.export.families.modules import Unet

    make: Any = UNet2DConditionModel
    net = make.from_pretrained(folder / "torch", local_files_only=True)
    return Unet(net).eval().requires_grad_(False)


def _make_onnx(
    folder: Path, model: Model, out: Path, fused: bool = True, static: bool = False
) -> None:
    from edgesd.export.external_data import write_model
    from edgesd.export.families import Component
    from edgesd.export.to_onnx import graph_from_module

    module = load_torch(folder)
    multiple = 2 ** (len(module.net.config.block_out_channels) - 1)
    component = Component(
        spec=model.spec(static),
        load=lambda: module,
        multiples={"height": multiple, "width": multiple},
        sizes=({"batch": 2, "height": 2 * multiple, "width": 3 * multiple},),
    )
    write_model(graph_from_module(module, component, "ort-mha" if fused else "sdpa"), out)


def _make_edgesd_static(folder: Path, model: Model, out: Path) -> None:
    _make_onnx(folder, model, out, static=True)


def _make_openvino(folder: Path, model: Model, out: Path) -> None:
    import openvino
    import torch

    inputs = model.inputs()
    warnings.simplefilter("ignore")  # tracing warns of each shape that it fixes
    converted = openvino.convert_model(
        load_torch(folder),
        example_input=tuple(torch.from_numpy(array) for array in inputs.values()),
        input=[tuple(array.shape) for array in inputs.values()],
    )
    for port, name in zip(converted.inputs, inputs, strict=True):
        port.get_tensor().set_names({name})
    openvino.save_model(converted, out / "unet.xml", compress_to_fp16=False)


def _make_openvino_onnx(folder: Path, model: Model, out: Path) -> None:
    import openvino

    with atomic_dir(out / "graph") as graph:
        _make_onnx(folder, model, graph, fused=False)
    converted = openvino.convert_model(
        out / "graph" / "model.onnx",
        input=[(name, list(array.shape)) for name, array in model.inputs().items()],
    )
    openvino.save_model(converted, out / "unet.xml", compress_to_fp16=False)
    for file in (out / "graph").iterdir():
        file.unlink()
    (out / "graph").rmdir()


_MAKERS: dict[str, Callable[[Path, Model, Path], None]] = {
    "torch": _make_torch,
    "edgesd": _make_onnx,
    "edgesd-static": _make_edgesd_static,
    "openvino": _make_openvino,
    "openvino-onnx": _make_openvino_onnx,
}
