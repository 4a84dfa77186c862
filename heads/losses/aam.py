"""Additive angular margin (ArcFace, Deng et al. 2019) for labels that are each yes or no.

The head gives logits ``z = s c + b`` with c the cosine of the sample's features and the label's
weights (`mmc.heads.models.cosine`). While training, a positive must be right by an angle m:

    phi(c) = c cos m - sqrt(max(1 - c^2, 1e-7)) sin m   if c > cos(pi - m), else c - m sin m

and the loss is the binary cross-entropy of ``s (y phi(c) + (1 - y) c) + b``. Differentiated as it
stands, through phi.

The offsets b are not learned: they are the label priors, which this loss knows, and so it finds c
from the logits. At c = 0 a label is as probable as it was in the training rows.

Faces are told apart with s = 30 to 64 and m = 0.5. With s = 30 probabilities come out near 0 and 1;
on movies (linear head, text) s = 15 and m = 0.2 reached .585 test mAP, s = 30 and m = 0.5 .572, bce
.581.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

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
    reduced,
    split_known,
    widened,
)
from mmc.store.errors import InputError


@dataclass(frozen=True, kw_only=True)
class AAMConfig:
    """Settings of the additive angular margin."""

    scale: float = 15.0
    """Logits per unit of cosine."""
    margin: float = 0.2
    """By how much a positive must be right: an angle in radians, or a cosine."""
    kind: Literal["angle", "cosine"] = "angle"
    """What the margin is added to: the angle (ArcFace), or taken from the cosine (CosFace, where
    0.35 is usual)."""
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
        if not self.scale > 0:
            raise InputError(f"loss.scale must be above 0, got {self.scale}")
        if not 0 <= self.margin < math.pi / 2:
            raise InputError(f"loss.margin must be in [0, 1.57), got {self.margin}")


class AAM(Loss):
    """Binary cross-entropy, positives by an angular margin; -1 targets count for nothing."""

    Config = AAMConfig
    tasks = frozenset({"multilabel"})
    weights: Tensor
    best_constant: Tensor

    def __init__(self, config: AAMConfig, positives: Tensor, known: Tensor) -> None:
        super().__init__(config, positives, known)
        positives, known = positives.double(), known.double()
        weights = balance(config.pos_weight, config.pos_weight_cap, positives, known - positives)
        self.register_buffer("weights", weights)

        def at_right_angles(offsets: Tensor, targets: Tensor) -> Tensor:
            """Losses where the offset is the whole logit, differentiated as by a cosine of 0."""
            return self.elements(offsets, targets, offsets.detach())

        self.register_buffer("best_constant", best_constant(at_right_angles, positives, known))

    @classmethod
    def head_settings(cls, config: AAMConfig) -> dict[str, Any]:
        return {"output": "cosine", "scale": config.scale}

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        logits = widened(logits)
        targets, known = split_known(targets, logits.dtype)
        elements = self.elements(logits, targets, self.best_constant.to(logits.dtype))
        return reduced(elements, known, self.config.reduction)

    def elements(self, logits: Tensor, targets: Tensor, offsets: Tensor) -> Tensor:
        """Loss (B, C) of every element; ``offsets`` (C,) are the logits at a cosine of 0."""
        scale = self.config.scale
        cosine = (logits - offsets) / scale
        # Negatives keep their logits to the last bit.
        logits = logits + targets * (scale * (self.phi(cosine) - cosine))
        weights = None if self.config.pos_weight == "none" else self.weights.to(logits.dtype)
        return F.binary_cross_entropy_with_logits(
            logits, targets, pos_weight=weights, reduction="none"
        )

    def phi(self, cosine: Tensor) -> Tensor:
        """The cosine that a positive is judged by; rises with the true one."""
        margin = self.config.margin
        if self.config.kind == "cosine":
            return cosine - margin
        sine = (1 - cosine.square()).clamp(min=1e-7).sqrt()
        turned = cosine * math.cos(margin) - sine * math.sin(margin)
        # Past the angle pi - m the cosine would rise again.
        beyond = cosine - margin * math.sin(margin)
        return torch.where(cosine > math.cos(math.pi - margin), turned, beyond)

    def prior(self) -> Tensor:
        return self.best_constant
