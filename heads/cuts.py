"""The search for the best thresholds on given rows: one for all labels, or one for each.

Legend: N rows, C labels, K candidate thresholds ("cuts"), P positives of the label that has most.
Scores are probabilities (N, C), -1 where unknown; truth is int8 (N, C) in {0, 1}.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mmc.heads.ranking import sort_rows, sorted_positives

LOWEST, HIGHEST = 0.01, 0.99
DEFAULT = 0.5
# With more distinct scores a common threshold is searched on a grid of 0.001 instead; with many
# more scores they are not even counted.
MAX_CUTS, MAX_SCORES = 2048, 1 << 20
# Objectives that differ by less are a tie (float64 sums in another order).
TIE = 1e-12
ASCENT_ROUNDS = 5
BLOCK_ENTRIES = 1 << 20
"""Scores that are looked at together, at least those of one label; each takes up to 60 bytes."""


def columns(rows: int, labels: int) -> Iterator[slice]:
    """The labels of (rows, labels) in blocks."""
    step = max(1, BLOCK_ENTRIES // max(rows, 1))
    return (slice(start, start + step) for start in range(0, labels, step))


def common(scores: Tensor, truth: Tensor, objective: str, *, binary: bool) -> Tensor:
    """The one threshold with the best objective, the nearest to 0.5 on a tie: float64 ()."""
    cuts = _candidates(scores)
    if binary:
        values = _binary_curve(_reached(cuts, scores), truth, len(cuts), objective)
    elif objective == "samples":
        values = _samples_curve(scores, _reached(cuts, scores), truth, len(cuts))
    else:
        values = _pooled_curve(scores, truth, cuts, objective)
    best = values >= values.max() - TIE
    distance = torch.where(best, (cuts - DEFAULT).abs(), torch.inf)
    return cuts[distance.argmin()]


def per_label(scores: Tensor, truth: Tensor, objective: str, near: Tensor) -> Tensor:
    """The best threshold of every label, float64 (C,); on a tie the nearest to ``near`` (C,).

    macro: each label's own F1. micro: the exact optimum over all combinations. samples: coordinate
    ascent from ``near``.
    """
    if objective == "samples":
        return _samples_ascent(scores, truth, near)
    # Labels with about as many positives together: a block has a cut for each of the most of one.
    order = positives(truth).argsort(stable=True)
    blocks = [order[part] for part in columns(*scores.shape)]
    sweeps = [_Sweep(scores[:, block], truth[:, block], near[block]) for block in blocks]
    best = _macro_optimum(sweeps) if objective == "macro" else _micro_optimum(sweeps)
    found = torch.empty_like(near)
    for block, sweep, place in zip(blocks, sweeps, best, strict=True):
        found[block] = sweep.at(sweep.cuts, place)
    return found


def positives(truth: Tensor) -> Tensor:
    """How many rows have each label: float64 (C,)."""
    counts = truth.new_zeros(truth.shape[1], dtype=torch.float64)
    for part in columns(*truth.shape):
        counts[part] = truth[:, part].sum(0, dtype=torch.float64)
    return counts


# -- one threshold ---------------------------------------------------------------------------------


def _candidates(scores: Tensor) -> Tensor:
    """Thresholds worth trying, ascending: between every two scores, or a fine grid; and 0.5."""
    grid = torch.linspace(LOWEST, HIGHEST, 981, dtype=torch.float64, device=scores.device)
    if scores.numel() > MAX_SCORES:
        return grid
    values = _distinct(scores.double())
    values = values[values >= 0]
    if len(values) > MAX_CUTS:
        return grid
    edges = torch.cat([values.new_zeros(1), values, values.new_ones(1)])
    middles = ((edges[:-1] + edges[1:]) / 2).clamp(LOWEST, HIGHEST)
    return _distinct(torch.cat([middles, middles.new_full((1,), DEFAULT)]))


def _distinct(values: Tensor) -> Tensor:
    distinct: Tensor = torch.unique(values, sorted=True)
    return distinct


def _reached(cuts: Tensor, scores: Tensor) -> Tensor:
    """How many of the cuts each score reaches: it is predicted at cuts 0 .. reached - 1."""
    return torch.searchsorted(cuts, scores.double().contiguous(), right=True)


def _counts_at_cuts(reached: Tensor, num_cuts: int) -> Tensor:
    """How many entries of each column of (N, G) are predicted at every cut: float64 (G, K)."""
    groups = reached.shape[1]
    places = reached + torch.arange(groups, device=reached.device) * (num_cuts + 1)
    counts = torch.bincount(places.reshape(-1), minlength=groups * (num_cuts + 1))
    return counts.view(groups, -1).flip(1).cumsum(1).flip(1)[:, 1:].double()


def _pooled_curve(scores: Tensor, truth: Tensor, cuts: Tensor, objective: str) -> Tensor:
    """micro or macro F1 (K,) of every common threshold."""
    parts: list[Tensor] = []
    hits = size = true = scores.new_zeros((), dtype=torch.float64)
    for part in columns(max(len(scores), len(cuts)), scores.shape[1]):
        reached, own = _reached(cuts, scores[:, part]), truth[:, part]
        # A false entry goes where it is never predicted.
        hits_GK = _counts_at_cuts(torch.where(own == 1, reached, 0), len(cuts))
        size_GK = _counts_at_cuts(reached, len(cuts))
        true_G = own.sum(0, dtype=torch.float64)[:, None]
        if objective == "micro":
            hits, size, true = hits + hits_GK.sum(0), size + size_GK.sum(0), true + true_G.sum()
        else:
            parts.append(2 * hits_GK / (size_GK + true_G).clamp(min=1))
    if objective == "micro":
        return 2 * hits / (size + true).clamp(min=1)
    return torch.cat(parts).mean(0)


def _samples_curve(scores: Tensor, reached: Tensor, truth: Tensor, num_cuts: int) -> Tensor:
    """samples-F1 (K,) of every common threshold.

    A row's labels are added from the most probable down; each changes the row's F1 by a step that
    holds at every cut that its score reaches.
    """
    order = scores.argsort(dim=1, descending=True)
    tp = truth.gather(1, order).cumsum(1, dtype=torch.float64)
    size = torch.arange(1, scores.shape[1] + 1, dtype=torch.float64, device=scores.device)
    f1 = 2 * tp / (size + tp[:, -1:])
    steps = f1.diff(dim=1, prepend=f1.new_zeros(len(f1), 1))
    places = reached.gather(1, order).reshape(-1)
    gained = torch.bincount(places, weights=steps.reshape(-1), minlength=num_cuts + 1)
    return gained.flip(0).cumsum(0).flip(0)[1:] / len(scores)


def _binary_curve(reached: Tensor, truth: Tensor, num_cuts: int, objective: str) -> Tensor:
    """Accuracy, or for macro the mean F1 of both classes, (K,) of thresholds on the second."""
    n, positives = len(truth), float(truth.sum())
    tp = _counts_at_cuts(torch.where(truth == 1, reached, 0), num_cuts)[0]
    predicted = _counts_at_cuts(reached, num_cuts)[0]
    tn = n - positives - (predicted - tp)
    if objective != "macro":
        return (tp + tn) / n
    yes = 2 * tp / (predicted + positives).clamp(min=1)
    no = 2 * tn / (2 * n - predicted - positives).clamp(min=1)
    return (yes + no) / 2


# -- one per label ---------------------------------------------------------------------------------


class _Sweep:
    """The cuts of every label that can be best, (C, K) with K = P + 2.

    For given hits the fewest predictions are best, so a cut lies just below a positive; and there
    are the two ends of what is allowed.
    """

    def __init__(self, scores: Tensor, truth: Tensor, near: Tensor) -> None:
        columns, yes = scores.T, truth.T
        n = len(scores)
        ranked = sort_rows(columns)
        positive, counts = sorted_positives(columns, yes)
        ends = torch.tensor([LOWEST, HIGHEST], dtype=torch.float64, device=scores.device)
        ends = ends.expand(len(counts), 2)
        # Compared in float64, as decisions are.
        ranked, positive = ranked.double(), positive.double()
        looked_up = torch.cat([positive, ends], 1)
        below = torch.searchsorted(ranked, looked_up)
        self.positives = counts.double()
        self.size = (n - below).double()
        hits = counts[:, None] - torch.searchsorted(positive, looked_up)
        self.tp = hits.clamp(min=0).double()
        under = ranked.gather(1, (below - 1).clamp(min=0)).clamp(min=0)
        under = torch.where(below > 0, under, 0.0)
        self.cuts = ((looked_up + under) / 2).clamp(LOWEST, HIGHEST)
        # Outside [LOWEST, HIGHEST] no threshold may separate the two neighbours.
        self.valid = (self.cuts <= looked_up) & (self.cuts > under) & looked_up.isfinite()
        self.cuts[:, -2:], self.valid[:, -2:] = ends, True
        self.distance = (self.cuts - near[:, None]).abs()

    def best(self, values: Tensor) -> Tensor:
        """Place (C,) of the largest value (C, K) among valid cuts, the nearest on a tie."""
        values = torch.where(self.valid, values, -torch.inf)
        tied = values >= values.max(1, keepdim=True).values - TIE
        return torch.where(tied, self.distance, torch.inf).argmin(1)

    @staticmethod
    def at(values: Tensor, places: Tensor) -> Tensor:
        """values (C, K) at places (C,)."""
        return values.gather(1, places[:, None])[:, 0]


def _macro_optimum(sweeps: Sequence[_Sweep]) -> list[Tensor]:
    """Places (G,) of the cuts with the best F1 of each label, block by block."""
    return [
        sweep.best(2 * sweep.tp / (sweep.size + sweep.positives[:, None]).clamp(min=1))
        for sweep in sweeps
    ]


def _micro_optimum(sweeps: Sequence[_Sweep]) -> list[Tensor]:
    """Places (G,) that maximise micro-F1 over all combinations of cuts (Dinkelbach's iteration).

    With F the value reached so far, each label takes the cut with the largest 2 TP - F * size;
    F rises until it is the optimum, in a handful of rounds.
    """
    total = torch.stack([sweep.positives.sum() for sweep in sweeps]).sum()
    value = torch.zeros_like(total)
    while True:
        best = [sweep.best(2 * sweep.tp - value * sweep.size) for sweep in sweeps]
        size, tp = total * 0, total * 0
        for sweep, place in zip(sweeps, best, strict=True):
            size = size + sweep.at(sweep.size, place).sum()
            tp = tp + sweep.at(sweep.tp, place).sum()
        reached = 2 * tp / (size + total).clamp(min=1)
        if reached <= value + TIE:
            return best
        value = reached


def _samples_ascent(scores: Tensor, truth: Tensor, near: Tensor) -> Tensor:
    """Thresholds (C,) by coordinate ascent on samples-F1, one label at a time, from ``near``."""
    cuts = near.clone()
    chosen = scores >= cuts
    yes = truth == 1
    tp, size = (chosen & yes).sum(1).double(), (chosen.sum(1) + yes.sum(1)).double()
    for _ in range(ASCENT_ROUNDS):
        moved = False
        for label in range(scores.shape[1]):
            hit, on = yes[:, label].double(), chosen[:, label].double()
            rest_tp, rest_size = tp - on * hit, size - on
            without = 2 * rest_tp / rest_size.clamp(min=1)
            gain = 2 * (rest_tp + hit) / (rest_size + 1) - without
            found, total = _best_prefix(scores[:, label], gain, near[label])
            if total <= (gain * on).sum() + TIE:
                continue
            cuts[label] = found
            chosen[:, label] = scores[:, label] >= found
            on = chosen[:, label].double()
            tp, size, moved = rest_tp + on * hit, rest_size + on, True
        if not moved:
            break
    return cuts


def _best_prefix(scores: Tensor, gain: Tensor, near: Tensor) -> tuple[Tensor, Tensor]:
    """The cut of scores (N,) above which the gains (N,) sum to most, and that sum."""
    ranked, order = scores.double().sort(descending=True)
    totals = torch.cat([gain.new_zeros(1), gain[order].cumsum(0)])
    above = torch.cat([ranked.new_ones(1), ranked])
    below = torch.cat([ranked, ranked.new_zeros(1)]).clamp(min=0)
    cuts = ((above + below) / 2).clamp(LOWEST, HIGHEST)
    # Not within a block of equal scores, and reachable; what 0.5 predicts always is.
    totals = torch.where((cuts <= above) & (cuts > below), totals, -torch.inf)
    tied = totals >= totals.max() - TIE
    best = torch.where(tied, (cuts - near).abs(), torch.inf).argmin()
    return cuts[best], totals[best]
