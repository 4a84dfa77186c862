"""Focal loss per label (Lin et al. 2017): what is already right counts little.

``a_t (1 - p_t)^g BCE(x, y)`` with ``p_t = y p + (1 - y)(1 - p)`` and
``a_t = a y + (1 - a)(1 - y)``. Soft targets t take ``p_t = 1 - |t - p|``. The weight is part of
what is differentiated.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mmc.heads.losses.base import ElementsConfig, ElementsLoss, check_least, power
from mmc.store.errors import InputError


@dataclass(frozen=True, kw_only=True)
class FocalConfig(ElementsConfig):
    """Settings of the focal loss."""

    gamma: float = 2.0
    """Power of 1 - p_t; 0 = cross-entropy."""
    alpha: float | None = None
    """Weight of positives, and 1 - alpha of negatives, instead of ``pos_weight``; none = both 1.
    The 0.25 of the paper is for detectors, and weighs positives down; tagging wants 0.5 to 0.75, or
    none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least("gamma", self.gamma)
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise InputError(f"loss.alpha must be in [0, 1] or none, got {self.alpha}")
        if self.alpha is not None and self.pos_weight != "none":
            raise InputError("loss.alpha and loss.pos_weight both weigh positives: set one of them")


class Focal(ElementsLoss):
    """Focal loss with logits; -1 targets count for nothing."""

    Config = FocalConfig

    def elements(self, logits: Tensor, targets: Tensor) -> Tensor:
        gamma, alpha = self.config.gamma, self.config.alpha
        loss = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
        if gamma:
            loss = loss * power(_distance(logits, targets), gamma)
        if alpha is not None:
            return loss * ((2 * alpha - 1) * targets + (1 - alpha))
        weights = self.positive_weights(loss.dtype)
        return loss if weights is None else loss * ((weights - 1) * targets + 1)


def _distance(logits: Tensor, targets: Tensor) -> Tensor:
    """``1 - p_t = |t - p|``, from the sigmoid of the wrong side: 1 - p would round to 0."""
    wrong = torch.sigmoid(torch.where(targets > 0.5, -logits, logits))
    return (wrong - torch.minimum(targets, 1 - targets)).abs()
