"""What the products of a LoRA are multiplied with: alpha / rank, from wherever a file has them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgesd.errors import InputError
from edgesd.export.source.folder import read_json_object
from edgesd.export.source.tensor_file import TensorFile

_METADATA = "lora_adapter_metadata"
"""Where diffusers has peft's configs: their fields' names begin with a component's and a dot."""

_PEFT, _CONFIG = "base_model.model.", "adapter_config.json"
"""What peft's own names begin with, and the file beside them that has the rest."""

_FAL = f"{_PEFT}double_blocks."
"""What names of fal's LoRAs of FLUX begin with, which come without a config: alpha is the rank."""

_TYPES = ("LORA", "LOHA", "LOKR")
_CHANGES_BASE = ("pissa", "olora", "corda", "lora_ga")
"""Ways of peft to begin that take something out of the model's own weights."""

_LARGEST = 1 << 20


@dataclass(frozen=True)
class _Config:
    """Of peft. ranks, alphas: of layers whose own differ, by name or the end of it."""

    rank: float
    alpha: float
    ranks: Mapping[str, float]
    alphas: Mapping[str, float]
    by_root: bool

    def scale(self, layer: str, rank: int | None) -> float:
        found = rank or _of_layer(self.ranks, layer, self.rank)
        return _of_layer(self.alphas, layer, self.alpha) / (
            math.sqrt(found) if self.by_root else found
        )


@dataclass(frozen=True)
class Scales:
    """configs: first word of the layers' names -> what peft says of them. files: where that stands
    besides in the file itself."""

    configs: Mapping[str, _Config]
    files: tuple[Path, ...] = ()

    def of(self, layer: str, alpha: float | None, rank: int | None) -> float:
        """alpha: of the layer's own tensor; None where there is none. 1 where nothing says it."""
        if alpha is not None:
            return alpha / rank if rank else 1.0
        first, _, rest = layer.partition(".")
        config = self.configs.get(first)
        rest = layer.removeprefix(_PEFT) if layer.startswith(_PEFT) else rest
        return 1.0 if config is None else config.scale(rest, rank)


def scales_of(file: TensorFile) -> Scales:
    """What a file, or the config beside it, says of scales. Raises InputError where peft's names
    have no config, unless they are fal's, and for a config that makes no sense."""
    if file.below(_PEFT):
        path = file.path.parent / _CONFIG
        if not path.is_file():
            if file.below(_FAL):
                return Scales({})
            raise InputError(
                f"{file.path} has peft's names ({_PEFT}...), and no {_CONFIG} beside it, which "
                "has its alpha: put that there, or save the LoRA with diffusers"
            )
        return Scales({_PEFT.split(".")[0]: _config(path, read_json_object(path))}, (path,))
    fields: dict[str, dict[str, Any]] = {}
    for key, value in (file.metadata_object(_METADATA) or {}).items():
        first, _, name = key.partition(".")
        fields.setdefault(first, {})[name] = value
    return Scales({first: _config(file.path, config) for first, config in fields.items()})


def _config(path: Path, config: Mapping[str, Any]) -> _Config:
    kind, begins = config.get("peft_type", _TYPES[0]), config.get("init_lora_weights")
    if kind not in _TYPES:
        raise InputError(f"{path}: peft_type is {str(kind)[:40]}: edgesd takes {', '.join(_TYPES)}")
    if isinstance(begins, str) and begins.startswith(_CHANGES_BASE):
        raise InputError(
            f"{path}: init_lora_weights is {begins[:40]}, which changed the model's own weights, "
            "too: convert it with peft (save_pretrained with path_initial_model_for_weight_"
            "conversion)"
        )
    alpha = config.get("lora_alpha", config.get("alpha"))
    rank = _number(path, "r", config.get("r"), 1)
    return _Config(
        rank,
        rank if alpha is None else _number(path, "alpha", alpha),
        _numbers(path, "rank_pattern", config.get("rank_pattern"), 1),
        _numbers(path, "alpha_pattern", config.get("alpha_pattern")),
        config.get("use_rslora") is True,
    )


def _numbers(path: Path, name: str, values: Any, least: float = -_LARGEST) -> dict[str, float]:
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise InputError(f"{path}: {name} must be a JSON object")
    for key in values:
        if not re.fullmatch(r"\^?[\w.]+", key):
            raise InputError(
                f"{path}: {name} has the pattern {key[:60]!r}: edgesd takes names of layers, as "
                "diffusers writes them"
            )
    return {key: _number(path, name, value, least) for key, value in values.items()}


def _number(path: Path, name: str, value: Any, least: float = -_LARGEST) -> float:
    if type(value) in (int, float) and least <= value <= _LARGEST:
        return float(value)
    raise InputError(
        f"{path}: {name} must be a number from {least:g} to {_LARGEST}, not {value!r:.40}"
    )


def _of_layer(values: Mapping[str, float], layer: str, other: float) -> float:
    """The value of the first name that is the layer's, or the end of it; one that begins with ^ is
    the whole."""
    for name, value in values.items():
        if layer == name.removeprefix("^") or layer.endswith(f".{name}"):
            return value
    return other
