"""Binary cross-entropy per label.

``softplus(x) - x y`` with logits x and targets y; with a weight w on the positives
``w y softplus(-x) + (1 - y) softplus(x)``.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from mmc.heads.losses.base import (
    PRIOR_SMOOTHING,
    Loss,
    PosWeight,
    Reduction,
    balance,
    check_cap,
    reduced,
    split_known,
    widened,
)


@dataclass(frozen=True, kw_only=True)
class BCEConfig:
    """Settings of the binary cross-entropy."""

    pos_weight: PosWeight = "none"
    """Weight of a label's positives: none = 1; auto = negatives / positives in the training rows;
    cap = the same, at most ``pos_weight_cap``."""
    pos_weight_cap: float = 20.0
    """Largest weight under ``pos_weight=cap``."""
    reduction: Reduction = "mean"
    """``mean`` over the known elements; ``sum`` of them; ``sum_per_sample_mean`` = sum over labels,
    mean over samples."""

    def __post_init__(self) -> None:
        check_cap(self.pos_weight_cap)


class BCE(Loss):
    """Binary cross-entropy with logits; -1 targets count for nothing."""

    Config = BCEConfig
    tasks = frozenset({"multilabel"})
    weights: Tensor
    best_constant: Tensor

    def __init__(self, config: BCEConfig, positives: Tensor, known: Tensor) -> None:
        super().__init__(config, positives, known)
        positives, known = positives.double(), known.double()
        negatives = known - positives
        weights = balance(config.pos_weight, config.pos_weight_cap, positives, negatives)
        self.weighted = config.pos_weight != "none"
        odds = weights * (positives + PRIOR_SMOOTHING) / (negatives + PRIOR_SMOOTHING)
        self.register_buffer("weights", weights.float())
        self.register_buffer("best_constant", odds.log().float())

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        logits = widened(logits)
        targets, known = split_known(targets, logits.dtype)
        weights = self.weights.to(logits.dtype) if self.weighted else None
        if known is None and self.config.reduction == "mean":
            # One pass instead of two.
            return F.binary_cross_entropy_with_logits(logits, targets, pos_weight=weights)
        elements = F.binary_cross_entropy_with_logits(
            logits, targets, pos_weight=weights, reduction="none"
        )
        return reduced(elements, known, self.config.reduction)

    def prior(self) -> Tensor:
        return self.best_constant
