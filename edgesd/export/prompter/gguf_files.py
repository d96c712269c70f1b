"""GGUF files: adapters for a base, merged models, and what types a file's tensors really have.

Names and layouts as in llama.cpp's own converters (convert_lora_to_gguf.py): an adapter holds
NAME.lora_a [rank, in] and NAME.lora_b [out, rank]; the rows of q and k are permuted, since GGUF
keeps the halves of a rotary pair side by side.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file

from edgesd.errors import InputError
from edgesd.export.prompter.base import require_gguf
from edgesd.files import atomic_path

Float = npt.NDArray[np.float32]

_GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


class Update(NamedTuple):
    """The adapter of one weight, in GGUF's layout: it adds scale * b @ a."""

    a: Float
    b: Float


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
    path = run / "adapter_model.safetensors"
    try:
        tensors: dict[str, Float] = load_file(path)
    except (OSError, ValueError, SafetensorError) as exc:
        raise InputError(f"{path} can't be read ({exc}): train an adapter first") from exc
    reader = _reader(base)
    shapes = {t.name: tuple(int(n) for n in t.shape[::-1]) for t in reader.tensors}
    heads, kv_heads = (
        _number(reader, f"attention.{key}") for key in ("head_count", "head_count_kv")
    )
    found = {}
    for name, a in tensors.items():
        if not name.endswith(".lora_A.weight"):
            continue
        module = name.removesuffix(".lora_A.weight")
        b = tensors[f"{module}.lora_B.weight"]
        target = _gguf_name(module)
        if shapes.get(target) != (b.shape[0], a.shape[1]):
            raise InputError(f"{run} isn't an adapter for {base}: {target} doesn't fit")
        if target.endswith(("attn_q.weight", "attn_k.weight")):
            b = permute(b, heads if "attn_q" in target else kv_heads)
        found[target] = Update(np.ascontiguousarray(a, np.float32), np.ascontiguousarray(b))
    if not found:
        raise InputError(f"{path} holds no adapter")
    return found


def permute(rows: Float, heads: int) -> Float:
    """Rows [heads * d, n] of a rotary projection: from halves one after the other (transformers) to
    pairs side by side (GGUF)."""
    pairs = rows.reshape(heads, 2, rows.shape[0] // heads // 2, rows.shape[1])
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
    """Write `base` in fp16 with the adapter in `run` added to its weights. Raises InputError.

    scale: alpha / rank. Norms stay in fp32.
    """
    gguf = require_gguf()
    updates = read_updates(run, base)
    reader = _reader(base)
    with atomic_path(out) as temporary:
        writer = gguf.GGUFWriter(str(temporary), _architecture(reader))
        for field in reader.fields.values():
            if not field.name.startswith("GGUF.") and field.name not in _OWN_FIELDS:
                kind = field.types[0]
                sub = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
                writer.add_key_value(field.name, field.contents(), kind, sub)
        writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
        for tensor in reader.tensors:
            weight = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            update = updates.get(tensor.name)
            if update is not None:
                weight = weight + np.float32(scale) * (update.b @ update.a)
            half = weight.ndim > 1
            writer.add_tensor(tensor.name, weight.astype(np.float16 if half else np.float32))
        _finish(writer)


_OWN_FIELDS = ("general.architecture", "general.file_type", "general.quantization_version")


def _finish(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _reader(path: Path) -> Any:
    gguf = require_gguf()
    try:
        return gguf.GGUFReader(path)
    except (OSError, ValueError, IndexError, KeyError) as exc:
        raise InputError(f"{path} can't be read as a GGUF file: {exc}") from exc


def _architecture(reader: Any) -> str:
    return str(reader.fields["general.architecture"].contents())


def _number(reader: Any, key: str) -> int:
    return int(reader.fields[f"{_architecture(reader)}.{key}"].contents())


def _gguf_name(module: str) -> str:
    """base_model.model.model.layers.3.self_attn.q_proj -> blk.3.attn_q.weight."""
    _, _, rest = module.partition("layers.")
    number, _, kind = rest.partition(".")
    if kind not in _GGUF_NAMES:
        raise InputError(f"{module} has no name in GGUF files of this architecture")
    return f"blk.{number}.{_GGUF_NAMES[kind]}.weight"
