"""Optimizers for the training of all weights, by how much memory their state takes.

GaLore (Zhao et al. 2024, arXiv 2403.03507) keeps AdamW's moments of a projection of each matrix'
gradient, APOLLO (Zhu et al. 2024, arXiv 2412.05270) of a random one, to scale the gradient by. Both
as their authors wrote them, in the package apollo-torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from edgesd.errors import MissingDependencyError
from edgesd.export.quiet import quiet

RANK = 32
"""Of the gradients' projections. GaLore's authors fine-tune with 4 or 8, pretrain with more."""

_EVERY = 200
"""Steps after which a projection is computed anew: the papers' default."""

_GALORE = {"rank": RANK, "update_proj_gap": _EVERY, "scale": 0.25, "proj_type": "std"}
_APOLLO = {**_GALORE, "scale": 1.0, "proj": "random", "scale_type": "channel"}


def optimizer_of(kind: str, model: nn.Module, learning_rate: float) -> torch.optim.Optimizer:
    """The optimizer `kind`, of options.OPTIMIZERS, over all weights of `model`.

    The matrices of its blocks are projected; embeddings and norms get AdamW's full state. Raises
    MissingDependencyError without its package, or for galore8bit without CUDA.
    """
    weights = [p for p in model.parameters() if p.requires_grad]
    if kind == "adamw":
        return torch.optim.AdamW(weights, lr=learning_rate, weight_decay=0.0)
    package = _package()
    if kind == "galore8bit" and not torch.cuda.is_available():
        raise MissingDependencyError(
            "galore8bit keeps its state by CUDA kernels, and there is no NVIDIA GPU: use galore or "
            "apollo"
        )
    projected = [p for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name]
    known = set(map(id, projected))
    rest = [p for p in weights if id(p) not in known]
    cls, options = {
        "galore": (package.GaLoreAdamW, _GALORE),
        "galore8bit": (package.GaLoreAdamW8bit, _GALORE),
        "apollo": (package.APOLLOAdamW, _APOLLO),
    }[kind]
    groups: list[dict[str, Any]] = [{"params": rest}, {"params": projected, **options}]
    made: torch.optim.Optimizer = cls(groups, lr=learning_rate, weight_decay=0.0)
    return made


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the tensors that an optimizer keeps besides weights and gradients, projections
    included."""
    found = {t.data_ptr(): t for state in optimizer.state.values() for t in _tensors(state)}
    return sum(t.numel() * t.element_size() for t in found.values())


def load_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Go on from `state`. Projections go to their weights' device, which torch leaves out."""
    optimizer.load_state_dict(state)
    for weight, kept in optimizer.state.items():
        for part in kept.values():
            for name, value in getattr(part, "__dict__", {}).items():
                if not torch.is_tensor(part) and torch.is_tensor(value):
                    setattr(part, name, value.to(weight.device))


def state_classes(kind: str) -> list[Any]:
    """Classes of objects in that optimizer's state other than tensors and numbers."""
    if kind == "adamw":
        return []
    package = _package()
    return [package.svd_projector.GaLoreProjector, package.random_projector.GradientProjector]


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if torch.is_tensor(value):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif hasattr(value, "__dict__"):
        yield from _tensors(vars(value))


def _package() -> Any:
    try:
        with quiet():  # bitsandbytes logs what it can't do
            import apollo_torch
    except ImportError as exc:
        raise MissingDependencyError(
            f"GaLore and APOLLO need the package apollo-torch ({exc}): pip install 'edgesd[full]'"
        ) from exc
    return apollo_torch
