"""Model families: one file per family, found by `_class_name` in model_index.json.

To add a family, write `families/<name>.py` with a `FAMILY: Family` and list it in `_MODULES`; what
it shares with others lies in `parts/`. A family reads configs only, as the libraries' own config
objects have them: what is missing in a file, renamed or mended for its age is what diffusers and
transformers make of it.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from edgesd.errors import InputError
from edgesd.export.families.checkpoint import Checkpoint
from edgesd.spec.pipeline import ComponentSpec, ImageTask, PipelineSpec
from edgesd.spec.quality import Metric

if TYPE_CHECKING:
    from torch import Tensor, nn

MAX_BATCH = 63
"""Batch of a dynamic graph, at most. diffusers' upsampling takes another branch from 64 on."""

AUTOENCODER = "vae"
"""The autoencoder's folder in every pipeline of diffusers."""

TOKENIZER_OF = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
"""A text encoder's folder there -> its tokenizer's."""

Sizes = Mapping[str, int]
"""A value for each symbolic dimension of a component's inputs: batch, height, width, tokens."""


Example = Callable[[np.random.Generator, Sequence[int]], npt.NDArray[Any]]
"""Makes random values of a shape, such as the pipeline feeds an input."""


@dataclass(frozen=True)
class Component:
    """One network to export.

    load: reads the weights and returns a torch module in fp32 whose forward takes the inputs of
        `spec` in order, and returns its output, or a tuple of them; load(weights=False) makes it
        of the config alone, for torch's meta device. Raises InputError.
    sizes: where parity is checked; all equal when the graph is static.
    multiples: what a symbolic dimension must be a multiple of (1 if absent).
    examples: input -> its values where parity is checked; standard normal ones if absent.
    fp32: whether its arithmetic stays in fp32 where a backend has fp16.
    """

    spec: ComponentSpec
    load: Callable[..., nn.Module]
    sizes: tuple[Sizes, ...]
    multiples: Mapping[str, int] = field(default_factory=dict)
    examples: Mapping[str, Example] = field(default_factory=dict)
    fp32: bool = False

    @property
    def name(self) -> str:
        """The component's name: unet, text_encoder ..."""
        return self.spec.name


@dataclass(frozen=True)
class OwnPipeline:
    """diffusers' own pipeline of a checkpoint, and where it calls its networks, which lie on
    torch's meta device.

    encoders: by the component's name. tokenizers: by the folder's name. encode: hands a prompt to
    the pipeline's encoders. encoded: what the pipeline takes from an encoder, by its component's
    name and outputs, in the order of its spec. has_size: whether it knows a default size by itself.
    of_task: the pipeline of the same networks that begins with an image, and takes_size: whether it
    makes that of a size that is given. options: of its call.
    fed: makes of what the pipeline gives its denoiser the inputs of that component, and how its
    output is given back; None where they have the same names and shapes.
    """

    pipeline: Any
    encoders: Mapping[str, Any]
    tokenizers: Mapping[str, Any]
    denoiser: Any
    autoencoder: Any
    encode: Callable[[str], object]
    encoded: Callable[[str, Sequence[Tensor]], object]
    has_size: bool
    of_task: Callable[[ImageTask], Any]
    takes_size: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    fed: (
        Callable[[Mapping[str, Any]], tuple[Mapping[str, Tensor], Callable[[Tensor], Tensor]]]
        | None
    ) = None


@dataclass(frozen=True)
class ExportSpec:
    """How a checkpoint is exported: the pipeline as a whole, and its networks in export order. own:
    makes diffusers' own pipeline of it, with the same scheduler, which the pipeline is compared
    with (own_pipeline.py). assumed: a line on what the model doesn't say; empty where it says all.
    judged_by: the metric by which changes of its graphs are judged, by images. PSNR suits models
    whose images stay the same ones when weights are rounded; those whose images lie at some 20 dB
    in 4 bits are judged by LPIPS (or what stands in for it).
    """

    pipeline: PipelineSpec
    components: tuple[Component, ...]
    own: Callable[[], OwnPipeline]
    assumed: str = ""
    judged_by: Metric = "psnr"


@dataclass(frozen=True)
class Family:
    """A model family.

    class_names: values of `_class_name` in model_index.json that it takes.
    weights: folder of each network -> stem of its weight files.
    configs: folders whose json and text files are needed (scheduler, tokenizer).
    export_spec: reads the configs. Takes (width, height) in pixels for static graphs, or None for
        dynamic ones, the name of a scheduler, or None for the model's own, the batch of a static
        denoiser, the chunks of a prompt that it takes (runtime/chunks.py), and tasks beside text to
        image. Raises InputError for a variant that isn't supported, UsageError for a size or a task
        that isn't the model's, or an unknown scheduler.
    """

    name: str
    class_names: tuple[str, ...]
    weights: Mapping[str, str]
    configs: tuple[str, ...]
    export_spec: Callable[
        [Checkpoint, tuple[int, int] | None, str | None, int, int, Sequence[ImageTask]], ExportSpec
    ]


_MODULES = ("sd", "sdxl", "flux")

_NOT_YET = ": edgesd doesn't support that yet"
_KNOWN = {
    "^ORT": ("an export for ONNX Runtime", ": give its folder, with a model.onnx for each network"),
    "^OV": ("an export for OpenVINO", ": give the diffusers folder it was made from"),
    "^Flax": ("a pipeline for JAX", ": give a PyTorch version of it"),
    "^StableDiffusion(XL)?ControlNet(Img2Img|Inpaint)?Pipeline$": (
        "a pipeline with a ControlNet",
        ": give its base model as MODEL, and its own folder controlnet as --controlnet",
    ),
    "ControlNet": ("a pipeline with a ControlNet", _NOT_YET),
    "^StableDiffusion(XL)?AdapterPipeline$": (
        "a pipeline with a T2I-Adapter",
        ": give its base model as MODEL, and its own folder adapter as --adapter",
    ),
    "Inpaint": ("an inpainting pipeline", _NOT_YET),
    "InstructPix2Pix|Upscal|Depth2Img|ImageVariation": ("a pipeline of another task", _NOT_YET),
    "^StableDiffusion3": ("a Stable Diffusion 3 pipeline", _NOT_YET),
    "^Flux": ("a FLUX pipeline", _NOT_YET),
    "Video|^Wan|^LTX|^CogVideo|^Mochi": ("a video pipeline", ": edgesd generates images"),
}
"""Unsupported pipelines: pattern of the class -> its kind, and advice."""


def families() -> tuple[Family, ...]:
    """All families that are listed in `_MODULES`."""
    return tuple(
        importlib.import_module(f"edgesd.export.families.{name}").FAMILY for name in _MODULES
    )


def family_of(class_name: str, where: str) -> Family:
    """The family that takes the diffusers pipeline class `class_name`.

    Raises InputError listing what is supported; `where` says which model asked.
    """
    for family in families():
        if class_name in family.class_names:
            return family
    valid = ", ".join(sorted(name for family in families() for name in family.class_names))
    kind = class_name if len(class_name) <= 80 else f"{class_name[:80]}..."
    for pattern, (what, advice) in _KNOWN.items():
        if re.search(pattern, class_name):
            raise InputError(f"{where} is {what} ({kind}){advice}; edgesd takes {valid}")
    raise InputError(f"{where} is a {kind}, which edgesd doesn't support (yet); it takes {valid}")
