"""Ranking metrics, tie-aware and vectorised over labels: average precision, AUROC, top-k.

Legend: G groups (labels), N rows, C labels. Scores are logits: saturated probabilities tie.
Targets are int8 in {-1, 0, 1}; -1 is unknown and left out.
"""

from typing import NamedTuple

import torch
from torch import Tensor

# Entries ranked at once; a chunk needs about 60 bytes for each.
CHUNK_ENTRIES = 1 << 22
# Micro-AUROC sorts every entry of the score matrix at once up to here, and bins them beyond.
EXACT_ENTRIES = 1 << 27
BINS = 1 << 20


class Ranking(NamedTuple):
    """Per label, float64 (C,); NaN where it is not defined."""

    ap: Tensor
    """Average precision; NaN without positives."""
    auroc: Tensor
    """Area under the ROC curve; NaN unless both values occur."""
    positives: Tensor
    known: Tensor


def rank_labels(scores: Tensor, targets: Tensor) -> Ranking:
    """Average precision and AUROC of every label from scores (N, C) and targets (N, C)."""
    n, num_labels = scores.shape
    step = max(1, CHUNK_ENTRIES // max(n, 1))
    parts = [
        _rank_groups(scores[:, i : i + step].T, targets[:, i : i + step].T)
        for i in range(0, num_labels, step)
    ]
    return Ranking(*(torch.cat(column) for column in zip(*parts, strict=True)))


def micro_auroc(scores: Tensor, targets: Tensor) -> float:
    """AUROC over all entries of (N, C) at once; NaN unless both values occur.

    Above 2^27 entries scores are binned into 2^20 equal-width bins and a bin counts as a tie.
    """
    if scores.numel() <= EXACT_ENTRIES:
        return float(_rank_groups(scores.reshape(1, -1), targets.reshape(1, -1)).auroc)
    low, high = float(scores.min()), float(scores.max())
    counts = torch.zeros(2, BINS, dtype=torch.float64, device=scores.device)
    for i in range(0, len(scores), max(1, CHUNK_ENTRIES // scores.shape[1])):
        block = slice(i, i + max(1, CHUNK_ENTRIES // scores.shape[1]))
        bins = ((scores[block].double() - low) / max(high - low, 1e-300) * BINS).long()
        for value in (0, 1):
            chosen = bins[targets[block] == value].clamp(max=BINS - 1)
            counts[value] += torch.bincount(chosen, minlength=BINS)
    negatives, positives = counts
    pairs = negatives.sum() * positives.sum()
    below = negatives.cumsum(0) - negatives / 2
    return float((positives * below).sum() / pairs)


def auroc_interval(
    scores: Tensor, targets: Tensor, *, seed: int = 0, level: float = 0.95, resamples: int = 1000
) -> tuple[float, float]:
    """Bootstrap interval of the AUROC of scores (N,), resampled within each class (percentiles).

    Fewer resamples (never under 100) are drawn above 50,000 rows, where the interval is narrow.
    NaN unless both values occur.
    """
    # On the CPU: the same seed gives the same interval on every device.
    scores, targets = scores.cpu().double(), targets.cpu()
    values = [scores[targets == value] for value in (0, 1)]
    if not all(len(v) for v in values):
        return float("nan"), float("nan")
    distinct, place = torch.unique(torch.cat(values), return_inverse=True)
    places = place.split([len(v) for v in values])
    total, generator = sum(len(v) for v in values), torch.Generator().manual_seed(seed)
    resamples = min(resamples, max(100, 50_000_000 // total))
    step, areas = max(1, CHUNK_ENTRIES // total), []
    for i in range(0, resamples, step):
        rounds = min(step, resamples - i)
        negatives, positives = (_resample(p, rounds, len(distinct), generator) for p in places)
        below = negatives.cumsum(1) - negatives / 2
        areas.append((positives * below).sum(1) / (len(values[0]) * len(values[1])))
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = torch.cat(areas).quantile(tails).tolist()
    return low, high


def _resample(places: Tensor, rounds: int, num_values: int, generator: torch.Generator) -> Tensor:
    """Draw as many of ``places`` (n,) as there are, with replacement: counts (rounds, values)."""
    drawn = places[torch.randint(len(places), (rounds, len(places)), generator=generator)]
    drawn += torch.arange(rounds)[:, None] * num_values
    counts = torch.bincount(drawn.flatten(), minlength=rounds * num_values)
    return counts.view(rounds, num_values).double()


def top_k_mask(scores: Tensor, k: int) -> Tensor:
    """The k best-scored labels of each row: bool (n, C) with exactly min(k, C) set."""
    best = scores.topk(min(k, scores.shape[1]), dim=1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, best, True)


def top_k_f1(scores: Tensor, targets: Tensor, k: int) -> dict[str, float]:
    """NUS-WIDE protocol: exactly k labels per row, no threshold, counts summed over all rows.

    ``oracle_f1`` is what a perfect ranking reaches; it is below 1 unless every row has k labels.
    Unknown entries count as absent; rows without any known entry are left out.
    """
    rows = (targets >= 0).any(1)
    yes = targets[rows] == 1
    # An unknown entry must not take one of the k places.
    masked = torch.where(targets[rows] >= 0, scores[rows], -torch.inf)
    k = min(k, scores.shape[1])
    predicted = float(k * len(yes))
    truth = float(yes.sum())
    hits = float((top_k_mask(masked, k) & yes).sum())
    best = float(yes.sum(1).clamp(max=k).sum())
    return {
        "precision": hits / max(predicted, 1),
        "recall": hits / max(truth, 1),
        "f1": 2 * hits / max(predicted + truth, 1),
        "oracle_f1": 2 * best / max(predicted + truth, 1),
    }


def _rank_groups(scores: Tensor, targets: Tensor) -> Ranking:
    """`Ranking` of groups given as rows: scores (G, N), targets (G, N).

    Precision and the ROC curve are read only at the end of each block of equal scores, so the
    order within a block does not matter.
    """
    if scores.shape[1] == 0:
        nothing = scores.new_full((len(scores),), torch.nan, dtype=torch.float64)
        return Ranking(nothing, nothing, torch.zeros_like(nothing), torch.zeros_like(nothing))
    # Unknown entries form the last block and add to neither count.
    scores = torch.where(targets >= 0, scores, -torch.inf)
    scores, order = scores.sort(dim=1, descending=True)
    hits = targets.gather(1, order)
    tp = (hits == 1).cumsum(1, dtype=torch.float64)
    fp = (hits == 0).cumsum(1, dtype=torch.float64)
    last = torch.ones_like(hits, dtype=torch.bool)
    last[:, :-1] = scores[:, 1:] != scores[:, :-1]
    new_tp, new_fp = _since_last(tp, last), _since_last(fp, last)
    positives, negatives = tp[:, -1], fp[:, -1]
    ap = (new_tp * tp / (tp + fp).clamp(min=1)).sum(1) / positives
    auroc = (new_fp * (tp - new_tp / 2)).sum(1) / (positives * negatives)
    return Ranking(ap, auroc, positives, positives + negatives)


def _since_last(counts: Tensor, last: Tensor) -> Tensor:
    """Running counts (G, N) -> what each block added, at its last entry; 0 elsewhere."""
    at_ends = torch.where(last, counts, 0.0)
    before = torch.zeros_like(counts)
    before[:, 1:] = at_ends.cummax(1).values[:, :-1]
    return torch.where(last, counts - before, 0.0)
