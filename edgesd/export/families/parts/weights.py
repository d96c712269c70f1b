"""Networks from disk: with their weights, or by their configs alone."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from edgesd.errors import InputError
from edgesd.export.families.checkpoint import Checkpoint, Weights
from edgesd.export.quiet import quiet
from edgesd.text import first_sentence


def load_network(source: Checkpoint, component: str, cls: Any, weights: bool = True) -> Any:
    """The network of a component in fp32, as an instance of `cls`; without weights: see `shell`.

    Raises InputError for missing, broken or non-finite weights.
    """
    if not weights:
        return shell(source, component, cls)
    files = source.weights(component)
    folder = source.folder(component)
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


def shell(source: Checkpoint, component: str, cls: Any) -> Any:
    """The network by its config, on torch's meta device, where it takes no memory. Raises
    InputError."""
    config = source.config(f"{component}/config.json")
    try:
        with torch.device("meta"), quiet():
            if issubclass(cls, transformers.PreTrainedModel):
                known = cls.config_class.from_pretrained(
                    str(source.folder(component)), local_files_only=True
                )
                net = cls(known)
            else:
                net = cls.from_config(config)
    except Exception as exc:  # as above
        raise InputError(
            f"{source.folder(component)}/config.json makes no {cls.__name__}: {first_sentence(exc)}"
        ) from exc
    return net.eval().requires_grad_(False).float()


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
