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

from mmc.heads.losses.base import ElementsConfig, ElementsLoss
from mmc.store.errors import InputError


@dataclass(frozen=True, kw_only=True)
class AAMConfig(ElementsConfig):
    """Settings of the additive angular margin."""

    scale: float = 15.0
    """Logits per unit of cosine."""
    margin: float = 0.2
    """By how much a positive must be right: an angle in radians, or a cosine."""
    kind: Literal["angle", "cosine"] = "angle"
    """What the margin is added to: the angle (ArcFace), or taken from the cosine (CosFace, where
    0.35 is usual)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.scale > 0:
            raise InputError(f"loss.scale must be above 0, got {self.scale}")
        if not 0 <= self.margin < math.pi / 2:
            raise InputError(f"loss.margin must be in [0, 1.57), got {self.margin}")


class AAM(ElementsLoss):
    """Binary cross-entropy, positives by an angular margin; -1 targets count for nothing."""

    Config = AAMConfig

    @classmethod
    def head_settings(cls, config: AAMConfig) -> dict[str, Any]:
        return {"output": "cosine", "scale": config.scale}

    def elements(self, logits: Tensor, targets: Tensor) -> Tensor:
        return self._turned(logits, targets, self.best_constant.to(logits.dtype))

    def of_constant(self, logits: Tensor, targets: Tensor) -> Tensor:
        # The whole logit is the offset, and the slope is the one at a cosine of 0.
        return self._turned(logits, targets, logits.detach())

    def _turned(self, logits: Tensor, targets: Tensor, offsets: Tensor) -> Tensor:
        """Loss (B, C) of every element; ``offsets`` (C,) are the logits at a cosine of 0."""
        scale = self.config.scale
        cosine = (logits - offsets) / scale
        # Negatives keep their logits to the last bit.
        logits = logits + targets * (scale * (self.phi(cosine) - cosine))
        return F.binary_cross_entropy_with_logits(
            logits, targets, pos_weight=self.positive_weights(logits.dtype), reduction="none"
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
