"""Sketches of pictures: their edges as white lines on black, and how a hand would miss some."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

# Steps of brightness from one pixel to the next, of 255, that make an edge: faint to strong.
THRESHOLDS = (10.0, 20.0, 40.0)
MAX_DROPPED = 0.3
MAX_JITTER = 1.5  # pixels, a deviation
LINE_WIDTHS = (1, 1, 2, 3)


def slopes(pictures: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of pictures [N, 3, S, S] the steepest channel's slope, and its parts across and down.

    Each [N, S, S]: central differences, 0 to 255 a pixel.
    """
    padded = functional.pad(pictures.float(), (1, 1, 1, 1), mode="replicate")
    across = (padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]) / 2
    down = (padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]) / 2
    slope, channel = (across.square() + down.square()).sqrt().max(dim=1)
    across, down = (each.gather(1, channel[:, None])[:, 0] for each in (across, down))
    return slope, across, down


def edge_levels(pictures: Tensor) -> Tensor:
    """uint8 [N, S, S]: how many of the thresholds an edge of pictures [N, 3, S, S] exceeds.

    Of neighbours across an edge the steepest alone is one.
    """
    slope, across, down = slopes(pictures)
    around = functional.pad(slope, (1, 1, 1, 1))
    left, right = around[:, 1:-1, :-2], around[:, 1:-1, 2:]
    above, below = around[:, :-2, 1:-1], around[:, 2:, 1:-1]
    upright = across.abs() >= down.abs()
    before, behind = torch.where(upright, left, above), torch.where(upright, right, below)
    crest = (slope > before) & (slope >= behind)
    steps = torch.tensor(THRESHOLDS)[:, None, None, None]
    return ((slope > steps).sum(dim=0) * crest).to(torch.uint8)


def widened(lines: Tensor, width: int) -> Tensor:
    """Lines [N, 1, S, S] of 0 and 1, one pixel wide, at ``width`` pixels."""
    before = (width - 1) // 2
    padded = functional.pad(lines, (before, width - 1 - before) * 2)
    return functional.max_pool2d(padded, width, stride=1)


def hints(lines: Tensor) -> Tensor:
    """Lines bool [N, S, S] -> what a ControlNet reads, [N, 3, S, S] of 0 and 1."""
    return lines[:, None].float().expand(-1, 3, -1, -1)


def drawn_by_hand(levels: Tensor) -> Tensor:
    """Hints [N, 3, S, S] of edge levels [N, S, S]: some edges are missing, the others shaky."""
    count, side = levels.shape[:2]
    least = torch.randint(1, len(THRESHOLDS) + 1, (count, 1, 1))
    lines = (levels >= least)[:, None].float()
    clouds = functional.interpolate(torch.rand(count, 1, 9, 9), (side, side), mode="bilinear")
    ranks = clouds.flatten(1).argsort(dim=1).argsort(dim=1).reshape(clouds.shape)
    dropped = torch.rand(count, 1, 1, 1) * MAX_DROPPED
    lines = lines * (ranks >= dropped * side * side)
    shaky = torch.rand(count, 1, 1, 1) * MAX_JITTER * 2 / side
    bend = functional.interpolate(torch.randn(count, 2, 10, 10), (side, side), mode="bicubic")
    still = torch.eye(2, 3).expand(count, 2, 3)
    grid = functional.affine_grid(still, list(lines.shape), align_corners=False)
    grid = grid + (bend * shaky).permute(0, 2, 3, 1)
    lines = functional.grid_sample(lines, grid, mode="nearest", align_corners=False)
    wide = [
        widened(line, LINE_WIDTHS[int(torch.randint(len(LINE_WIDTHS), ()))])
        for line in torch.split(lines, 1)
    ]
    return torch.cat(wide).expand(-1, 3, -1, -1)
