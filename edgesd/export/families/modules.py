"""torch side of the families: weights from disk, in wrappers with the graphs' inputs and outputs.

Each wrapper holds the network as `net`, so that a graph's names are the network's own ones.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers.models.upsampling import Upsample2D
from diffusers.utils import DummyObject
from torch import Tensor, nn
from torch.nn import functional

from edgesd.errors import InputError
from edgesd.export.quiet import quiet
from edgesd.export.source import ModelSource, Weights
from edgesd.spec.pipeline import LatentSpec
from edgesd.text import first_sentence

_TEXT_TO_IMAGE = {"StableDiffusionImg2ImgPipeline": "StableDiffusionPipeline"}
"""Pipelines that begin with an image -> the one that generates from prompts alone."""

_NO_OPTIONS = ("_diffusers_version", "_name_or_path")
"""Of a scheduler's config."""

_NO_SIZE_IS_A_MULTIPLE = 40
"""Upsamplings of a UNet that asks whether a size is a multiple of two to that power."""


class TextEncoder(nn.Module):
    """input_ids [batch, tokens] -> last hidden state, after the final norm [batch, tokens, C]."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, input_ids: Tensor) -> Tensor:
        """See the class."""
        out: Tensor = self.net(input_ids=input_ids).last_hidden_state
        return out


class Unet(nn.Module):
    """sample [batch, 4, h, w], timestep [1], states [batch, tokens, C] -> noise_pred like sample.

    timestep_cond [batch, D]: embedding of the guidance scale, for models distilled with it. follow:
    upsampling makes the size of what it is joined with, which it else doubles to. diffusers' UNet
    decides that by the sample, which a graph for any size can't: both give the same where the
    sample's size is a multiple of all levels'.
    """

    def __init__(self, net: nn.Module, follow: bool = False) -> None:
        super().__init__()
        self.net = net
        if follow:
            _follow_skips(net)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        timestep_cond: Tensor | None = None,
    ) -> Tensor:
        """See the class."""
        out: Tensor = self.net(
            sample,
            timestep,
            encoder_hidden_states=encoder_hidden_states,
            timestep_cond=timestep_cond,
            return_dict=False,
        )[0]
        return out


class VaeDecoder(nn.Module):
    """latents [batch, C, h, w], as the UNet makes them -> image [batch, 3, H, W] in about -1 to 1.

    AutoencoderTiny, too, gives -1 to 1: diffusers' DecoderTiny ends with 2 x - 1.
    """

    def __init__(self, net: nn.Module, latent: LatentSpec) -> None:
        super().__init__()
        self.net = net
        self.scale, self.shift = latent.scaling_factor, latent.shift_factor

    def forward(self, latents: Tensor) -> Tensor:
        """See the class."""
        if self.scale != 1:
            latents = latents / self.scale
        if self.shift:
            latents = latents + self.shift
        out: Tensor = self.net.decode(latents, return_dict=False)[0]  # type: ignore[operator]
        return out


class VaeEncoder(nn.Module):
    """image [batch, 3, H, W] in -1 to 1 -> mean and std of the latents, each [batch, C, h, w].

    AutoencoderTiny gives the latents themselves. All are scaled as the UNet expects them.
    """

    def __init__(self, net: nn.Module, latent: LatentSpec) -> None:
        super().__init__()
        self.net = net
        self.scale, self.shift = latent.scaling_factor, latent.shift_factor

    def forward(self, image: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """See the class."""
        encoded = self.net.encode(image)  # type: ignore[operator]
        if hasattr(encoded, "latents"):
            return self._scaled(encoded.latents)
        return self._scaled(encoded.latent_dist.mean), encoded.latent_dist.std * self.scale

    def _scaled(self, latents: Tensor) -> Tensor:
        if self.shift:
            latents = latents - self.shift
        return latents * self.scale if self.scale != 1 else latents


def load_text_encoder(source: ModelSource, weights: bool = True) -> nn.Module:
    """The text encoder in fp32. Raises InputError for missing, broken or non-finite weights."""
    return TextEncoder(_load(source, "text_encoder", transformers.CLIPTextModel, weights))


def load_unet(source: ModelSource, weights: bool = True, follow: bool = False) -> nn.Module:
    """The UNet in fp32; follow: see Unet. Raises InputError for missing, broken or non-finite
    weights."""
    return Unet(_load(source, "unet", diffusers.UNet2DConditionModel, weights), follow)


def load_vae_decoder(source: ModelSource, latent: LatentSpec, weights: bool = True) -> nn.Module:
    """The VAE's decoder in fp32. Raises InputError for missing, broken or non-finite weights."""
    net = _load(source, "vae", getattr(diffusers, source.class_of("vae")), weights)
    net.encoder = net.quant_conv = None
    return VaeDecoder(net, latent)


def load_vae_encoder(source: ModelSource, latent: LatentSpec, weights: bool = True) -> nn.Module:
    """The VAE's encoder in fp32. Raises InputError for missing, broken or non-finite weights."""
    net = _load(source, "vae", getattr(diffusers, source.class_of("vae")), weights)
    net.decoder = net.post_quant_conv = None
    return VaeEncoder(net, latent)


class _Following(nn.Module):
    """diffusers' Upsample2D, of which it takes the convolution, without its branches on sizes."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, hidden: Tensor, output_size: tuple[int, int] | None = None) -> Tensor:
        """[batch, C, h, w] -> [batch, C', 2 h, 2 w], or as output_size says."""
        scale = 2.0 if output_size is None else None
        wide = functional.interpolate(hidden, output_size, scale, mode="nearest")
        out: Tensor = self.conv(wide)
        return out


def _follow_skips(net: Any) -> None:
    """Let a UNet forward the sizes of its skip connections whatever the sample's are."""
    for block in net.up_blocks:
        for index, layer in enumerate(block.upsamplers or ()):
            plain = isinstance(layer, Upsample2D) and layer.use_conv and layer.name == "conv"
            if not plain or layer.norm is not None or not layer.interpolate:
                raise InputError(
                    f"the UNet's {type(layer).__name__} makes images of multiples of "
                    f"{2**net.num_upsamplers} latents only: give --size"
                )
            block.upsamplers[index] = _Following(layer.conv)
    net.num_upsamplers = _NO_SIZE_IS_A_MULTIPLE


def own_pipeline(source: ModelSource, sampler: str) -> Any:
    """diffusers' own text-to-image pipeline of a model, as its constructor leaves the configs.

    Networks are of their configs alone, on torch's meta device. sampler: class of the scheduler
    where diffusers has none of the model's own name, or lacks a package that it needs. Raises
    InputError for what the libraries can't make sense of.
    """
    index = source.index["_class_name"]
    name = _TEXT_TO_IMAGE.get(str(index), str(index))
    scheduler: Any = getattr(diffusers, source.class_of("scheduler"), None)
    if scheduler is None or isinstance(scheduler, DummyObject):
        scheduler = getattr(diffusers, sampler)
    folder = source.root
    parts: dict[str, Callable[[], Any]] = {
        "text_encoder": lambda: _shell(source, "text_encoder", transformers.CLIPTextModel),
        "unet": lambda: _shell(source, "unet", diffusers.UNet2DConditionModel),
        "vae": lambda: _shell(source, "vae", getattr(diffusers, source.class_of("vae"))),
        "tokenizer": lambda: load_tokenizer(folder / "tokenizer"),
        "scheduler": lambda: scheduler.from_pretrained(
            str(folder / "scheduler"), local_files_only=True
        ),
    }
    made = {}
    for part, make in parts.items():
        try:
            with quiet():
                made[part] = make()
        except InputError:
            raise
        except Exception as exc:  # many libraries read here, each with exceptions of its own
            raise InputError(f"cannot read {folder / part}: {first_sentence(exc)}") from exc
    absent = dict.fromkeys(("safety_checker", "feature_extractor", "image_encoder"))
    try:
        with quiet():
            cls: Any = getattr(diffusers, name)
            return cls(**made, **absent, requires_safety_checker=False)
    except Exception as exc:  # as above
        raise InputError(f"{source.name} makes no {name}: {first_sentence(exc)}") from exc


def with_sampler(pipeline: Any, sampler: str) -> Any:
    """The pipeline with a scheduler of the diffusers class `sampler`, made from its own one's
    options where that is another. The pipeline of latent consistency models takes its own only:
    Stable Diffusion's, which feeds such a UNet just as well, takes the others."""
    if type(pipeline.scheduler).__name__ == sampler:
        return pipeline
    with quiet():
        other = getattr(diffusers, sampler).from_config(pipeline.scheduler.config)
        if isinstance(pipeline, diffusers.LatentConsistencyModelPipeline):
            cls: Any = diffusers.StableDiffusionPipeline
            pipeline = cls(**pipeline.components, requires_safety_checker=False)
        pipeline.scheduler = other
    return pipeline


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer as diffusers' pipelines use it: the one that knows tokenizer.json, which
    transformers 4 has beside one in Python. Raises InputError where its files are missing, which
    transformers takes for a tokenizer without words."""
    names = ("vocab.json", "merges.txt"), ("tokenizer.json",)
    if not any(all((folder / name).is_file() for name in files) for files in names):
        raise InputError(
            f"{folder} lacks the tokenizer's files, tokenizer.json or vocab.json and merges.txt: "
            "download the model again"
        )
    cls: Any = transformers.CLIPTokenizerFast  # type: ignore[attr-defined]
    return cls.from_pretrained(str(folder), local_files_only=True)


def scheduler_config(scheduler: Any) -> dict[str, Any]:
    """All options of a scheduler, by diffusers' names, as JSON can hold them: what isn't finite
    becomes None. `_use_default_values` lists those that its model doesn't give."""
    config: dict[str, Any] = json.loads(scheduler.to_json_string())
    used = sorted(scheduler.config.get("_use_default_values") or ())
    config = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in config.items()
        if key not in _NO_OPTIONS
    }
    return {**config, "_use_default_values": used} if used else config


def _load(source: ModelSource, component: str, cls: Any, weights: bool) -> Any:
    if not weights:
        return _shell(source, component, cls)
    files = source.weights(component)
    folder = source.root / component
    load: Callable[..., tuple[Any, dict[str, Any]]] = cls.from_pretrained
    try:
        with quiet():
            net, info = load(
                str(folder),
                use_safetensors=files.safetensors,
                variant=files.variant,
                local_files_only=True,
                output_loading_info=True,
            )
    except Exception as exc:  # many libraries read here, each with exceptions of its own
        raise InputError(_why_not_loaded(folder, files, exc)) from exc
    missing = sorted(info["missing_keys"])
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputError(f"the weights in {folder} lack {missing[0]}{more}: download them again")
    net = net.eval().requires_grad_(False).float()
    for name, tensor in net.state_dict().items():
        if not bool(torch.isfinite(tensor).all()):
            raise InputError(f"{folder}: {name} holds NaN or infinite weights: download it again")
    return net


def _why_not_loaded(folder: Path, files: Weights, exc: Exception) -> str:
    """One line for weights that a library can't load."""
    chain: list[BaseException] = [exc]
    while cause := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(cause)
    told = " ".join(map(str, chain))
    # torch reads tensors alone from a pickle, and says so at length.
    if not files.safetensors and re.search("weights.only", told, re.IGNORECASE):
        held = re.search(r"GLOBAL ([\w.]+)", told)
        objects = f" ({held[1]})" if held else ""
        return (
            f"{folder / files.files[-1]} isn't loaded: it holds Python objects besides tensors"
            f"{objects}, and reading those can run code. Save its tensors alone, best as "
            ".safetensors, or download the model's .safetensors"
        )
    return f"cannot load the weights in {folder}: {first_sentence(exc)}"


def _shell(source: ModelSource, component: str, cls: Any) -> Any:
    """The network by its config, for torch's meta device, where it takes no memory."""
    config = source.config(f"{component}/config.json")
    try:
        with torch.device("meta"), quiet():
            if issubclass(cls, transformers.PreTrainedModel):
                known = cls.config_class.from_pretrained(
                    str(source.root / component), local_files_only=True
                )
                net = cls(known)
            else:
                net = cls.from_config(config)
    except Exception as exc:  # as above
        raise InputError(
            f"{source.root / component}/config.json makes no {cls.__name__}: {first_sentence(exc)}"
        ) from exc
    return net.eval().requires_grad_(False).float()
