"""Softmax cross-entropy over the classes: ``-log softmax(x)[k]``.

With class weights the mean divides by the sum of the weights of the rows' classes.
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
    balance,
    check_cap,
    check_share,
    widened,
)

ClassReduction = Literal["mean", "sum"]


@dataclass(frozen=True, kw_only=True)
class CEConfig:
    """Settings of the softmax cross-entropy."""

    pos_weight: PosWeight = "none"
    """Weight of a row by its class: none = 1; auto = rows / (classes x rows of the class) in the
    training rows; cap = the same, at most ``pos_weight_cap``."""
    pos_weight_cap: float = 20.0
    """Largest weight under ``pos_weight=cap``."""
    reduction: ClassReduction = "mean"
    """``mean`` over the known rows, or their ``sum``."""

    def idle(self) -> dict[str, str]:
        """Settings that do nothing beside the others -> which others."""
        if self.pos_weight == "cap":
            return {}
        return {"pos_weight_cap": f"loss.pos_weight={self.pos_weight}"}

    def __post_init__(self) -> None:
        check_cap(self.pos_weight_cap)


@dataclass(frozen=True, kw_only=True)
class SmoothCEConfig(CEConfig):
    """Settings of the softmax cross-entropy with smoothed targets."""

    smoothing: float = 0.1
    """Share of a target that is spread evenly over all classes, its own among them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("smoothing", self.smoothing)


class CE(Loss):
    """Cross-entropy over the classes; rows whose target is -1 count for nothing."""

    Config = CEConfig
    tasks = frozenset({"binary", "multiclass"})
    weights: Tensor
    best_constant: Tensor

    def __init__(self, config: CEConfig, positives: Tensor, known: Tensor) -> None:
        super().__init__(config, positives, known)
        positives = positives.double()
        self.smoothing = getattr(config, "smoothing", 0.0)
        weights = class_weights(config, positives)
        self.weighted = config.pos_weight != "none"
        counts = positives + PRIOR_SMOOTHING
        spread = self.smoothing * counts.mean()
        mass = weights * ((1 - self.smoothing) * counts + spread)
        self.register_buffer("weights", weights.float())
        self.register_buffer("best_constant", (mass / mass.sum()).log().float())

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        logits = widened(logits)
        weights = self.weights.to(logits.dtype) if self.weighted else None
        total = F.cross_entropy(
            logits,
            targets,
            weight=weights,
            ignore_index=-1,
            reduction="sum",
            label_smoothing=self.smoothing,
        )
        if self.config.reduction == "sum":
            return total
        # Not reduction="mean": a batch without known rows is 0, not NaN.
        return total / self._known_weight(targets, logits.dtype).clamp(min=1e-12)

    def divisor(self, targets: Tensor) -> Tensor | None:
        if self.config.reduction == "sum":
            return None
        return self._known_weight(targets, torch.float32)

    def _known_weight(self, targets: Tensor, dtype: torch.dtype) -> Tensor:
        """Sum of the weights of the known rows."""
        known = (targets >= 0).to(dtype)
        if self.weighted:
            known = known * self.weights.to(dtype)[targets.clamp(min=0)]
        return known.sum()

    def prior(self) -> Tensor:
        return self.best_constant


class SmoothCE(CE):
    """Cross-entropy with targets ``(1 - e) onehot + e / C`` (Szegedy et al. 2016)."""

    Config = SmoothCEConfig


def class_weights(config: CEConfig, positives: Tensor) -> Tensor:
    """Weight (C,) of a row of each class, as ``pos_weight`` says; float64."""
    mean_rows = positives.sum() / len(positives)
    return balance(config.pos_weight, config.pos_weight_cap, positives, mean_rows)
