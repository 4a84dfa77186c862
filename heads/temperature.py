"""One temperature per run: logits / T before sigmoid or softmax, fitted on validation rows.

Guo et al. 2017. It changes how sure the probabilities are and nothing else: no ranking, no arg-max,
no decision at 0.5.

Legend: n rows, C labels.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar
from torch import Tensor

LOWEST, HIGHEST = 1 / 50, 50.0
"""Temperatures that are looked at."""
ENOUGH = 10
"""Fewer known decisions of either outcome (rows, where there is one label per sample) fit none."""
ENTRIES = 1 << 22
"""Most logits that are looked at, of evenly spaced rows: one number needs no more."""

BLOCK_ENTRIES = 1 << 20
"""Logits of which probabilities are made together, in float64."""


def probabilities(logits: Tensor, task: str, temperature: float = 1.0) -> Tensor:
    """float32 (n, C): sigmoid per label for multilabel, softmax over labels otherwise.

    Args:
        temperature: what the logits are divided by.
    """
    out = torch.empty_like(logits, dtype=torch.float32)
    step = max(1, BLOCK_ENTRIES // max(logits.shape[1], 1))
    for i in range(0, len(logits), step):
        exact = logits[i : i + step].double() / temperature
        out[i : i + step] = exact.sigmoid() if task == "multilabel" else exact.softmax(1)
    return out


def log_loss(logits: Tensor, targets: Tensor, task: str, temperature: float = 1.0) -> float:
    """Mean of -log p of what is true, over known entries or rows, in float64; NaN without any.

    Args:
        logits: float (n, C).
        targets: multilabel int (n, C) in {-1, 0, 1}; otherwise int64 (n,), -1 unknown.
    """
    total, count = 0.0, 0
    step = max(1, ENTRIES // max(logits.shape[1], 1))
    for i in range(0, len(logits), step):
        block, known = targets[i : i + step], targets[i : i + step] >= 0
        exact = logits[i : i + step].double() / temperature
        if task == "multilabel":
            # -log p = softplus(-x) of a positive and softplus(x) of a negative.
            total += float(F.softplus(torch.where(block == 1, -exact, exact))[known].sum())
        else:
            total += float(F.cross_entropy(exact[known], block[known].long(), reduction="sum"))
        count += int(known.sum())
    return total / count if count else math.nan


def fit_temperature(logits: Tensor, targets: Tensor, task: str) -> float:
    """The temperature that fits validation data best; its log loss is never above that of 1.

    The log loss is convex in 1/T, so a bounded search along log T finds the least. Outcomes are
    smoothed as Platt (1999) does, (n + 1) / (n + 2) for n of a kind: rows that the head tells apart
    without error would otherwise ask for endless sureness. With 10,000 decisions that is nothing.

    Args:
        logits: float (n, C), any device.
        targets: multilabel int (n, C) in {-1, 0, 1}; otherwise int64 (n,); -1 is left out.

    Returns:
        1.0 where there are fewer than 10 known positives or negatives (of all labels together), or
        fewer than 10 rows of a task with one label per sample.
    """
    step = max(1, -(-logits.numel() // ENTRIES))
    logits, targets = logits[::step].double(), targets[::step]
    sharpness = _search(*(_decisions if task == "multilabel" else _classes)(logits, targets))
    if sharpness is None:
        return 1.0
    found = 1 / sharpness
    better = log_loss(logits, targets, task, found) < log_loss(logits, targets, task)
    return found if better else 1.0


def _decisions(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Known entries as choices of two: logits (m, 2) and smoothed shares (m, 2)."""
    known = targets >= 0
    x, yes = logits[known], targets[known] == 1
    positives, negatives = int(yes.sum()), int((~yes).sum())
    if min(positives, negatives) < ENOUGH:
        return None, None
    share = torch.where(yes, (positives + 1) / (positives + 2), 1 / (negatives + 2)).double()
    return torch.stack([x, torch.zeros_like(x)], 1), torch.stack([share, 1 - share], 1)


def _classes(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Known rows: logits (m, C) and smoothed shares (m, C)."""
    known = targets >= 0
    x, truth = logits[known], targets[known].long()
    if len(x) < ENOUGH or x.shape[1] < 2:
        return None, None
    rest = 1 / (len(x) + 2) / (x.shape[1] - 1)
    shares = torch.full_like(x, rest)
    return x, shares.scatter_(1, truth[:, None], (len(x) + 1) / (len(x) + 2))


def _search(logits: Tensor | None, shares: Tensor | None) -> float | None:
    """1/T with the least cross-entropy of softmax(logits / T) with shares (m, C)."""
    if logits is None or shares is None:
        return None
    # Sum of shares is 1, so the linear part needs no more than its total.
    linear = float((logits * shares).sum())

    def loss(log_sharpness: float) -> float:
        sharpness = math.exp(log_sharpness)
        blocks = logits.split(max(1, BLOCK_ENTRIES // logits.shape[1]))
        # Summed in one piece, so that the result does not depend on the blocks.
        normalisers = torch.cat([(block * sharpness).logsumexp(1) for block in blocks])
        return float(normalisers.sum()) - sharpness * linear

    bounds = (-math.log(HIGHEST), -math.log(LOWEST))
    found = minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-7})
    return float(np.exp(found.x))
