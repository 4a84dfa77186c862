"""Regions of a picture: a grid over a feature map, and the arrays that detectors fill.

A box is x1, y1, x2, y2 and area, each divided by the picture's width, height or both.

Shapes: B pictures, R regions, C channels, h x w cells of a feature map.
"""

import torch
from torch import Tensor
from torch.nn import functional

GRID = 6
"""Regions along each side of a grid: 36 in all, as many as detectors are asked for."""


def grid_fields(feature_map: Tensor) -> dict[str, Tensor]:
    """A feature map as tokens and as a 6 x 6 grid of regions.

    Args:
        feature_map: (B, C, h, w).

    Returns:
        ``image_tokens`` (B, h * w, C) in reading order; ``regions`` (B, 36, C), each the mean of
        the cells that touch its part of the picture; their ``boxes`` (B, 36, 5) and
        ``region_mask`` (B, 36).
    """
    count = len(feature_map)
    pooled = functional.adaptive_avg_pool2d(feature_map.float(), GRID)
    boxes = grid_boxes(GRID).to(feature_map.device)
    return {
        "image_tokens": feature_map.flatten(2).transpose(1, 2),
        "regions": pooled.flatten(2).transpose(1, 2),
        "boxes": boxes.expand(count, -1, -1),
        "region_mask": torch.ones(count, GRID**2, dtype=torch.bool, device=feature_map.device),
    }


def grid_boxes(side: int) -> Tensor:
    """(side², 5) float32 boxes that tile the unit square, in reading order."""
    edges = torch.arange(side + 1, dtype=torch.float32) / side
    top, left = torch.meshgrid(edges[:-1], edges[:-1], indexing="ij")
    bottom, right = torch.meshgrid(edges[1:], edges[1:], indexing="ij")
    corners = torch.stack([left, top, right, bottom], dim=-1).reshape(-1, 4)
    return with_area(corners)


def with_area(corners: Tensor) -> Tensor:
    """Boxes (..., 5) from corners (..., 4) that are already divided by the picture's size."""
    sides = corners[..., 2:] - corners[..., :2]
    return torch.cat([corners, sides.prod(-1, keepdim=True)], dim=-1)
