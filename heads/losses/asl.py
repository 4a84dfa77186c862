"""Asymmetric loss per label (Ben-Baruch et al. 2021): easy negatives count little, or nothing.

With ``p_m = max(p - m, 0)``: ``-y (1 - p)^g+ log p - (1 - y) p_m^g- log(1 - p_m)``. A negative with
p <= m has no loss and no gradient. Soft targets are weights of the two parts.

Published trainings sum over batch and labels. Here it is the mean unless told otherwise, so that
gradient clipping and learning rates mean what they mean for the other losses.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mmc.heads.losses.base import (
    Loss,
    PosWeight,
    Reduction,
    balance,
    best_constant,
    check_cap,
    check_least,
    check_share,
    power,
    reduced,
    split_known,
    widened,
)


@dataclass(frozen=True, kw_only=True)
class ASLConfig:
    """Settings of the asymmetric loss."""

    gamma_neg: float = 4.0
    """Power of p_m on negatives."""
    gamma_pos: float = 0.0
    """Power of 1 - p on positives."""
    clip: float = 0.05
    """Margin m: a negative with a probability up to it counts for nothing."""
    detach_weight: bool = False
    """Treat the powers as constants when differentiating, as the published trainings do."""
    pos_weight: PosWeight = "none"
    """Weight of a label's positives: none = 1; auto = negatives / positives in the training rows;
    cap = the same, at most ``pos_weight_cap``. The powers weigh the negatives down already."""
    pos_weight_cap: float = 20.0
    """Largest weight under ``pos_weight=cap``."""
    reduction: Reduction = "mean"
    """``mean`` over the known elements; ``sum`` of them; ``sum_per_sample_mean`` = sum over labels,
    mean over samples."""

    def __post_init__(self) -> None:
        check_cap(self.pos_weight_cap)
        check_least("gamma_neg", self.gamma_neg)
        check_least("gamma_pos", self.gamma_pos)
        check_share("clip", self.clip)


class ASL(Loss):
    """Asymmetric loss with logits; -1 targets count for nothing."""

    Config = ASLConfig
    tasks = frozenset({"multilabel"})
    weights: Tensor
    best_constant: Tensor

    def __init__(self, config: ASLConfig, positives: Tensor, known: Tensor) -> None:
        super().__init__(config, positives, known)
        positives, known = positives.double(), known.double()
        weights = balance(config.pos_weight, config.pos_weight_cap, positives, known - positives)
        self.register_buffer("weights", weights)
        self.register_buffer("best_constant", best_constant(self.elements, positives, known))

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        logits = widened(logits)
        targets, known = split_known(targets, logits.dtype)
        return reduced(self.elements(logits, targets), known, self.config.reduction)

    def elements(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Loss (B, C) of every element, unweighted by what is known."""
        positive = self._positive(logits)
        if self.config.pos_weight != "none":
            positive = positive * self.weights.to(logits.dtype)
        return torch.lerp(self._negative(logits), positive, targets)

    def prior(self) -> Tensor:
        return self.best_constant

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
