"""GGUF files: adapters for a base, merged and requantized models, and what types a file's tensors
really have.

Names and layouts as in llama.cpp's own converters (convert_lora_to_gguf.py): an adapter holds
NAME.lora_a [rank, in] and NAME.lora_b [out, rank]; the rows of q and k are permuted in files of the
llama architecture, since they keep the halves of a rotary pair side by side.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file

from edgesd.errors import InputError
from edgesd.export.prompter.base import require_gguf
from edgesd.export.prompter.gguf_header import check_header
from edgesd.files import atomic_path
from edgesd.runtime.arrays import Float
from edgesd.text import first_sentence

ADAPTER_WEIGHTS = "adapter_model.safetensors"
"""What peft calls an adapter's weights."""

WEIGHTS = "weights.safetensors"
"""Of a run that trained all weights: them, by the names that transformers gives them."""

_MOST_BLOCKS = 1000


class Update(NamedTuple):
    """The adapter of one weight: it adds scale * b @ a. a: [rank, in], b: [out, rank]."""

    a: Float
    b: Float


class Layout:
    """How a GGUF file names and orders what transformers calls otherwise. Raises InputError for a
    file that can't be read."""

    def __init__(self, path: Path) -> None:
        gguf = require_gguf()
        self.reader = _reader(path)
        self.shapes = {t.name: tuple(int(n) for n in t.shape[::-1]) for t in self.reader.tensors}
        kind = _architecture(self.reader)
        known = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
        if kind not in known:
            raise InputError(f"{path} is of an architecture that is not known: {kind}")
        blocks = _number(self.reader, "block_count")
        if not 0 < blocks <= _MOST_BLOCKS:
            raise InputError(f"{path} has {blocks} blocks: expected 1 to {_MOST_BLOCKS}")
        self._names = gguf.get_tensor_name_map(known[kind], blocks)
        self._heads = {}
        if kind == "llama":
            heads, kv_heads = (
                _number(self.reader, f"attention.{key}") for key in ("head_count", "head_count_kv")
            )
            self._heads = {"attn_q": heads, "attn_k": kv_heads}

    def name(self, weight: str) -> str:
        """model.layers.3.self_attn.q_proj.weight -> blk.3.attn_q.weight."""
        found = self._names.get_name(weight, (".weight", ".bias"))
        if found is None:
            raise InputError(f"{weight} has no name in GGUF files of this architecture")
        return str(found)

    def to_gguf(self, name: str, rows: Float) -> Float:
        """Rows [out, n] of the GGUF tensor `name`, from transformers' order."""
        heads = self._heads_of(name)
        return permute(rows, heads) if heads else rows

    def to_torch(self, name: str, rows: Float) -> Float:
        """The inverse of `to_gguf`."""
        heads = self._heads_of(name)
        return permute(rows, heads, rows.shape[0] // heads // 2) if heads else rows

    def _heads_of(self, name: str) -> int | None:
        return self._heads.get(name.split(".")[-2]) if name.endswith(".weight") else None


def tensor_types(path: Path) -> dict[str, int]:
    """Type of quantization -> number of weights (not tensors) that have it. Raises InputError."""
    found: Counter[str] = Counter()
    for tensor in _reader(path).tensors:
        found[tensor.tensor_type.name] += int(tensor.n_elements)
    return dict(found.most_common())


def read_updates(run: Path, base: Path) -> dict[str, Update]:
    """The adapter in the folder `run`, as peft wrote it: tensor of `base` -> its update.

    Raises InputError when it isn't there, or isn't for this base.
    """
    path = run / ADAPTER_WEIGHTS
    tensors = _load(path)
    layout = Layout(base)
    found = {}
    for name, a in tensors.items():
        if not name.endswith(".lora_A.weight"):
            continue
        module = name.removesuffix(".lora_A.weight")
        b = tensors[f"{module}.lora_B.weight"]
        target = layout.name(f"{module.removeprefix('base_model.model.')}.weight")
        if layout.shapes.get(target) != (b.shape[0], a.shape[1]):
            raise InputError(f"{run} isn't an adapter for {base}: {target} doesn't fit")
        found[target] = Update(*map(np.ascontiguousarray, (a, layout.to_gguf(target, b))))
    if not found:
        raise InputError(f"{path} holds no adapter")
    return found


def read_weights(run: Path, base: Path) -> dict[str, Float]:
    """All weights that the run trained: tensor of `base` -> its new values, in GGUF's layout.

    Raises InputError when they aren't there, or aren't of this base.
    """
    layout = Layout(base)
    found = {}
    for name, weight in _load(run / WEIGHTS).items():
        target = layout.name(name)
        if layout.shapes.get(target) != weight.shape:
            raise InputError(f"{run} isn't a training of {base}: {target} doesn't fit")
        found[target] = layout.to_gguf(target, weight)
    return found


def _load(path: Path) -> dict[str, Float]:
    try:
        found: dict[str, Float] = load_file(path)
    except (OSError, ValueError, SafetensorError) as exc:
        raise InputError(f"{path} can't be read ({exc}): train first") from exc
    return found


def permute(rows: Float, heads: int, parts: int = 2) -> Float:
    """Rows [heads * d, n] of a rotary projection: from halves one after the other (transformers) to
    pairs side by side (GGUF). In each head, `parts` runs of rows are interleaved."""
    pairs = rows.reshape(heads, parts, rows.shape[0] // heads // parts, rows.shape[1])
    out: Float = pairs.swapaxes(1, 2).reshape(rows.shape)
    return out


def write_adapter(run: Path, base: Path, alpha: float, out: Path) -> None:
    """Write the adapter in `run` as a GGUF file for `base`, in fp16. Raises InputError."""
    gguf = require_gguf()
    updates = read_updates(run, base)
    with atomic_path(out) as temporary:
        writer = gguf.GGUFWriter(str(temporary), _architecture(_reader(base)))
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", float(alpha))
        for name, update in updates.items():
            writer.add_tensor(f"{name}.lora_a", update.a.astype(np.float16))
            writer.add_tensor(f"{name}.lora_b", update.b.astype(np.float16))
        _finish(writer)


def write_merged(run: Path, base: Path, scale: float, out: Path) -> None:
    """Write `base` in fp16 with what `run` learned: the adapter added, or all weights replaced.

    scale: alpha / rank. Norms stay in fp32. Raises InputError.
    """
    weights = read_weights(run, base) if (run / WEIGHTS).is_file() else {}
    updates = {} if weights else read_updates(run, base)

    def encode(name: str, tensor: Any) -> tuple[npt.NDArray[Any], Any]:
        weight = weights.get(name)
        if weight is None:
            weight = dequantize(tensor)
        if name in updates:
            weight = weight + np.float32(scale) * (updates[name].b @ updates[name].a)
        return weight.astype(np.float16 if weight.ndim > 1 else np.float32), None

    _rewrite(base, out, "F16", encode)


def write_base(base: Path, weights: Mapping[str, Float], kind: str, out: Path) -> None:
    """Write `base` with other values for some of its weights, those in the type `kind`.

    Its other weights stay as they are, but matrices of 16 or 32 bits become Q8_0, which is what
    llama.cpp's quantizer makes of embeddings. Raises InputError.
    """
    gguf = require_gguf()
    kinds = gguf.GGMLQuantizationType

    def encode(name: str, tensor: Any) -> tuple[npt.NDArray[Any], Any]:
        if name in weights:
            return gguf.quants.quantize(weights[name], kinds[kind]), kinds[kind]
        if tensor.tensor_type in _FLOATS and tensor.data.ndim > 1 and kind != "F16":
            return gguf.quants.quantize(dequantize(tensor), kinds.Q8_0), kinds.Q8_0
        return tensor.data, tensor.tensor_type

    _rewrite(base, out, kind, encode)


def dequantize(tensor: Any) -> Float:
    """Values of a reader's tensor."""
    values: Float = require_gguf().quants.dequantize(tensor.data, tensor.tensor_type)
    return values


def rounded(weight: Float, kind: str) -> Float:
    """Values of `weight` [out, in] on the grid of a GGUF type. Raises InputError where its blocks
    don't fit."""
    gguf = require_gguf()
    number = gguf.GGMLQuantizationType[kind]
    try:
        codes = gguf.quants.quantize(weight, number)
    except gguf.quants.QuantError as exc:
        raise InputError(f"a weight of {list(weight.shape)} can't have the type {kind}") from exc
    values: Float = gguf.quants.dequantize(codes, number)
    return values


Encode = Callable[[str, Any], tuple[npt.NDArray[Any], Any]]
"""A tensor's name and the reader's tensor -> what to write, and its type, or None for a plain one.
"""

_OWN_FIELDS = ("general.architecture", "general.file_type", "general.quantization_version")
_FLOATS = (0, 1, 30)  # GGMLQuantizationType: F32, F16, BF16


def _rewrite(base: Path, out: Path, file_type: str, encode: Encode) -> None:
    """Write `base` with the same fields, each tensor as `encode` says."""
    gguf = require_gguf()
    reader = _reader(base)
    with atomic_path(out) as temporary:
        writer = gguf.GGUFWriter(str(temporary), _architecture(reader))
        for field in reader.fields.values():
            if not field.name.startswith("GGUF.") and field.name not in _OWN_FIELDS:
                kind = field.types[0]
                sub = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
                writer.add_key_value(field.name, field.contents(), kind, sub)
        writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{file_type}"])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        for tensor in reader.tensors:
            data, number = encode(tensor.name, tensor)
            writer.add_tensor(tensor.name, data, raw_dtype=number)
        _finish(writer)


def _finish(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _reader(path: Path) -> Any:
    gguf = require_gguf()
    check_header(path)
    try:
        return gguf.GGUFReader(path)
    except (OSError, ValueError, IndexError, KeyError, OverflowError, struct.error) as exc:
        raise InputError(f"{path} can't be read as a GGUF file: {first_sentence(exc)}") from exc


def _architecture(reader: Any) -> str:
    return str(_contents(reader, "general.architecture"))


def _number(reader: Any, key: str) -> int:
    name = f"{_architecture(reader)}.{key}"
    try:
        return int(_contents(reader, name))
    except (TypeError, ValueError):
        raise InputError(f"its GGUF file's {name} is no number: convert the model again") from None


def _contents(reader: Any, name: str) -> Any:
    try:
        return reader.fields[name].contents()
    except (KeyError, ValueError, IndexError):
        raise InputError(f"its GGUF file has no {name}: convert the model again") from None
