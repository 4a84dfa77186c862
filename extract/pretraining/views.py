"""Pictures varied from step to step, on the device: a random resized crop, and a mirror.

Szegedy et al. 2014 (arXiv:1409.4842) cut from the original; here the cut is of the picture at the
size of the model, which is decoded once for every epoch alike and enlarged by 1.3 at most by
default.

Legend: n pictures of H x W pixels.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mmc.extract.pretraining.options import AugmentConfig

_ASPECT = 4 / 3
"""Largest ratio of the sides of what is cut out, and its inverse the smallest."""


def draw_views(config: AugmentConfig, seed: Sequence[int], rows: slice, total: int) -> Tensor:
    """Where the pictures of ``rows`` of ``total`` are cut: (n, 2, 3) float32, as affine_grid's."""
    noise = np.random.default_rng(seed).random((total, 5))[rows]
    area = config.crop + (1 - config.crop) * noise[:, 0]
    ratio = np.exp((2 * noise[:, 1] - 1) * math.log(_ASPECT) * (config.crop < 1))
    wide = np.minimum(np.sqrt(area * ratio), 1)
    high = np.minimum(np.sqrt(area / ratio), 1)
    across, down = ((2 * noise[:, i] - 1) * (1 - side) for i, side in ((2, wide), (3, high)))
    mirrored = np.where(config.flip & (noise[:, 4] < 0.5), -1.0, 1.0)
    zero = np.zeros_like(wide)
    theta = np.stack([wide * mirrored, zero, across, zero, high, down], 1)
    return torch.from_numpy(theta.reshape(-1, 2, 3)).float()


def cut(images: Tensor, views: Tensor) -> Tensor:
    """What `draw_views` says of images (n, 3, H, W) float32, at the same size."""
    grid = F.affine_grid(views.to(images.device), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def varies(config: AugmentConfig) -> bool:
    """Whether there is anything to do."""
    return config.crop < 1 or config.flip
