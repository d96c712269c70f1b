"""Masks for the training of inpainting: boxes, blobs and whole pictures."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

WHOLE_SHARE = 0.1
BLOB_SHARE = 0.35
BOX_SIDES = (0.2, 0.8)  # of the picture's
BLOB_AREAS = (0.1, 0.6)


def box(side: int) -> Tensor:
    """[S, S] of 0 and 1: a rectangle is drawn anew."""
    height, width = (torch.empty(2).uniform_(*BOX_SIDES) * side).long().tolist()
    top = int(torch.randint(side - height + 1, ()))
    left = int(torch.randint(side - width + 1, ()))
    mask = torch.zeros(side, side)
    mask[top : top + height, left : left + width] = 1.0
    return mask


def blob(side: int) -> Tensor:
    """[S, S] of 0 and 1: what a soft random field exceeds is drawn anew."""
    field = functional.interpolate(torch.rand(1, 1, 6, 6), (side, side), mode="bicubic")[0, 0]
    area = float(torch.empty(()).uniform_(*BLOB_AREAS))
    return (field > field.flatten().quantile(1 - area)).float()


def masks(count: int, side: int) -> Tensor:
    """[N, 1, S, S] of 0 and 1; 1 is drawn anew."""
    made = []
    for kind in torch.rand(count).tolist():
        if kind < WHOLE_SHARE:
            made.append(torch.ones(side, side))
        else:
            made.append(blob(side) if kind < WHOLE_SHARE + BLOB_SHARE else box(side))
    return torch.stack(made)[:, None]
