"""The losses of masked patches and masked tokens, as sums, so that parts of a batch add up.

Legend: M masked patches of p x p pixels, K masked tokens, V tokens of the vocabulary.
"""

import torch.nn.functional as F
from torch import Tensor

from mmc.extract.pretraining.options import Pixels

_EPS = 1e-6
"""Added to the variance of a patch, as MAE does."""


def patchify(images: Tensor, patch: tuple[int, int], pixels: Pixels) -> Tensor:
    """Patches of images (B, 3, H, W) in reading order: (B, P, 3 * p * p).

    Inside a patch the order is that of the reference: of SimMIM channel, row, column (a pixel
    shuffle); of MAE row, column, channel.
    """
    batch, channels, height, width = images.shape
    rows, columns = height // patch[0], width // patch[1]
    parts = images.reshape(batch, channels, rows, patch[0], columns, patch[1])
    order = (0, 2, 4, 1, 3, 5) if pixels == "simmim" else (0, 2, 4, 3, 5, 1)
    return parts.permute(order).reshape(batch, rows * columns, channels * patch[0] * patch[1])


def patch_loss(told: Tensor, true: Tensor, total: Tensor, pixels: Pixels) -> Tensor:
    """The share that some masked patches have in the mean over all ``total`` of them, a scalar.

    ``simmim``: mean absolute error of SimMIM (Xie et al. 2021, arXiv:2111.09886), with its 1e-5 in
    the denominator, in pixels. ``mae``: mean squared error of MAE (He et al. 2021,
    arXiv:2111.06377); ``mae_norm``: with each true patch brought to mean 0 and variance 1 first.

    Args:
        told: (M, 3 * p * p) float32.
        true: (M, 3 * p * p) of the normalised picture.
        total: scalar: masked patches of the whole batch.
    """
    if not len(told):
        return told.sum()  # 0, with gradients
    if pixels == "simmim":
        area = told.shape[1] // 3
        return (told - true).abs().sum() / (total * area + 1e-5) / 3
    if pixels == "mae_norm":
        mean, variance = true.mean(1, keepdim=True), true.var(1, keepdim=True)
        true = (true - mean) / (variance + _EPS).sqrt()
    return (told - true).square().mean(1).sum() / total.clamp(min=1)


def token_loss(scores: Tensor, true: Tensor, total: Tensor) -> Tensor:
    """The share that some masked tokens have in the mean cross-entropy of all ``total``, a scalar.

    Args:
        scores: (K, V) float32.
        true: int64 (K,).
        total: scalar: masked tokens of the whole batch.
    """
    return F.cross_entropy(scores.float(), true, reduction="sum") / total.clamp(min=1)
