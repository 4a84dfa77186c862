"""Boxes of the Visual Genome detector: anchors, proposals, overlaps.

Pixels are counted inclusively, as in the first Faster R-CNN: a box from 0 to 15 is 16 pixels wide.
Boxes are x1, y1, x2, y2 in pixels; n boxes, A anchors per cell, h x w cells.
"""

import torch
from torch import Tensor
from torchvision.ops import nms

CELL = 16
"""Pixels from one cell of the feature map to the next."""
RATIOS = (0.5, 1.0, 2.0)
"""Height over width."""
SCALES = (4, 8, 16, 32)
"""Sides in cells of the square anchors."""
BEFORE_NMS = 6000
OVERLAP = 0.7


def base_anchors() -> Tensor:
    """(12, 4): the anchors of the cell at the origin, by ratio, then scale.

    Each ratio gives a box of about one cell's area with whole sides, which the scales multiply
    about its centre.
    """
    centre = (CELL - 1) / 2
    rows = []
    for ratio in RATIOS:
        width = round((CELL * CELL / ratio) ** 0.5)
        height = round(width * ratio)
        for scale in SCALES:
            across, down = (width * scale - 1) / 2, (height * scale - 1) / 2
            rows.append([centre - across, centre - down, centre + across, centre + down])
    return torch.tensor(rows)


def anchors(height: int, width: int) -> Tensor:
    """(h * w * 12, 4): all anchors, by row, column, then as in :func:`base_anchors`."""
    y, x = torch.meshgrid(torch.arange(height) * CELL, torch.arange(width) * CELL, indexing="ij")
    shifts = torch.stack([x, y, x, y], dim=-1).reshape(-1, 1, 4)
    return (shifts + base_anchors()).reshape(-1, 4)


def decode(boxes: Tensor, deltas: Tensor) -> Tensor:
    """Boxes (n, 4) moved by (n, 4): the centre by parts of the sides, the sides by exp."""
    sides = boxes[:, 2:] - boxes[:, :2] + 1
    centres = boxes[:, :2] + 0.5 * sides + deltas[:, :2] * sides
    half = 0.5 * sides * deltas[:, 2:].exp()
    return torch.cat([centres - half, centres + half], dim=1)


def proposals(scores: Tensor, deltas: Tensor, height: int, width: int, most: int) -> Tensor:
    """The best boxes that may hold an object, best first.

    Args:
        scores: (2A, h, w): background of each anchor, then foreground.
        deltas: (4A, h, w): four for each anchor.
        height: pixels of the network's input, as ``width``.
        most: how many.

    Returns:
        (n, 4), 1 <= n <= ``most``, inside the input.
    """
    cells = scores.shape[1:]
    background, foreground = scores.permute(1, 2, 0).chunk(2, dim=2)
    objectness = (foreground - background).flatten()  # orders as the softmax of the two does
    order = objectness.argsort(descending=True, stable=True)[:BEFORE_NMS]
    all_deltas = deltas.permute(1, 2, 0).reshape(-1, 4)
    boxes = decode(anchors(*cells).to(deltas)[order], all_deltas[order])
    limit = boxes.new_tensor([width - 1, height - 1, width - 1, height - 1])
    boxes = boxes.clamp(min=0).minimum(limit)
    ranks = -torch.arange(len(boxes), dtype=boxes.dtype, device=boxes.device)
    kept = nms(inclusive(boxes), ranks, OVERLAP)
    return boxes[kept[:most]]


def inclusive(boxes: Tensor) -> Tensor:
    """``boxes`` with the far edges one further, where width is the difference of the corners."""
    return boxes + boxes.new_tensor([0, 0, 1, 1])


def overlaps(boxes: Tensor) -> Tensor:
    """(n, n) intersection over union of each pair, pixels counted inclusively."""
    edges = inclusive(boxes)
    corner = torch.minimum(edges[:, None, 2:], edges[None, :, 2:])
    sides = (corner - torch.maximum(edges[:, None, :2], edges[None, :, :2])).clamp(min=0)
    shared = sides.prod(-1)
    areas = (edges[:, 2:] - edges[:, :2]).prod(-1)
    return shared / (areas[:, None] + areas[None] - shared)


def greedy_survivors(covers: Tensor, scores: Tensor) -> Tensor:
    """Non-maximum suppression of the same boxes by many classes' scores at once.

    A class takes its boxes in order of their scores (of equal ones the first), and each box that
    still lives ends those that it covers.

    Args:
        covers: bool (n, n), whether two boxes overlap too much.
        scores: (C, n).

    Returns:
        bool (C, n): boxes that no better one of the class covers.
    """
    alive = torch.ones_like(scores, dtype=torch.bool)
    order = scores.argsort(dim=1, descending=True, stable=True)
    classes = torch.arange(len(scores), device=scores.device)
    others = covers & ~torch.eye(len(covers), dtype=torch.bool, device=covers.device)
    for rank in range(scores.shape[1]):
        box = order[:, rank]
        # What lives and overlaps a living box comes after it: a better one would have ended it.
        alive &= ~(others[box] & alive[classes, box][:, None])
    return alive
