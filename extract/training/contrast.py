"""The contrastive loss of CLIP over the pairs that are valid.

Legend: N pairs in a batch (of all processes), R rows of it, D features.

Radford et al. 2021 (arXiv:2103.00020): S = s F G^T of normalised features, cross-entropy of every
row and of every column with its own pair as the target, both means averaged. With more than one
right answer the target is spread evenly over them; what is neither right nor wrong is left out of
the sum that an answer is compared with; rows and columns without a right answer add nothing, and
where there are none at all the loss is 0 with gradients of 0, not NaN.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mmc.store.errors import InputError

LARGEST_SCALE = math.log(100)
"""CLIP's limit of the inverse temperature's logarithm: a larger one made its training unstable."""


@dataclass(frozen=True)
class PairMask:
    """Which picture belongs to which text: pictures are rows, texts are columns."""

    positives: Tensor
    """(N, N) bool: they belong together."""
    counted: Tensor
    """(N, N) bool: they are compared; positives are, the others are negatives."""

    @classmethod
    def of(
        cls,
        valid: Tensor,
        *,
        same: Tensor | None = None,
        groups: Tensor | None = None,
        rule: str = "own",
    ) -> "PairMask":
        """The mask of N samples.

        Args:
            valid: (N,) bool: the row's picture and text are there and belong together. A row that
                is not valid is nobody's negative either.
            same: (N, K) int64: contents of each row. Rows that share one (the same picture, the
                same text) are not negatives of each other: the pair would be right.
            groups: (N,) int64 class of each row, -1 = none.
            rule: what rows of one class are to each other: ``own`` nothing, ``positives``,
                ``exclude`` neither positives nor negatives.
        """
        own = torch.eye(len(valid), dtype=torch.bool, device=valid.device)
        both = valid[:, None] & valid[None, :]
        alike = torch.zeros_like(own)
        if groups is not None and rule != "own":
            alike = (groups[:, None] == groups[None, :]) & (groups[:, None] >= 0)
        repeated = torch.zeros_like(own)
        for content in () if same is None else same.T:
            repeated |= content[:, None] == content[None, :]
        positives = both & ((own | alike) if rule == "positives" else own)
        left_out = repeated | alike
        return cls(positives, positives | (both & ~left_out))


def contrastive_loss(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    mask: PairMask | Tensor | None = None,
    rows: slice | None = None,
) -> Tensor:
    """The loss of N pairs, a scalar.

    Args:
        image: (N, D) float, normalised; row i of ``image`` and of ``text`` is a pair.
        text: (N, D) float, normalised.
        scale: scalar, the inverse temperature itself (not its logarithm).
        mask: which pairs are valid, (N, N) bool where it is a tensor: what is not valid is a
            negative then. None: each with its own, CLIP's loss.
        rows: the share of the loss that belongs to these rows and columns; shares of all rows sum
            to the loss, as their gradients do.

    Raises:
        InputError: shapes that do not fit.
    """
    if image.ndim != 2 or image.shape != text.shape:
        raise InputError(
            f"pairs need as many pictures as texts, of one width; got {tuple(image.shape)} and "
            f"{tuple(text.shape)}"
        )
    if mask is None:
        mask = PairMask.of(torch.ones(len(image), dtype=torch.bool, device=image.device))
    elif isinstance(mask, Tensor):
        mask = PairMask(mask.bool(), torch.ones_like(mask, dtype=torch.bool))
    for part in (mask.positives, mask.counted):
        if part.shape != (len(image), len(image)):
            raise InputError(
                f"the pair mask is {tuple(part.shape)}, {len(image)} pairs need "
                f"({len(image)}, {len(image)})"
            )
    here = slice(0, len(image)) if rows is None else rows
    positives, counted = mask.positives, mask.counted
    total = image.new_zeros(())
    for queries, keys, right, seen in (
        (image, text, positives, counted),
        (text, image, positives.T, counted.T),
    ):
        losses = _row_losses(scale * queries[here] @ keys.T, right[here], seen[here])
        total = total + losses.sum() / right.any(1).sum().clamp(min=1)
    return total / 2


def _row_losses(logits: Tensor, positives: Tensor, counted: Tensor) -> Tensor:
    """(R,) cross-entropy of rows (R, N) with their positives; 0 where there is none."""
    some = positives.any(1, keepdim=True)
    # A row of nothing but -inf would be NaN, in its gradient too.
    logits = logits.masked_fill(~counted & some, -torch.inf).masked_fill(~some, 0.0)
    shares = positives.to(logits.dtype) / positives.sum(1, keepdim=True).clamp(min=1)
    return -torch.where(positives, shares * logits.log_softmax(1), 0.0).sum(1)
