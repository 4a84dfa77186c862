"""What every loss is: logits and targets -> one number to minimise.

Shapes: B samples, C labels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from mmc.heads.models.base import NoConfig
from mmc.store.errors import InputError

PRIOR_SMOOTHING = 1.0
"""Added to both counts, so that a label without positives starts at finite logits."""
LOWEST, HIGHEST = -40.0, 40.0
"""Between these logits the best constant is looked for."""

Reduction = Literal["mean", "sum", "sum_per_sample_mean"]
PosWeight = Literal["none", "auto", "cap"]


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
        """One number over what is known, a scalar; computed in float32 (float64 if given).

        Args:
            logits: (B, C), any float dtype.
            targets: (B, C), 1 yes, 0 no, -1 unknown, in between: soft; for a loss over classes
                int64 (B,), -1 unknown.
        """
        raise NotImplementedError

    def divisor(self, targets: Tensor) -> Tensor | None:
        """What ``forward`` divides the sum over a batch by, a scalar; None where it does not.

        Joins parts of a batch: their values times their divisors, summed, over the sum of the
        divisors, is the value of the whole. This is that of a loss whose ``reduction`` means what
        `reduced` says.

        Args:
            targets: as in ``forward``.
        """
        reduction = getattr(self.config, "reduction", "mean")
        if reduction == "sum":
            return None
        known = targets >= 0
        if reduction == "sum_per_sample_mean":
            known = known.any(1)
        return known.sum().float()

    def prior(self) -> Tensor:
        """The constant logits (C,) that minimise the loss on the training rows."""
        raise NotImplementedError

    @classmethod
    def head_settings(cls, config: Any) -> dict[str, Any]:
        """Settings that the head must have for this loss, by name; most ask for none."""
        return {}


@dataclass(frozen=True, kw_only=True)
class ElementsConfig:
    """Settings of every loss that is a sum over elements: one sample and one label each."""

    pos_weight: PosWeight = "none"
    """Weight of a label's positives: none = 1; auto = negatives / positives in the training rows;
    cap = the same, at most ``pos_weight_cap``."""
    pos_weight_cap: float = 20.0
    """Largest weight under ``pos_weight=cap``."""
    reduction: Reduction = "mean"
    """``mean`` over the known elements; ``sum`` of them; ``sum_per_sample_mean`` = sum over labels,
    mean over samples."""

    def idle(self) -> dict[str, str]:
        """Settings that do nothing beside the others -> which others."""
        if self.pos_weight == "cap":
            return {}
        return {"pos_weight_cap": f"loss.pos_weight={self.pos_weight}"}

    def __post_init__(self) -> None:
        check_cap(self.pos_weight_cap)


class ElementsLoss(Loss):
    """Base of the losses that are a sum over elements; -1 targets count for nothing.

    A loss says what an element costs; weights, reduction, unknown targets and the best constant
    follow.
    """

    Config = ElementsConfig
    tasks = frozenset({"multilabel"})
    share: Tensor
    """Share of the training rows that have each label, (C,) float64; never 0 or 1."""
    weights: Tensor
    best_constant: Tensor

    def __init__(self, config: Any, positives: Tensor, known: Tensor) -> None:
        super().__init__(config, positives, known)
        positives, known = positives.double(), known.double()
        share = (positives + PRIOR_SMOOTHING) / (known + 2 * PRIOR_SMOOTHING)
        weights = balance(config.pos_weight, config.pos_weight_cap, positives, known - positives)
        self.register_buffer("share", share)
        self.register_buffer("weights", weights)
        self.register_buffer("best_constant", best_constant(self.of_constant, positives, known))

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        logits = widened(logits)
        targets, known = split_known(targets, logits.dtype)
        return reduced(self.elements(logits, targets), known, self.config.reduction)

    def elements(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Loss (B, C) of every element, whether it is known or not."""
        raise NotImplementedError

    def of_constant(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The same of logits that are alike for all samples, as the prior's."""
        return self.elements(logits, targets)

    def positive_weights(self, dtype: torch.dtype) -> Tensor | None:
        """Weight (C,) of each label's positives; None: all 1."""
        return None if self.config.pos_weight == "none" else self.weights.to(dtype)

    def prior(self) -> Tensor:
        return self.best_constant


def widened(logits: Tensor) -> Tensor:
    """Half precision to float32; sums of small differences need it."""
    return logits if logits.dtype == torch.float64 else logits.float()


def balance(kind: PosWeight, cap: float, positives: Tensor, total: Tensor | float) -> Tensor:
    """Weight (C,) of a label's positives: 1, or total / positives ("auto"), at most ``cap``."""
    weights = total / positives.clamp(min=1)
    if kind == "none":
        return torch.ones_like(weights)
    return weights.clamp(max=cap) if kind == "cap" else weights


def check_cap(cap: float) -> None:
    """Raise InputError unless a largest weight is positive."""
    if not cap > 0:
        raise InputError(f"loss.pos_weight_cap must be above 0, got {cap}")


def check_share(name: str, value: float) -> None:
    """Raise InputError unless a setting is in [0, 1)."""
    if not 0 <= value < 1:
        raise InputError(f"loss.{name} must be in [0, 1), got {value}")


def check_least(name: str, value: float, least: float = 0.0) -> None:
    """Raise InputError where a setting is below ``least``."""
    if not value >= least:
        raise InputError(f"loss.{name} must be {least:g} or more, got {value}")


def power(base: Tensor, exponent: float) -> Tensor:
    """``base ** exponent`` of numbers in [0, 1], with a finite gradient at 0."""
    if exponent == 1:
        return base
    if exponent in (2, 4):
        # Products are several times faster than a general power.
        squared = base.square()
        return squared if exponent == 2 else squared.square()
    return base.clamp(min=1e-12).pow(exponent)


def split_known(targets: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Targets (B, C) as ``dtype`` with 0 at unknown places, and the mask of the known ones.

    The mask is None where all are known. Masking costs a tenth of a linear head's step on a CPU, so
    look first; on other devices looking would wait for the device, and masking is cheap.
    """
    targets = targets.to(dtype)
    if targets.device.type == "cpu" and targets.numel() and targets.min() >= 0:
        return targets, None
    return targets.clamp(min=0), (targets >= 0).to(dtype)


def reduced(elements: Tensor, known: Tensor | None, reduction: Reduction) -> Tensor:
    """Losses of the elements (B, C) -> a scalar; what is not ``known`` counts for nothing.

    ``mean`` is over the known elements, ``sum_per_sample_mean`` over the rows with any.
    """
    if known is None:
        # The gradient of a sum, unlike that of a mean, is not written out for every element.
        total = elements.sum()
        if reduction == "mean":
            return total / elements.numel()
        return total if reduction == "sum" else total / max(len(elements), 1)
    total = (elements * known).sum()
    if reduction == "sum":
        return total
    counted = known if reduction == "mean" else known.amax(1)
    return total / counted.sum().clamp(min=1)


def best_constant(
    elements: Callable[[Tensor, Tensor], Tensor], positives: Tensor, known: Tensor
) -> Tensor:
    """The logits (C,) at which the loss of a label's training rows has no slope, float32.

    By bisection in float64, for losses that are a sum over elements.

    Args:
        elements: (logits (1, C), targets (1, C)) -> losses of the elements (1, C).
        positives: (C,) rows that have the label.
        known: (C,) rows for which it is known.
    """
    yes = (positives.double() + PRIOR_SMOOTHING)[None]
    no = (known.double() - positives.double() + PRIOR_SMOOTHING)[None]
    low, high = torch.full_like(yes, LOWEST), torch.full_like(yes, HIGHEST)
    for _ in range(64):
        middle = ((low + high) / 2).requires_grad_()
        with torch.enable_grad():
            total = yes * elements(middle, torch.ones_like(yes))
            total = total + no * elements(middle, torch.zeros_like(yes))
            (slope,) = torch.autograd.grad(total.sum(), middle)
        middle = middle.detach()
        low = torch.where(slope < 0, middle, low)
        high = torch.where(slope < 0, high, middle)
    return ((low + high) / 2)[0].float()


def best_constant_classes(objective: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    """The logits (C,) that minimise ``objective`` of them, float32; by L-BFGS in float64.

    Args:
        objective: logits (C,) -> the loss of the training rows, a scalar.
        start: (C,) logits near the minimum.
    """
    logits = start.double().clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [logits],
        max_iter=500,
        tolerance_grad=1e-10,
        tolerance_change=1e-14,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = objective(logits)
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(closure)
    found = logits.detach()
    # Only differences count in a softmax; this is the one that log-probabilities have.
    return (found - found.logsumexp(0)).float()
