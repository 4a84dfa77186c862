"""What every loss is: logits and targets -> one number to minimise.

Shapes: B samples, C labels.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mmc.heads.models.base import NoConfig

PRIOR_SMOOTHING = 1.0
"""Added to both counts, so that a label without positives starts at finite logits."""


class Loss(nn.Module):
    """Base of the losses; built by ``cls(config, positives, known)``.

    ``positives`` (C,) counts the training rows that have each label, ``known`` (C,) those for
    which it is known.
    """

    Config: ClassVar[type] = NoConfig
    tasks: ClassVar[frozenset[str]] = frozenset()
    """The tasks that it can be used for."""

    def __init__(self, config: Any, positives: Tensor, known: Tensor) -> None:
        super().__init__()
        self.config = config

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The mean over what is known, a scalar; computed in float32 (float64 if given).

        Args:
            logits: (B, C), any float dtype.
            targets: (B, C), 1 yes, 0 no, -1 unknown; for a loss over classes int64 (B,), -1
                unknown.
        """
        raise NotImplementedError

    def prior(self) -> Tensor:
        """The constant logits (C,) that minimise the loss on the training rows."""
        raise NotImplementedError


def widened(logits: Tensor) -> Tensor:
    """Half precision to float32; sums of small differences need it."""
    return logits if logits.dtype == torch.float64 else logits.float()


def balance(kind: str, cap: float, positives: Tensor, total: Tensor | float) -> Tensor:
    """Weight (C,) of a label's positives: 1, or total / positives ("auto"), at most ``cap``."""
    weights = total / positives.clamp(min=1)
    if kind == "none":
        return torch.ones_like(weights)
    return weights.clamp(max=cap) if kind == "cap" else weights
