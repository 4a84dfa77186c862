"""Binary cross-entropy per label.

``softplus(x) - x y`` with logits x and targets y; with a weight w on the positives
``w y softplus(-x) + (1 - y) softplus(x)``. Mean over the known entries of the batch.
"""

from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from mmc.heads.losses.base import PRIOR_SMOOTHING, Loss, balance, widened
from mmc.store.errors import InputError


@dataclass(frozen=True, kw_only=True)
class BCEConfig:
    """Settings of the binary cross-entropy."""

    pos_weight: Literal["none", "auto", "cap"] = "none"
    """Weight of a label's positives: none = 1; auto = negatives / positives in the training rows;
    cap = the same, at most ``pos_weight_cap``."""
    pos_weight_cap: float = 20.0
    """Largest weight under ``pos_weight=cap``."""

    def __post_init__(self) -> None:
        if not self.pos_weight_cap > 0:
            raise InputError(f"loss.pos_weight_cap must be above 0, got {self.pos_weight_cap}")


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
        targets = targets.to(logits.dtype)
        weights = self.weights.to(logits.dtype) if self.weighted else None
        # Masking costs a tenth of a linear head's step on a CPU, so look first; on other devices
        # looking would wait for the device, and masking is cheap.
        if targets.device.type == "cpu" and targets.numel() and targets.min() >= 0:
            return F.binary_cross_entropy_with_logits(logits, targets, pos_weight=weights)
        known = (targets >= 0).to(logits.dtype)
        total = F.binary_cross_entropy_with_logits(
            logits, targets.clamp(min=0), weight=known, pos_weight=weights, reduction="sum"
        )
        return total / known.sum().clamp(min=1)

    def prior(self) -> Tensor:
        return self.best_constant
