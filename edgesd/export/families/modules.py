"""torch side of the families: weights from disk, in wrappers with the graphs' inputs and outputs.

Each wrapper holds the network as `net`, so that a graph's names are the network's own ones.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from torch import Tensor, nn

from edgesd.errors import InputError
from edgesd.export.quiet import quiet
from edgesd.export.source import ModelSource, Weights
from edgesd.spec import LatentSpec
from edgesd.text import first_sentence


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

    timestep_cond [batch, D]: embedding of the guidance scale, for models distilled with it.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

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


def load_unet(source: ModelSource, weights: bool = True) -> nn.Module:
    """The UNet in fp32. Raises InputError for missing, broken or non-finite weights."""
    return Unet(_load(source, "unet", diffusers.UNet2DConditionModel, weights))


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
                net = cls(cls.config_class(**config))
            else:
                net = cls.from_config(config)
    except Exception as exc:  # as above
        raise InputError(
            f"{source.root / component}/config.json makes no {cls.__name__}: {first_sentence(exc)}"
        ) from exc
    return net.eval().requires_grad_(False).float()
