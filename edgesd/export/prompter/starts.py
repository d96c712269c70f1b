"""How an adapter starts before training, and which base weights it belongs to.

default: nothing (B = 0), beside the base. pissa: the weights' principal directions, beside what is
left of them (Meng et al. 2024, arXiv 2404.02948); written as an adapter of twice the rank for the
base as it was. loftq and loftq-gguf: the rounding error, beside the rounded base, which the
run then includes (`OWN_BASE`); peft's rounds to NF4, which GGUF files don't know, so that its base
is written in fp16; loftq-gguf rounds to the very grid of the file. loftq-gguf-control: loftq-gguf's
norms in random directions.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from edgesd.errors import InputError, MissingDependencyError
from edgesd.export.prompter.base import Base, load_base
from edgesd.export.prompter.gguf_files import (
    Layout,
    Update,
    dequantize,
    rounded,
    tensor_types,
    write_base,
)
from edgesd.export.prompter.loftq import loftq, random_like
from edgesd.export.quiet import quiet
from edgesd.progress import Progress
from edgesd.runtime.arrays import Float

if TYPE_CHECKING:
    from peft import PeftModel

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

OWN_BASE = "base.gguf"
"""In a run's folder: the model that its adapter is for, when that isn't the one it was given."""

INITIAL = "initial"
"""Folder in a run's: PiSSA's adapter before training."""


@dataclass(frozen=True)
class AdapterSettings:
    """start: one of options.ADAPTER_STARTS. grid, iterations: LoftQ's, of options.GRIDS. The
    update is alpha / rank times the adapter's product."""

    rank: int
    alpha: int
    start: str = "default"
    grid: str = "Q4_0"
    iterations: int = 5
    seed: int = 0


@dataclass
class Started:
    """An adapter in its model. file: of the model that it is for. starts: by name, what else the
    adapter could begin as, for comparison; its own among them, or none of them."""

    base: Base
    model: PeftModel
    file: Path
    starts: dict[str, dict[str, Update]]


def begin(path: Path, run: Path, settings: AdapterSettings, progress: Progress) -> Started:
    """The model in `path` with an adapter that is yet to be trained.

    What the start needs besides is written to the folder `run`. Raises InputError for a base that
    the start can't be made of, MissingDependencyError without peft, or for loftq without CUDA.
    """
    if settings.start == "loftq":
        return _by_peft_loftq(path, run, settings)
    if settings.start.startswith("loftq-gguf"):
        return _by_loftq(path, run, settings, progress)
    base = load_base(path)
    pissa = settings.start == "pissa"
    model = with_adapter(base, settings, init_lora_weights="pissa_niter_16" if pissa else True)
    if pissa:
        model.save_pretrained(str(run / INITIAL), save_embedding_layers=False)
    return Started(base, model, path, {})


def with_adapter(base: Base, settings: AdapterSettings, **options: Any) -> PeftModel:
    """`base` with an adapter on all linear layers of its blocks. options: peft's. Raises
    MissingDependencyError."""
    try:
        with quiet():  # bitsandbytes logs what it can't do, where it is installed
            from peft import LoraConfig, get_peft_model
    except ImportError as exc:
        raise MissingDependencyError(
            f"training needs peft ({exc}): pip install 'edgesd[build]'"
        ) from exc
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        target_modules=list(MODULES),
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
        **options,
    )
    return get_peft_model(base.model, config)


@torch.no_grad()
def set_adapter(model: PeftModel, layout: Layout, updates: dict[str, Update], scale: float) -> None:
    """Let the adapter be what adds `updates`, which are in GGUF's layout and not yet scaled.

    scale: alpha / rank, which the model multiplies its product with.
    """
    for module, layer in adapted_layers(model).items():
        name = layout.name(f"{module}.weight")
        a, b = (part / np.sqrt(scale) for part in updates[name])
        layer.lora_A["default"].weight.copy_(torch.from_numpy(a))
        layer.lora_B["default"].weight.copy_(torch.from_numpy(layout.to_torch(name, b)))


def adapted_layers(model: PeftModel) -> dict[str, Any]:
    """Layers that have an adapter, by their names in the plain model."""
    modules = model.get_base_model().named_modules()
    return {name: layer for name, layer in modules if hasattr(layer, "lora_A")}


def save_adapter(model: PeftModel, run: Path, settings: AdapterSettings) -> AdapterSettings:
    """Write the trained adapter as peft does. Returns what it has for rank and alpha: PiSSA's is
    the difference to its start, of twice the rank (peft's conversion)."""
    if settings.start != "pissa":
        model.save_pretrained(str(run), save_embedding_layers=False)
        return settings
    initial = run / INITIAL
    model.save_pretrained(
        str(run), save_embedding_layers=False, path_initial_model_for_weight_conversion=str(initial)
    )
    shutil.rmtree(initial)
    return AdapterSettings(2 * settings.rank, 2 * settings.alpha, "pissa")


def _by_loftq(path: Path, run: Path, settings: AdapterSettings, progress: Progress) -> Started:
    _require_file(path)
    if next(iter(tensor_types(path))) == settings.grid:
        raise InputError(
            f"{path} is {settings.grid} already, from which rounding takes nothing away: give a "
            "base of more bits, or another --grid"
        )
    layout = Layout(path)
    grid, own = {}, {}
    tensors = [t for t in layout.reader.tensors if _is_adapted(t.name)]
    for done, tensor in enumerate(tensors, start=1):
        grid[tensor.name], own[tensor.name] = loftq(
            dequantize(tensor),
            lambda weight: rounded(weight, settings.grid),
            settings.rank,
            settings.iterations,
        )
        progress.update("start", done, len(tensors))
    write_base(path, grid, settings.grid, run / OWN_BASE)
    chance = np.random.default_rng(settings.seed)
    control = {name: random_like(update, chance) for name, update in own.items()}
    base = load_base(run / OWN_BASE)
    nothing = {name: Update(a, np.zeros_like(b)) for name, (a, b) in own.items()}
    starts = {"default": nothing, "loftq-gguf": own, "loftq-gguf-control": control}
    return Started(base, with_adapter(base, settings), run / OWN_BASE, starts)


def _by_peft_loftq(path: Path, run: Path, settings: AdapterSettings) -> Started:
    _require_file(path)
    if not torch.cuda.is_available():
        raise MissingDependencyError(
            "peft's LoftQ computes on an NVIDIA GPU, and there is none: use loftq-gguf, which "
            "needs none and rounds to a grid that llama.cpp has"
        )
    base = load_base(path)
    model = with_adapter(
        base,
        settings,
        init_lora_weights="loftq",
        loftq_config={"loftq_bits": 4, "loftq_iter": settings.iterations},
    )
    layout = Layout(path)
    weights: dict[str, Float] = {}
    for name, layer in adapted_layers(model).items():
        target = layout.name(f"{name}.weight")
        weight = layer.get_base_layer().weight
        weight.data = weight.data.half().float()  # as the file has it
        weights[target] = layout.to_gguf(target, weight.data.cpu().numpy())
    write_base(path, weights, "F16", run / OWN_BASE)
    return Started(base, model, run / OWN_BASE, {})


def _is_adapted(name: str) -> bool:
    return name.split(".")[-2] in _ADAPTED and name.endswith(".weight")


_ADAPTED = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


def _require_file(path: Path) -> None:
    if not path.is_file():
        raise InputError(f"LoftQ writes a GGUF file for its adapter, and {path} is none")
