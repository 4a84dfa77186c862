"""Focal loss over the classes: ``(1 - p_k)^g`` times the cross-entropy of a row of class k.

With smoothing e the power is that of the true class and the cross-entropy that of
``(1 - e) onehot + e / C``. The weight is part of what is differentiated. The mean is over the rows:
class weights change what a row counts, and not what is divided by.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mmc.heads.losses.base import (
    PRIOR_SMOOTHING,
    Loss,
    best_constant_classes,
    check_least,
    check_share,
    power,
    widened,
)
from mmc.heads.losses.ce import CEConfig, class_weights


@dataclass(frozen=True, kw_only=True)
class FocalCEConfig(CEConfig):
    """Settings of the focal loss over the classes."""

    gamma: float = 2.0
    """Power of 1 - p; 0 = cross-entropy."""
    smoothing: float = 0.0
    """Share of a target that is spread evenly over all classes, its own among them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least("gamma", self.gamma)
        check_share("smoothing", self.smoothing)


class FocalCE(Loss):
    """Focal loss over the classes; rows whose target is -1 count for nothing."""

    Config = FocalCEConfig
    tasks = frozenset({"binary", "multiclass"})
    weights: Tensor
    best_constant: Tensor

    def __init__(self, config: FocalCEConfig, positives: Tensor, known: Tensor) -> None:
        super().__init__(config, positives, known)
        positives = positives.double()
        weights = class_weights(config, positives)
        mass = weights * (positives + PRIOR_SMOOTHING)
        mass = mass / mass.sum()

        def expected(logits: Tensor) -> Tensor:
            """Loss of rows of every class in proportion to their mass."""
            log_p = logits.log_softmax(0)
            shares = mass * self._power(log_p)
            hard = -(shares * log_p).sum()
            return (1 - config.smoothing) * hard - config.smoothing * shares.sum() * log_p.mean()

        self.register_buffer("weights", weights.float())
        self.register_buffer("best_constant", best_constant_classes(expected, mass.log()))

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        log_p = widened(logits).log_softmax(-1)
        known, smoothing = targets >= 0, self.config.smoothing
        classes = targets.clamp(min=0)
        log_pk = log_p.gather(1, classes[:, None])[:, 0]
        losses = -log_pk
        if smoothing:
            losses = (1 - smoothing) * losses - smoothing * log_p.mean(-1)
        losses = losses * self._power(log_pk)
        if self.config.pos_weight != "none":
            losses = losses * self.weights.to(losses.dtype)[classes]
        total = (losses * known).sum()
        return total if self.config.reduction == "sum" else total / known.sum().clamp(min=1)

    def prior(self) -> Tensor:
        return self.best_constant

    def _power(self, log_p: Tensor) -> Tensor:
        gamma = self.config.gamma
        # -expm1(log p) = 1 - p, exact where p is near 1.
        return power(-torch.expm1(log_p), gamma) if gamma else torch.ones_like(log_p)
