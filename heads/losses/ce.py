"""Softmax cross-entropy over the classes: ``-log softmax(x)[k]``, mean over the known rows.

With class weights the mean divides by the sum of the weights of the rows' classes.
"""

from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from mmc.heads.losses.base import PRIOR_SMOOTHING, Loss, balance, widened
from mmc.store.errors import InputError


@dataclass(frozen=True, kw_only=True)
class CEConfig:
    """Settings of the softmax cross-entropy."""

    pos_weight: Literal["none", "auto", "cap"] = "none"
    """Weight of a row by its class: none = 1; auto = rows / (classes x rows of the class) in the
    training rows; cap = the same, at most ``pos_weight_cap``."""
    pos_weight_cap: float = 20.0
    """Largest weight under ``pos_weight=cap``."""

    def __post_init__(self) -> None:
        if not self.pos_weight_cap > 0:
            raise InputError(f"loss.pos_weight_cap must be above 0, got {self.pos_weight_cap}")


class CE(Loss):
    """Cross-entropy over the classes; rows whose target is -1 count for nothing."""

    Config = CEConfig
    tasks = frozenset({"binary", "multiclass"})
    weights: Tensor
    best_constant: Tensor

    def __init__(self, config: CEConfig, positives: Tensor, known: Tensor) -> None:
        super().__init__(config, positives, known)
        positives = positives.double()
        mean_rows = positives.sum() / len(positives)
        weights = balance(config.pos_weight, config.pos_weight_cap, positives, mean_rows)
        self.weighted = config.pos_weight != "none"
        mass = weights * (positives + PRIOR_SMOOTHING)
        self.register_buffer("weights", weights.float())
        self.register_buffer("best_constant", (mass / mass.sum()).log().float())

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        logits = widened(logits)
        weights = self.weights.to(logits.dtype) if self.weighted else None
        total = F.cross_entropy(logits, targets, weight=weights, ignore_index=-1, reduction="sum")
        known = (targets >= 0).to(logits.dtype)
        if weights is not None:
            known = known * weights[targets.clamp(min=0)]
        # Not reduction="mean": a batch without known rows is 0, not NaN.
        return total / known.sum().clamp(min=1e-12)

    def prior(self) -> Tensor:
        return self.best_constant
