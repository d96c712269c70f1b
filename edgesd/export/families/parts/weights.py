"""Networks from disk: with their weights, which stay mapped, or by their configs alone."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open

from edgesd.errors import InputError
from edgesd.export.families.checkpoint import Checkpoint, Weights
from edgesd.export.families.parts.lora import lora_edits, widen
from edgesd.export.families.parts.textual_inversion import add_vectors
from edgesd.export.mapped import edit_mapped, hold_mapped
from edgesd.export.quiet import quiet
from edgesd.text import first_sentence

_MAPPED = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
"""Types of weights that stay in their files."""


def load_network(source: Checkpoint, component: str, cls: Any, weights: bool = True) -> Any:
    """The network of a component, which computes in fp32, as an instance of `cls`; without weights:
    see `shell`. Its weights stay mapped where the files allow it (export/mapped.py).

    Raises InputError for missing, broken or non-finite weights.
    """
    if not weights:
        return shell(source, component, cls)
    with init_empty_weights(include_buffers=False):
        net = _by_config(source, component, cls)
    state = source.state(component, net)
    if state is None:
        net = _from_folder(source, component, cls)
    else:
        net.load_state_dict(state, strict=True, assign=True)
    net = net.eval().requires_grad_(False)
    add_vectors(net, source, component)
    widen(net, source, component)
    for name, tensor in net.state_dict().items():
        if not _is_finite(tensor):
            where = source.folder(component) if state is None else source.name
            raise InputError(f"{where}: {name} holds NaN or infinite weights: download it again")
    hold_mapped(net)
    source.check_network(component, net)
    edit_mapped(net, lora_edits(source, component, net))
    return net


def _is_finite(tensor: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite: by the extremes, which need no memory, and of which NaN
    is one."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    return all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(tensor))


def _from_folder(source: Checkpoint, component: str, cls: Any) -> Any:
    """What the libraries load, in the type that the files have. Raises InputError."""
    files, folder = source.weights(component), source.folder(component)
    dtype = _stored_type(folder, files)
    net = _from_pretrained(folder, files, cls, dtype)
    if dtype != torch.float32 and any(b.is_floating_point() for b in net.buffers()):
        # Tables that a network computes for itself lose nothing in fp32.
        net = _from_pretrained(folder, files, cls, torch.float32)
    return net


def _stored_type(folder: Path, files: Weights) -> torch.dtype:
    """The type of a component's weights where they have one that can be mapped and made fp32
    without loss; else fp32, which they are then read in. Broken files are the loader's to tell."""
    if not files.safetensors:
        return torch.float32
    types = set()
    for name in files.files:
        if name.endswith(".safetensors"):
            try:
                with safe_open(folder / name, "pt") as file:
                    types |= {file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118
            except (SafetensorError, OSError):
                return torch.float32
    return _MAPPED[types.pop()] if len(types) == 1 and types <= set(_MAPPED) else torch.float32


def _from_pretrained(folder: Path, files: Weights, cls: Any, dtype: torch.dtype) -> Any:
    """What the libraries load. Raises InputError."""
    load: Callable[..., tuple[Any, dict[str, Any]]] = cls.from_pretrained
    try:
        with quiet():
            net, info = load(
                str(folder),
                use_safetensors=files.safetensors,
                variant=files.variant,
                local_files_only=True,
                output_loading_info=True,
                torch_dtype=dtype,
            )
    except Exception as exc:  # many libraries read here, each with exceptions of its own
        raise InputError(_why_not_loaded(folder, files, exc)) from exc
    missing = sorted(info["missing_keys"])
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputError(f"the weights in {folder} lack {missing[0]}{more}: download them again")
    return net


def shell(source: Checkpoint, component: str, cls: Any) -> Any:
    """The network by its config, on torch's meta device, where it takes no memory. Raises
    InputError, also where the source's files are seen to have another."""
    with torch.device("meta"):
        net = _by_config(source, component, cls)
    net = net.eval().requires_grad_(False).float()
    source.check_shapes(component, net)
    add_vectors(net, source, component)
    widen(net, source, component)
    return net


def _by_config(source: Checkpoint, component: str, cls: Any) -> Any:
    config, folder = source.config(f"{component}/config.json"), source.folder(component)
    try:
        with quiet():
            if issubclass(cls, transformers.PreTrainedModel):
                return cls(cls.config_class.from_pretrained(str(folder), local_files_only=True))
            return cls.from_config(config)
    except Exception as exc:  # as above
        raise InputError(
            f"{folder}/config.json makes no {cls.__name__}: {first_sentence(exc)}"
        ) from exc


def _why_not_loaded(folder: Path, files: Weights, exc: Exception) -> str:
    """One line for weights that a library can't load."""
    chain: list[BaseException] = [exc]
    while cause := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(cause)
    messages = " ".join(map(str, chain))
    # torch reads tensors alone from a pickle, and says so at length.
    if not files.safetensors and re.search("weights.only", messages, re.IGNORECASE):
        held = re.search(r"GLOBAL ([\w.]+)", messages)
        objects = f" ({held[1]})" if held else ""
        return (
            f"{folder / files.files[-1]} isn't loaded: it holds Python objects besides tensors"
            f"{objects}, and reading those can run code. Save its tensors alone, best as "
            ".safetensors, or download the model's .safetensors"
        )
    return f"cannot load the weights in {folder}: {first_sentence(exc)}"
