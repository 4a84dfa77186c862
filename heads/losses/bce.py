"""Binary cross-entropy per label.

``softplus(x) - x y`` with logits x and targets y; with a weight w on the positives
``w y softplus(-x) + (1 - y) softplus(x)``.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from mmc.heads.losses.base import ElementsConfig, ElementsLoss, reduced, split_known, widened


@dataclass(frozen=True, kw_only=True)
class BCEConfig(ElementsConfig):
    """Settings of the binary cross-entropy."""


class BCE(ElementsLoss):
    """Binary cross-entropy with logits; -1 targets count for nothing."""

    Config = BCEConfig

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        logits = widened(logits)
        targets, known = split_known(targets, logits.dtype)
        if known is None and self.config.reduction == "mean":
            # One pass instead of two: a sixth of the time. And the gradient of a sum, unlike that
            # of a mean, is not written out for every element first: another sixth.
            weights = self.positive_weights(logits.dtype)
            total = F.binary_cross_entropy_with_logits(
                logits, targets, pos_weight=weights, reduction="sum"
            )
            return total / logits.numel()
        return reduced(self.elements(logits, targets), known, self.config.reduction)

    def elements(self, logits: Tensor, targets: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(
            logits, targets, pos_weight=self.positive_weights(logits.dtype), reduction="none"
        )
