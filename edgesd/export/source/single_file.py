"""A model in one .safetensors file, with the names that its authors' own code gave the weights.

The layout (Stable Diffusion 1.x, 2.x, XL, XL's refiner) is told by names of weights, and diffusers'
own conversion maps them to its modules. Configs and tokenizers are those of the published models,
which come with edgesd (layouts/), or those of a folder that the user names.

A file of FLUX has the transformer, under its authors' names or diffusers', and all else is in the
folder.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from edgesd.errors import InputError
from edgesd.export.families import family_of
from edgesd.export.families.parts.flux_names import diffusers_state
from edgesd.export.families.variants import SCHEDULER_CONFIG
from edgesd.export.quiet import quiet
from edgesd.export.source.folder import INDEX, ModelSource, class_name_of, read_json_object
from edgesd.export.source.layouts import ConfigFolder, known_layouts, lay_out
from edgesd.export.source.names import known_name
from edgesd.export.source.tensor_file import TensorFile
from edgesd.files import expanded
from edgesd.text import first_sentence

if TYPE_CHECKING:
    from torch import Tensor, nn

_log = logging.getLogger(__name__)

_DENOISER, _FLUX = "model.diffusion_model.", "FluxTransformer2DModel"

_PREFIXES: Mapping[str, tuple[str, ...]] = {
    "UNet2DConditionModel": (_DENOISER,),
    _FLUX: (_DENOISER, ""),
    "AutoencoderKL": ("first_stage_model.", "vae."),
    "CLIPTextModel": (
        "cond_stage_model.transformer.",
        "cond_stage_model.model.",
        "conditioner.embedders.0.transformer.",
    ),
    "CLIPTextModelWithProjection": (
        "conditioner.embedders.1.model.",
        "conditioner.embedders.0.model.",
    ),
}
"""Class of a network -> what the names of its weights begin with, of which a file has one."""

_OF_FLUX = ("double_blocks.0.img_attn.qkv.weight", "transformer_blocks.0.attn.add_q_proj.weight")
"""In a transformer of FLUX: the authors' name, and diffusers'."""

_BESIDE_FLUX = ("vae.", "text_encoders.")
"""What names of other networks begin with in files that have them, too."""

_COUNTERS = ("position_ids",)
"""Ends of names of what older text encoders hold besides weights."""
_LEFT_OUT = ("logit_scale", "text_projection.weight")
"""Ends of names of weights that text encoders have, and some have no use for."""

_LONGEST_NAME = 100
"""Characters of a weight's name in an error."""

_PREDICTION = "modelspec.prediction_type"
_MARKS: Mapping[str, Mapping[str, object]] = {
    "v_pred": {"prediction_type": "v_prediction"},
    "ztsnr": {"rescale_betas_zero_snr": True},
}
"""Empty tensor by which a checkpoint says how it was trained -> options of its scheduler."""
_PREDICTIONS = {"v": "v_prediction", "epsilon": "epsilon"}
"""What a file's metadata say -> diffusers' word."""

_VELOCITY = "v2"
"""A layout that models of two kinds have."""
_ANY = "v1"
"""diffusers' guess for what it doesn't know."""
_INPAINTING = (
    "a checkpoint for inpainting: give --config FOLDER, a diffusers folder of such a model, whose "
    "weights aren't needed"
)
_OTHERS: Mapping[str, str] = {
    "inpainting": _INPAINTING,
    "inpainting_v2": _INPAINTING,
    "xl_inpaint": _INPAINTING,
    "upscale": "an upscaler: edgesd doesn't support that yet",
    "controlnet": "a ControlNet: give its base model as MODEL, and the folder of a ControlNet that "
    "diffusers saved as --controlnet",
}
"""Layouts without configs here -> what they are, and advice."""

_GIVE_CONFIG = (
    "if it is another model of the same kind, give --config FOLDER, a diffusers folder of that "
    "model, whose weights aren't needed"
)


@dataclass(frozen=True, kw_only=True)
class SingleFile(ModelSource):
    """A model whose weights are in one file; `root` has the configs, as of a diffusers folder.

    tensors: the header of the file. made: the folder `root`, where edgesd made it; None where it is
    the user's own. alone: the one component that the file holds, the others being in `root`; None
    where it holds all.
    """

    tensors: TensorFile
    made: ConfigFolder | None
    alone: str | None = None

    def state(self, component: str, net: nn.Module) -> Mapping[str, Tensor] | None:
        """The weights of `net` by the names in its state dict, mapped from the file. Raises
        InputError where the file has others than its config asks for."""
        if not self._holds(component):
            return super().state(component, net)
        return self._read(component, net, self.tensors.load)

    def check_shapes(self, component: str, net: nn.Module) -> None:
        """By the file's header, where edgesd's own conversion needs no more."""
        if self.alone == component and self._holds(component):
            self._read(component, net, self.tensors.shells)

    def _read(
        self,
        component: str,
        net: nn.Module,
        load: Callable[[Collection[str]], Mapping[str, Tensor]],
    ) -> Mapping[str, Tensor]:
        """What `load` gives of a component, as `state`."""
        prefix = self._prefix(component)
        names = [n for n in self.tensors.below(prefix) if not n.endswith(_COUNTERS)]
        found = load(names)
        try:
            with quiet():
                converted = _converted(found, prefix, net)
        except Exception as exc:  # diffusers reads here, with exceptions of many kinds
            raise InputError(
                f"{self._place}: its {component} isn't what its config says: "
                f"{first_sentence(exc)}: {self._other_config}"
            ) from exc
        return self._fitting(component, converted, net)

    def parameters(self, component: str) -> int:
        """Number of weights of a component."""
        if not self._holds(component):
            return super().parameters(component)
        return self.tensors.parameters(self.tensors.below(self._prefix(component)))

    @property
    def public_name(self) -> str:
        """What bundles say: the hub's id, or the file's name without its suffix."""
        return self.name if self.tensors.path != expanded(self.name) else self.tensors.path.stem

    def licence_name(self) -> str:
        """What the file's metadata says, or else the model card in the folder of the configs; or
        "unknown"."""
        return self.tensors.licence or super().licence_name()

    def _files(self) -> list[tuple[str, Path]]:
        beside = self._weight_files(c for c in self._own_networks if not self._holds(c))
        return [*self._config_files(), *beside, ("weights.safetensors", self.tensors.path)]

    def _holds(self, component: str) -> bool:
        return component not in self.others and self.alone in (None, component)

    def _prefix(self, component: str) -> str:
        """What the names of a component's weights begin with. Raises InputError."""
        class_name = self.class_of(component)
        valid = _PREFIXES.get(class_name)
        if valid is None:
            raise InputError(
                f"{self._place}: its {component} would be a {class_name}: of single files edgesd "
                f"reads {', '.join(_PREFIXES)}"
            )
        if class_name == _FLUX:
            found = _flux_prefix(self.tensors)
        else:
            found = next((prefix for prefix in valid if self.tensors.below(prefix)), None)
        if found is not None:
            return found
        raise InputError(
            f"{self._place} has no {component}: expected weights named {valid[0]}...; it isn't a "
            "whole pipeline"
        )

    def _fitting(
        self, component: str, found: Mapping[str, Tensor], net: nn.Module
    ) -> dict[str, Tensor]:
        """Those of `found` that `net` has. Raises InputError unless they are all that it has."""
        wanted = net.state_dict()
        found = {known_name(name, wanted): tensor for name, tensor in found.items()}
        what = f"{self._place}: its {component}"
        for name, tensor in wanted.items():
            if name not in found:
                raise InputError(f"{what} lacks {name}: {self._other_config}")
            if (ours := tuple(found[name].shape)) != tuple(tensor.shape):
                raise InputError(
                    f"{what} has a {name} of shape {list(ours)}, and its config asks for "
                    f"{list(tensor.shape)}: {self._other_config}"
                )
        for name in found:
            if name not in wanted and not name.endswith(_LEFT_OUT):
                raise InputError(
                    f"{what} has {name[:_LONGEST_NAME]}, which its config doesn't ask for: "
                    f"{self._other_config}"
                )
        return {name: found[name] for name in wanted}

    @property
    def _place(self) -> Path:
        return self.tensors.path

    @property
    def _other_config(self) -> str:
        if self.made is None:
            return f"{self.root} doesn't fit this file"
        return _GIVE_CONFIG


def open_single_file(name: str, path: Path, configs: Path | None = None) -> SingleFile:
    """Open a checkpoint. configs: a diffusers folder whose configs and tokenizers are taken; None
    for those of the published model that has this layout. Raises InputError."""
    tensors = TensorFile(path)
    flux = _flux_prefix(tensors) is not None
    if not flux:
        _check_whole(tensors)
    made = None
    if configs is None:
        if flux:
            raise InputError(
                f"{path} holds a transformer of FLUX: give --config FOLDER, a diffusers folder of "
                "that model (schnell, dev ...), which has its text encoders and autoencoder, too"
            )
        layout = _layout_of(tensors)
        if layout == _VELOCITY and not tensors.metadata.get(_PREDICTION):
            _log.warning(
                "%s: taken for Stable Diffusion 2.x at 768x768, which predicts velocity; for "
                "2-base give --config, for SD-Turbo --variant turbo",
                path,
            )
        made = lay_out(layout)
        _note_training(made, tensors)
        configs = made.root
    index = read_json_object(configs / INDEX)
    family = family_of(class_name_of(configs / INDEX, index), name)
    opened = SingleFile(name, configs, index, family, tensors=tensors, made=made)
    classes = {component: opened.class_of(component) for component in opened.networks}
    alone = next((component for component in classes if classes[component] == _FLUX), None)
    if flux and alone is None:
        raise InputError(f"{path} holds a transformer of FLUX, and {configs} is no model of that")
    if alone and (more := [n for n in tensors if n.startswith(_BESIDE_FLUX)]):
        _log.warning(
            "%s: its transformer alone is read: %s and %d more are those of %s",
            path, more[0][:_LONGEST_NAME], len(more) - 1, configs,
        )  # fmt: skip
    return replace(opened, alone=alone)


def _flux_prefix(tensors: TensorFile) -> str | None:
    """What names of a transformer of FLUX begin with in a file; None where it has none."""
    return next(
        (p for p in _PREFIXES[_FLUX] if any(p + name in tensors for name in _OF_FLUX)), None
    )


def _check_whole(tensors: TensorFile) -> None:
    """Raise InputError for a file that holds no denoiser under the authors' names."""
    if tensors.below(_DENOISER):
        return
    what = "holds no weights" if not tensors else f"begins with {next(iter(tensors))[:80]}"
    if any("lora" in name.lower() for name in tensors):
        raise InputError(
            f"{tensors.path} is a LoRA, not a model: give its base model as MODEL, and this file "
            "as --lora"
        )
    raise InputError(
        f"{tensors.path} {what}: expected a whole checkpoint of Stable Diffusion 1.x, 2.x or XL, "
        "with weights named model.diffusion_model..., or a transformer of FLUX; for "
        "another network alone give its pipeline"
    )


def _layout_of(tensors: TensorFile) -> str:
    """diffusers' name of a checkpoint's layout. Raises InputError for one without configs here."""
    with quiet():
        from diffusers.loaders.single_file_utils import (
            CHECKPOINT_KEY_NAMES,
            infer_diffusers_model_type,
        )
    try:
        layout = str(infer_diffusers_model_type(tensors))
    except Exception as exc:  # of a tensor whose shape is none of its name
        raise InputError(
            f"{tensors.path} isn't a checkpoint that diffusers knows: {first_sentence(exc)}"
        ) from exc
    if layout == _ANY and CHECKPOINT_KEY_NAMES[_ANY] not in tensors:
        layout = "of an unknown build"
    if layout in known_layouts():
        return layout
    if layout in _OTHERS:
        raise InputError(f"{tensors.path} is {_OTHERS[layout]}")
    raise InputError(
        f"{tensors.path} is {layout}: of single files edgesd knows {', '.join(known_layouts())}; "
        f"{_GIVE_CONFIG}"
    )


def _note_training(folder: ConfigFolder, tensors: TensorFile) -> None:
    """Set what the file says of its training in the scheduler's config."""
    options: dict[str, object] = {}
    for mark in sorted(_MARKS.keys() & tensors.keys()):
        options |= _MARKS[mark]
    said = tensors.metadata.get(_PREDICTION, "").lower()
    if said in _PREDICTIONS:
        options["prediction_type"] = _PREDICTIONS[said]
    if options:
        folder.write(
            SCHEDULER_CONFIG, {**read_json_object(folder.root / SCHEDULER_CONFIG), **options}
        )


def _converted(found: Mapping[str, Tensor], prefix: str, net: nn.Module) -> dict[str, Tensor]:
    """The weights of one network by diffusers' names, mostly by its own conversion: that of FLUX
    knows one width, and copies. Raises what diffusers raises."""
    from diffusers.loaders import single_file_utils as utils

    class_name, config = type(net).__name__, net.config
    converted: dict[str, Tensor]
    if class_name == "UNet2DConditionModel":
        converted = utils.convert_ldm_unet_checkpoint(found, config)
        used = {id(tensor) for tensor in converted.values()}
        if unused := [name for name, tensor in found.items() if id(tensor) not in used]:
            raise InputError(f"diffusers' conversion doesn't know {unused[0][:_LONGEST_NAME]}")
    elif class_name == _FLUX:
        bare = {name.removeprefix(prefix): tensor for name, tensor in found.items()}
        shapes = {name: tuple(value.shape) for name, value in net.state_dict().items()}
        converted = diffusers_state(bare, shapes)
    elif class_name == "AutoencoderKL":
        converted = utils.convert_ldm_vae_checkpoint(found, config)
    elif prefix.endswith(".transformer."):
        converted = utils.convert_ldm_clip_checkpoint(found)
    else:
        converted = utils.convert_open_clip_checkpoint(net, found, prefix)
    return converted
