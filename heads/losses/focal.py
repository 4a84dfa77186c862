"""Focal loss per label (Lin et al. 2017): what is already right counts little.

``a_t (1 - p_t)^g BCE(x, y)`` with ``p_t = y p + (1 - y)(1 - p)`` and
``a_t = a y + (1 - a)(1 - y)``. Soft targets t take ``p_t = 1 - |t - p|``. The weight is part of
what is differentiated.
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
    power,
    reduced,
    split_known,
    widened,
)
from mmc.store.errors import InputError


@dataclass(frozen=True, kw_only=True)
class FocalConfig:
    """Settings of the focal loss."""

    gamma: float = 2.0
    """Power of 1 - p_t; 0 = cross-entropy."""
    alpha: float | None = None
    """Weight of positives, and 1 - alpha of negatives; none = both 1. The 0.25 of the paper is for
    detectors, and weighs positives down; tagging wants 0.5 to 0.75, or none."""
    pos_weight: PosWeight = "none"
    """Weight of a label's positives by its rarity, instead of ``alpha``: none = 1; auto =
    negatives / positives in the training rows; cap = the same, at most ``pos_weight_cap``."""
    pos_weight_cap: float = 20.0
    """Largest weight under ``pos_weight=cap``."""
    reduction: Reduction = "mean"
    """``mean`` over the known elements; ``sum`` of them; ``sum_per_sample_mean`` = sum over labels,
    mean over samples."""

    def __post_init__(self) -> None:
        check_cap(self.pos_weight_cap)
        check_least("gamma", self.gamma)
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise InputError(f"loss.alpha must be in [0, 1] or none, got {self.alpha}")
        if self.alpha is not None and self.pos_weight != "none":
            raise InputError("loss.alpha and loss.pos_weight both weigh positives: set one of them")


class Focal(Loss):
    """Focal loss with logits; -1 targets count for nothing."""

    Config = FocalConfig
    tasks = frozenset({"multilabel"})
    weights: Tensor
    best_constant: Tensor

    def __init__(self, config: FocalConfig, positives: Tensor, known: Tensor) -> None:
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
        config = self.config
        loss = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
        if config.gamma:
            loss = loss * power(_distance(logits, targets), config.gamma)
        if config.alpha is not None:
            loss = loss * ((2 * config.alpha - 1) * targets + (1 - config.alpha))
        elif config.pos_weight != "none":
            loss = loss * ((self.weights.to(loss.dtype) - 1) * targets + 1)
        return loss

    def prior(self) -> Tensor:
        return self.best_constant


def _distance(logits: Tensor, targets: Tensor) -> Tensor:
    """``1 - p_t = |t - p|``, from the sigmoid of the wrong side: 1 - p would round to 0."""
    wrong = torch.sigmoid(torch.where(targets > 0.5, -logits, logits))
    return (wrong - torch.minimum(targets, 1 - targets)).abs()
