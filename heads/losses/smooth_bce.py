"""Binary cross-entropy with smoothed targets.

Targets ``t = y (1 - e) + e / 2`` (Szegedy et al. 2016, for two outcomes), or towards the label's
prior p, ``t = y (1 - e) + e p``, which does not lift the negatives of rare labels. The smallest
value is not 0 but the entropy of the smoothed targets. Weights of positives multiply the positive
part of each target.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mmc.heads.losses.base import ElementsConfig, ElementsLoss, check_share


@dataclass(frozen=True, kw_only=True)
class SmoothBCEConfig(ElementsConfig):
    """Settings of the binary cross-entropy with smoothed targets."""

    smoothing: float = 0.1
    """Share e of a target that is taken away and spread."""
    towards: Literal["half", "prior"] = "half"
    """Where that share goes: to one half, or to the label's share of the training rows."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("smoothing", self.smoothing)


class SmoothBCE(ElementsLoss):
    """Binary cross-entropy with smoothed targets; -1 targets count for nothing."""

    Config = SmoothBCEConfig

    def elements(self, logits: Tensor, targets: Tensor) -> Tensor:
        smoothing, towards = self.config.smoothing, self.config.towards
        spread = self.share if towards == "prior" else torch.full_like(self.share, 0.5)
        floor = (smoothing * spread).to(logits.dtype)
        targets = torch.add(floor, targets, alpha=1 - smoothing)
        return F.binary_cross_entropy_with_logits(
            logits, targets, pos_weight=self.positive_weights(logits.dtype), reduction="none"
        )
