"""Precision, recall and F1 averaged over labels, as papers on multi-label images report them.

Legend: N rows, C labels. Definitions of ML-GCN (Chen et al. 2019); CF1 is the F1 of the averaged
precision and recall, which is not the macro-F1.
"""

import math

import torch
from torch import Tensor

from mmc.heads.ranking import CHUNK_ENTRIES, top_k_mask


def averaged(tp: Tensor, predicted: Tensor, true: Tensor) -> dict[str, float]:
    """Per-class (C) and overall (O) precision, recall and F1 from counts (C,) of each label.

    Classes without positives are left out of the averages.
    """
    with_true = true > 0
    cp = mean((tp / predicted.clamp(min=1))[with_true])
    cr = mean((tp / true.clamp(min=1))[with_true])
    op = ratio(tp.sum(), predicted.sum())
    recall = ratio(tp.sum(), true.sum())
    return {
        "CP": cp,
        "CR": cr,
        "CF1": ratio(2 * cp * cr, cp + cr),
        "OP": op,
        "OR": recall,
        "OF1": ratio(2 * op * recall, op + recall),
    }


def top_k_averaged(logits: Tensor, targets: Tensor, k: int) -> dict[str, float]:
    """`averaged` where a row gets at most its ``k`` best labels, and only those with logit >= 0.

    Unlike `mmc.heads.ranking.top_k_f1` a row may get fewer than ``k``, or none. Unknown entries
    take no place; rows without any known entry are left out.
    """
    zeros = torch.zeros(logits.shape[1], dtype=torch.float64, device=logits.device)
    tp, predicted, true = zeros.clone(), zeros.clone(), zeros.clone()
    step = max(1, CHUNK_ENTRIES // max(logits.shape[1], 1))
    for i in range(0, len(logits), step):
        truth, scores = targets[i : i + step], logits[i : i + step]
        masked = torch.where(truth >= 0, scores, -torch.inf)
        chosen = top_k_mask(masked, k) & (masked >= 0)
        tp += (chosen & (truth == 1)).sum(0)
        predicted += chosen.sum(0)
        true += (truth == 1).sum(0)
    return averaged(tp, predicted, true)


def mean(values: Tensor) -> float:
    """Mean of the values that are defined; NaN when none is."""
    values = values[~values.isnan()]
    return float(values.mean()) if len(values) else math.nan


def ratio(part: Tensor | float, whole: Tensor | float) -> float:
    """0 when there is nothing to divide by (scikit-learn's ``zero_division=0``)."""
    return float(part) / float(whole) if float(whole) > 0 else 0.0
