"""Makes what `peers` compares: one UNet with random weights, in each contender's own format.

Everything is made from nothing, with fixed seeds, and kept: FOLDER/MODEL/torch (safetensors),
edgesd and edgesd-static (ONNX with fused attention), edgesd-PRECISION (quantized by rounding, with
the graph for edgesd's own kernels), openvino (IR converted from the torch module), openvino-onnx
(IR converted from an ONNX graph of standard operators), openvino-int8 (Q/DQ, by nncf), sdcpp-TYPE
(one GGUF file, whose other networks are random, too). Nothing heavy is imported before it is
needed, because contenders that run without torch import this file.
"""

from __future__ import annotations

import multiprocessing
import shutil
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.flux_gguf import convert_t5, convert_transformer
from edgesd.errors import EdgesdError
from edgesd.files import atomic_dir
from edgesd.spec.base import Dim
from edgesd.spec.pipeline import ComponentSpec, TensorSpec

_HEADER_BYTES = 1 << 20
"""Of a GGUF file: more than the names of its tensors take."""

Inputs = dict[str, npt.NDArray[np.float32]]
TOKENS = 77
INPUTS_FILE = "inputs.npz"
QUANTIZED = ("w8a8", "w4a8-g64", "w4a8-g64-lr32")
SDCPP_TYPES = ("q8_0", "q4_0", "f16")


@dataclass(frozen=True)
class Model:
    """A UNet. latent: height and width of its latents; config: of diffusers' UNet2DConditionModel,
    whose defaults are those of Stable Diffusion 1.5 where it says nothing."""

    name: str
    latent: int
    cross_attention_dim: int
    config: dict[str, Any] = field(default_factory=dict)

    def spec(self, static: bool = False) -> ComponentSpec:
        """As in a bundle that generates any size, or, if `static`, in one of this size only."""
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
        """One image without guidance: sample [1, 4, latent, latent], timestep [1], states."""
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
            "sdxl",
            128,
            2048,
            {
                "block_out_channels": (320, 640, 1280),
                "layers_per_block": 2,
                "attention_head_dim": (5, 10, 20),
                "transformer_layers_per_block": (1, 2, 10),
                "use_linear_projection": True,
                "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
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
"""sd15: the true size, 860 million parameters, 512x512 pixels. sdxl: that of Stable Diffusion XL
but for the embedding of sizes, 2.6 billion, 1024x1024. tiny: to try the script."""


def prepare(root: Path, model: Model, formats: list[str]) -> Path:
    """Make the formats that `root`/NAME lacks, each in a process of its own, and return it."""
    folder = root / model.name
    formats = [name.removesuffix("+stock").removesuffix("+stream") for name in formats]
    needed = ["torch"] if all(name.startswith("sdcpp") for name in formats) else ["torch", "edgesd"]
    for name in dict.fromkeys([*needed, *formats]):
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

    from edgesd.export.families.parts.unet import Unet

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


def _make_quantized(folder: Path, model: Model, out: Path, precision: str) -> None:
    from edgesd.export.backends.onnxruntime import LOWERING
    from edgesd.export.external_data import KERNELS_FILE, write_model
    from edgesd.export.passes.no_shapes import NoShapes

    plain, layers = rounded(folder, precision)
    own, _ = rounded(folder, precision, layers)
    LOWERING.lower_quantized(plain, layers, set(), None)
    LOWERING.lower_to_kernels(own, layers, set(), None)
    for graph in (plain, own):
        NoShapes()(graph)
    write_model(plain, out, {KERNELS_FILE: own})


def rounded(folder: Path, precision: str, layers: Any = None) -> tuple[Any, Any]:
    """The fp32 graph below `folder`, and all its layers, by node, under a scheme: rounded, with
    inputs of 8 bits as they come. Speed and memory need no better. layers: those from before."""
    import onnx_ir as ir

    from edgesd.export.quantize.layers import find_layers, matrix_of
    from edgesd.export.quantize.quantize import rounded_layer
    from edgesd.spec.scheme import parse_scheme

    graph, scheme = ir.load(folder / "edgesd" / "model.onnx"), parse_scheme(precision)
    if layers is None:
        nodes = {node.name: node for node in graph.graph}
        layers = {
            layer.node: rounded_layer(layer, matrix_of(nodes[layer.node], layer), scheme)
            for layer in find_layers("unet", graph)
        }
    return graph, layers


def _make_openvino_int8(folder: Path, model: Model, out: Path) -> None:
    if not (folder / "openvino").exists():
        _make("openvino", folder, model)
    _quantize_by_nncf(folder / "openvino" / "unet.xml", model.inputs(), out / "unet.xml")


def convert_openvino(pipeline: Path, size: tuple[int, int], work: Path) -> Path:
    """The folder of an SDXL pipeline's UNet in INT8, weights and activations, for one image of
    `size` pixels (width, height) without guidance: unet.xml, and inputs.npz to run it with. Made
    once and kept in `work`. It is read in fp16, and its ranges come of one random input: speed and
    memory need no better. Conversion took 11.5 GB of memory for SDXL, and quantization for
    1024x1024 more than 31 GB, which is as far as it was tried. Raises EdgesdError when the process
    that makes it ends, as for want of memory."""
    out = work / f"{pipeline.name}-openvino-int8-{size[0]}x{size[1]}"
    work.mkdir(parents=True, exist_ok=True)
    for make in (_sdxl_to_openvino, _sdxl_to_int8):  # what one holds, the next doesn't
        process = multiprocessing.get_context("spawn").Process(
            target=make, args=(pipeline, size, out)
        )
        process.start()
        process.join()
        if process.exitcode:
            raise EdgesdError(
                f"OpenVINO's INT8 of {pipeline} can't be made: {make.__name__} ended with status "
                f"{process.exitcode} (-9: memory ran out)"
            )
    return out


def _sdxl_to_openvino(pipeline: Path, size: tuple[int, int], out: Path) -> None:
    folder = out.with_name(f"{out.name}-fp16")
    if folder.exists() or out.exists():
        return
    import openvino
    import torch
    from diffusers import UNet2DConditionModel
    from openvino.frontend.pytorch.patch_model import __make_16bit_traceable as make_traceable

    from edgesd.export.families.parts.unet import TextTimeUnet

    make: Any = UNet2DConditionModel
    net = make.from_pretrained(
        pipeline / "unet", local_files_only=True, torch_dtype=torch.float16
    ).eval()
    config, (width, height) = net.config, size
    ids = 6
    shapes = {
        "sample": (1, config.in_channels, height // 8, width // 8),
        "timestep": (1,),
        "encoder_hidden_states": (1, TOKENS, config.cross_attention_dim),
        "text_embeds": (
            1,
            config.projection_class_embeddings_input_dim - ids * config.addition_time_embed_dim,
        ),
        "time_ids": (1, ids),
    }
    random = np.random.default_rng(0)
    inputs = {name: random.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    inputs["timestep"][:] = 500
    inputs["time_ids"][:] = (height, width, 0, 0, height, width)
    warnings.simplefilter("ignore")  # tracing warns of each shape that it fixes
    module = TextTimeUnet(net, False).requires_grad_(False)
    make_traceable(module)
    converted = openvino.convert_model(
        module,
        example_input=tuple(torch.from_numpy(array) for array in inputs.values()),
        input=list(shapes.values()),
    )
    for port, name in zip(converted.inputs, shapes, strict=True):
        port.get_tensor().set_names({name})
    with atomic_dir(folder) as part:
        openvino.save_model(converted, part / "unet.xml", compress_to_fp16=True)
        np.savez(part / INPUTS_FILE, allow_pickle=False, **inputs)


def _sdxl_to_int8(_: Path, __: tuple[int, int], out: Path) -> None:
    source = out.with_name(f"{out.name}-fp16")
    if out.exists():
        return
    with np.load(source / INPUTS_FILE) as file:
        inputs = {name: file[name] for name in file.files}
    with atomic_dir(out) as part:
        _quantize_by_nncf(source / "unet.xml", inputs, part / "unet.xml")
        np.savez(part / INPUTS_FILE, allow_pickle=False, **inputs)
    shutil.rmtree(source)


def _quantize_by_nncf(source: Path, inputs: Inputs, out: Path) -> None:
    import nncf
    import openvino

    advanced = nncf.AdvancedQuantizationParameters(disable_bias_correction=True)
    quantized = nncf.quantize(
        openvino.Core().read_model(source),
        nncf.Dataset([inputs]),
        subset_size=1,
        preset=nncf.QuantizationPreset.MIXED,
        advanced_parameters=advanced,
    )
    openvino.save_model(quantized, out, compress_to_fp16=False)


def _make_sdcpp(_: Path, model: Model, out: Path, kind: str) -> None:
    from benchmarks.random_pipeline import write_pipeline

    if model.name != "sd15":
        raise EdgesdError(
            "stable-diffusion.cpp's steps are measured with --model sd15 only: "
            "benchmarks.whole_images has the others"
        )
    write_pipeline(out / "pipeline")
    convert_sdcpp(out / "pipeline", kind, out).rename(out / "model.gguf")
    shutil.rmtree(out / "pipeline")


def convert_sdcpp(pipeline: Path, kind: str, work: Path) -> Path:
    """The file of stable-diffusion.cpp for a diffusers folder, made once and kept in `work`; of
    FLUX.1 a folder, with a file for each network. kind: one of SDCPP_TYPES. Raises EdgesdError when
    it can't be made."""
    if (pipeline / "transformer").is_dir():
        return _convert_flux(pipeline, kind, work)
    path = work / f"{pipeline.name}-{kind}.gguf"
    if path.exists():
        return path
    import stable_diffusion_cpp
    from stable_diffusion_cpp.stable_diffusion import GGML_TYPE_MAP

    work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=work) as folder:
        copy, part = Path(folder) / "pipeline", Path(folder) / path.name
        for file in sorted(pipeline.rglob("*")):
            target = copy / file.relative_to(pipeline)
            target.parent.mkdir(parents=True, exist_ok=True)
            if file.is_file() and file.parent.name.startswith("text_encoder"):
                if file.suffix == ".safetensors":
                    _with_old_names(file, target)
            elif file.is_file():
                target.symlink_to(file.resolve())
        done = stable_diffusion_cpp.convert(
            str(copy).encode(), b"", str(part).encode(), GGML_TYPE_MAP[kind], b"", True
        )
        if not done:
            raise EdgesdError("stable-diffusion.cpp can't convert the model: see above")
        _mend_names(part)
        part.rename(path)
    return path


FLUX_FILES = {
    "diffusion_model_path": "transformer.gguf",
    "t5xxl_path": "t5.gguf",
    "clip_l_path": "clip_l.safetensors",
    "vae_path": "vae.safetensors",
}
"""What stable-diffusion.cpp calls the networks of FLUX.1 -> files of the folder of them."""


def _convert_flux(pipeline: Path, kind: str, work: Path) -> Path:
    path = work / f"{pipeline.name}-{kind}"
    if path.exists():
        return path
    work.mkdir(parents=True, exist_ok=True)
    with atomic_dir(path) as out:
        transformer, t5, clip, vae = (out / name for name in FLUX_FILES.values())
        convert_transformer(pipeline / "transformer", kind, transformer)
        convert_t5(pipeline / "text_encoder_2", kind, t5)
        _with_old_names(pipeline / "text_encoder" / "model.safetensors", clip)
        shutil.copyfile(pipeline / "vae" / "diffusion_pytorch_model.safetensors", vae)
    return path


def _with_old_names(file: Path, target: Path) -> None:
    """Write CLIP's weights under the names that transformers wrote before version 5."""
    from safetensors.torch import load_file, save_file

    tensors, old = load_file(file), "text_model."
    plain = not any(name.startswith(old) for name in tensors)
    save_file({f"{old}{name}" if plain else name: t for name, t in tensors.items()}, target)


def convert_sdcpp_control(controlnet: Path, work: Path) -> Path:
    """A diffusers ControlNet for stable-diffusion.cpp, which reads the author's names and converts
    weights as it loads them; made once and kept in `work`."""
    path = work / f"{controlnet.name}-control.safetensors"
    if path.exists():
        return path
    from safetensors.torch import load_file, save_file

    (file,) = controlnet.glob("*.safetensors")
    work.mkdir(parents=True, exist_ok=True)
    named = {f"control_model.{control_name(name)}": t for name, t in load_file(file).items()}
    with tempfile.TemporaryDirectory(dir=work) as folder:
        part = Path(folder) / path.name
        save_file(named, part)
        part.rename(path)
    return path


_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_CONTROL = {
    "time_embedding.linear_1.": "time_embed.0.",
    "time_embedding.linear_2.": "time_embed.2.",
    "conv_in.": "input_blocks.0.0.",
    "mid_block.attentions.0.": "middle_block.1.",
    "controlnet_mid_block.": "middle_block_out.0.",
    "controlnet_cond_embedding.conv_in.": "input_hint_block.0.",
    "controlnet_cond_embedding.conv_out.": "input_hint_block.14.",
}
_LAYERS = 2
"""Residual blocks of each resolution of Stable Diffusion 1.x."""


def control_name(name: str) -> str:
    """What the author of ControlNet calls a tensor that diffusers calls `name`: the tables of
    lllyasviel/ControlNet's cldm.py, for two residual blocks a level."""
    for begins, author in _CONTROL.items():
        if name.startswith(begins):
            return author + name.removeprefix(begins)
    match name.split("."):
        case ["controlnet_down_blocks", number, last]:
            return f"zero_convs.{number}.0.{last}"
        case ["controlnet_cond_embedding", "blocks", number, last]:
            return f"input_hint_block.{2 * int(number) + 2}.{last}"
        case ["mid_block", "resnets", number, layer, last]:
            return f"middle_block.{2 * int(number)}.{_RESNET[layer]}.{last}"
        case ["down_blocks", level, "resnets", number, layer, last]:
            return f"input_blocks.{_place(level, number)}.0.{_RESNET[layer]}.{last}"
        case ["down_blocks", level, "attentions", number, *rest]:
            return f"input_blocks.{_place(level, number)}.1.{'.'.join(rest)}"
        case ["down_blocks", level, "downsamplers", "0", "conv", last]:
            return f"input_blocks.{_place(level, _LAYERS)}.0.op.{last}"
    raise EdgesdError(f"a ControlNet of Stable Diffusion 1.x has no {name}")


def _place(level: str, number: str | int) -> int:
    return (_LAYERS + 1) * int(level) + int(number) + 1


def _mend_names(gguf: Path) -> None:
    """Its converter names a second encoder of a diffusers folder as its reader doesn't know it.
    Both names are equally long, so that they can be replaced in the file's header."""
    with gguf.open("r+b") as file:
        header = file.read(_HEADER_BYTES)
        mended = header.replace(b"stage_model.transformer.1.", b"stage_model.1.transformer.")
        file.seek(0)
        file.write(mended)


_MAKERS: dict[str, Callable[[Path, Model, Path], None]] = {
    "torch": _make_torch,
    "edgesd": _make_onnx,
    "edgesd-static": _make_edgesd_static,
    "openvino": _make_openvino,
    "openvino-onnx": _make_openvino_onnx,
    "openvino-int8": _make_openvino_int8,
    **{
        f"edgesd-{precision}": partial(_make_quantized, precision=precision)
        for precision in QUANTIZED
    },
    **{f"sdcpp-{kind}": partial(_make_sdcpp, kind=kind) for kind in SDCPP_TYPES},
}
