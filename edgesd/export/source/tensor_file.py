"""A .safetensors file: names and shapes of what it holds, and its tensors, mapped."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from edgesd.errors import InputError
from edgesd.export.source.pointers import check_no_pointer
from edgesd.text import first_sentence

if TYPE_CHECKING:
    from torch import Tensor

_TYPES = ("F64", "F32", "F16", "BF16")
"""Of weights. Others (int8, fp8) are of quantized models."""

NUMBERS = (*_TYPES, "I64", "I32", "I16", "I8", "U8")
"""Of single numbers."""

_LICENCE, _LONGEST_LICENCE = "modelspec.license", 100


class TensorInfo(NamedTuple):
    """dtype: safetensors' word for it."""

    shape: tuple[int, ...]
    dtype: str


class TensorFile(Mapping[str, TensorInfo]):
    """The header of a .safetensors file: name -> shape and type of a tensor. metadata: what the
    file says of itself."""

    def __init__(self, path: Path) -> None:
        """Raises InputError for a file that can't be read, is cut off, or has no sound header."""
        from safetensors import SafetensorError, safe_open

        check_no_pointer(path)
        self.path = path
        try:
            with safe_open(path, "np") as file:
                self.metadata: Mapping[str, str] = MappingProxyType(file.metadata() or {})
                slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
                self._tensors = {
                    name: TensorInfo(tuple(part.get_shape()), part.get_dtype())
                    for name, part in slices.items()
                }
        except (SafetensorError, OSError) as exc:
            raise InputError(
                f"cannot read {path}: {first_sentence(exc)}: download the file again"
            ) from exc

    def __getitem__(self, name: str) -> TensorInfo:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    @property
    def licence(self) -> str:
        """What its metadata say, in short; "" where they don't."""
        return " ".join(self.metadata.get(_LICENCE, "").split())[:_LONGEST_LICENCE]

    def metadata_object(self, name: str) -> dict[str, Any] | None:
        """The JSON object that its metadata have as `name`; None where they have none. Raises
        InputError for anything else."""
        text = self.metadata.get(name)
        if text is None:
            return None
        where = f"{self.path}: {name} in its metadata"
        try:
            found = json.loads(text)
        except (ValueError, RecursionError) as exc:
            raise InputError(f"{where} isn't valid JSON ({exc})") from exc
        if not isinstance(found, dict):
            raise InputError(f"{where} must be a JSON object")
        return found

    def below(self, prefix: str) -> list[str]:
        """The names that begin with `prefix`."""
        return [name for name in self if name.startswith(prefix)]

    def parameters(self, names: Collection[str]) -> int:
        """Numbers in those tensors."""
        return sum(math.prod(self[name].shape) for name in names)

    def load(self, names: Collection[str], types: Collection[str] = _TYPES) -> dict[str, Tensor]:
        """Those tensors, mapped from the file. types: that they may have. Raises InputError for
        others, which hold no plain weights."""
        from safetensors import SafetensorError, safe_open

        self._check_types(names, types)
        try:
            with safe_open(self.path, "pt") as file:
                return {name: file.get_tensor(name) for name in names}
        except (SafetensorError, OSError) as exc:
            raise InputError(f"cannot read {self.path}: {first_sentence(exc)}") from exc

    def shells(self, names: Collection[str]) -> dict[str, Tensor]:
        """The same without values, on torch's meta device. Raises InputError as `load`."""
        import torch

        self._check_types(names, _TYPES)
        return {name: torch.empty(self[name].shape, device="meta") for name in names}

    def _check_types(self, names: Collection[str], types: Collection[str]) -> None:
        for name in names:
            if (dtype := self[name].dtype) not in types:
                raise InputError(
                    f"{self.path}: {name[:100]} is stored as {dtype}: edgesd reads weights in "
                    f"{', '.join(_TYPES)}; give the file that it was quantized from"
                )
