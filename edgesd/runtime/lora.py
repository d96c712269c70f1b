"""LoRAs on a board: files of factors, and what they fill the slots of a bundle's graphs with.

A file is in the form of safetensors (its README, "Format"): eight bytes of the header's length, a
header in JSON, and arrays one after another, without gaps. For each layer that it changes it has
COMPONENT/LAYER/down [inputs, r] and COMPONENT/LAYER/up [r, outputs], fp16 or fp32, with the LoRA's
own scale (alpha / r) within up; `__metadata__` has a LoraFile under "edgesd".

A file fits every bundle that has a slot of the same name, inputs and outputs for each of its
layers: whatever the precision and backend, and other models of the same architecture, too.
`edgesd lora convert` makes such files (export/lora).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import msgspec
import numpy as np
from msgspec import Meta

from edgesd.errors import InputError, ResourceError, UsageError
from edgesd.files import scaled_path
from edgesd.runtime.arrays import Array, Float
from edgesd.runtime.signature import check_trusted_lora
from edgesd.spec.base import Sha256, Size, decode_json
from edgesd.spec.build import MOST_LORA_SCALE
from edgesd.spec.bundle import BundleManifest
from edgesd.spec.lora import MOST_SLOTS, LoraFile, LoraSlots, slot_inputs
from edgesd.spec.scheme import MAX_RANK

SUFFIX = ".lora"
_METADATA, _KEY = "__metadata__", "edgesd"
_MOST_BYTES, _MOST_HEADER = 4 << 30, 16 << 20
MOST_VALUE = float(np.finfo(np.float16).max)
"""Magnitude of a factor: backends may compute in fp16."""

_TYPES: Mapping[str, np.dtype[Any]] = {"F16": np.dtype("<f2"), "F32": np.dtype("<f4")}

Place = tuple[str, str]
"""A component, and a layer in it."""


class Factors(NamedTuple):
    """What a LoRA adds to a layer: (x down) up. down [inputs, r], up [r, outputs]."""

    down: Array
    up: Array

    @property
    def rank(self) -> int:
        """r."""
        return len(self.up)


class Lora(NamedTuple):
    """A file of factors that was read. sha256: of all its bytes. about: what it says of itself."""

    sha256: Sha256
    about: LoraFile
    factors: Mapping[Place, Factors]

    @property
    def bytes(self) -> int:
        """Memory that its factors take."""
        return sum(array.nbytes for pair in self.factors.values() for array in pair)


class Used(NamedTuple):
    """A LoRA, and the factor that what it adds is multiplied with."""

    lora: Lora
    scale: float = 1.0


def open_lora(given: str, folder: Path | None = None) -> Used:
    """The LoRA in FILE or FILE:SCALE, as a command line has it; without such a file, NAME.lora in
    `folder`, of NAME or NAME:SCALE. Raises InputError as `read_lora`, UsageError for a scale that
    is none, BundleError for a file that this machine doesn't trust (runtime.signature)."""
    path, scale = scaled_path(given)
    if folder is not None and not path.exists() and str(path) == path.name:
        path = folder / f"{path.name.removesuffix(SUFFIX)}{SUFFIX}"
    if not path.is_file():
        raise InputError(f"--lora {given}: there is no such file: give FILE or FILE:SCALE")
    _check_scale(scale)
    lora = read_lora(path)
    check_trusted_lora(path, lora.sha256)
    return Used(lora, scale)


class _Tensor(msgspec.Struct, forbid_unknown_fields=True):
    dtype: str
    shape: Annotated[tuple[Size, ...], Meta(max_length=2, min_length=2)]
    data_offsets: tuple[Annotated[int, Meta(ge=0)], Annotated[int, Meta(ge=0)]]


def read_lora(path: Path) -> Lora:
    """The factors in a file. Raises InputError, with one line that says what is wrong, for anything
    but a whole file of finite factors; ResourceError when memory runs out."""
    try:
        return _parsed(_content(path))
    except InputError as exc:
        raise InputError(f"{path}: {exc}") from exc
    except MemoryError as exc:
        raise ResourceError(f"not enough memory for {path}") from exc


def _content(path: Path) -> bytes:
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK  # of a FIFO: don't wait
    try:
        with os.fdopen(os.open(path, flags), "rb") as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise InputError("it isn't a regular file")
            if found.st_size > _MOST_BYTES:
                raise InputError(f"it has {found.st_size} bytes, more than a LoRA has")
            return file.read(_MOST_BYTES)
    except OSError as exc:
        raise InputError(f"it can't be read ({exc.strerror or exc})") from exc


def _parsed(content: bytes) -> Lora:
    length = int.from_bytes(content[:8], "little")
    if len(content) < 8 or not 2 <= length <= min(_MOST_HEADER, len(content) - 8):
        raise InputError(
            "it isn't a LoRA for boards, or it is truncated: edgesd lora convert makes one"
        )
    fields = decode_json(content[8 : 8 + length], dict[str, msgspec.Raw])
    metadata = decode_json(fields.pop(_METADATA, msgspec.Raw(b"{}")), dict[str, str])
    if _KEY not in metadata:
        raise InputError("it isn't a LoRA for boards: make one of it by edgesd lora convert")
    about = decode_json(metadata[_KEY], LoraFile)
    if not 0 < len(fields) <= 2 * MOST_SLOTS:
        raise InputError(f"it has {len(fields)} factors")
    tensors = {name: decode_json(raw, _Tensor) for name, raw in fields.items()}
    data = memoryview(content)[8 + length :]
    end = 0
    found: dict[Place, dict[str, Array]] = {}
    for name, tensor in sorted(tensors.items(), key=lambda each: each[1].data_offsets):
        begin, after = tensor.data_offsets
        dtype = _TYPES.get(tensor.dtype)
        size = math.prod(tensor.shape)
        if dtype is None or begin != end or after - begin != size * dtype.itemsize:
            raise InputError(f"its header is wrong about {name[:100]!r}: copy or make it anew")
        end = after
        if end > len(data):
            break
        component, _, rest = name.partition("/")
        layer, _, which = rest.rpartition("/")
        if not component or not layer or which not in ("down", "up"):
            raise InputError(f"{name[:100]!r} is no factor of a layer")
        array = np.frombuffer(data[begin:after], dtype).reshape(tensor.shape)
        _check_values(array, name)
        found.setdefault((component, layer), {})[which] = array
    if end != len(data):
        raise InputError(f"its factors have {len(data)} bytes, not {end}: copy it anew")
    return Lora(hashlib.sha256(content).hexdigest(), about, _paired(found))


def _check_values(array: Array, name: str) -> None:
    largest = float(np.abs(array).max(initial=0))  # NaN where there is one
    if not largest <= MOST_VALUE:
        raise InputError(f"{name[:100]!r} holds NaN, or values beyond {MOST_VALUE:.0f}")


def _paired(found: Mapping[Place, Mapping[str, Array]]) -> dict[Place, Factors]:
    pairs = {}
    for (component, layer), pair in found.items():
        if len(pair) != 2 or pair["down"].shape[1] != pair["up"].shape[0]:
            raise InputError(f"the factors of {component}/{layer[:100]} don't fit each other")
        pairs[component, layer] = Factors(pair["down"], pair["up"])
        if pairs[component, layer].rank > MAX_RANK:
            raise InputError(f"{component}/{layer[:100]} has a rank above {MAX_RANK}")
    return pairs


def lora_bytes(factors: Mapping[Place, Factors], about: LoraFile) -> bytes:
    """The content of a file of factors, each fp16 or fp32."""
    header: dict[str, object] = {_METADATA: {_KEY: msgspec.json.encode(about).decode()}}
    arrays: list[bytes] = []
    end = 0
    names = {dtype: name for name, dtype in _TYPES.items()}
    for (component, layer), pair in sorted(factors.items()):
        for which, array in zip(("down", "up"), pair, strict=True):
            data = np.ascontiguousarray(array).tobytes()
            header[f"{component}/{layer}/{which}"] = {
                "dtype": names[array.dtype],
                "shape": array.shape,
                "data_offsets": (end, end + len(data)),
            }
            arrays.append(data)
            end += len(data)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + b"".join(arrays)


# What fills slots.


def slots_of(manifest: BundleManifest) -> dict[str, LoraSlots]:
    """Component -> its slots. Raises UsageError for a bundle without any."""
    found = {name: e.slots for name, e in manifest.engines.items() if e.slots is not None}
    if not found:
        raise UsageError(
            f"{manifest.name} has no place for LoRAs: build it with --lora-slots RANK, or with a "
            "LoRA merged into it by --lora"
        )
    return found


def filling(manifest: BundleManifest, used: Sequence[Used]) -> dict[str, dict[str, Float]]:
    """What the slots of a bundle are filled with when several LoRAs are used together: component ->
    input -> array, of components that they change. Ranks of one layer add up.

    Raises UsageError where a LoRA doesn't fit the bundle, or they are too large together.
    """
    used = [each for each in used if each.scale]
    if not used:
        return {}
    slots = slots_of(manifest)
    places = {
        (component, slot.name): (slot, slot_inputs(index))
        for component, each in slots.items()
        for index, slot in enumerate(each.layers)
    }
    mixed: dict[Place, list[tuple[Factors, float]]] = {}
    for lora, scale in used:
        _check_scale(scale)
        for place, factors in lora.factors.items():
            slot, _ = places.get(place, (None, None))
            sizes = len(factors.down), factors.up.shape[1]
            if slot is None or sizes != (slot.inputs, slot.outputs):
                component, layer = place
                raise UsageError(
                    f"{lora.about.name} was made for another model ({lora.about.model}): "
                    f"{manifest.name} has no slot {component}/{layer} of {sizes[0]} to {sizes[1]} "
                    "values: convert it for this bundle by edgesd lora convert"
                )
            mixed.setdefault(place, []).append((factors, scale))
    found: dict[str, dict[str, Float]] = {}
    for place, each in mixed.items():
        rank, most = sum(factors.rank for factors, _ in each), slots[place[0]].rank
        if rank > most:
            raise UsageError(
                f"{' and '.join(lora.about.name for lora, _ in used)} need a rank of {rank} in "
                f"{'/'.join(place)}, and {manifest.name} was built with --lora-slots {most}: use "
                "fewer at a time, or build it for more"
            )
        down, up = places[place][1]
        one = found.setdefault(place[0], {})
        one[down] = np.concatenate([np.float32(f.down) for f, _ in each], axis=1)
        one[up] = np.concatenate([np.float32(f.up) * np.float32(s) for f, s in each])
        _check_values(one[up], f"{'/'.join(place)} times its scale")
    return found


def _check_scale(scale: float) -> None:
    if not abs(scale) <= MOST_LORA_SCALE:
        most = f"{MOST_LORA_SCALE:g}"
        raise UsageError(f"the scale {scale:g} of a LoRA isn't -{most} to {most}")


def fill_slots(slots: LoraSlots, factors: Mapping[str, Array]) -> dict[str, Array]:
    """An array for each input of `slots`: what is given, filled up with zeros where ranks are
    fixed; those that aren't given are empty. Raises InputError for what no slot takes."""
    found: dict[str, Array] = {}
    for index, slot in enumerate(slots.layers):
        names = slot_inputs(index)
        down, up = (factors.get(name) for name in names)
        if down is None or up is None:
            down, up = np.zeros((slot.inputs, 0)), np.zeros((0, slot.outputs))
        rank = down.shape[1]
        if down.shape != (slot.inputs, rank) or up.shape != (rank, slot.outputs):
            raise InputError(f"a LoRA's factors for {slot.name} don't fit its slot")
        if rank > slots.rank:
            raise InputError(f"a LoRA has the rank {rank} in {slot.name}: {slots.rank} is the most")
        width = slots.rank if slots.fixed else rank
        wide = (
            np.zeros((slot.inputs, width), np.float32),
            np.zeros((width, slot.outputs), np.float32),
        )
        wide[0][:, :rank], wide[1][:rank] = down, up
        found.update(zip(names, wide, strict=True))
    if unknown := factors.keys() - found.keys():
        raise InputError(f"no slot takes a LoRA's {min(unknown)}")
    return found


def empty_factors(slots: LoraSlots) -> dict[str, Array]:
    """What fills `slots` when no LoRA is used."""
    return fill_slots(slots, {})
