"""Pictures moved about, so that a caption doesn't tell where something lies."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

SCALES = (0.6, 1.05)
MAX_SHIFT = 0.15  # of the side
MAX_TURN_DEGREES = 20.0


def moved(pictures: Tensor) -> Tensor:
    """uint8 pictures [N, 3, S, S], each mirrored or not, turned, scaled and moved, on white.

    A caption of the set names one picture; where that lies must be learned from elsewhere.
    """
    count = len(pictures)
    angle = torch.empty(count).uniform_(-MAX_TURN_DEGREES, MAX_TURN_DEGREES).deg2rad()
    scale = torch.empty(count).uniform_(*SCALES)
    mirror = torch.randint(2, (count,)) * 2 - 1
    places = torch.zeros(count, 2, 3)  # of the output's pixels -> of the input's
    places[:, 0, 0], places[:, 0, 1] = mirror * angle.cos() / scale, -angle.sin() / scale
    places[:, 1, 0], places[:, 1, 1] = mirror * angle.sin() / scale, angle.cos() / scale
    places[:, :, 2] = torch.empty(count, 2).uniform_(-MAX_SHIFT, MAX_SHIFT) * 2
    grid = functional.affine_grid(places, list(pictures.shape), align_corners=False)
    ink = 255.0 - pictures.float()
    drawn = 255.0 - functional.grid_sample(ink, grid, align_corners=False)
    return drawn.round().to(torch.uint8)


def variants(pictures: Tensor, count: int) -> Tensor:
    """uint8 [N, count, 3, S, S] of uint8 pictures [N, 3, S, S]: each as it is, then moved."""
    made = [
        torch.stack([part, *(moved(part) for _ in range(count - 1))], dim=1)
        for part in torch.split(pictures, 64)
    ]
    return torch.cat(made)
