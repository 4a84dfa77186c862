"""Labels that are known by their texts: any label that has one can be scored.

Shapes: B samples, C labels, M labels of a training step, W width of a label text, D of a head.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

OUT = -1e4
"""Logit of a label that a training step leaves out; finite, so that no loss makes NaN of it."""


class LabelTexts(nn.Module):
    """The texts of a head's labels, of unit length, and their priors, the constant answers.

    The prior of a label that the head was not trained on is the mean of those that it was.
    """

    text: Tensor
    prior: Tensor

    def __init__(self, num_labels: int, width: int, label_text: Tensor | None) -> None:
        super().__init__()
        self.given = label_text is not None
        if label_text is None:
            label_text = torch.zeros(num_labels, width)
        self.register_buffer("text", F.normalize(label_text.float(), dim=-1))
        self.register_buffer("prior", torch.zeros(num_labels))

    def set_width(self, width: int) -> None:
        """Make room for texts of another width (a saved head tells its own)."""
        self.text = self.text.new_zeros(len(self.text), width)

    def choose(self, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """Texts (M, W) and priors (M,) of ``labels``, ascending; None: all."""
        if labels is None:
            return self.text, self.prior
        return self.text[labels], self.prior[labels]

    def spread(self, logits_BM: Tensor, labels: Tensor | None) -> Tensor:
        """Logits of ``labels`` at their places among all (B, C)."""
        if labels is None:
            return logits_BM
        full = logits_BM.new_full((len(logits_BM), len(self.prior)), OUT)
        return full.index_copy(1, labels, logits_BM)

    def other(self, label_text: Tensor, same: Tensor) -> dict[str, Tensor]:
        """This module's state for other labels; see `Head.for_labels`."""
        prior = torch.where(same >= 0, self.prior[same.clamp(min=0)], self.prior.mean())
        return {"text": F.normalize(label_text.to(self.text), dim=-1), "prior": prior}


def selective(targets: Tensor, num_labels: int, budget: int) -> Tensor | None:
    """Selective language supervision: the labels (M,) that a training step is about, ascending.

    All labels that are positive in the batch, and others at random up to the budget. Where the
    positives alone are more, a random part of them that leaves each sample one; M exceeds the
    budget only where that takes it. Several processes choose the same labels, for the positives of
    them all. After ADDS (Xu et al. 2022, arXiv:2208.09562), which names the idea; the algorithm is
    ours.

    Args:
        targets: (B, C) with 1 for positives, or int64 (B,), -1 for unknown.
        budget: most labels; 0 = all.

    Returns:
        None where all labels are within the budget.
    """
    if not budget or num_labels <= budget:
        return None
    if targets.ndim == 1:
        positive = F.one_hot(targets.clamp(min=0), num_labels).bool() & (targets >= 0)[:, None]
    else:
        positive = targets > 0
    urgency = torch.rand(num_labels, device=targets.device)
    present = positive.any(0)
    if _several():
        dist.broadcast(urgency, 0)
        present = _anywhere(present)
    # What samples keep is what they share: each the one of its positives that is most urgent.
    kept = torch.where(positive, urgency, -1.0).argmax(1)[positive.any(1)]
    must = torch.zeros_like(present).index_fill(0, kept, True)
    if _several():
        must = _anywhere(must)
    urgency = urgency + present.float() + must.float()
    count = max(budget, int(must.sum()))
    return urgency.topk(count).indices.sort().values


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _anywhere(flags: Tensor) -> Tensor:
    """Where any process has True."""
    numbers = flags.int()
    dist.all_reduce(numbers, dist.ReduceOp.MAX)
    return numbers.bool()
