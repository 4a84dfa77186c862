"""Asymmetric loss per label (Ben-Baruch et al. 2021): easy negatives count little, or nothing.

With ``p_m = max(p - m, 0)``: ``-y (1 - p)^g+ log p - (1 - y) p_m^g- log(1 - p_m)``. A negative with
p <= m has no loss and no gradient. Soft targets are weights of the two parts.

Published trainings sum over batch and labels. Here it is the mean unless told otherwise, so that
gradient clipping and learning rates mean what they mean for the other losses. The powers weigh
negatives down already, and ``pos_weight`` comes on top.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mmc.heads.losses.base import ElementsConfig, ElementsLoss, check_least, check_share, power


@dataclass(frozen=True, kw_only=True)
class ASLConfig(ElementsConfig):
    """Settings of the asymmetric loss."""

    gamma_neg: float = 4.0
    """Power of p_m on negatives."""
    gamma_pos: float = 0.0
    """Power of 1 - p on positives."""
    clip: float = 0.05
    """Margin m: a negative with a probability up to it counts for nothing."""
    detach_weight: bool = False
    """Treat the powers as constants when differentiating, as the published trainings do."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least("gamma_neg", self.gamma_neg)
        check_least("gamma_pos", self.gamma_pos)
        check_share("clip", self.clip)


class ASL(ElementsLoss):
    """Asymmetric loss with logits; -1 targets count for nothing."""

    Config = ASLConfig

    def elements(self, logits: Tensor, targets: Tensor) -> Tensor:
        positive = self._positive(logits)
        weights = self.positive_weights(logits.dtype)
        if weights is not None:
            positive = positive * weights
        return torch.lerp(self._negative(logits), positive, targets)

    def _positive(self, logits: Tensor) -> Tensor:
        """``-(1 - p)^g+ log p``."""
        loss, gamma = F.softplus(-logits), self.config.gamma_pos
        return loss * self._weight(torch.sigmoid(-logits), gamma) if gamma else loss

    def _negative(self, logits: Tensor) -> Tensor:
        """``-p_m^g- log(1 - p_m)``."""
        p, gamma = torch.sigmoid(logits), self.config.gamma_neg
        if self.config.clip:
            p = (p - self.config.clip).clamp(min=0)
            loss = -torch.log1p(-p)
        else:
            loss = F.softplus(logits)  # p rounds to 1 where this is still finite
        return loss * self._weight(p, gamma) if gamma else loss

    def _weight(self, p: Tensor, gamma: float) -> Tensor:
        return power(p.detach() if self.config.detach_weight else p, gamma)
