"""Binary cross-entropy with smoothed targets.

Targets ``t = y (1 - e) + e / 2`` (Szegedy et al. 2016, for two outcomes), or towards the label's
prior p, ``t = y (1 - e) + e p``, which does not lift the negatives of rare labels. The smallest
value is not 0 but the entropy of the smoothed targets.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mmc.heads.losses.base import (
    PRIOR_SMOOTHING,
    Loss,
    PosWeight,
    Reduction,
    balance,
    check_cap,
    check_share,
    reduced,
    split_known,
    widened,
)


@dataclass(frozen=True, kw_only=True)
class SmoothBCEConfig:
    """Settings of the binary cross-entropy with smoothed targets."""

    smoothing: float = 0.1
    """Share e of a target that is taken away and spread."""
    towards: Literal["half", "prior"] = "half"
    """Where that share goes: to one half, or to the label's share of the training rows."""
    pos_weight: PosWeight = "none"
    """Weight of a label's positives: none = 1; auto = negatives / positives in the training rows;
    cap = the same, at most ``pos_weight_cap``. It multiplies the positive part of each target."""
    pos_weight_cap: float = 20.0
    """Largest weight under ``pos_weight=cap``."""
    reduction: Reduction = "mean"
    """``mean`` over the known elements; ``sum`` of them; ``sum_per_sample_mean`` = sum over labels,
    mean over samples."""

    def __post_init__(self) -> None:
        check_cap(self.pos_weight_cap)
        check_share("smoothing", self.smoothing)


class SmoothBCE(Loss):
    """Binary cross-entropy with smoothed targets; -1 targets count for nothing."""

    Config = SmoothBCEConfig
    tasks = frozenset({"multilabel"})
    floor: Tensor
    weights: Tensor
    best_constant: Tensor

    def __init__(self, config: SmoothBCEConfig, positives: Tensor, known: Tensor) -> None:
        super().__init__(config, positives, known)
        positives, known = positives.double(), known.double()
        weights = balance(config.pos_weight, config.pos_weight_cap, positives, known - positives)
        self.weighted = config.pos_weight != "none"
        share = (positives + PRIOR_SMOOTHING) / (known + 2 * PRIOR_SMOOTHING)
        spread = share if config.towards == "prior" else torch.full_like(share, 0.5)
        floor = config.smoothing * spread
        mean = share * (1 - config.smoothing) + floor
        # float64: the smoothed targets are those of the formula in either precision.
        self.register_buffer("floor", floor)
        self.register_buffer("weights", weights.float())
        self.register_buffer("best_constant", (weights * mean / (1 - mean)).log().float())

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        logits = widened(logits)
        targets, known = split_known(targets, logits.dtype)
        targets = torch.add(self.floor.to(logits.dtype), targets, alpha=1 - self.config.smoothing)
        weights = self.weights.to(logits.dtype) if self.weighted else None
        elements = F.binary_cross_entropy_with_logits(
            logits, targets, pos_weight=weights, reduction="none"
        )
        return reduced(elements, known, self.config.reduction)

    def prior(self) -> Tensor:
        return self.best_constant
