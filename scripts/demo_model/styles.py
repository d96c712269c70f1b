"""Filters that give pictures another style."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from .sketch import slopes

INK = 4.0  # darkness of a line for each step of brightness from one pixel to the next
BLUE = (10.0, 50.0, 190.0)
LUMA = (0.299, 0.587, 0.114)


def line_art(pictures: Tensor) -> Tensor:
    """uint8 pictures [N, 3, S, S]: their edges as dark lines on white, without fills."""
    slope = slopes(pictures)[0][:, None]
    lines = functional.max_pool2d(slope, 3, stride=1, padding=1) * INK
    drawn = (255.0 - lines).clamp(25.0, 255.0)
    return drawn.round().to(torch.uint8).expand(-1, 3, -1, -1)


def duotone(pictures: Tensor) -> Tensor:
    """uint8 pictures [N, 3, S, S] in shades of one blue: the darker, the bluer."""
    blue, luma = (torch.tensor(each)[:, None, None] for each in (BLUE, LUMA))
    light = ((pictures.float() / 255.0) * luma).sum(dim=1, keepdim=True).square()
    drawn = blue + (255.0 - blue) * light
    return drawn.round().to(torch.uint8)


STYLES: dict[str, Callable[[Tensor], Tensor]] = {"line-art": line_art, "duotone": duotone}
